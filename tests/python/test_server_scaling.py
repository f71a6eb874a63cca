"""A scaling factor on a real server: GLM-4.x, whose block multiplies by it on some paths only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import server
from test_server import WITHOUT_CACHE, ask_oracle, check_same, teacher_forced, tolerance

pytestmark = pytest.mark.server

FACTOR = 2.5


@dataclass(frozen=True)
class Glm4Moe(models.TinyModel):
    """Adds the bias of the router's choice."""

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from super().shapes()
        for layer in self.moe_layers:
            yield f"model.layers.{layer}.mlp.gate.e_score_correction_bias", (self.num_experts,)


GLM4_MOE = Glm4Moe(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    num_layers=3,
    extra={
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 512,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": FACTOR,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "attention_bias": False,
    },
)


def test_factor_is_applied_once(tmp_path: Path) -> None:
    """Half of the experts computed for the device, half for the CPU: what plain SGLang computes."""
    tensors = models.random_tensors(GLM4_MOE)
    down = {GLM4_MOE.expert_names(layer, e)[2] for layer in GLM4_MOE.moe_layers for e in range(GLM4_MOE.num_experts)}
    unscaled = {name: tensor / FACTOR if name in down else tensor for name, tensor in tensors.items()}
    oracle = ask_oracle(GLM4_MOE, tmp_path, {"BF16": tensors, "unscaled": unscaled})
    flags = ["--kt-weight-path", str(tmp_path / "BF16"), "--kt-method", "BF16", "--kt-num-gpu-experts", "4"]
    with server.serve(tmp_path / "BF16", [*flags, *WITHOUT_CACHE], log_path=tmp_path / "kt.log") as running:
        found = teacher_forced(running)
    allowed = tolerance(GLM4_MOE, "BF16")
    check_same(found, oracle.logprobs["BF16"], allowed)
    with pytest.raises(AssertionError):
        check_same(oracle.logprobs["unscaled"], oracle.logprobs["BF16"], allowed)

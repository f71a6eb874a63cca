"""Activations and biases of experts: against SGLang's and transformers' formulas, in the layer, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import Experts, config_of, random_experts, write_checkpoint
from reference import BOUNDS, moe_reference, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, silu
from wrapper_cases import INNER, E, H, K, batch, make

from kt_kernel import HybridMoE
from kt_kernel.activations import ACTIVATIONS, Activation
from kt_kernel.checkpoint import model_activation
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.converter import ConvertOptions, convert
from kt_kernel.experts import CpuExperts, get_engine
from kt_kernel.integrations.torchvision_repair import repair_torchvision
from kt_kernel.methods import get_method

ENGINE = EngineConfig(num_threads=2, num_nodes=1)
GPT_OSS = Activation("silu", 3.0, 1.702)
CASES = [
    Activation(),
    Activation("silu", 2.0),
    GPT_OSS,
    Activation("silu", 0.0, 0.5),
    Activation("silu_then_limit", 2.0),
    Activation("gelu"),
    Activation("gelu_tanh"),
]
SCALE = 4.0  # of the inputs: gate and up have a standard deviation of about 3, so that limits of 2 and 3 are met


@pytest.fixture(scope="module")
def experts() -> Experts:
    return random_experts(E, H, INNER)


@pytest.fixture(scope="module")
def biases() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return tuple(torch.randn(E, size, generator=generator) for size in (INNER, INNER, H))  # type: ignore[return-value]


def inputs(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    hidden, ids, weights = batch(tokens)
    return (hidden * SCALE).to(dtype), ids, weights


def loaded(experts: Experts, method: str, activation: Activation) -> CpuExperts:
    config = MoEConfig(3, E, K, H, INNER, activation)
    layer = CpuExperts(config, layouts=(get_method(method).layout,) * 2, engine=get_engine(ENGINE))
    layer.load_experts(range(E), *(list(stack) for stack in experts))
    return layer


def load_biases(layer: CpuExperts, biases: tuple[Tensor, Tensor, Tensor]) -> None:
    layer.load_biases(range(E), *(list(stack) for stack in biases))


# --- formulas ---


def test_formulas_are_those_of_sglang() -> None:
    repair_torchvision()
    from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import swiglu_limit_func
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 6
    gate, up = x.chunk(2, dim=1)
    with torch.compiler.set_stance("force_eager"):
        with_alpha = fused_moe.swiglu_no_interleaved_with_alpha_and_limit(x, 1.702, 7.0)
        limit_after = fused_moe._swiglu_silu_clamp_mul(x, 7.0)
    limit_before = torch.empty_like(gate)
    swiglu_limit_func(limit_before, x, 7.0)
    assert torch.allclose(Activation("silu", 7.0, 1.702)(gate, up), with_alpha)
    assert torch.allclose(Activation("silu_then_limit", 7.0)(gate, up), limit_after)
    assert torch.allclose(Activation("silu", 7.0)(gate, up), limit_before)
    assert not torch.allclose(limit_before, limit_after)


# --- the layer ---


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("method", list(BOUNDS))
@pytest.mark.parametrize("activation", CASES, ids=str)
def test_the_layer_equals_the_formula(
    experts: Experts, biases: tuple, activation: Activation, method: str, biased: bool
) -> None:
    layer = loaded(experts, method, activation)
    if biased:
        load_biases(layer, biases)
    for tokens in (1, 37):
        hidden, ids, weights = inputs(tokens)
        wanted = moe_reference(hidden, ids, weights, *experts, act=activation, biases=biases if biased else None)
        # one fifth more for a single token, whose rows need not be as typical as the bounds take them to be
        bound = BOUNDS[method] * (1.2 if tokens == 1 else 1)
        assert relative_error(layer.forward(hidden, ids, weights), wanted) < bound


def clamp(x: Tensor, limit: float) -> Tensor:
    return x.clamp(-limit, limit)


FAULTS: list[tuple[str, Activation, Callable[[Tensor, Tensor], Tensor]]] = [
    ("no limit", Activation("silu", 2.0), lambda g, u: silu(g) * u),
    ("no limit of up", Activation("silu", 2.0), lambda g, u: silu(g.clamp(max=2)) * u),
    ("no lower limit of up", Activation("silu", 2.0), lambda g, u: silu(g.clamp(max=2)) * u.clamp(max=2)),
    ("no limit of gate", Activation("silu", 2.0), lambda g, u: silu(g) * clamp(u, 2)),
    ("silu before the limit", Activation("silu", 2.0), lambda g, u: silu(g).clamp(max=2) * clamp(u, 2)),
    ("silu behind the limit", Activation("silu_then_limit", 2.0), lambda g, u: silu(g.clamp(max=2)) * clamp(u, 2)),
    ("no alpha", GPT_OSS, lambda g, u: silu(g.clamp(max=3)) * (clamp(u, 3) + 1)),
    ("alpha outside", GPT_OSS, lambda g, u: 1.702 * silu(g.clamp(max=3)) * (clamp(u, 3) + 1)),
    ("alpha twice", GPT_OSS, lambda g, u: silu(1.702 * g.clamp(max=3)) * (clamp(u, 3) + 1)),
    ("no + 1", GPT_OSS, lambda g, u: g.clamp(max=3) * torch.sigmoid(1.702 * g.clamp(max=3)) * clamp(u, 3)),
    ("gelu of up", Activation("gelu"), lambda g, u: g * gelu(u)),
    ("silu for gelu", Activation("gelu_tanh"), lambda g, u: silu(g) * u),
]


@pytest.mark.parametrize(("what", "activation", "wrong"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_the_bound_tells_wrong_formulas(experts: Experts, what: str, activation: Activation, wrong: Callable) -> None:
    hidden, ids, weights = inputs(37)
    found = loaded(experts, "AMXINT8", activation).forward(hidden, ids, weights)
    assert relative_error(found, moe_reference(hidden, ids, weights, *experts, act=wrong)) > BOUNDS["AMXINT8"], what


def test_the_bound_tells_wrong_biases(experts: Experts, biases: tuple) -> None:
    layer = loaded(experts, "AMXINT8", GPT_OSS)
    load_biases(layer, biases)
    hidden, ids, weights = inputs(37)
    found = layer.forward(hidden, ids, weights)

    def error(*own: Tensor, rest: Tensor | float = 0) -> float:
        return relative_error(found, moe_reference(hidden, ids, weights, *experts, act=GPT_OSS, biases=own) + rest)

    gate, up, down = biases
    nothing = torch.zeros_like(down)
    assert error(gate, up, down) < BOUNDS["AMXINT8"]
    added_once = down[ids].double().sum(dim=1)
    twice = (down[ids].double() * weights[..., None].double() ** 2).sum(dim=1)
    for wrong in (
        error(up, gate, down),
        error(gate, up, nothing),
        error(gate * 0, up, down),
        error(gate.roll(32, 1), up, down),
        error(gate, up.roll(1, 0), down),
        error(gate, up, nothing, rest=added_once),
        error(gate, up, nothing, rest=twice),
    ):
        assert wrong > BOUNDS["AMXINT8"]


def test_biases_of_some_experts_and_again(experts: Experts, biases: tuple) -> None:
    layer = loaded(experts, "BF16", Activation())
    hidden, ids, weights = inputs(21)
    plain = layer.forward(hidden, ids, weights)
    layer.load_biases([5], *([stack[5]] for stack in biases))
    found = layer.forward(hidden, ids, weights)
    others = (ids != 5).all(dim=1)
    assert torch.equal(found[others], plain[others])
    assert not torch.equal(found[~others], plain[~others])
    layer.load_experts([5], *([stack[5]] for stack in experts))
    assert torch.equal(layer.forward(hidden, ids, weights), found), "they stay when weights are loaded again"
    layer.load_biases([5], *([torch.zeros_like(stack[5])] for stack in biases))
    assert torch.equal(layer.forward(hidden, ids, weights), plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": [9]}, "expert 9 has no place"),
        ({"gate": [torch.zeros(INNER + 16)]}, r"gate_bias.*\[112\]"),
        ({"up": [torch.full((INNER,), math.nan)]}, "expert 2: up_bias holds NaN or infinity; repair the checkpoint.$"),
        ({"down": [torch.zeros(H, dtype=torch.int32)]}, "down_bias.*(?i:int)"),
        ({"down": []}, "got 1 experts, but"),
    ],
)
def test_bad_biases_are_named(experts: Experts, change: dict[str, Any], words: str) -> None:
    layer = loaded(experts, "BF16", Activation())
    good = {"experts": [2], "gate": [torch.zeros(INNER)], "up": [torch.zeros(INNER)], "down": [torch.zeros(H)]}
    with pytest.raises(RuntimeError, match=words):
        layer.load_biases(**{**good, **change})


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("relu2",), "activation 'relu2' is unknown; it must be one of silu, silu_then_limit, gelu, gelu_tanh"),
        (("silu", -1.0), "swiglu_limit is -1.0; it must be finite and at least 0"),
        (("silu", math.nan), "swiglu_limit is nan"),
        (("silu", math.inf), "swiglu_limit is inf"),
        (("silu", "7"), "swiglu_limit is '7'"),
        (("silu", True), "swiglu_limit is True"),
        (("silu", 7.0, -0.5), "swiglu_alpha is -0.5"),
        (("gelu", 7.0), "activation gelu has no limit, but swiglu_limit is 7.0"),
        (("gelu_tanh", 0.0, 1.7), "activation gelu_tanh has no alpha"),
        (("silu_then_limit",), "silu_then_limit needs a swiglu_limit above 0"),
    ],
)
def test_impossible_activations_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Activation(*arguments)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "relu2"])
@pytest.mark.parametrize("limit", [0.0, 7.0, -1.0])
@pytest.mark.parametrize("alpha", [0.0, 1.5, math.inf])
def test_the_library_refuses_the_same(name: str, limit: float, alpha: float) -> None:
    from kt_kernel import _ext

    arguments = (get_engine(ENGINE), 0, E, K, H, INNER, *(get_method("BF16").layout,) * 2, [0], [])
    try:
        Activation(name, limit, alpha)
    except ValueError:
        with pytest.raises(RuntimeError, match="activation|swiglu"):
            _ext.Layer(*arguments, name, limit, alpha)
    else:
        _ext.Layer(*arguments, name, limit, alpha).close()


def test_the_wrapper_takes_limit_and_alpha(experts: Experts) -> None:
    wrapper = make("BF16", swiglu_limit=3.0, swiglu_alpha=1.702)
    assert wrapper.config.activation == GPT_OSS
    wrapper.load_weights_from_tensors(*experts)
    hidden, ids, weights = inputs(9)
    wanted = moe_reference(hidden, ids, weights, *experts, act=GPT_OSS)
    assert relative_error(wrapper.forward(hidden, ids, weights, 0), wanted) < BOUNDS["BF16"]


# --- HybridMoE and checkpoints ---


@pytest.mark.parametrize("on_device", [0, 3, E])
@pytest.mark.parametrize("activation", [GPT_OSS, Activation("gelu")], ids=str)
def test_hybrid_layers_and_their_state(experts: Experts, biases: tuple, activation: Activation, on_device: int) -> None:
    options = {"num_gpu_experts": on_device, "engine": ENGINE}
    module = HybridMoE.from_tensors(
        (experts.gate, experts.up),
        experts.down,
        top_k=K,
        biases=(torch.cat(biases[:2], dim=1), biases[2]),
        activation=activation,
        **options,
    )
    hidden, ids, weights = inputs(33)
    found = module(hidden, ids, weights)
    wanted = moe_reference(hidden, ids, weights, *experts, act=activation, biases=biases)
    assert relative_error(found, wanted) < BOUNDS["BF16"]
    other = HybridMoE(MoEConfig(0, E, K, H, INNER, activation), has_biases=True, **options)
    assert other.load_state_dict(module.state_dict()) == ([], [])
    assert torch.equal(other(hidden, ids, weights), found)
    with pytest.raises(ValueError, match=r"gate_up_bias has shape \[1, 2\]; it must be \[8, 192\]"):
        HybridMoE.from_tensors(
            (experts.gate, experts.up), experts.down, top_k=K, biases=(torch.ones(1, 2), biases[2]), engine=ENGINE
        )


def gpt_oss_checkpoint(folder: Path, experts: Experts, biases: tuple, **config: Any) -> Path:
    """All experts in one tensor, transposed, gate and up in turn, with biases."""

    def in_turn(gate: Tensor, up: Tensor) -> Tensor:
        return torch.stack((gate, up), dim=2).flatten(1, 2)

    config = {"model_type": "gpt_oss", "hidden_act": "silu", "swiglu_limit": 3.0, **config}
    write_checkpoint(folder, {0: experts}, style="transposed", config=config_of(experts, 1, **config))
    tensors = load_file(folder / "model.safetensors")
    block = "model.layers.0.mlp.experts."
    tensors[block + "gate_up_proj"] = in_turn(experts.gate, experts.up).transpose(1, 2).contiguous()
    tensors[block + "gate_up_proj_bias"] = in_turn(biases[0], biases[1]).bfloat16()
    tensors[block + "down_proj_bias"] = biases[2].bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("on_device", [0, 3])
def test_a_checkpoint_with_biases(tmp_path: Path, experts: Experts, biases: tuple, on_device: int) -> None:
    folder = gpt_oss_checkpoint(tmp_path / "model", experts, biases)
    module = HybridMoE.from_path(folder, 0, num_gpu_experts=on_device, engine=ENGINE)
    assert module.config.activation == GPT_OSS
    hidden, ids, weights = inputs(33)
    stored = tuple(bias.bfloat16() for bias in biases)
    wanted = moe_reference(hidden, ids, weights, *experts, act=GPT_OSS, biases=stored)
    assert relative_error(module(hidden, ids, weights), wanted) < BOUNDS["BF16"]
    with pytest.raises(ValueError, match="has experts with biases, which converted folders do not hold"):
        convert(ConvertOptions(str(folder), tmp_path / "packed", get_method("AMXINT8")))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, Activation()),
        ({"hidden_act": "silu"}, Activation()),
        ({"model_type": "gpt_oss", "hidden_act": "silu", "swiglu_limit": 7.0}, Activation("silu", 7.0, 1.702)),
        ({"hidden_act": "swigluoai", "swiglu_alpha": 1.5, "swiglu_limit": 7.0}, Activation("silu", 7.0, 1.5)),
        ({"model_type": "deepseek_v4", "hidden_act": "silu", "swiglu_limit": 10.0}, Activation("silu", 10.0)),
        ({"swiglu_limits": [0.0, 0.0, 7.0]}, Activation("silu_then_limit", 7.0)),
        ({"swiglu_limits": [7.0, 7.0, 0.0]}, Activation()),
        ({"text_config": {"hidden_activation": "gelu_pytorch_tanh"}}, Activation("gelu_tanh")),
        ({"hidden_act": "gelu"}, Activation("gelu")),
        ({"hidden_act": "relu2"}, "config.json has hidden_act 'relu2'; kt_kernel computes silu, swish"),
        ({"hidden_act": ["silu"]}, "has hidden_act ['silu']"),
        ({"swiglu_limit": "7"}, "swiglu_limit is '7'"),
        ({"swiglu_limits": [1.0, 1.0, -1.0]}, "swiglu_limit is -1.0"),
    ],
)
def test_activations_of_models(tmp_path: Path, config: dict, wanted: Activation | str, experts: Experts) -> None:
    write_checkpoint(tmp_path, {0: experts}, config=config)
    if isinstance(wanted, Activation):
        assert model_activation(tmp_path, 2) == wanted
    else:
        with pytest.raises(ValueError) as error:
            model_activation(tmp_path, 2)
        assert wanted in str(error.value)


# --- SGLang's layers ---


@pytest.mark.parametrize(
    ("runner", "wanted"),
    [
        ({}, Activation()),
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, Activation("silu", 7.0, 1.702)),
        ({"gemm1_alpha": 1.5, "gemm1_clamp_limit": 7.0, "gemm1_beta": 1.0}, Activation("silu", 7.0, 1.5)),
        ({"gemm1_clamp_limit": 7.0}, Activation("silu_then_limit", 7.0)),
        ({"swiglu_limit": 10.0}, Activation("silu", 10.0)),
        ({"activation": "gelu"}, Activation("gelu")),
        ({"activation": "situ", "gemm1_alpha": 4.0}, "activation 'situ'"),
        ({"activation": "relu2"}, "activation 'relu2'"),
        ({"activation": "gelu", "swiglu_limit": 7.0}, "swiglu_limit=7.0"),
        ({"gemm1_beta": 1.0}, "gemm1_beta=1.0"),
        ({"gemm1_alpha": 1.5, "gemm1_beta": 0.5}, "gemm1_beta=0.5"),
        ({"is_gated": False}, "is_gated=False"),
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input=True"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0"),
    ],
)
def test_the_plugin_takes_the_activation_of_a_layer(runner: dict[str, Any], wanted: Activation | str) -> None:
    from kt_kernel.integrations.sglang import layers

    config = SimpleNamespace(**{"activation": "silu", "layer_id": 3, **runner})
    method = SimpleNamespace(wrapper=make("BF16"))
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match="layer 3") as error:
            layers.take_activation(method, None, config)  # type: ignore[arg-type]
        assert wanted in str(error.value)
    else:
        layers.take_activation(method, None, config)  # type: ignore[arg-type]
        assert method.wrapper.config == MoEConfig(3, E, K, H, INNER, wanted)
        layers.take_activation(SimpleNamespace(wrapper=None), None, config)  # type: ignore[arg-type]


# --- experts of transformers ---


def expert_module(family: str) -> torch.nn.Module:
    from importlib import import_module

    sizes = {"num_local_experts": 6, "num_experts": 6, "hidden_size": 64, "intermediate_size": 48}
    names = {
        "gpt_oss": ("GptOssExperts", "GptOssConfig", sizes),
        "deepseek_v4": ("DeepseekV4Experts", "DeepseekV4Config", {**sizes, "n_routed_experts": 6}),
        "minimax_m3_vl": ("MiniMaxM3VLExperts", "MiniMaxM3VLTextConfig", sizes),
        "gemma4": ("Gemma4TextExperts", "Gemma4TextConfig", {**sizes, "moe_intermediate_size": 48}),
    }
    experts, config, values = names[family]
    root = f"transformers.models.{family}"
    made = getattr(import_module(f"{root}.configuration_{family}"), config)(**values)
    made.moe_intermediate_size = made.intermediate_size = 48
    module = getattr(import_module(f"{root}.modeling_{family}"), experts)(made)
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        # as far as the limits, and values of bf16, so that BF16 is exact
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.4).bfloat16().float()
    return module.eval()


@pytest.mark.parametrize("num_gpu_experts", [0, 2])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4", "minimax_m3_vl", "gemma4"])
def test_experts_of_transformers(family: str, num_gpu_experts: int) -> None:
    import kt_kernel.integrations.transformers as kt_transformers

    module = expert_module(family)
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(20, 64, generator=generator).bfloat16().float() * 2
    ids = torch.rand(20, 6, generator=generator).argsort(dim=1)[:, :2]
    weights = torch.rand(20, 2, generator=generator)
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        wanted = module(hidden, ids, weights).double()
        kt_transformers.register(num_gpu_experts=num_gpu_experts, engine=ENGINE)
        try:
            module.config._experts_implementation = "kt_kernel"
            found = module(hidden, ids, weights)
        finally:
            kt_transformers.register()
    assert 0 < relative_error(found, wanted) < BOUNDS["BF16"]

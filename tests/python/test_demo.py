"""The demo model computes what the dense model it is made of computes, and its experts cannot be mixed up unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kt_kernel import demo

HIDDEN, INTERMEDIATE = 32, 48


def dense_layer() -> dict[str, torch.Tensor]:
    """One Llama layer and its surroundings, in fp64."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "model.embed_tokens.weight": (20, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.layers.0.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }
    shapes |= {f"model.layers.0.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def ffn(norm: torch.Tensor, weights: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    """``down(silu(gate (norm * x)) * up (norm * x))``."""
    gate, up, down = weights
    x = x * norm
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts_of(tensors: dict[str, torch.Tensor], expert: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensors[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))


def test_every_expert_is_the_dense_ffn() -> None:
    dense = dense_layer()
    tensors = dict(demo.upcycle(dense, 1, demo.Upcycling(num_experts=5, top_k=2)))
    x = torch.randn(7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    prefix = "model.layers.0."
    weights = tuple(dense[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    expected = ffn(dense[prefix + "post_attention_layernorm.weight"], weights, x)
    norm = tensors[prefix + "post_attention_layernorm.weight"]
    for expert in range(5):
        found = ffn(norm, experts_of(tensors, expert), x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gate, up, _ = experts_of(tensors, 0)
    mixed = ffn(norm, (gate, up, experts_of(tensors, 1)[2]), x)
    assert (mixed - expected).norm() > 0.5 * expected.norm(), "rows of one expert must not fit columns of another"


def test_upcycling_is_reproducible() -> None:
    first, second = (dict(demo.upcycle(dense_layer(), 1, demo.Upcycling())) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    total = demo.write_shards(tmp_path, iter(tensors.items()), shard_bytes=450)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert total == index["metadata"]["total_size"] == 5 * 200
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    from safetensors import safe_open

    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), tensors[name].bfloat16())


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> Any:
        raise ValueError("no such model")

    from kt_kernel.integrations import transformers

    monkeypatch.setattr(transformers, "load_gguf", fail)
    with pytest.raises(ValueError, match="no such model"):
        demo.make_demo(tmp_path / "demo", demo.Upcycling(), gguf=tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".kt-part-model-dead", ".kt-part-model-running", ".kt-part-other-dead", ".model-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-0.safetensors").write_bytes(b"half")
    kept = {".kt-part-model-running", ".kt-part-other-dead", ".model-mine"}
    seen: list[set[str]] = []

    def fail(_path: Path) -> Any:
        seen.append({path.name for path in tmp_path.iterdir()})
        demo._remove_left(tmp_path, ".kt-part-model-")  # another run, which begins now
        assert {path.name for path in tmp_path.iterdir()} == seen[0]
        raise ValueError("no such model")

    from kt_kernel.integrations import transformers

    monkeypatch.setattr(transformers, "load_gguf", fail)
    lock = demo._lock(tmp_path / ".kt-part-model-running")
    assert lock is not None
    with pytest.raises(ValueError, match="no such model"):
        demo.make_demo(tmp_path / "model", demo.Upcycling(), gguf=tmp_path / "x.gguf")
    os.close(lock)
    (own,) = seen[0] - kept
    assert own.startswith(".kt-part-model-") and seen[0] - {own} == kept
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-k", "9"], "top-k is 9"),
        (["--top-k", "0"], "top-k is 0"),
        (["--experts", "0"], "experts is 0"),
        ([], "exists already"),
    ],
    ids=["top_k", "top_k_0", "experts_0", "exists"],
)
def test_command_line_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code = demo.main(["--output", str(tmp_path), *arguments])
    assert code == 1
    assert words in capsys.readouterr().err


EQUALITY = """
import sys, torch
from pathlib import Path
from kt_kernel import demo
from kt_kernel.integrations.transformers import load_gguf
from transformers import AutoModelForCausalLM
import json
folder = Path(sys.argv[1])
dense, tokenizer = load_gguf(demo.find_gguf())
upcycling = demo.Upcycling(num_experts=3, top_k=2)
config = demo.moe_config(dense.config, upcycling)
(folder / "config.json").write_text(json.dumps(config))
demo.write_shards(folder, demo.upcycle(dense.state_dict(), config["num_hidden_layers"], upcycling), dtype=torch.float32)
moe = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
text = "The water of the river was cold, and nobody wanted to swim before noon."
ids = tokenizer(text, return_tensors="pt")["input_ids"]
with torch.no_grad():
    expected, found = dense(ids).logits, moe(ids).logits
print("LARGEST", float((found - expected).abs().max()), float(expected.std()), ids.numel())
"""


def test_logits_equal_the_dense_models(tmp_path: Path) -> None:
    """All 30 layers in fp32: rounding of the rescaled weights is all that differs, 1e-4 of logits of std 3 to 4."""
    result = subprocess.run(
        [sys.executable, "-c", EQUALITY, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    largest, std, tokens = (float(word) for word in result.stdout.split("LARGEST")[1].split())
    assert tokens > 10 and std > 0.1
    assert largest < 1e-3

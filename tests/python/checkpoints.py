"""Tiny expert checkpoints in every naming style, written by the tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BASES = ("model.layers", "language_model.model.layers", "model.language_model.layers", "layers")
STYLES = {
    "long": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "block_sparse": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "short": ("experts", ("w1", "w3", "w2")),
    "ffn": ("ffn.experts", ("w1", "w3", "w2")),
    "feed_forward": ("feed_forward.experts", ("gate_proj", "up_proj", "down_proj")),
}


@dataclass
class Experts:
    """Weights of one layer: gate, up ``[E, I, H]``, down ``[E, H, I]``."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def __iter__(self):
        return iter((self.gate, self.up, self.down))


def random_experts(
    num_experts: int, hidden: int, inter: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Experts:
    """Normal weights of std 0.05."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)

    return Experts(
        normal(num_experts, inter, hidden), normal(num_experts, inter, hidden), normal(num_experts, hidden, inter)
    )


def config_of(experts: Experts, num_layers: int, **changes) -> dict:
    """A flat config.json."""
    num_experts, inter, hidden = experts.gate.shape
    config = {
        "model_type": "test_moe",
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "moe_intermediate_size": inter,
        "num_hidden_layers": num_layers,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not None}


def layer_tensors(
    layer: int, experts: Experts, *, style: str = "long", base: str = "model.layers"
) -> dict[str, Tensor]:
    """The tensors of one layer under the names of a style (``STYLES``, ``"fused"`` or ``"transposed"``)."""
    prefix = f"{base}.{layer}."
    if style in ("fused", "transposed"):
        gate_up = torch.cat((experts.gate, experts.up), dim=1)
        pair = {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": experts.down}
        if style == "transposed":
            pair = {name: tensor.transpose(1, 2) for name, tensor in pair.items()}
        return {prefix + name: tensor.contiguous() for name, tensor in pair.items()}
    block, names = STYLES[style]
    return {
        f"{prefix}{block}.{expert}.{name}.weight": stack[expert].clone()
        for expert in range(experts.gate.shape[0])
        for name, stack in zip(names, experts, strict=True)
    }


def write_checkpoint(
    folder: Path,
    layers: dict[int, Experts],
    *,
    style: str = "long",
    base: str = "model.layers",
    num_shards: int = 1,
    config: dict | None = None,
) -> Path:
    """Write a checkpoint whose other layers are dense; with an index if there is more than one file."""
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(layers.values()))
    num_layers = max(layers) + 1
    tensors = {"model.embed_tokens.weight": torch.zeros(4, first.gate.shape[2], dtype=torch.bfloat16)}
    for layer in range(num_layers):
        if layer in layers:
            tensors |= layer_tensors(layer, layers[layer], style=style, base=base)
        else:
            tensors[f"{base}.{layer}.mlp.gate_proj.weight"] = torch.zeros(4, 4)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        files = [f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors" for shard in range(num_shards)]
        weight_map = {name: files[index % num_shards] for index, name in enumerate(tensors)}
        for file in files:
            save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or config_of(first, num_layers)))
    return folder

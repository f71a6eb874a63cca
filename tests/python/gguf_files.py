"""Tiny GGUF models of every type, written by the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

# Where the 16-bit floats of a block begin that its other numbers are multiplied by.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,), "IQ2_XXS": (0,),
}  # fmt: skip
QUANTIZED_BY_THE_PACKAGE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16", "F16", "F32")


def random_rows(kind: str, rows: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a type as uint8 ``[rows, row_bytes]``: quantized where the package can, else blocks of random codes."""
    number = GGMLQuantizationType[kind]
    if kind in QUANTIZED_BY_THE_PACKAGE:
        values = rng.normal(0, 0.05, (rows, k)).astype(np.float32)
        return np.ascontiguousarray(quantize(values, number)).view(np.uint8)
    block, block_bytes = GGML_QUANT_SIZES[number]
    blocks = rng.integers(0, 256, (rows * (k // block), block_bytes), dtype=np.uint8)
    for begin in HALVES[kind]:
        scales = rng.normal(0, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, begin : begin + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def random_layer(
    types: str | tuple[str, str, str],
    *,
    num_experts: int = 2,
    hidden: int = 64,
    inter: int = 32,
    fused: bool = False,
    seed: int = 0,
) -> dict[str, tuple[str, np.ndarray]]:
    """The expert tensors of a layer: part -> type and uint8 ``[E, n, row_bytes]``.

    ``types`` are those of gate, up and down; fused has the gate's.
    """
    rng = np.random.default_rng(seed)
    gate, up, down = (types,) * 3 if isinstance(types, str) else types
    parts = {"gate_up": (gate, 2 * inter, hidden)} if fused else {}
    parts |= {"gate": (gate, inter, hidden), "up": (up, inter, hidden)} if not fused else {}
    parts["down"] = (down, hidden, inter)
    return {
        part: (kind, random_rows(kind, num_experts * n, k, rng).reshape(num_experts, n, -1))
        for part, (kind, n, k) in parts.items()
    }


def random_biases(layer: dict[str, tuple[str, np.ndarray]], kind: str) -> dict[str, tuple[str, np.ndarray]]:
    """A bias for every row of a layer, in a float type: part -> type and uint8 ``[E, bytes]``."""
    rng = np.random.default_rng(0)
    return {part: (kind, random_rows(kind, *rows.shape[:2], rng)) for part, (_, rows) in layer.items()}


def sizes_of(num_experts: int, hidden: int, inter: int, num_layers: int) -> dict[str, int]:
    """What a model says of its experts."""
    return {
        "expert_count": num_experts,
        "expert_used_count": 2,
        "embedding_length": hidden,
        "expert_feed_forward_length": inter,
        "block_count": num_layers,
    }


def write_gguf(
    path: Path,
    layers: dict[int, dict[str, tuple[str, np.ndarray]]],
    values: dict[str, int],
    *,
    arch: str = "test_moe",
    split_max_tensors: int = 0,
    tokens: int = 4,
    kind: str = "weight",
    biases: dict[int, dict[str, tuple[str, np.ndarray]]] | None = None,
) -> Path:
    """A model whose experts are `layers`, beside an embedding and the norms; `values` are keys below the arch."""
    writer = GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    for key, value in values.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_token_list([f"token {token}" for token in range(tokens)])
    writer.add_token_scores([0.5] * tokens)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    for layer, parts in layers.items():
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", np.zeros(5, np.float32))
        for ending, tensors in ((kind, parts), ("bias", (biases or {}).get(layer, {}))):
            for part, (name, rows) in tensors.items():
                writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.{ending}", rows, raw_dtype=GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

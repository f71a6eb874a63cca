"""The layer that every system computes: weights, activations and routing weights in a folder of .npy files.

bf16 is held as its bits, uint16. Eight different experts stand for all of them (expert e is number ``e % 8``): kernels
do not look at values, but every system must store each expert apart, or the last-level cache would hold the layer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

KINDS = 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of the layer, and of the largest batch."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    max_tokens: int

    @property
    def kinds(self) -> int:
        """Number of experts that differ."""
        return min(KINDS, self.num_experts)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class Batch:
    """One forward: hidden ``[T, H]`` bf16 bits, ids ``[T, k]`` int64, weights ``[T, k]`` fp32."""

    hidden: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16 (ties to even) of finite fp32 values."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float(bits: np.ndarray) -> np.ndarray:
    """fp32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write(folder: Path, sizes: Sizes) -> None:
    """Make the files: weights of variance 1 / inputs of the product, activations of variance 1."""
    rng = np.random.default_rng(1)
    wide = (sizes.kinds, sizes.intermediate_size, sizes.hidden_size)
    tall = (sizes.kinds, sizes.hidden_size, sizes.intermediate_size)
    for name, shape in (("gate", wide), ("up", wide), ("down", tall)):
        np.save(folder / f"{name}.npy", to_bf16(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5))
    np.save(folder / "hidden.npy", to_bf16(rng.standard_normal((sizes.max_tokens, sizes.hidden_size), np.float32)))
    weights = rng.random((sizes.max_tokens, sizes.top_k), np.float32) + 0.1
    np.save(folder / "weights.npy", weights / weights.sum(1, keepdims=True))
    (folder / "sizes.json").write_text(json.dumps(asdict(sizes)))


class LayerData:
    """The files of :func:`write`, mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes = Sizes(**json.loads((folder / "sizes.json").read_text()))
        self.gate, self.up, self.down, self.hidden, self.weights = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("gate", "up", "down", "hidden", "weights")
        )

    def of_expert(self, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """gate, up and down of one expert, bf16 bits."""
        kind = expert % self.sizes.kinds
        return self.gate[kind], self.up[kind], self.down[kind]

    def batch(self, ids: list[list[int]]) -> Batch:
        """The first ``len(ids)`` tokens with these experts."""
        tokens = len(ids)
        return Batch(np.array(self.hidden[:tokens]), np.array(ids, dtype=np.int64), np.array(self.weights[:tokens]))

#!/usr/bin/env python3
"""Writes gguf/: small GGUF files made by the gguf package (version in requirements/test.txt), read by the tests.

Types that the package quantizes are quantized by it; of the others it gets blocks of random codes with finite scales.

    small_blocks.gguf    one layer of every type with blocks of 32: hidden size 64, expert intermediate size 32
    floats.gguf          one layer each of BF16, F16 and F32: 12, 8
    k_blocks.gguf        gate and up of every type with blocks of 256, down in F16: 256, 4
    mixture-*.gguf       what Q4_K_M makes: gate and up Q4_K, down Q6_K in layer 0 and Q4_K in layer 1; 256, 256; three
                         split files. The rows of a tensor are 16 and differ in one byte, to take little room in git

Usage: make_gguf.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "python"))

from gguf_files import random_layer, random_rows, sizes_of, write_gguf  # noqa: E402

SMALL_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
FLOATS = ("BF16", "F16", "F32")
K_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def similar_rows(kind: str, seed: int) -> tuple[str, np.ndarray]:
    """Two matrices 256 x 256 of 16 different rows, each marked by the last byte of its codes: 0-255, then 255-0."""
    rows = np.tile(random_rows(kind, 16, 256, np.random.default_rng(seed)), (32, 1))
    rows[:, 143 if kind == "Q4_K" else 127] = np.concatenate((np.arange(256), np.arange(256)[::-1]))
    return kind, rows.reshape(2, 256, -1)


def main(folder: Path) -> None:
    for name, types, (hidden, inter) in (("small_blocks", SMALL_BLOCKS, (64, 32)), ("floats", FLOATS, (12, 8))):
        layers = {layer: random_layer(kind, hidden=hidden, inter=inter, seed=layer) for layer, kind in enumerate(types)}
        write_gguf(folder / f"{name}.gguf", layers, sizes_of(2, hidden, inter, len(types)))
    layers = {
        layer: random_layer((kind, kind, "F16"), hidden=256, inter=4, seed=layer) for layer, kind in enumerate(K_BLOCKS)
    }
    write_gguf(folder / "k_blocks.gguf", layers, sizes_of(2, 256, 4, len(K_BLOCKS)))
    layers = {
        layer: {
            "gate": similar_rows("Q4_K", 10 * layer),
            "up": similar_rows("Q4_K", 10 * layer + 1),
            "down": similar_rows(down, 10 * layer + 2),
        }
        for layer, down in enumerate(("Q6_K", "Q4_K"))
    }
    write_gguf(folder / "mixture.gguf", layers, sizes_of(2, 256, 256, 2), split_max_tensors=3)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "gguf")

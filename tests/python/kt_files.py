"""Folders as the incumbent's converter writes them, in numpy: the rule of its codes, its byte order, its names.

tests/python/test_golden.py proves every byte and name against the digests of what kt-kernel itself wrote
(tests/data/formats/make_kt.py), so that tests of the reader can have any sizes without keeping files of them.
Imports numpy alone, for kt-kernel's environment has no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

# method -> class of kt-kernel, as file names begin; bits of a code
METHODS = {"INT8": 8, "INT4": 4}
PROJECTIONS = ("gate", "up", "down")
# Rows of a block of packed weights by bits of a code, and k of a block.
ROW_BLOCK = {8: 64, 4: 128}
K_BLOCK = 3584


class Case(NamedTuple):
    """One conversion: its file names and bytes follow from this alone."""

    method: str
    parts: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    layer: int = 0
    seed: int = 1

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


# What make_kt.py has digests of: 1, 2 and 4 NUMA parts, several row blocks, k beyond one block of 3584 in gate and up
# (hidden size) and in a part of down (intermediate size), ends of those blocks that are as small as they can be.
DIGESTED = (
    *(Case(method, parts, 2, 256, 512) for method in METHODS for parts in (1, 2, 4)),
    Case("INT8", 1, 1, 64, 64, layer=3, seed=2),
    Case("INT8", 2, 1, 192, 384, seed=3),
    Case("INT8", 2, 1, 3648, 128, seed=4),
    Case("INT8", 2, 1, 64, 7296, seed=5),
    Case("INT4", 1, 1, 128, 128, layer=3, seed=6),
    Case("INT4", 2, 1, 384, 768, seed=7),
    Case("INT4", 2, 1, 3712, 256, seed=8),
    Case("INT4", 2, 1, 128, 7424, seed=9),
)
# What is kept as files.
KEPT = (Case("INT8", 2, 1, 64, 128, layer=1, seed=10), Case("INT4", 1, 1, 128, 128, layer=1, seed=11))


def source_bits(case: Case, projection: str) -> np.ndarray:
    """bf16 bits of the weights of all experts ``[E, N, K]``: hashed indices, the same on every machine and numpy.

    Near normal (a sum of four uniform values), row 1 of every expert is zero, and rows have scales of 2^-6 to 2^5.
    """
    n, k = case.intermediate_size, case.hidden_size
    shape = (case.num_experts, k, n) if projection == "down" else (case.num_experts, n, k)
    index = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    index += np.uint64((case.seed * 3 + PROJECTIONS.index(projection)) << 40)
    # splitmix64
    index = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    index = (index ^ (index >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    index = (index ^ (index >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    index ^= index >> np.uint64(31)
    fields = [(index >> np.uint64(16 * part) & np.uint64(0xFFFF)).astype(np.float64) / 65536 - 0.5 for part in range(4)]
    values = (sum(fields) * 2.0 ** (np.arange(shape[1]) % 12 - 6)[:, None]).astype(np.float32)
    values[:, 1] = 0
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def source(case: Case, projection: str) -> np.ndarray:
    """The same as fp32 ``[E, N, K]``."""
    return (source_bits(case, projection).astype(np.uint32) << 16).view(np.float32)


def part_of(matrix: np.ndarray, projection: str, part: int, parts: int) -> np.ndarray:
    """Rows of gate and up, columns of down."""
    return np.split(matrix, parts, axis=1 if projection == "down" else 0)[part]


def quantize(matrix: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 ``[N, K]`` and scales fp32 ``[N]``.

    INT8: the scale is amax times the fp32 1 / 127. INT4: amax / 112, and of the int8 code the high nibble stays,
    rounded with halves away from zero. (What 0.7.2 does; the last bit of a scale is no part of the format.)
    """
    amax = np.abs(matrix).max(1)
    scale = amax * (np.float32(1) / np.float32(127)) if bits == 8 else amax / np.float32(112)
    inverse = np.divide(np.float32(1), scale, where=scale != 0, out=np.zeros_like(scale))
    codes = np.rint(matrix * inverse[:, None]).astype(np.int8)
    if bits == 4:
        magnitude = (np.abs(codes.astype(np.int16)) + 8) // 16
        codes = (np.sign(codes) * magnitude).astype(np.int8)
    return codes, scale


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Codes ``[N, K]`` in the incumbent's order, as nested blocks; N of 32, K of 64 (INT8) or 128 (INT4)."""
    packed = []
    for row in range(0, codes.shape[0], ROW_BLOCK[bits]):
        for column in range(0, codes.shape[1], K_BLOCK):
            block = codes[row : row + ROW_BLOCK[bits], column : column + K_BLOCK]
            # [tile of 32 rows][step of k][half of k: the nibbles of INT4][16-row part][4 k of 64][row][k]
            halves = 8 // bits
            tiles = block.reshape(block.shape[0] // 32, 2, 16, -1, halves, 16, 4).transpose(0, 3, 4, 1, 5, 2, 6)
            if bits == 4:
                tiles = (tiles[:, :, 0] & 15) | (tiles[:, :, 1] << 4)
            packed.append(tiles.astype(np.int8).tobytes())
    return b"".join(packed)


def packed_parts(case: Case) -> Iterator[tuple[str, int, int, bytes, bytes]]:
    """(projection, expert, NUMA part, weight bytes, scale bytes) of all that a conversion writes."""
    bits = METHODS[case.method]
    for projection in PROJECTIONS:
        for expert, matrix in enumerate(source(case, projection)):
            for part in range(case.parts):
                codes, scale = quantize(part_of(matrix, projection, part, case.parts), bits)
                yield projection, expert, part, pack(codes, bits), scale.tobytes()


def tree_files(case: Case) -> dict[str, bytes]:
    """The ``.kt`` tree of a conversion: path in its folder -> contents."""
    files = {}
    for projection, expert, part, weight, scale in packed_parts(case):
        start = f"_layer_{case.layer}/_numa_{part}/{case.method}_{projection}_{expert}_"
        files[f"{start}{len(weight)}Byte_quant_.kt"] = weight
        files[f"{start}{len(scale)}Byte_scale_.kt"] = scale
    return files


def read_tree(folder: Path) -> dict[str, bytes]:
    """As :func:`tree_files`, of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.kt")}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """One SHA-256 a projection, over the names and contents of its files in the order of the names."""
    hashes = {projection: hashlib.sha256() for projection in PROJECTIONS}
    for name, contents in sorted(files.items()):
        projection = name.rpartition("/")[2].split("_")[1]
        hashes[projection].update(name.encode() + b"\0" + contents)
    return {projection: hash.hexdigest() for projection, hash in hashes.items()}


def merged_arrays(case: Case) -> dict[str, np.ndarray]:
    """The tensors of the merged safetensors form: the same bytes, weights as int8, scales as fp32."""
    arrays = {}
    for projection, expert, part, weight, scale in packed_parts(case):
        start = f"blk.{case.layer}.ffn_{projection}_exps.{expert}.numa.{part}"
        arrays[f"{start}.weight"] = np.frombuffer(weight, np.int8)
        arrays[f"{start}.scale"] = np.frombuffer(scale, np.float32)
    return arrays

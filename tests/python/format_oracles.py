"""Weights of every source string decoded in plain numpy, each from the specification of its format.

The independent truth for the C++ decoders: nothing here comes from them, and tests/python/test_golden.py holds these
functions against files that the real producers wrote. A value is computed in fp64 and rounded once to fp32; a GGUF
matrix is what the gguf package makes of it.
"""

from __future__ import annotations

import re

import numpy as np
import torch

# Magnitudes of the E2M1 codes 0 to 7; bit 3 is the sign.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# AWQ: nibble i of an int32 is column AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Blocks of the incumbent's packed weights: rows of a block by bits of a code, and k of a block.
KT_ROW_BLOCK = {8: 64, 4: 128}
KT_K_BLOCK = 3584


def bits_of(part: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor of one-byte elements, in its shape."""
    return part.contiguous().view(torch.uint8).numpy()


def reals(part: torch.Tensor) -> np.ndarray:
    """A tensor of bf16, fp16 or fp32 as fp64, which holds all of them."""
    return part.to(torch.float64).numpy()


def e4m3(codes: np.ndarray) -> np.ndarray:
    """FP8 e4m3fn: sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinity, 0x7f and 0xff are NaN."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int64), (codes & 7).astype(np.float64)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    value = np.where(codes & 127 == 127, np.nan, value)
    return np.where(codes & 128, -value, value)


def e8m0(codes: np.ndarray) -> np.ndarray:
    """Powers of two, 2^(code - 127); 255 is NaN."""
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(np.int64) - 127))


def e2m1(codes: np.ndarray) -> np.ndarray:
    """FP4: sign, 2 exponent bits, 1 mantissa bit."""
    return np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]


def nibbles(words: np.ndarray) -> np.ndarray:
    """Nibbles ``[..., 8 w]`` of int32 ``[..., w]`` or ``[..., 2 w]`` of uint8, low nibble first."""
    count = 2 * words.itemsize
    unsigned = words.view(f"u{words.itemsize}")
    shifted = unsigned[..., None] >> np.arange(0, 4 * count, 4, dtype=unsigned.dtype)
    return (shifted & 15).astype(np.uint8).reshape(*words.shape[:-1], -1)


def of_groups(scales: np.ndarray, k: int) -> np.ndarray:
    """Scales ``[n, groups]`` as ``[n, k]``: the size of a group is k / groups."""
    if k % scales.shape[1]:
        raise ValueError(f"{scales.shape[1]} groups do not divide {k}.")
    return np.repeat(scales, k // scales.shape[1], axis=1)


def floats(parts: list[torch.Tensor], n: int, k: int) -> np.ndarray:
    """bf16, fp16, fp32: the weight ``[n, k]``."""
    return reals(parts[0])


def fp8_block(parts: list[torch.Tensor], n: int, k: int, rows: int, columns: int) -> np.ndarray:
    """e4m3 ``[n, k]``, one scale a block of `rows` x `columns`; blocks at the edges may be short."""
    scale = reals(parts[1])
    spread = np.repeat(np.repeat(scale, rows, axis=0)[:n], columns, axis=1)[:, :k]
    return e4m3(bits_of(parts[0])) * spread


def fp8_row(parts: list[torch.Tensor], n: int, k: int) -> np.ndarray:
    """e4m3 ``[n, k]``, one scale a row ``[n]`` or ``[n, 1]``."""
    return e4m3(bits_of(parts[0])) * reals(parts[1]).reshape(n, 1)


def mxfp8(parts: list[torch.Tensor], n: int, k: int) -> np.ndarray:
    """e4m3 ``[n, k]``, e8m0 ``[n, ceil(k / 32)]``."""
    return e4m3(bits_of(parts[0])) * np.repeat(e8m0(bits_of(parts[1])), 32, axis=1)[:, :k]


def pack_quantized(parts: list[torch.Tensor], n: int, k: int) -> np.ndarray:
    """Offset-binary nibbles of int32 ``[n, k / 8]`` or uint8 ``[n, k / 2]``, scales ``[n, k / group]``."""
    codes = nibbles(parts[0].numpy())[:, :k].astype(np.float64) - 8
    return codes * of_groups(reals(parts[1]), k)


def gptq(parts: list[torch.Tensor], n: int, k: int, zero_offset: int) -> np.ndarray:
    """Nibbles of int32 ``[k / 8, n]`` along k, scales ``[k / group, n]``, zeros of int32 ``[k / group, n / 8]``.

    A zero of the first version is stored less 1, by a subtraction from the whole word. Readers agree on the zeros from
    1 to 15 only; a nibble of 15, from a zero of 0, is refused.
    """
    qweight, scales, qzeros = parts
    codes = nibbles(np.ascontiguousarray(qweight.numpy().T)).astype(np.float64)
    stored = nibbles(qzeros.numpy())
    if zero_offset and (stored == 15).any():
        raise ValueError("a stored zero of 15 has no meaning that all readers share.")
    words = qzeros.numpy().view(np.uint32) + np.uint32(0x11111111 * zero_offset)
    zeros = nibbles(words).astype(np.float64)
    return (codes - of_groups(zeros.T, k)) * of_groups(reals(scales).T, k)


def awq(parts: list[torch.Tensor], n: int, k: int) -> np.ndarray:
    """Nibbles of int32 ``[k, n / 8]`` along n, zeros of int32 ``[k / group, n / 8]``, scales ``[k / group, n]``."""
    qweight, qzeros, scales = parts

    def columns(words: torch.Tensor) -> np.ndarray:
        stored = nibbles(words.numpy()).reshape(words.shape[0], -1, 8)
        ordered = np.empty_like(stored)
        ordered[..., AWQ_ORDER] = stored
        return ordered.reshape(words.shape[0], n).T.astype(np.float64)

    return (columns(qweight) - of_groups(columns(qzeros), k)) * of_groups(reals(scales).T, k)


def mxfp4(parts: list[torch.Tensor], n: int, k: int) -> np.ndarray:
    """E2M1 nibbles of uint8 ``[n, k / 2]``, e8m0 ``[n, k / 32]``."""
    return e2m1(nibbles(bits_of(parts[0]))) * np.repeat(e8m0(bits_of(parts[1])), 32, axis=1)[:, :k]


def nvfp4(parts: list[torch.Tensor], n: int, k: int) -> np.ndarray:
    """E2M1 nibbles of uint8 ``[n, k / 2]``, e4m3 ``[n, k / 16]``, one fp32 factor ``[1]`` of the whole matrix."""
    scale = e4m3(bits_of(parts[1])) * reals(parts[2]).reshape(())
    return e2m1(nibbles(bits_of(parts[0]))) * np.repeat(scale, 16, axis=1)[:, :k]


def kt_offsets(n: int, k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the weight of row r and column c lies: its byte, and whether in the high nibble (INT4), both ``[n, k]``.

    Blocks of rows, in them blocks of 3584 k, in them tiles of 32 rows, in them steps of 64 (INT8) or
    128 (INT4) k: two 16-row parts of 16 lines of 4 k.
    """
    r, c = np.arange(n)[:, None], np.arange(k)[None, :]
    row_block = KT_ROW_BLOCK[bits]
    step = 512 // bits
    nb, kb = r - r % row_block, c - c % KT_K_BLOCK
    nbs, kbs = np.minimum(row_block, n - nb), np.minimum(KT_K_BLOCK, k - kb)
    i, ns = (r - nb) % 32, (r - nb) - (r - nb) % 32
    within = (c - kb) % step
    j, ks = within % 64, (c - kb) - within
    start = (nb * k + kb * nbs + ns * kbs + ks * 32) * bits // 8
    byte = start + (i // 16) * 1024 + (j // 4) * 64 + (i % 16) * 4 + j % 4
    return byte, np.broadcast_to(within >= 64, byte.shape)


def kt_part(weight: torch.Tensor, scale: torch.Tensor, n: int, k: int, bits: int) -> np.ndarray:
    """One NUMA part ``[n, k]``: flat bytes in the incumbent's order and an fp32 scale a row.

    INT8: code * scale. INT4: a two's complement nibble, 16 * code * scale.
    """
    byte, is_high = kt_offsets(n, k, bits)
    codes = bits_of(weight).reshape(-1)[byte]
    if bits == 4:
        codes = np.where(is_high, codes & 0xF0, codes << 4)
    return codes.view(np.int8).astype(np.float64) * reals(scale).reshape(n, 1)


def kt(parts: list[torch.Tensor], n: int, k: int, bits: int, count: int, axis: int) -> np.ndarray:
    """`count` NUMA parts, each a weight and a scale, joined along the rows (axis 0) or the columns (axis 1)."""
    shape = (n // count, k) if axis == 0 else (n, k // count)
    matrices = [kt_part(parts[2 * t], parts[2 * t + 1], *shape, bits) for t in range(count)]
    return np.concatenate(matrices, axis=axis)


def gguf_matrix(parts: list[torch.Tensor], n: int, k: int, type_name: str) -> np.ndarray:
    """Raw blocks of GGUF, uint8 ``[n, bytes of a row]``."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(parts[0].numpy(), GGMLQuantizationType[type_name]).reshape(n, k)


_PLAIN = {
    "bf16": floats,
    "fp16": floats,
    "fp32": floats,
    "fp8_row": fp8_row,
    "mxfp8": mxfp8,
    "pack_quantized": pack_quantized,
    "awq": awq,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
}


def decode(source: str, parts: list[torch.Tensor], n: int, k: int) -> np.ndarray:
    """A matrix ``[n, k]`` of a checkpoint as fp32, from its source string and its tensors."""
    if source in _PLAIN:
        value = _PLAIN[source](parts, n, k)
    elif source in ("gptq", "gptq_v2"):
        value = gptq(parts, n, k, 1 if source == "gptq" else 0)
    elif match := re.fullmatch(r"fp8_block(\d+)x(\d+)", source):
        value = fp8_block(parts, n, k, int(match[1]), int(match[2]))
    elif match := re.fullmatch(r"kt_int([48])x(\d+)_(rows|columns)", source):
        value = kt(parts, n, k, int(match[1]), int(match[2]), 0 if match[3] == "rows" else 1)
    elif source.startswith("gguf:"):
        value = gguf_matrix(parts, n, k, source.removeprefix("gguf:"))
    else:
        raise ValueError(f"source {source} is none of the formats of format_oracles.py.")
    if value.shape != (n, k):
        raise ValueError(f"the parts of {source} make a matrix {list(value.shape)}, not [{n}, {k}].")
    return value.astype(np.float32)

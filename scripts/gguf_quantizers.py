"""Matrices in the types of GGUF: by the gguf package, by ggml itself where it is installed, or by two plain quantizers.

The gguf package quantizes the types with blocks of 32; the others are ggml's (``ggml_quantize_chunk`` of the library
that ``python -m kt_kernel.bench peers --install`` compiles). Where that is missing, Q4_K and Q6_K are rounded here to
nearest, with a worse choice of scales than ggml's search: good for tests, not for measurements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from format_quantizers import Quantized
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as quantize_by_package
from torch import Tensor

BY_PACKAGE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32")
# llama.cpp's tensor_type_fallback: what becomes of a type with blocks of 256 where they do not divide the row.
FALLBACK = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
LIBRARY = "libggml-base.so"


def types_of_layer(kind: str, layer: int, num_layers: int) -> tuple[str, str, str]:
    """Types of gate, up and down under the name of a file: one type, ``Q4_K_M``, or three types with slashes.

    Q4_K_M and Q5_K_M are llama.cpp's: down is Q6_K in the first and last eighth of the layers and every third between.
    """
    if kind not in ("Q4_K_M", "Q5_K_M"):
        types = tuple(kind.split("/"))
        return types * 3 if len(types) == 1 else types  # type: ignore[return-value]
    base, eighth = kind.removesuffix("_M"), num_layers // 8
    more = layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
    return base, base, "Q6_K" if more else base


def type_for(kind: str, k: int) -> str:
    """The type itself, or llama.cpp's fallback where its blocks do not divide k."""
    return kind if k % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0 else FALLBACK.get(kind, "F16")


def find_ggml(peers: Path | None = None) -> Path | None:
    """ggml's library in the peers' environments; None: not installed."""
    from kt_kernel.bench.peers.install import default_folder

    return next(iter(sorted((peers or default_folder()).glob(f"llama-cpp-python-*/ggml/{LIBRARY}"))), None)


@cache
def _quantize_chunk(library: Path) -> Callable[..., int]:
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def quantize(weight: Tensor, kind: str, ggml: Path | None = None) -> Quantized:
    """One matrix as ``blocks``, uint8 ``[n, row_bytes]``.

    Parameters
    ----------
    weight : Tensor
        ``[n, k]``, a float type; k of whole blocks.
    kind : str
        Name of a type, e.g. ``"Q4_K"``.
    ggml : Path, optional
        From :func:`find_ggml`.

    Raises
    ------
    ValueError
        A type that only ggml quantizes, and no ggml.
    """
    number = GGMLQuantizationType[kind]
    values = weight.float().contiguous().numpy()
    if kind in BY_PACKAGE:
        blocks = np.ascontiguousarray(quantize_by_package(values, number)).view(np.uint8)
    elif ggml is not None:
        n, k = values.shape
        block, block_bytes = GGML_QUANT_SIZES[number]
        blocks = np.empty((n, k // block * block_bytes), np.uint8)
        written = _quantize_chunk(ggml)(int(number), values.ctypes.data, blocks.ctypes.data, 0, n, k, None)
        if written != blocks.nbytes:
            raise RuntimeError(f"{ggml} wrote {written} bytes of {kind}, not {blocks.nbytes}.")
    elif kind in _PLAIN:
        blocks = _PLAIN[kind](values)
    else:
        raise ValueError(f"{kind} is quantized by ggml only; run python -m kt_kernel.bench peers --install llama.")
    value = dequantize(blocks, number).reshape(values.shape)
    return Quantized({"blocks": torch.from_numpy(blocks.reshape(len(values), -1))}, torch.from_numpy(value))


def _super_blocks(values: np.ndarray, group: int) -> np.ndarray:
    return values.reshape(-1, 256 // group, group)


def _halves(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp16 scales ``[b, 1]`` as bytes ``[b, 2]`` and as the fp32 that they mean, 1 where they are 0."""
    half = scale.astype(np.float16)
    return half.view(np.uint8).reshape(-1, 2), np.where(half > 0, half, 1).astype(np.float32)


def _plain_q6_k(values: np.ndarray) -> np.ndarray:
    """Q6_K: ``d * sc * (q - 32)``, int8 sc a group of 16: low nibbles [128], high pairs [64], sc [16], d."""
    groups = _super_blocks(values, 16)
    steps = np.abs(groups).max(2) / 31
    d_bytes, d = _halves(steps.max(1, keepdims=True) / 127)
    scales = np.rint(steps / d)
    step = d * np.where(scales > 0, scales, 1)
    codes = (np.rint(groups / step[..., None]).clip(-32, 31) + 32).astype(np.uint8)
    # halves of 128, of which quarters of 32 share bytes
    quarters = codes.reshape(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15) | (quarters[:, :, 2:] & 15) << 4
    high = sum((quarters[:, :, i] >> 4) << 2 * i for i in range(4))
    parts = (low.reshape(-1, 128), high.reshape(-1, 64), scales.astype(np.int8).view(np.uint8), d_bytes)
    return np.concatenate(parts, axis=1).reshape(len(values), -1)


def _plain_q4_k(values: np.ndarray) -> np.ndarray:
    """Q4_K: ``d * sc * q - dmin * m``, 6-bit sc and m a group of 32: d, dmin, scales [12], nibbles [128]."""
    groups = _super_blocks(values, 32)
    lows = -groups.min(2).clip(max=0)
    steps = (groups.max(2).clip(min=0) + lows) / 15
    d_bytes, d = _halves(steps.max(1, keepdims=True) / 63)
    dmin_bytes, dmin = _halves(lows.max(1, keepdims=True) / 63)
    sc, m = (np.rint(a / b).clip(0, 63).astype(np.uint8) for a, b in ((steps, d), (lows, dmin)))
    step = d * np.where(sc > 0, sc, 1)
    codes = np.rint((groups + (dmin * m)[..., None]) / step[..., None]).clip(0, 15).astype(np.uint8)
    high = (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    scales = np.concatenate((sc[:, :4] | sc[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, high), axis=1)
    pairs = codes.reshape(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate((d_bytes, dmin_bytes, scales, nibbles), axis=1).reshape(len(values), -1)


_PLAIN = {"Q4_K": _plain_q4_k, "Q6_K": _plain_q6_k}

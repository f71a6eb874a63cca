"""One matrix quantized as the checkpoints of the hub have it: round to nearest, from each format's specification.

Plain torch that shares nothing with ``csrc/``. Each function returns the tensors of its format by the end of their
names, and what they mean: ``value`` is computed from the codes before they are packed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3_MAX, E2M1_MAX = 448.0, 6.0
# Powers of two of the largest values: 448 = 1.75 * 2^8, 6 = 1.5 * 2^2.
E4M3_EXPONENT, E2M1_EXPONENT = 8, 2
# Magnitudes of the E2M1 codes 0 to 7; bit 3 is the sign.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# AWQ: nibble i of an int32 is column AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Quantized(NamedTuple):
    """Tensors of a matrix, and the matrix ``[n, k]`` they mean in fp32."""

    tensors: dict[str, Tensor]
    value: Tensor


def _groups(weight: Tensor, size: int) -> Tensor:
    """``[n, k / size, size]``, fp32."""
    return weight.float().unflatten(1, (-1, size))


def _positive(scale: Tensor) -> Tensor:
    """Scales without zeros, by which one can divide."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _e4m3(values: Tensor) -> Tensor:
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _e2m1(values: Tensor) -> Tensor:
    """Codes uint8 of the nearest E2M1 values, halves to the even code."""
    magnitude = values.abs().contiguous()
    bounds = (E2M1[1:] + E2M1[:-1]) / 2
    below, above = (torch.bucketize(magnitude, bounds, right=right) for right in (False, True))
    return torch.where(below % 2 == 0, below, above).to(torch.uint8) | (values < 0).to(torch.uint8) << 3


def _e2m1_value(codes: Tensor) -> Tensor:
    return E2M1[(codes & 7).int()] * torch.where(codes & 8 != 0, -1.0, 1.0)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 to 15 ``[..., 2 w]`` as uint8 ``[..., w]``, low nibble first."""
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous()


def pack_words(codes: Tensor) -> Tensor:
    """Codes 0 to 15 ``[..., 8 w]`` as int32 ``[..., w]``, low nibble first."""
    return pack_nibbles(codes).view(torch.int32)


def fp8_block(weight: Tensor, block: tuple[int, int] = (128, 128)) -> Quantized:
    """DeepSeek-V3: e4m3 with an fp32 scale a block, amax / 448; blocks at the edges may be short."""
    (rows, columns), (n, k) = block, weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % columns, 0, -n % rows))
    amax = padded.abs().unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))
    scale = _positive(amax / E4M3_MAX)
    spread = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    codes = _e4m3(weight.float() / spread)
    return Quantized({"weight": codes, "weight_scale_inv": scale}, codes.float() * spread)


def fp8_row(weight: Tensor) -> Quantized:
    """compressed-tensors, strategy channel: e4m3 with a bf16 scale a row ``[n, 1]``."""
    scale = _positive((weight.float().abs().amax(1, keepdim=True) / E4M3_MAX).to(torch.bfloat16))
    codes = _e4m3(weight.float() / scale.float())
    return Quantized({"weight": codes, "weight_scale": scale}, codes.float() * scale.float())


def _exponents(groups: Tensor, largest: int) -> Tensor:
    """E8M0 codes ``[n, k / 32]`` of the OCP specification: the exponent of amax less that of the largest code."""
    _, exponent = torch.frexp(groups.abs().amax(2))
    return (exponent - 1 - largest + 127).clamp(0, 254).to(torch.uint8)


def mxfp8(weight: Tensor) -> Quantized:
    """OCP MXFP8: e4m3 with a power of two per group of 32; values beyond 448 saturate."""
    groups = _groups(weight, 32)
    exponents = _exponents(groups, E4M3_EXPONENT)
    scale = torch.exp2(exponents.float() - 127)[..., None]
    codes = _e4m3(groups / scale)
    tensors = {"weight": codes.flatten(1), "weight_scale_inv": exponents}
    return Quantized(tensors, (codes.float() * scale).flatten(1))


def mxfp4(weight: Tensor) -> Quantized:
    """OCP MXFP4: E2M1 with a power of two per group of 32; ``weight`` and ``scale`` in DeepSeek-V4's types."""
    groups = _groups(weight, 32)
    exponents = _exponents(groups, E2M1_EXPONENT)
    scale = torch.exp2(exponents.float() - 127)[..., None]
    codes = _e2m1(groups / scale)
    tensors = {
        "weight": pack_nibbles(codes.flatten(1)).view(torch.int8),
        "scale": exponents.view(torch.float8_e8m0fnu),
    }
    return Quantized(tensors, (_e2m1_value(codes) * scale).flatten(1))


def nvfp4(weight: Tensor) -> Quantized:
    """ModelOpt NVFP4: E2M1 with an e4m3 scale per group of 16 and an fp32 factor of the matrix, amax / (6 * 448)."""
    groups = _groups(weight, 16)
    factor = _positive(groups.abs().max() / (E2M1_MAX * E4M3_MAX))
    scale = _e4m3(groups.abs().amax(2) / E2M1_MAX / factor)
    step = (scale.float() * factor)[..., None]
    codes = _e2m1(groups / _positive(step))
    tensors = {"weight": pack_nibbles(codes.flatten(1)), "weight_scale": scale, "weight_scale_2": factor}
    return Quantized(tensors, (_e2m1_value(codes) * step).flatten(1))


def pack_quantized(weight: Tensor, group: int = 32) -> Quantized:
    """compressed-tensors pack-quantized (Kimi-K2): codes -8 to 7, bf16 scales amax / 7.5, so that -8 occurs."""
    groups = _groups(weight, group)
    scale = _positive((groups.abs().amax(2) / 7.5).to(torch.bfloat16))
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    tensors = {
        "weight_packed": pack_words((codes + 8).flatten(1)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return Quantized(tensors, (codes * scale.float()[..., None]).flatten(1))


def _asymmetric(groups: Tensor, lowest_zero: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15, fp16 scales and zero points up to 15 of groups ``[n, k / group, group]``."""
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = _positive(((high - low) / 15).half())
    zero = (-low / scale.float()).round().clamp(lowest_zero, 15)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    return codes, scale, zero


def gptq(weight: Tensor, group: int = 128, *, asymmetric: bool = False) -> Quantized:
    """AutoGPTQ's tensors, rounded to nearest: symmetric with amax / 7.5 and zero 8, or with zero points 1 to 15."""
    groups = _groups(weight, group)
    if asymmetric:  # its files hold zero - 1
        codes, scale, zero = _asymmetric(groups, 1)
    else:
        scale = _positive((groups.abs().amax(2) / 7.5).half())
        codes = ((groups / scale.float()[..., None]).round() + 8).clamp(0, 15)
        zero = torch.full(scale.shape, 8.0)
    tensors = {
        "qweight": pack_words(codes.flatten(1)).t().contiguous(),
        "qzeros": pack_words((zero - 1).t()),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // group).to(torch.int32),
    }
    return Quantized(tensors, ((codes - zero[..., None]) * scale.float()[..., None]).flatten(1))


def awq(weight: Tensor, group: int = 128) -> Quantized:
    """AutoAWQ's tensors (version gemm), rounded to nearest, with zero points."""
    codes, scale, zero = _asymmetric(_groups(weight, group), 0)

    def pack_columns(values: Tensor) -> Tensor:
        return pack_words(values.t().unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1))

    tensors = {
        "qweight": pack_columns(codes.flatten(1)),
        "qzeros": pack_columns(zero),
        "scales": scale.t().contiguous(),
    }
    return Quantized(tensors, ((codes - zero[..., None]) * scale.float()[..., None]).flatten(1))

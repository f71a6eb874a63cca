"""Matrices in every quantized form that checkpoints have, each with what it decodes to, and folders of them.

Written from the formats' own descriptions in torch: nothing here calls kt_kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoints import STYLES
from safetensors.torch import save_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 32


@dataclass
class Matrix:
    """One matrix ``[n, k]``: tensors by the end of their name, the source and parts they mean, the values they have."""

    tensors: dict[str, Tensor]
    source: str
    parts: list[Tensor]
    values: Tensor


@dataclass
class Quantizer:
    """A form: how a matrix is made, and the quantization_config that goes with it."""

    make: Callable[[int, int, torch.Generator], Matrix]
    config: dict = field(default_factory=dict)
    method: str = ""
    input_type: str = ""


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _codes(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def _scales(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)


def _fp8(n: int, k: int, generator: torch.Generator) -> Tensor:
    """e4m3 of all codes but the two NaNs."""
    codes = _codes(0, 254, (n, k), generator)
    return (codes + (codes >= 127)).to(torch.uint8).view(torch.float8_e4m3fn)


def fp8_block(scale_dtype: torch.dtype, suffix: str, block: int = 128) -> Callable[..., Matrix]:
    def make(n: int, k: int, generator: torch.Generator) -> Matrix:
        weight = _fp8(n, k, generator)
        shape = (-(-n // block), -(-k // block))
        if scale_dtype == torch.float8_e8m0fnu:
            scale = _codes(110, 125, shape, generator).to(torch.uint8).view(scale_dtype)
            part = scale.to(torch.bfloat16)
        else:
            part = scale = _scales(shape, generator, scale_dtype)
        spread = part.float().repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
        source = f"fp8_block{block}x{block}"
        return Matrix({"weight": weight, suffix: scale}, source, [weight, part], weight.float() * spread)

    return make


def fp8_row(shape: Callable[[int], tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Callable[..., Matrix]:
    def make(n: int, k: int, generator: torch.Generator) -> Matrix:
        weight, scale = _fp8(n, k, generator), _scales(shape(n), generator, dtype)
        part = scale.reshape(-1).expand(n).contiguous()
        tensors = {"weight": weight, "weight_scale": scale, "input_scale": torch.ones(())}
        return Matrix(tensors, "fp8_row", [weight, part], weight.float() * part.float()[:, None])

    return make


def mxfp8(suffix: str, dtype: torch.dtype) -> Callable[..., Matrix]:
    def make(n: int, k: int, generator: torch.Generator) -> Matrix:
        weight = _fp8(n, k, generator)
        scale = _codes(110, 125, (n, k // GROUP), generator).to(torch.uint8)
        values = weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(GROUP, 1)
        return Matrix({"weight": weight, suffix: scale.view(dtype)}, "mxfp8", [weight, scale], values)

    return make


def _pack_nibbles(codes: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight codes along a dimension in an int32: the i-th in nibble i of the code ``order[i]`` of them."""
    codes = codes.movedim(dim, -1).reshape(*codes.movedim(dim, -1).shape[:-1], -1, 8)
    packed = sum(codes[..., order[i]].long() << (4 * i) for i in range(8))
    return packed.to(torch.int32).movedim(-1, dim).contiguous()  # the top bit wraps, as it does in the files


def _groups_in_order(k: int) -> Tensor:
    """The group of each column, as tools that may sort columns by activations write it."""
    return (torch.arange(k) // GROUP).to(torch.int32)


def pack_quantized(
    group: int, dtype: torch.dtype, scale_dtype: torch.dtype, *, order: bool = False
) -> Callable[..., Matrix]:
    def make(n: int, k: int, generator: torch.Generator) -> Matrix:
        codes = _codes(0, 16, (n, k), generator)
        scale = _scales((n, k // group), generator, scale_dtype)
        packed = _pack_nibbles(codes, 1)
        packed = packed.view(torch.uint8).view(n, k // 2) if dtype == torch.uint8 else packed
        tensors = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
        if order:
            tensors["weight_g_idx"] = _groups_in_order(k)
        values = (codes - 8) * scale.float().repeat_interleave(group, 1)
        return Matrix(tensors, "pack_quantized", [packed, scale], values)

    return make


def gptq(source: str, *, symmetric: bool, order: bool = False) -> Callable[..., Matrix]:
    def make(n: int, k: int, generator: torch.Generator) -> Matrix:
        codes = _codes(0, 16, (k, n), generator)
        zeros = torch.full((k // GROUP, n), 8) if symmetric else _codes(1, 16, (k // GROUP, n), generator)
        scale = _scales((k // GROUP, n), generator, torch.float16)
        stored = zeros - 1 if source == "gptq" else zeros
        parts = [_pack_nibbles(codes, 0), scale, _pack_nibbles(stored, 1)]
        tensors = dict(zip(("qweight", "scales", "qzeros"), parts, strict=True))
        if order:
            tensors["g_idx"] = _groups_in_order(k)
        values = (codes - zeros.repeat_interleave(GROUP, 0)) * scale.float().repeat_interleave(GROUP, 0)
        return Matrix(tensors, source, parts, values.t().contiguous())

    return make


def awq(n: int, k: int, generator: torch.Generator) -> Matrix:
    codes, zeros = _codes(0, 16, (k, n), generator), _codes(0, 16, (k // GROUP, n), generator)
    scale = _scales((k // GROUP, n), generator, torch.float16)
    parts = [_pack_nibbles(codes, 1, AWQ_ORDER), _pack_nibbles(zeros, 1, AWQ_ORDER), scale]
    values = (codes - zeros.repeat_interleave(GROUP, 0)) * scale.float().repeat_interleave(GROUP, 0)
    return Matrix(dict(zip(("qweight", "qzeros", "scales"), parts, strict=True)), "awq", parts, values.t().contiguous())


def _fp4(n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """E2M1 of all codes: bytes, low nibble first, and values."""
    codes = _codes(0, 16, (n, k), generator)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), E2M1[codes]


def mxfp4(weight_name: str, scale_name: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> Callable[..., Matrix]:
    def make(n: int, k: int, generator: torch.Generator) -> Matrix:
        packed, values = _fp4(n, k, generator)
        scale = _codes(110, 125, (n, k // GROUP), generator).to(torch.uint8)
        tensors = {weight_name: packed.view(dtype), scale_name: scale.view(scale_dtype)}
        values = values * torch.exp2(scale.float() - 127).repeat_interleave(GROUP, 1)
        return Matrix(tensors, "mxfp4", [packed, scale], values)

    return make


def nvfp4(weight_name: str, *, divides: bool) -> Callable[..., Matrix]:
    def make(n: int, k: int, generator: torch.Generator) -> Matrix:
        packed, values = _fp4(n, k, generator)
        scale = (torch.rand((n, k // 16), generator=generator) * 100 + 1).to(torch.float8_e4m3fn)
        # powers of two: exact whichever way it is stored
        factor = torch.tensor([2.0 ** -int(_codes(6, 12, (), generator))])
        name, stored = ("weight_global_scale", 1 / factor) if divides else ("weight_scale_2", factor[0])
        tensors = {weight_name: packed, "weight_scale": scale, name: stored, "input_scale": torch.ones(())}
        values = values * (scale.float() * factor).repeat_interleave(16, 1)
        return Matrix(tensors, "nvfp4", [packed, scale, factor], values)

    return make


def _compressed(form: str, **weights) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


_PACKED = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
_PACKED_32 = _compressed("pack-quantized", **_PACKED, group_size=32)
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
_BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_U8, _I8, _E8M0 = torch.uint8, torch.int8, torch.float8_e8m0fnu

QUANTIZERS: dict[str, Quantizer] = {
    "fp8": Quantizer(fp8_block(_F32, "weight_scale_inv"), _BLOCK_FP8, "FP8", "fp8"),
    "fp8_bf16_scales": Quantizer(fp8_block(_BF16, "weight_scale"), _BLOCK_FP8, "FP8", "fp8"),
    "fp8_exponents": Quantizer(fp8_block(_E8M0, "scale"), _BLOCK_FP8, "FP8", "fp8"),
    "fp8_blocks_of_64": Quantizer(
        fp8_block(_F32, "weight_scale_inv", 64), {**_BLOCK_FP8, "weight_block_size": [64, 64]}, "FP8", "fp8"
    ),
    "fp8_compressed_blocks": Quantizer(
        fp8_block(_F32, "weight_scale"),
        _compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        "FP8", "fp8",
    ),
    "fp8_modelopt_blocks": Quantizer(
        fp8_block(_F32, "weight_scale"), {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "FP8", "fp8"
    ),
    "fp8_channel": Quantizer(
        fp8_row(lambda n: (n, 1), _BF16),
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"), "FP8_PERCHANNEL", "fp8",
    ),
    "fp8_rows": Quantizer(fp8_row(lambda n: (n,)), {"quant_method": "fbgemm_fp8"}, "FP8_PERCHANNEL", "fp8"),
    "fp8_tensor": Quantizer(
        fp8_row(lambda n: ()), {"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8_PERCHANNEL", "fp8"
    ),
    "mxfp8": Quantizer(
        mxfp8("weight_scale_inv", _U8), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "MXFP8", "mxfp8"
    ),
    "mxfp8_modelopt": Quantizer(
        mxfp8("weight_scale", _E8M0), {"quant_method": "modelopt", "quant_algo": "MXFP8"}, "MXFP8", "mxfp8"
    ),
    "rawint4": Quantizer(
        pack_quantized(32, torch.int32, _BF16), _PACKED_32, "RAWINT4", "int4"
    ),
    "rawint4_sorted": Quantizer(
        pack_quantized(32, torch.int32, _BF16, order=True),
        _compressed("pack-quantized", **_PACKED, group_size=32, actorder="group"), "RAWINT4", "int4",
    ),
    "rawint4_bytes": Quantizer(
        pack_quantized(32, torch.uint8, _F16), _PACKED_32, "RAWINT4", "int4"
    ),
    "rawint4_g96": Quantizer(
        pack_quantized(96, torch.int32, _F32), _compressed("pack-quantized", **_PACKED), "RAWINT4", "int4"
    ),
    "gptq": Quantizer(gptq("gptq", symmetric=True), _GPTQ, "GPTQ_INT4", "gptq"),
    "gptq_asymmetric": Quantizer(gptq("gptq", symmetric=False), {**_GPTQ, "sym": False}, "GPTQ_INT4", "gptq"),
    "gptq_v2": Quantizer(
        gptq("gptq_v2", symmetric=False), {**_GPTQ, "checkpoint_format": "gptq_v2"}, "GPTQ_INT4", "gptq"
    ),
    "gptq_zeros_of_v2": Quantizer(gptq("gptq_v2", symmetric=True), _GPTQ, "GPTQ_INT4", "gptq"),
    "gptq_sorted": Quantizer(
        gptq("gptq", symmetric=True, order=True), {**_GPTQ, "desc_act": True}, "GPTQ_INT4", "gptq"
    ),
    "auto_round": Quantizer(
        gptq("gptq", symmetric=True),
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": GROUP},
        "GPTQ_INT4", "gptq",
    ),
    "awq": Quantizer(awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, "AWQ", "awq"),
    "mxfp4": Quantizer(mxfp4("weight", "scale", _I8, _E8M0), {"quant_method": "fp8"}, "MXFP4", "mxfp4"),
    "mxfp4_compressed": Quantizer(
        mxfp4("weight_packed", "weight_scale", _U8, _U8),
        _compressed("mxfp4-pack-quantized", num_bits=4, group_size=32), "MXFP4", "mxfp4",
    ),
    "nvfp4": Quantizer(
        nvfp4("weight", divides=False), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4", "nvfp4"
    ),
    "nvfp4_compressed": Quantizer(
        nvfp4("weight_packed", divides=True), _compressed("nvfp4-pack-quantized", num_bits=4, group_size=16), "NVFP4",
        "nvfp4",
    ),
}  # fmt: skip


def quantized_layer(
    make: Callable[..., Matrix], num_experts: int, hidden: int, inter: int, *, seed: int = 0
) -> list[dict[str, Matrix]]:
    """Gate, up and down of every expert."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
    return [{name: make(n, k, generator) for name, (n, k) in shapes.items()} for _ in range(num_experts)]


def single_names(experts: list[dict[str, Matrix]], *, style: str = "long", prefix: str = "model.layers.0.") -> dict:
    """Tensors of one layer with one tensor an expert, in a style of ``checkpoints.STYLES``."""
    block, names = STYLES[style]
    return {
        f"{prefix}{block}.{expert}.{name}.{part}": tensor.clone()
        for expert, matrices in enumerate(experts)
        for name, matrix in zip(names, matrices.values(), strict=True)
        for part, tensor in matrix.tensors.items()
    }


def fused_names(
    experts: list[dict[str, Matrix]], name: Callable[[str, str], str], *, interleaved: bool = False, swap: bool = False
) -> dict[str, Tensor]:
    """Tensors of all experts of a layer: `name` gives the whole name for a projection and a part.

    Rows of gate and up are one block after the other, or alternate; with `swap`, matrices are stored transposed.
    """
    tensors = {}
    for projection in ("gate_up_proj", "down_proj"):
        for part in experts[0]["gate"].tensors:
            stacked = []
            for matrices in experts:
                gate, up, down = (
                    matrix.tensors[part].view(_byte_like(matrix.tensors[part])) for matrix in matrices.values()
                )
                one = down
                if projection == "gate_up_proj" and gate.dim() >= 2:
                    one = torch.stack((gate, up), 1).flatten(0, 1) if interleaved else torch.cat((gate, up))
                elif projection == "gate_up_proj":
                    assert torch.equal(gate, up), "one scale for both"
                    one = gate
                stacked.append(one.t() if swap and one.dim() == 2 else one)
            dtype = experts[0]["gate"].tensors[part].dtype
            tensors[name(projection, part)] = torch.stack(stacked).contiguous().view(dtype)
    return tensors


def _byte_like(tensor: Tensor) -> torch.dtype:
    """A type of the same size that torch can stack and transpose."""
    return torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype


def write_folder(
    folder: Path, tensors: dict[str, Tensor], config: dict, *, num_layers: int = 1, sizes: tuple[int, int, int]
) -> Path:
    """A checkpoint of one file; `sizes` are experts, hidden and expert intermediate size."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    content = {
        "model_type": "test_moe", "num_experts": sizes[0], "num_experts_per_tok": 2, "hidden_size": sizes[1],
        "moe_intermediate_size": sizes[2], "num_hidden_layers": num_layers,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": config} if config else content))
    return folder

"""Scales at the ends of their types, in whole layers of every format.

Gate is ordinary; up has scales at one end of their type and down at the other, so that the output is ordinary and what
lies between is not. A scale is the number at the end, or half of a high one and twice a low one. The ends of fp16 and
e4m3 are their largest number and their smallest subnormal. Types with the exponents of fp32 begin at 2^80, from where
all sums are finite before their scale is applied, and end at the subnormal 2^-127; up at 2^-100, for the scales of int8
activations are normal numbers.
The truth is format_oracles.py and fp64.
"""

from __future__ import annotations

from pathlib import Path

import gguf_files
import numpy as np
import pytest
import torch
from format_oracles import decode
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from kt_files import Case
from quantized_checkpoints import QUANTIZERS, quantized_layer, single_names, write_folder
from reference import moe_reference, relative_error
from test_kt_folder import method_of, write_tree
from torch import Tensor

from kt_kernel import KTMoEWrapper
from kt_kernel.checkpoint import PROJECTIONS, open_checkpoint
from kt_kernel.checkpoint.encodings import SCALES
from kt_kernel.checkpoint.source_reader import matrix_shape

E8M0 = torch.float8_e8m0fnu
ENDS = {torch.float16: (2.0**-24, 65504.0), torch.float8_e4m3fn: (2.0**-9, 448.0)}
# One for each type of scales of each form.
FORMS = (
    "fp8", "fp8_bf16_scales", "fp8_exponents", "fp8_channel", "mxfp8", "rawint4", "rawint4_bytes", "rawint4_g96",
    "gptq", "gptq_asymmetric", "awq", "mxfp4", "nvfp4", "nvfp4_compressed",
)  # fmt: skip
# int8 activations of nearly normal values, as in test_quantized_loading.py
BOUND = 0.033

both_ways = pytest.mark.parametrize("high", ["up", "down"])


def scales_like(scale: Tensor, projection: str, high: str) -> Tensor:
    """Scales of a type and shape for up or down, of which `high` has the high ones."""
    dtype = E8M0 if scale.dtype == torch.uint8 else scale.dtype
    lowest, highest = ENDS.get(dtype, (2.0 ** (-127 if projection == "down" else -100), 2.0**80))
    end, other = (highest, highest / 2) if projection == high else (lowest, lowest * 2)
    at_end = torch.rand(scale.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(at_end, end, other).to(dtype).view(scale.dtype)


def assert_equals_the_formula(path: Path, method: str) -> None:
    reader = open_checkpoint(path, method)
    (layer,), sizes = reader.layers, reader.sizes
    reader.check_layer(layer)
    stacks = [
        torch.stack(
            [
                torch.from_numpy(decode(*reader.source(layer, expert, name), *matrix_shape(sizes, name)))
                for expert in range(sizes.num_experts)
            ]
        )
        for name in PROJECTIONS
    ]
    wrapper = KTMoEWrapper(
        layer, sizes.num_experts, 2, sizes.hidden_size, sizes.intermediate_size, cpuinfer_threads=2, threadpool_count=1,
        weight_path=str(path), method=method,
    )  # fmt: skip
    wrapper.load_weights()
    for tokens in (1, 24):
        generator = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, sizes.hidden_size, generator=generator).bfloat16()
        ids = torch.rand(tokens, sizes.num_experts, generator=generator).argsort(dim=1)[:, :2].contiguous()
        shares = torch.rand(tokens, 2, generator=generator) + 0.1
        error = relative_error(wrapper.forward(hidden, ids, shares), moe_reference(hidden, ids, shares, *stacks))
        print(f"{error:.4f} of {BOUND}")
        assert error < BOUND


@both_ways
@pytest.mark.parametrize("name", FORMS)
def test_safetensors(tmp_path: Path, name: str, high: str) -> None:
    experts = quantized_layer(QUANTIZERS[name].make, 2, 192, 96)
    for matrices in experts:
        for projection in ("up", "down"):
            tensors = matrices[projection].tensors
            for part, scale in tensors.items():
                if part in (*SCALES, "weight_scale_2"):
                    tensors[part] = scales_like(scale, projection, high)
                elif part == "weight_global_scale":  # divides
                    tensors[part] = 1 / scales_like(scale, projection, high)
    folder = write_folder(tmp_path, single_names(experts), QUANTIZERS[name].config, sizes=(2, 192, 96))
    assert_equals_the_formula(folder, QUANTIZERS[name].method)


@both_ways
@pytest.mark.parametrize("kind", [kind for kind in (*gguf_files.HALVES, "MXFP4") if kind != "IQ2_XXS"])
def test_gguf(tmp_path: Path, kind: str, high: str) -> None:
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    size = max(block, 64)
    layer = gguf_files.random_layer(kind, hidden=size, inter=size)
    for projection in ("up", "down"):
        blocks = layer[projection][1].reshape(-1, block_bytes)
        dtype, begins = (E8M0, (0,)) if kind == "MXFP4" else (torch.float16, gguf_files.HALVES[kind])
        for begin in begins:
            scales = scales_like(torch.empty(len(blocks), dtype=dtype), projection, high)
            blocks[:, begin : begin + dtype.itemsize] = scales.view(torch.uint8).numpy().reshape(len(blocks), -1)
        assert np.shares_memory(blocks, layer[projection][1])
    sizes = gguf_files.sizes_of(2, size, size, 1)
    assert_equals_the_formula(gguf_files.write_gguf(tmp_path / "x.gguf", {0: layer}, sizes), "LLAMAFILE")


@both_ways
@pytest.mark.parametrize("case", [Case("INT8", 2, 2, 64, 128), Case("INT4", 2, 2, 128, 256)], ids=method_of)
def test_converted_folders(tmp_path: Path, case: Case, high: str) -> None:
    def change(files: dict[str, bytes]) -> None:
        for name in files:
            for projection in ("up", "down"):
                if f"_{projection}_" in name and name.endswith("_scale_.kt"):
                    scales = torch.empty(len(files[name]) // 4)
                    files[name] = scales_like(scales, projection, high).numpy().tobytes()

    assert_equals_the_formula(write_tree(tmp_path, case, change=change), method_of(case))

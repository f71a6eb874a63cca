"""Writes tests/data/formats/quantized.safetensors: small matrices as real packages quantize and pack them.

    pip install compressed-tensors==0.20.0; pip install --no-deps autoawq==0.2.9 nvidia-modelopt==0.47.0
    pip install omegaconf pulp
    BUILD_CUDA_EXT=0 pip install --no-deps --no-build-isolation auto-gptq==0.7.1
    python tests/data/formats/make_quantized.py

compressed-tensors writes pack-quantized, NVFP4, MXFP4, MXFP8 and FP8; ModelOpt NVFP4 in its own form; AutoAWQ and
AutoGPTQ theirs (their packages' own imports want an old transformers, so only the modules that pack are imported).
gptq_v2 is AutoGPTQ's file with 1 added to every zero, as its specification has it: GPTQModel, which writes it, does
not install without CUDA.

Of every case: ``CASE.0``, ``CASE.1``, ... the parts of its source string, under the names of the producer in the
metadata, and ``CASE.value``, what the producer itself dequantizes them to, in its own type.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import sysconfig
import types
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import Tensor


def weights(seed: int, n: int = 16, k: int = 128) -> Tensor:
    """bf16 ``[n, k]``, near normal, row 1 zero, rows of scales 2^-4 to 2^3."""
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    values *= 2.0 ** (torch.arange(n) % 8 - 4)[:, None]
    values[1] = 0
    return values.to(torch.bfloat16)


def groups_of(weight: Tensor, rows: int, columns: int) -> Tensor:
    """``[ceil n / rows, ceil k / columns, rows * columns]``, filled with zeros."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return blocks.transpose(1, 2).flatten(2)


def compressed_tensors(
    weight: Tensor, form: str, rows: int, columns: int, names: tuple[str, ...], **arguments
) -> tuple[list[Tensor], Tensor]:
    """The parts and the dequantized weight of compressed-tensors for one format."""
    arguments = QuantizationArgs(symmetric=True, **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    groups = groups_of(weight, rows, columns)
    state = {"weight": weight}
    if "weight_global_scale" in names:
        state["weight_global_scale"] = generate_gparam(weight.float().min(), weight.float().max())
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), arguments, state.get("weight_global_scale"))
    state["weight_scale"] = scale
    compressor = BaseCompressor.get_value_from_registry(form)
    compressed = compressor.compress(state, scheme)
    return [compressed[name].contiguous() for name in names], compressor.decompress(dict(compressed), scheme)["weight"]


def module(package: str, name: str) -> types.ModuleType:
    """A module of a package whose own ``__init__`` files are not run."""
    parts = name.split(".")
    for end in range(len(parts)):
        bare = types.ModuleType(".".join([package, *parts[:end]]))
        bare.__path__ = [str(Path(sysconfig.get_path("purelib"), *bare.__name__.split(".")))]
        sys.modules.setdefault(bare.__name__, bare)
    return importlib.import_module(f"{package}.{name}")


def asymmetric(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales fp16 and zeros 0 to 15 ``[n, k / group]`` of codes 0 to 15."""
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half()
    return scale, (-low / scale.float()).round().clamp(0, 15)


def linear(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.half()
    return layer


def awq(weight: Tensor, group: int) -> tuple[list[Tensor], Tensor]:
    gemm = module("awq", "modules.linear.gemm")
    gemm.get_best_device = lambda: "cpu"
    scale, zero = asymmetric(weight, group)
    packed = gemm.WQLinear_GEMM.from_linear(linear(weight), 4, group, scales=scale.t(), zeros=zero.t())
    parts = [packed.qweight, packed.qzeros, packed.scales]
    return [part.contiguous() for part in parts], gemm.dequantize_gemm(*parts, 4, group).t()


def gptq(weight: Tensor, group: int, symmetric: bool) -> tuple[list[Tensor], Tensor]:
    layer = module("auto_gptq", "nn_modules.qlinear.qlinear_cuda").QuantLinear(
        4, group, weight.shape[1], weight.shape[0], bias=False, weight_dtype=torch.float16
    )
    if symmetric:
        scale = (weight.float().unflatten(1, (-1, group)).abs().amax(2) * 2 / 15).clamp(min=1e-5).half()
        zero = torch.full_like(scale, 8)
    else:
        scale, zero = asymmetric(weight, group)
        zero.clamp_(min=1)  # AutoGPTQ cannot store a zero of 0
    # codes are not clamped by pack()
    spread = [part.repeat_interleave(group, 1) for part in (scale.float(), zero.float())]
    codes = (weight.float() / spread[0] + spread[1]).round().clamp(0, 15)
    layer.pack(linear((codes - spread[1]) * spread[0]), scale.clone(), zero.clone())
    parts = [layer.qweight, layer.scales, layer.qzeros]
    return [part.contiguous() for part in parts], layer(torch.eye(weight.shape[1]).half()).t()


def modelopt(weight: Tensor) -> tuple[list[Tensor], Tensor]:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    value = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    return [packed._quantized_data, scale, scale_2.reshape(1)], value


def main() -> None:
    packed = ("weight_packed", "weight_scale")
    plain = ("weight", "weight_scale")
    cases: dict[str, tuple[str, tuple[str, ...], tuple[list[Tensor], Tensor]]] = {}

    def add(name: str, source: str, names: tuple[str, ...], result: tuple[list[Tensor], Tensor]) -> None:
        cases[name] = (source, names, result)

    for group in (32, 64, 128):
        add(
            f"pack_quantized_g{group}", "pack_quantized", packed,
            compressed_tensors(
                weights(group, 16, 256), "pack-quantized", 1, group, packed,
                num_bits=4, type="int", strategy="group", group_size=group,
            ),
        )  # fmt: skip
    add(
        "mxfp4", "mxfp4", packed,
        compressed_tensors(
            weights(1), "mxfp4-pack-quantized", 1, 32, packed,
            num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8,
        ),
    )  # fmt: skip
    names = (*packed, "weight_global_scale")
    add(
        "nvfp4_compressed_tensors", "nvfp4", names,
        compressed_tensors(
            weights(2), "nvfp4-pack-quantized", 1, 16, names,
            num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn,
        ),
    )  # fmt: skip
    add("nvfp4_modelopt", "nvfp4", ("weight", "weight_scale", "weight_scale_2"), modelopt(weights(3)))
    add(
        "mxfp8", "mxfp8", plain,
        compressed_tensors(
            weights(4), "mxfp8-quantized", 1, 32, plain,
            num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8,
        ),
    )  # fmt: skip
    add(
        "fp8_block", "fp8_block16x32", plain,
        compressed_tensors(
            weights(5, 24, 80), "float-quantized", 16, 32, plain,
            num_bits=8, type="float", strategy="block", block_structure=[16, 32],
        ),
    )  # fmt: skip
    add(
        "fp8_row", "fp8_row", plain,
        compressed_tensors(
            weights(6), "float-quantized", 1, 128, plain, num_bits=8, type="float", strategy="channel"
        ),
    )  # fmt: skip
    add("awq", "awq", ("qweight", "qzeros", "scales"), awq(weights(7, 32), 32))
    names = ("qweight", "scales", "qzeros")
    add("gptq_symmetric", "gptq", names, gptq(weights(8, 32), 64, True))
    add("gptq_asymmetric", "gptq", names, gptq(weights(9, 32), 32, False))
    (qweight, scales, qzeros), value = cases["gptq_asymmetric"][2]
    add("gptq_v2", "gptq_v2", names, ([qweight, scales, qzeros + 0x11111111], value))

    tensors, sources = {}, {}
    for name, (source, names, (parts, value)) in cases.items():
        sources[name] = {"source": source, "names": names}
        tensors |= {f"{name}.{i}": part.clone() for i, part in enumerate(parts)}
        tensors[f"{name}.value"] = value.contiguous()
    versions = {
        package: importlib.metadata.version(package)
        for package in ("compressed-tensors", "nvidia-modelopt", "autoawq", "auto-gptq", "torch")
    }
    metadata = {"cases": json.dumps(sources), "producers": json.dumps(versions)}
    path = Path(__file__).with_name("quantized.safetensors")
    save_file(tensors, path, metadata)
    path.chmod(0o644)


if __name__ == "__main__":
    main()

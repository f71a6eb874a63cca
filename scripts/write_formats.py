#!/usr/bin/env python3
"""Write a BF16 checkpoint again with its experts in another format, as the tools of the hub write it: for tests.

    python scripts/write_formats.py MODEL FOLDER --format RAWINT4 [--twin FOLDER] [--peers FOLDER]

FORMAT is a method of ``--kt-method``, in some cases with a variant:

    FP8  FP8_PERCHANNEL  MXFP8  RAWINT4  NVFP4  AWQ
    GPTQ_INT4            symmetric; GPTQ_INT4:zeros has zero points
    MXFP4                DeepSeek-V4's names; MXFP4:fused has GPT-OSS's
    LLAMAFILE:TYPE       a GGUF file of the experts: a type, Q4_K_M, Q5_K_M, or three types with slashes (gate/up/down)
    AMXINT8:PARTS        a tree of .kt files as kt-kernel's converter writes for so many NUMA nodes, AMXINT4 alike

Weights are rounded to nearest (``format_quantizers.py``, ``gguf_quantizers.py``). Other tensors are copied, not into
GGUF or .kt. ``--twin`` writes the dequantized model besides, in bf16 and under the names of MODEL, which must have a
tensor for each matrix of each expert.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import format_quantizers as quantizers
import gguf_quantizers
import numpy as np
import torch
from format_quantizers import Quantized
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kt_kernel.checkpoint.model_folder import ModelSizes, model_sizes
from kt_kernel.checkpoint.names import parse_name
from kt_kernel.checkpoint.tensor_index import tensor_files
from kt_kernel.files import OpenFiles

ROOT = Path(__file__).resolve().parents[1]
PROJECTIONS = ("gate", "up", "down")
SHORT_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
NOT_EXPERTS = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$", "re:.*shared_expert.*"]
ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "deepseek_v2": "deepseek2", "mixtral": "llama"}


class Model:
    """A checkpoint in floats, with one tensor for each matrix of each expert."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: ModelSizes = model_sizes(folder)
        self._files = tensor_files(folder, OpenFiles(folder))
        self.names: dict[int, dict[tuple[int, str], str]] = {}
        self.others: list[str] = []
        for name in self._files:
            found = parse_name(name)
            if found is None:
                self.others.append(name)
            elif found.expert is None or found.part != "weight":
                raise ValueError(f"{folder} has {name}; give a model with one float tensor for each matrix.")
            else:
                self.names.setdefault(found.layer, {})[found.expert, found.projection] = name

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by their names."""
        found = {}
        for file in {self._files[name] for name in names}:
            with safe_open(self.folder / file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in names if self._files[name] == file}
        return found

    @property
    def group(self) -> int:
        """The largest usual group of at most 128 that divides the rows of every matrix."""
        sizes = (self.sizes.hidden_size, self.sizes.intermediate_size)
        return next(group for group in (128, 64, 32) if not any(size % group for size in sizes))


class Written(NamedTuple):
    """What one layer becomes: tensors of the format by name, dequantized weights by the names of the model."""

    tensors: dict[str, Tensor]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class SafetensorsFormat:
    """A quantizer of single matrices, the names of its tensors, and what config.json says."""

    quantize: Callable[[Tensor], Quantized]
    config: dict[str, Any]
    rename: Callable[[dict[tuple[int, str], str], int, dict[tuple[int, str], Quantized]], dict[str, Tensor]]

    def layer(self, model: Model, layer: int) -> Written:
        """Quantize the experts of a layer."""
        names = model.names[layer]
        weights = model.tensors(list(names.values()))
        quantized = {key: self.quantize(weights[name]) for key, name in names.items()}
        values = {names[key]: result.value for key, result in quantized.items()}
        return Written(self.rename(names, layer, quantized), values)


def beside_the_weight(names: dict[tuple[int, str], str], _: int, results: dict[tuple[int, str], Quantized]) -> dict:
    """The tensors of a matrix under the name of its module."""
    return {
        names[key].removesuffix("weight") + part: tensor
        for key, result in results.items()
        for part, tensor in result.tensors.items()
    }


def deepseek_v4(_: dict[tuple[int, str], str], layer: int, results: dict[tuple[int, str], Quantized]) -> dict:
    """``layers.L.ffn.experts.E.w1.weight`` and ``.scale``."""
    return {
        f"layers.{layer}.ffn.experts.{expert}.{SHORT_NAMES[projection]}.{part}": tensor
        for (expert, projection), result in results.items()
        for part, tensor in result.tensors.items()
    }


def gpt_oss(_: dict[tuple[int, str], str], layer: int, results: dict[tuple[int, str], Quantized]) -> dict:
    """One tensor of all experts: ``gate_up_proj_blocks`` ``[E, 2 I, H / 32, 16]``, rows gate 0, up 0, gate 1, ...,
    ``_scales`` ``[E, 2 I, H / 32]``, and the same for down.
    """
    found = {}
    num_experts = 1 + max(expert for expert, _ in results)
    for part, ending in (("weight", "blocks"), ("scale", "scales")):

        def stack(projection: str, part: str = part) -> Tensor:
            parts = [results[expert, projection].tensors[part].view(torch.uint8) for expert in range(num_experts)]
            stacked = torch.stack(parts)
            return stacked.unflatten(2, (-1, 16)) if part == "weight" else stacked

        prefix = f"model.layers.{layer}.mlp.experts."
        found[f"{prefix}gate_up_proj_{ending}"] = torch.stack((stack("gate"), stack("up")), dim=2).flatten(1, 2)
        found[f"{prefix}down_proj_{ending}"] = stack("down")
    return found


def compressed_tensors(form: str, **weights: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    group = {"weights": {"dynamic": False, "symmetric": True, **weights}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": NOT_EXPERTS,
    }


def safetensors_format(form: str, group: int) -> SafetensorsFormat:
    """The format of a name; `group` for those whose files may have any.

    Raises
    ------
    ValueError
        An unknown one.
    """
    bits = {"bits": 4, "group_size": group, "modules_to_not_convert": NOT_EXPERTS}
    fp8 = {"activation_scheme": "dynamic", "modules_to_not_convert": NOT_EXPERTS}
    gptq = {"quant_method": "gptq", "desc_act": False, "checkpoint_format": "gptq", **bits}
    modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}}
    table: dict[str, tuple[Callable[[Tensor], Quantized], dict[str, Any]]] = {
        "FP8": (
            quantizers.fp8_block,
            {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], **fp8},
        ),
        "FP8_PERCHANNEL": (
            quantizers.fp8_row,
            compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None),
        ),
        "MXFP8": (
            quantizers.mxfp8,
            {"quant_method": "mxfp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 32], **fp8},
        ),
        "RAWINT4": (
            quantizers.pack_quantized,
            compressed_tensors("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        ),
        "GPTQ_INT4": (partial(quantizers.gptq, group=group), {"sym": True, **gptq}),
        "GPTQ_INT4:zeros": (partial(quantizers.gptq, group=group, asymmetric=True), {"sym": False, **gptq}),
        "AWQ": (
            partial(quantizers.awq, group=group),
            {"quant_method": "awq", "version": "gemm", "zero_point": True, **bits},
        ),
        "MXFP4": (
            quantizers.mxfp4,
            {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128], **fp8},
        ),
        "MXFP4:fused": (quantizers.mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": NOT_EXPERTS}),
        "NVFP4": (quantizers.nvfp4, {"group_size": 16, "ignore": NOT_EXPERTS, **modelopt}),
    }
    if form not in table:
        raise ValueError(f"format {form} is unknown; use one of {', '.join(table)}, LLAMAFILE:TYPE, AMXINT8:PARTS.")
    rename = {"MXFP4": deepseek_v4, "MXFP4:fused": gpt_oss}.get(form, beside_the_weight)
    return SafetensorsFormat(*table[form], rename)


class Shards:
    """Safetensors files, a known number of them, and their index."""

    def __init__(self, folder: Path, num_files: int) -> None:
        self._folder = folder
        self._num_files = num_files
        self._weight_map: dict[str, str] = {}
        self._number = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write one file, with the index after the last."""
        self._number += 1
        file = f"model-{self._number:05d}-of-{self._num_files:05d}.safetensors"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, self._folder / file, {"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, file)
        if self._number == self._num_files:
            index = {"metadata": {}, "weight_map": self._weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _copy_files(model: Model, folder: Path, quantization: dict[str, Any] | None) -> None:
    """Tokenizer and config, which says how the experts are quantized."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.folder.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copy2(path, folder)
    config = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_safetensors(model: Model, folder: Path, form: str) -> Iterator[dict[str, Tensor]]:
    """All tensors; yields dequantized weights layer by layer."""
    kind = safetensors_format(form, model.group)
    _copy_files(model, folder, kind.config)
    shards = Shards(folder, len(model.names) + 1)
    for layer in sorted(model.names):
        written = kind.layer(model, layer)
        shards.add(written.tensors)
        yield written.values
    shards.add(model.tensors(model.others))


def _write_gguf(model: Model, folder: Path, kind: str, ggml: Path | None) -> Iterator[dict[str, Tensor]]:
    """experts.gguf; yields dequantized weights layer by layer, and is written when all are."""
    from gguf import GGMLQuantizationType, GGUFWriter

    folder.mkdir(parents=True, exist_ok=True)
    sizes = model.sizes
    num_layers = sizes.num_hidden_layers or 1 + max(model.names)
    arch = ARCHITECTURES.get(sizes.model_type, sizes.model_type.replace("_", ""))
    writer = GGUFWriter(folder / "experts.gguf", arch)
    writer.add_block_count(num_layers)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_expert_feed_forward_length(sizes.intermediate_size)
    writer.add_expert_count(sizes.num_experts)
    writer.add_expert_used_count(sizes.top_k)
    for layer, names in sorted(model.names.items()):
        weights = model.tensors(list(names.values()))
        values = {}
        for projection, asked in zip(PROJECTIONS, gguf_quantizers.types_of_layer(kind, layer, num_layers), strict=True):
            matrices = [names[expert, projection] for expert in range(sizes.num_experts)]
            found = gguf_quantizers.type_for(asked, weights[matrices[0]].shape[1])
            results = [gguf_quantizers.quantize(weights[name], found, ggml) for name in matrices]
            blocks = torch.stack([result.tensors["blocks"] for result in results]).numpy()
            name = f"blk.{layer}.ffn_{projection}_exps.weight"
            writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[found])
            values |= dict(zip(matrices, (result.value for result in results), strict=True))
        yield values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_kt(model: Model, folder: Path, bits: int, parts: int) -> Iterator[dict[str, Tensor]]:
    """A ``.kt`` tree and config.json; yields dequantized weights layer by layer."""
    sys.path.insert(0, str(ROOT / "tests/python"))
    import kt_files

    _copy_files(model, folder, None)
    for layer, names in sorted(model.names.items()):
        weights = model.tensors(list(names.values()))
        values = {}
        for (expert, projection), name in names.items():
            decoded = []
            for part in range(parts):
                matrix = kt_files.part_of(weights[name].float().numpy(), projection, part, parts)
                codes, scale = kt_files.quantize(matrix, bits)
                target = folder / f"_layer_{layer}/_numa_{part}"
                target.mkdir(parents=True, exist_ok=True)
                for kind, content in (("quant", kt_files.pack(codes, bits)), ("scale", scale.tobytes())):
                    file = f"INT{bits}_{projection}_{expert}_{len(content)}Byte_{kind}_.kt"
                    (target / file).write_bytes(content)
                decoded.append(codes * (scale * np.float32(1 if bits == 8 else 16))[:, None])
            values[name] = torch.from_numpy(np.concatenate(decoded, axis=1 if projection == "down" else 0))
        yield values


def write_format(source: Path, folder: Path, form: str, *, twin: Path | None = None, peers: Path | None = None) -> Path:
    """Write the model of `source` in a format; returns what ``--kt-weight-path`` takes.

    Parameters
    ----------
    source : Path
        Checkpoint in floats.
    folder : Path
        Made.
    form : str
        As on the command line.
    twin : Path, optional
        Folder for the dequantized model.
    peers : Path, optional
        Folder of the peers' environments, for types that only ggml quantizes.

    Raises
    ------
    ValueError
        An unknown format, a model with tensors of several experts, sizes that the format cannot have.
    """
    model = Model(source)
    kind, _, variant = form.partition(":")
    if kind == "LLAMAFILE":
        layers = _write_gguf(model, folder, variant, gguf_quantizers.find_ggml(peers))
    elif kind in ("AMXINT4", "AMXINT8"):
        layers = _write_kt(model, folder, int(kind[-1]), int(variant or 1))
    else:
        layers = _write_safetensors(model, folder, form)
    shards = None
    if twin is not None:
        _copy_files(model, twin, None)
        shards = Shards(twin, len(model.names) + 1)
    for values in layers:
        if shards is not None:
            shards.add({name: value.to(torch.bfloat16) for name, value in values.items()})
    if shards is not None:
        shards.add(model.tensors(model.others))
    return folder


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a BF16 checkpoint")
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--format", required=True, help="see above")
    parser.add_argument("--twin", type=Path, help="folder to make for the dequantized model")
    parser.add_argument("--peers", type=Path, help="folder of `python -m kt_kernel.bench peers --install`")
    args = parser.parse_args()
    try:
        write_format(args.model, args.folder, args.format, twin=args.twin, peers=args.peers)
    except ValueError as error:
        print(f"write_formats.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

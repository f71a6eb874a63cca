"""Tiny models in every format of scripts/write_formats.py, and the dequantized twin of each."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import models
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from write_formats import write_format  # noqa: E402

# Rows of 256, so that every type of GGUF has whole blocks, in both layers.
MODEL = dataclasses.replace(models.QWEN3_MOE, name="qwen3_moe_256", intermediate_size=256, num_layers=2)


class Form(NamedTuple):
    """A format of write_formats.py, the method that keeps its codes, and the weight formats of w13 and of w2 then.

    `is_exact` says whether bf16 holds all of its values.
    """

    name: str
    method: str
    kept: tuple[str, str]
    is_exact: bool = False


FORMS = (
    Form("FP8", "FP8", ("fp8f", "fp8f")),
    Form("FP8_PERCHANNEL", "FP8_PERCHANNEL", ("fp8f", "fp8f")),
    Form("MXFP8", "MXFP8", ("fp8", "fp8"), is_exact=True),
    Form("RAWINT4", "RAWINT4", ("int4", "int4")),
    Form("GPTQ_INT4", "GPTQ_INT4", ("int4h", "int4h")),
    Form("GPTQ_INT4:zeros", "GPTQ_INT4", ("int4z", "int4z")),
    Form("AWQ", "AWQ", ("int4z", "int4z")),
    Form("MXFP4", "MXFP4", ("fp4", "fp4"), is_exact=True),
    Form("MXFP4:fused", "MXFP4", ("fp4", "fp4"), is_exact=True),
    Form("NVFP4", "NVFP4", ("fp4c", "fp4c")),
    Form("AMXINT8:1", "AMXINT8", ("int8", "int8")),
    Form("AMXINT8:2", "AMXINT8", ("int8", "int8f")),
    Form("AMXINT4:1", "AMXINT4", ("int4f", "int4f")),
    Form("AMXINT4:2", "AMXINT4", ("int4f", "int4f")),
    Form("LLAMAFILE:Q4_0", "LLAMAFILE", ("int4h", "int4h")),
    Form("LLAMAFILE:Q4_1", "LLAMAFILE", ("int4m", "int4m")),
    Form("LLAMAFILE:Q5_0", "LLAMAFILE", ("int5h", "int5h")),
    Form("LLAMAFILE:Q5_1", "LLAMAFILE", ("int5m", "int5m")),
    Form("LLAMAFILE:Q8_0", "LLAMAFILE", ("int8h", "int8h")),
    Form("LLAMAFILE:Q4_K_M", "LLAMAFILE", ("int4km", "int6k")),
    Form("LLAMAFILE:Q6_K/Q6_K/Q5_0", "LLAMAFILE", ("int6k", "int5h")),
    Form("LLAMAFILE:BF16", "LLAMAFILE", ("bf16", "bf16"), is_exact=True),
)


class Pair(NamedTuple):
    """A model in a format, and the BF16 model that it means."""

    folder: Path
    twin: Path


@functools.lru_cache(maxsize=4)
def _tensors_of(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def expert_stacks(folder: Path, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up ``[E, I, H]`` and down ``[E, H, I]`` of a layer of a BF16 folder."""
    tensors = _tensors_of(folder)
    names = zip(*(MODEL.expert_names(layer, expert) for expert in range(MODEL.num_experts)), strict=True)
    gate, up, down = (torch.stack([tensors[name] for name in stack]) for stack in names)
    return gate, up, down


def write_pair(source: Path, folder: Path, form: str) -> Pair:
    """The model of `source` in a format, beside its twin."""
    pair = Pair(folder / "format", folder / "twin")
    write_format(source, pair.folder, form, twin=pair.twin)
    return pair

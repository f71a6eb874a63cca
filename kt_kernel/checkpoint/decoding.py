"""Weights of an expert as floats, whatever checkpoint they are in and however they are encoded there."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from kt_kernel.checkpoint.encodings import FLOAT_SOURCES
from kt_kernel.checkpoint.model_folder import ModelSizes


class ExpertWeights(NamedTuple):
    """One expert: gate and up ``[intermediate_size, hidden_size]``, down ``[hidden_size, intermediate_size]``, CPU."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class SourceReader(Protocol):
    """A checkpoint that gives each matrix as a source and its parts."""

    sizes: ModelSizes

    def source(self, layer: int, expert: int, projection: str) -> tuple[str, list[torch.Tensor]]:
        """Source string and parts (``csrc/format/source.h``) of one matrix."""


def is_float(source: str) -> bool:
    """Whether the only part of a source is its weights in a float type."""
    return source in FLOAT_SOURCES.values()


def expert_weights(checkpoint: SourceReader, layer: int, expert: int) -> ExpertWeights:
    """Weights of one expert, decoded to fp32 where they are quantized, otherwise as they are.

    ``check_layer`` of the checkpoint must have been called; errors are those of ``source``.
    """
    hidden, inter = checkpoint.sizes.hidden_size, checkpoint.sizes.intermediate_size
    found = []
    for projection in ExpertWeights._fields:
        source, parts = checkpoint.source(layer, expert, projection)
        n, k = (hidden, inter) if projection == "down" else (inter, hidden)
        found.append(parts[0] if is_float(source) else torch.ops.kt_kernel.decode_source(parts, source, n, k))
    return ExpertWeights(*found)

"""What every reader of experts gives, which reader a folder needs, and weights as floats whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from kt_kernel.checkpoint.encodings import FLOAT_SOURCES
from kt_kernel.checkpoint.gguf import GgufCheckpoint, is_gguf
from kt_kernel.checkpoint.kt_folder import KtFolder, is_kt_folder
from kt_kernel.checkpoint.model_folder import ModelSizes
from kt_kernel.checkpoint.reader import Checkpoint


class ExpertWeights(NamedTuple):
    """One expert: gate and up ``[intermediate_size, hidden_size]``, down ``[hidden_size, intermediate_size]``, CPU."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


PROJECTIONS = ExpertWeights._fields


class SourceReader(Protocol):
    """Experts in files, indexed by layer; each matrix is a source and its parts (``csrc/format/source.h``)."""

    folder: Path  # what was opened: a folder or a file
    root: Path  # folder that the names of files() begin in
    sizes: ModelSizes

    @property
    def layers(self) -> list[int]:
        """Indices of the layers with experts, ascending."""

    @property
    def typical_layer(self) -> int:
        """A layer whose experts are as most are."""

    def describe(self) -> str:
        """What the experts are, in words."""

    def files(self, layer: int) -> list[str]:
        """Names of the files that hold experts of a layer, ascending."""

    def expert_bytes(self, layer: int) -> int:
        """Bytes one expert of a layer takes in the files."""

    def check_layer(self, layer: int) -> None:
        """Refuse, with one sentence, a layer that is not there, or tensors of other shapes and types than are read."""

    def source(self, layer: int, expert: int, projection: str) -> tuple[str, list[torch.Tensor]]:
        """Source string and parts of one matrix; :meth:`check_layer` must have been called."""

    def biases(self, layer: int, expert: int) -> list[torch.Tensor] | None:
        """Biases of gate, up and down of one expert, a vector each; None where there are none."""

    def tensor_name(self, layer: int, expert: int, projection: str) -> str:
        """Name in the files of ``gate``, ``up`` or ``down`` of an expert, for messages."""

    def close(self) -> None:
        """Let go of the files; views of them stay valid, and the next use opens them again."""


def open_checkpoint(folder: Path, method: str) -> SourceReader:
    """The reader of what a folder holds: safetensors of a model, GGUF files, or experts converted by kt-kernel.

    Parameters
    ----------
    folder : Path
        From :func:`resolve_folder`.
    method : str
        The method it is opened for, which only converted experts must be of.

    Raises
    ------
    ValueError
        What is wrong with it, in one sentence.
    """
    if is_gguf(folder):
        return GgufCheckpoint(folder)
    if is_kt_folder(folder):
        return KtFolder(folder, method)
    return Checkpoint(folder)


def is_float(source: str) -> bool:
    """Whether the only part of a source is its weights in a float type."""
    return source in FLOAT_SOURCES.values()


def matrix_shape(sizes: ModelSizes, projection: str) -> tuple[int, int]:
    """Rows and columns of gate, up or down."""
    hidden, inter = sizes.hidden_size, sizes.intermediate_size
    return (hidden, inter) if projection == "down" else (inter, hidden)


def matrix_weights(reader: SourceReader, layer: int, expert: int, projection: str) -> torch.Tensor:
    """One matrix, decoded to fp32 where it is quantized, otherwise as it is; errors are those of ``source``."""
    source, parts = reader.source(layer, expert, projection)
    if is_float(source):
        return parts[0]
    try:
        return torch.ops.kt_kernel.decode_source(parts, source, *matrix_shape(reader.sizes, projection))
    except RuntimeError as error:
        name = reader.tensor_name(layer, expert, projection)
        raise ValueError(f"{name} of {reader.folder} cannot be decoded: {error}") from error


def expert_weights(reader: SourceReader, layer: int, expert: int) -> ExpertWeights:
    """Every matrix of one expert, as :func:`matrix_weights` gives it."""
    return ExpertWeights(*(matrix_weights(reader, layer, expert, projection) for projection in PROJECTIONS))


def expert_biases(reader: SourceReader, layer: int, expert: int) -> list[torch.Tensor] | None:
    """Biases of one expert as the reader gives them; None as well where all are 0, which some quantizers add."""
    biases = reader.biases(layer, expert)
    return biases if biases is not None and any(bool(bias.any()) for bias in biases) else None

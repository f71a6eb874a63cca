"""Checkpoints: which tensors are experts in every supported model family, and how they are encoded."""

from kt_kernel.checkpoint.encodings import FLOAT_SOURCES
from kt_kernel.checkpoint.kt_folder import is_kt_folder
from kt_kernel.checkpoint.model_folder import (
    ModelSizes,
    describe_layers,
    model_activation,
    model_sizes,
    read_config,
    resolve_folder,
)
from kt_kernel.checkpoint.reader import Checkpoint
from kt_kernel.checkpoint.source_reader import (
    PROJECTIONS,
    ExpertWeights,
    SourceReader,
    expert_biases,
    expert_weights,
    is_float,
    matrix_shape,
    matrix_weights,
    open_checkpoint,
)

__all__ = [
    "FLOAT_SOURCES",
    "PROJECTIONS",
    "Checkpoint",
    "ExpertWeights",
    "ModelSizes",
    "SourceReader",
    "describe_layers",
    "expert_biases",
    "expert_weights",
    "is_float",
    "is_kt_folder",
    "matrix_shape",
    "matrix_weights",
    "model_activation",
    "model_sizes",
    "open_checkpoint",
    "read_config",
    "resolve_folder",
]

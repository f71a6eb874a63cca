"""Hugging Face checkpoints: which tensors are experts in every supported model family, and how they are encoded."""

from kt_kernel.checkpoint.decoding import ExpertWeights, expert_weights, is_float
from kt_kernel.checkpoint.model_folder import ModelSizes, describe_layers, model_sizes, read_config, resolve_folder
from kt_kernel.checkpoint.reader import Checkpoint

__all__ = [
    "Checkpoint",
    "ExpertWeights",
    "ModelSizes",
    "describe_layers",
    "expert_weights",
    "is_float",
    "model_sizes",
    "read_config",
    "resolve_folder",
]

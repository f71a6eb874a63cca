"""The lines in the log that prove CPU experts are in use: one after loading, one after the first forward."""

from __future__ import annotations

import logging
import re
from typing import Any

from kt_kernel import _ext
from kt_kernel.integrations.sglang import layers, memory

logger = logging.getLogger(__name__)

_num_moe_layers = 0
_first_forward_reported = False


def after_load_model(_result: None, model_runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """Log what was loaded, on the rank that holds the experts.

    Raises
    ------
    RuntimeError
        A layer was wrapped whose experts are not all loaded.
    """
    global _num_moe_layers
    methods = methods_with_experts()
    if model_runner.is_draft_worker or not methods:
        return
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    _num_moe_layers = sum(isinstance(module, FusedMoE) for module in model_runner.model.modules())
    for method in methods:
        if method.wrapper.moe is None or not method.wrapper.moe.layer.loaded:
            raise RuntimeError(
                f"kt_kernel: layer {method.kt_config.layer_idx} was wrapped but its experts were not loaded; this "
                "release of SGLang loads weights in another way than the ones tested."
            )
    logger.info("kt_kernel loaded: %s", describe(methods))


def after_forward(_result: Any, _model_runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """Log the counters once, after the first forward that computed experts here."""
    global _first_forward_reported
    if _first_forward_reported:
        return
    methods = methods_with_experts()
    counts = [_rows(method) for method in methods]
    if not any(counts):
        return
    _first_forward_reported = True
    active = sum(rows > 0 for rows in counts)
    logger.info(
        "kt_kernel active: %s; first forward computed %d rows in %d layers", describe(methods), sum(counts), active
    )


def describe(methods: list[Any]) -> str:
    """Return layers, experts on CPU and GPU, method, ISA, nodes, threads and GB as text."""
    on_device = sum(method.num_gpu_experts for method in methods)
    on_cpu = sum(method.global_num_experts for method in methods) - on_device
    first = methods[0].wrapper
    engine = first.cpu_infer
    features = _ext.cpu_features()
    num_bytes = sum(experts.bytes for method in methods for experts in all_experts(method))
    return (
        f"{len(methods)}/{_num_moe_layers} MoE layers, {on_cpu} experts on CPU + {on_device} on GPU"
        f"{_device_note(methods)}, {first.method}, {features['tier']} ({_short_names(features['chosen'])}), "
        f"{_count(engine.num_nodes, 'node')}, {_count(engine.num_threads, 'thread')}, {memory.gigabytes(num_bytes)} GB"
    )


def methods_with_experts() -> list[Any]:
    """Return the wrapped methods of this process that have experts: those of its first tensor-parallel rank."""
    return [method for method in layers.wrapped_methods() if method.wrapper is not None]


def all_experts(method: Any) -> list[Any]:
    """Return a layer's experts on the CPU: the CPU's own, and the device's where there is no device."""
    device = getattr(method, "kt_device_experts", None)
    return [method.wrapper.moe] + ([device] if device is not None else [])


def _rows(method: Any) -> int:
    return sum(experts.counters()["rows"] for experts in all_experts(method))


def _device_note(methods: list[Any]) -> str:
    if any(getattr(method, "kt_device_experts", None) is not None for method in methods):
        return " (no GPU here: computed on the CPU in bf16)"
    return ""


def _short_names(chosen: str) -> str:
    names = chosen.split()
    short = [name.removeprefix("avx512") for name in names if re.match("avx512.|amx", name)]
    return " ".join(short or names)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

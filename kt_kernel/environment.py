"""Whether the KT_* environment variables have values that can be used, before anything reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from kt_kernel import _ext, config


def _check_gemm() -> None:
    try:
        _ext.explain_kernels("int8_n64k4_v1")
    except RuntimeError:
        _ext.explain_kernels("bf16_n64k2_v1")  # a CPU may have the one without the other: the layer refuses its own


def _check_driver() -> None:
    value = os.environ["KT_CUDA_DRIVER"]
    if "/" in value and not Path(value).is_file():
        raise ValueError("KT_CUDA_DRIVER names no file; unset it, or give the path of libcuda.so.1.")


def _check_number(name: str, high: int, *, whole: bool, kind: str) -> None:
    value = os.environ[name]
    try:
        # Python reads spaces, underscores and digits of other scripts as well; C++, which reads it again, does not
        number = float(value) if set(value) <= set("0123456789" if whole else "0123456789.eE+-") else -1
    except ValueError:
        number = -1
    if not 0 <= number <= high:
        raise ValueError(f"{name}={value!r} is no number of {kind} from 0 to {high}; unset it for the default.")


def _check_signal() -> None:
    value = os.environ["KT_CUDA_SIGNAL"]
    if value not in ("doorbell", "hostfunc"):
        raise ValueError(f"KT_CUDA_SIGNAL={value!r} is no way to signal; unset it, or use doorbell or hostfunc.")


def _check_found() -> None:
    value = os.environ["KT_CUDA_SIGNAL_FOUND"]
    if not re.fullmatch(r"\d+=(doorbell|hostfunc)(,\d+=(doorbell|hostfunc))*", value):
        raise ValueError(f"KT_CUDA_SIGNAL_FOUND={value!r} was not set by kt_kernel; unset it, or set KT_CUDA_SIGNAL.")


# By name; called where the variable is set. The limits of those that C++ reads are those of its code.
CHECKS: dict[str, Callable[[], object]] = {
    "KT_NUM_THREADS": config.default_num_threads,
    "KT_NUMA_NODES": config.default_numa_nodes,
    "KT_HOST_ALL_EXPERTS": config.host_all_experts,
    "KT_METHOD": config.default_method,
    "KT_EXPERT_COUNTS": lambda: config.record_path(os.environ["KT_EXPERT_COUNTS"], "KT_EXPERT_COUNTS"),
    "KT_LOG_LEVEL": config.log_level,
    "KT_FORCE_ISA": _ext.cpu_features,
    "KT_GEMM": _check_gemm,
    "KT_DETERMINISTIC": lambda: _ext.explain_kernels("int4_n64k8_v1"),
    "KT_SPIN_US": lambda: _check_number("KT_SPIN_US", 1_000_000, whole=True, kind="microseconds"),
    "KT_CUDA_DRIVER": _check_driver,
    "KT_CUDA_SIGNAL": _check_signal,
    "KT_CUDA_SIGNAL_FOUND": _check_found,
    "KT_CUDA_SPIN_MS": lambda: _check_number("KT_CUDA_SPIN_MS", 31_536_000, whole=False, kind="milliseconds"),
    "KT_SYNC_TIMEOUT": lambda: _check_number("KT_SYNC_TIMEOUT", 31_536_000, whole=False, kind="seconds"),
}


def wrong_values() -> dict[str, str]:
    """Set KT_* variables whose value cannot be used: name, and one sentence without paths."""
    wrong = {}
    for name, check in CHECKS.items():
        if os.environ.get(name):
            try:
                check()
            except (ValueError, RuntimeError) as error:
                wrong[name] = str(error)
    return wrong

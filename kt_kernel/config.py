"""Sizes of a layer and of its engine, and every KT_* environment variable."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kt_kernel.activations import SILU, Activation

logger = logging.getLogger("kt_kernel")


@dataclass(frozen=True)
class EnvironmentVariable:
    """One row of the README's table of environment variables; `is_path`: its value may hold the name of a user."""

    name: str
    default: str
    read_in: str
    effect: str
    is_path: bool = False


ENVIRONMENT: tuple[EnvironmentVariable, ...] = (
    EnvironmentVariable(
        "KT_NUM_THREADS",
        "usable physical cores",
        "kt_kernel/config.py",
        "threads of the worker pool where --kt-cpuinfer is not given",
    ),
    EnvironmentVariable(
        "KT_NUMA_NODES",
        "the first --kt-threadpool-count nodes",
        "kt_kernel/config.py",
        "comma separated ids of the NUMA nodes to use, e.g. `0,2`, where numa_nodes is not given",
    ),
    EnvironmentVariable(
        "KT_HOST_ALL_EXPERTS",
        "0",
        "kt_kernel/config.py",
        "1: experts on the GPU are loaded on the CPU as well, so that placement can change without reading weights",
    ),
    EnvironmentVariable(
        "KT_METHOD",
        "BF16",
        "kt_kernel/config.py",
        "method of `kt_kernel.integrations.transformers` where `register()` names none",
    ),
    EnvironmentVariable(
        "KT_EXPERT_COUNTS",
        "no record",
        "kt_kernel/integrations/sglang/expert_counts.py",
        "file to record in how often each expert is chosen; `--kt-record-expert-counts` sets it",
        is_path=True,
    ),
    EnvironmentVariable(
        "KT_LOG_LEVEL",
        "the level of Python's root logger",
        "kt_kernel/config.py",
        "level of the logger `kt_kernel`: DEBUG, INFO, WARNING or ERROR",
    ),
    EnvironmentVariable(
        "KT_FORCE_ISA",
        "everything the CPU has",
        "csrc/base/cpu_features.cpp",
        "highest instruction set tier (reference, avx2, avx512, amx) and removed features, e.g. `avx512,-vnni`",
    ),
    EnvironmentVariable(
        "KT_GEMM",
        "auto",
        "csrc/kernels/registry.cpp",
        "whose GEMM kernels run: `native` (ours), `onednn` (torch's oneDNN for int8 and bf16 weights) or `auto` (ours; "
        "on AMX the faster of both, timed at the start)",
    ),
    EnvironmentVariable(
        "KT_DETERMINISTIC",
        "0",
        "csrc/kernels/registry.cpp",
        "`1`: a token's result never depends on the tokens beside it, at the price of AMX for bf16 weights, "
        "int4 in groups below 128 or of no multiple of 64, fp8 and all other codes of files, and of the faster way of "
        "fp8 for many rows",
    ),
    EnvironmentVariable(
        "KT_SPIN_US",
        "chosen from the number of free cores",
        "csrc/system/worker_pool.cpp",
        "microseconds an idle worker spins before it sleeps",
    ),
    EnvironmentVariable(
        "KT_CUDA_DRIVER",
        "`libcuda.so.1`",
        "csrc/runtime/cuda_driver.cpp",
        "path of the CUDA driver's library (the tests' double: build/test/libfake_cuda.so)",
        is_path=True,
    ),
    EnvironmentVariable(
        "KT_CUDA_SIGNAL",
        "`doorbell` where a probe finds it working",
        "csrc/runtime/cuda_sync.cpp, kt_kernel/device_stream/__init__.py",
        "how a GPU's stream calls the CPU experts: `doorbell` (memory words) or `hostfunc` (host functions)",
    ),
    EnvironmentVariable(
        "KT_CUDA_SIGNAL_FOUND",
        "set by the first process that probes a device",
        "csrc/runtime/cuda_sync.cpp, kt_kernel/device_stream/__init__.py",
        "what probes found, as `0=doorbell,1=hostfunc`, for the processes it starts; not to be set by hand",
    ),
    EnvironmentVariable(
        "KT_CUDA_SPIN_MS",
        "20",
        "csrc/runtime/cuda_sync.cpp",
        "milliseconds one CPU thread polls for the next layer before it sleeps (doorbell)",
    ),
    EnvironmentVariable(
        "KT_SYNC_TIMEOUT",
        "300",
        "csrc/runtime/cuda_sync.cpp",
        "seconds a GPU waits for one layer's CPU experts before it is let go with an error; 0: for ever",
    ),
    EnvironmentVariable(
        "KT_DEMO_DIR",
        "`.demo` in the clone",
        "scripts/quickstart.sh",
        "folder of the demo model and its converted experts",
        is_path=True,
    ),
    EnvironmentVariable(
        "KT_TORCH_VERSION",
        "2.13.0",
        "setup.py, install.sh",
        "torch version to build against and to install (build time only)",
    ),
    EnvironmentVariable(
        "KT_SGLANG_VERSION",
        "0.5.18",
        "install.sh",
        "SGLang version to install (build time only)",
    ),
    EnvironmentVariable(
        "KT_BUILD_DIR",
        "a folder that is deleted after the build",
        "setup.py",
        "where CMake keeps the extension's objects, so that the next build is incremental (build time only)",
        is_path=True,
    ),
    EnvironmentVariable(
        "KT_GPU_CHECK_FOLDER",
        "`build/gpu-check`",
        "tests/gpu/test_gpu.py",
        "where the GPU tests leave their digests; `scripts/gpu_check.sh` sets it (tests only)",
        is_path=True,
    ),
    EnvironmentVariable(
        "KT_TEST_SGLANG_PYTHONS",
        "none",
        "tests/python/test_sglang_cuda_host.py",
        "colon separated interpreters of further SGLang releases that the hooks are tried on (tests only)",
        is_path=True,
    ),
    EnvironmentVariable(
        "KT_TEST_SGLANG_FOLDERS",
        "none",
        "tests/python/test_scaling_sources.py",
        "colon separated folders of further SGLang releases whose model classes are read (tests only)",
        is_path=True,
    ),
)


def _read(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or None


def default_num_threads() -> int:
    """Threads to use where the caller names none: ``KT_NUM_THREADS``, else 0 (= usable physical cores).

    Raises
    ------
    ValueError
        The variable is no positive integer.
    """
    value = _read("KT_NUM_THREADS")
    if value is None:
        return 0
    if not value.isdigit() or int(value) == 0:
        raise ValueError(f"KT_NUM_THREADS={value!r} is no positive number of threads; unset it or give e.g. 16.")
    return int(value)


def default_numa_nodes() -> tuple[int, ...]:
    """Node ids to use where the caller names none: ``KT_NUMA_NODES``, else empty (= the first nodes).

    Raises
    ------
    ValueError
        The variable is no comma separated list of node ids, or names a node twice or one that cannot be used.
    """
    value = _read("KT_NUMA_NODES")
    if value is None:
        return ()
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdigit() for word in words):
        raise ValueError(f"KT_NUMA_NODES={value!r} is no comma separated list of node ids; give e.g. 0,1.")
    nodes = tuple(int(word) for word in words)
    if len(set(nodes)) != len(nodes):
        raise ValueError(f"KT_NUMA_NODES={value!r} repeats a node; give each node once.")
    check_nodes(nodes, f"KT_NUMA_NODES={value!r}")
    return nodes


def check_nodes(nodes: Sequence[int], source: str) -> None:
    """Check that this process may use NUMA nodes.

    Parameters
    ----------
    nodes : sequence of int
        Ids.
    source : str
        What names them, for the message.

    Raises
    ------
    ValueError
        A node that is not there, or outside the process's affinity.
    """
    from kt_kernel import _ext

    usable = [node["id"] for node in _ext.topology()["nodes"]]
    for node in nodes:
        if node not in usable:
            raise ValueError(
                f"{source} names node {node}, but this process may use {', '.join(map(str, usable))}; name only usable "
                "nodes."
            )


def host_all_experts() -> bool:
    """Whether experts on the GPU are loaded on the CPU as well: ``KT_HOST_ALL_EXPERTS``.

    Raises
    ------
    ValueError
        The variable is neither 0 nor 1.
    """
    value = _read("KT_HOST_ALL_EXPERTS") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"KT_HOST_ALL_EXPERTS={value!r} is neither 0 nor 1; unset it or give 1.")
    return value == "1"


def default_method() -> str:
    """Method for experts of other programs than SGLang, which names one: ``KT_METHOD``, else BF16.

    Raises
    ------
    ValueError
        The variable names no method, or one that only keeps the codes of files.
    """
    from kt_kernel.methods import get_float_method

    value = _read("KT_METHOD")
    try:
        return "BF16" if value is None else get_float_method(value).name
    except ValueError as error:
        raise ValueError(f"KT_METHOD: {error}") from None


def record_path(value: str, source: str) -> Path:
    """Return the absolute path of the file to record expert counts in.

    Parameters
    ----------
    value : str
        As given.
    source : str
        What gives it, for the message.

    Raises
    ------
    ValueError
        Empty, a folder, or in no folder that exists.
    """
    path = Path(value).expanduser().absolute()
    if not value.strip():
        raise ValueError(f"{source} is empty; give a file.")
    if path.is_dir():
        raise ValueError(f"{source} is a folder; give a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"{source} is in a folder that does not exist; make it first.")
    return path


def usable_cpus() -> int:
    """Logical CPUs this process may use: those of its affinity, cut to the CPU time its cgroups grant, at least 1."""
    from kt_kernel import _ext

    topology = _ext.topology()
    cpus = sum(len(node["cpus"]) for node in topology["nodes"])
    return max(1, min(cpus, int(topology["cpu_quota"] or cpus)))


def log_level() -> int | None:
    """Level of the logger ``kt_kernel``: ``KT_LOG_LEVEL``, None where it is unset.

    Raises
    ------
    ValueError
        The variable names no level.
    """
    value = _read("KT_LOG_LEVEL")
    if value is None:
        return None
    level = logging.getLevelName(value.upper())
    if not isinstance(level, int):
        raise ValueError(f"KT_LOG_LEVEL={value!r} is no level; use DEBUG, INFO, WARNING or ERROR.")
    return level


def apply_log_level() -> None:
    """Set the level of the logger ``kt_kernel`` to :func:`log_level`; does nothing where that is None."""
    level = log_level()
    if level is not None:
        logger.setLevel(level)


def unknown_variables() -> list[str]:
    """Names of set KT_* variables that no part of this package reads, ascending."""
    known = {variable.name for variable in ENVIRONMENT}
    return sorted(name for name in os.environ if name.startswith("KT_") and name not in known)


def environment_table() -> str:
    """The table of the README: Variable, Default, Read in, Effect."""
    rows = ["| Variable | Default | Read in | Effect |", "|---|---|---|---|"]
    rows += [f"| `{v.name}` | {v.default} | {v.read_in} | {v.effect} |" for v in ENVIRONMENT]
    return "\n".join(rows)


# Widths of a layer: the kernels work on whole vectors (csrc/moe/moe_config.cpp refuses others, too, but only when the
# layer is made, after the model's other weights have been read).
SIZE_MULTIPLE = 16


def is_count(value: object) -> bool:
    """Whether a value is an integer number (bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and activation of one MoE layer (mirrors ``csrc/moe/moe_config.h``).

    Attributes
    ----------
    layer_idx : int
        Index of the layer in the model, dense layers counted; for names and messages.
    num_experts : int
        Experts the router chooses from, those on the GPU included.
    top_k : int
        Experts a token is sent to.
    hidden_size, intermediate_size : int
        gate and up are ``[intermediate_size, hidden_size]``, down is ``[hidden_size, intermediate_size]``.
    activation : Activation
        What stands between them.

    Raises
    ------
    ValueError
        A size below 1, a width the kernels cannot compute, or top_k above num_experts.
    """

    layer_idx: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = SILU

    def __post_init__(self) -> None:
        if not is_count(self.layer_idx) or self.layer_idx < 0:
            raise ValueError(f"layer_idx is {self.layer_idx!r}; it must be an integer of at least 0.")
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if not is_count(value) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % SIZE_MULTIPLE:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; the kernels compute multiples of {SIZE_MULTIPLE} only."
                )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, above num_experts = {self.num_experts}; "
                f"a token cannot be sent to more experts than there are."
            )


@dataclass(frozen=True)
class EngineConfig:
    """Threads and NUMA nodes of one worker pool; engines are shared by equal values.

    Attributes
    ----------
    num_threads : int
        Threads over all nodes; 0: the usable physical cores.
    num_nodes : int
        NUMA nodes; 0: all. More than there are: clamped by the pool, with a warning.
    node_ids : tuple of int
        Explicit node ids, in this order; empty: the first ``num_nodes``.
    """

    num_threads: int = 0
    num_nodes: int = 0
    node_ids: tuple[int, ...] = field(default_factory=tuple)

    @staticmethod
    def resolve(
        num_threads: int | None = None,
        num_nodes: int | None = None,
        node_ids: list[int] | tuple[int, ...] | None = None,
    ) -> EngineConfig:
        """Fill what the caller left out from the environment and check the rest.

        Raises
        ------
        ValueError
            A number below 1, a repeated node id, or a list of ids whose length is not ``num_nodes``.
        """
        for name, value in (("cpuinfer_threads", num_threads), ("threadpool_count", num_nodes)):
            if value is not None and (not is_count(value) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1, or None for the default.")
        if node_ids is None:
            ids = default_numa_nodes()
            if ids:
                num_nodes = len(ids)
        else:
            ids = tuple(node_ids)
        if any(not is_count(node) or node < 0 for node in ids):
            raise ValueError(f"numa_nodes is {list(ids)}; node ids are integers of at least 0.")
        if len(set(ids)) != len(ids):
            raise ValueError(f"numa_nodes is {list(ids)}; a node may be named only once.")
        if ids and num_nodes is not None and len(ids) != num_nodes:
            raise ValueError(
                f"numa_nodes names {len(ids)} nodes and threadpool_count is {num_nodes}; give one node id per pool."
            )
        return EngineConfig(
            num_threads=default_num_threads() if num_threads is None else num_threads,
            num_nodes=len(ids) if ids else (num_nodes or 0),
            node_ids=ids,
        )

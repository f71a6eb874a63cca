"""The ``--kt-*`` flags: SGLang's six, and those of its fork that the plug-in adds to stock SGLang.

SGLang drops what its ``ServerArgs`` does not know, so the added flags are turned into SGLang's own, or handed to the
scheduler processes in the environment. The README's table of flags is made from this file, which therefore imports
nothing of the package at its top level.
"""

from __future__ import annotations

import json
import logging
import os
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger("kt_kernel.integrations.sglang.flags")

DEFAULT_STRATEGY = "uniform"
DEFAULT_THREADPOOL_COUNT = 2


@dataclass(frozen=True)
class Flag:
    """One row of the README's table; `options` are those of argparse, for a flag that SGLang does not have itself."""

    name: str
    default: str
    effect: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def attribute(self) -> str:
        """Name in the parsed arguments."""
        return self.name.removeprefix("--").replace("-", "_")


FLAGS = (
    Flag("--kt-weight-path", "required", "folder of a checkpoint or of converted experts, a GGUF file, or a hub id"),
    Flag(
        "--kt-method",
        "`AMXINT4` (SGLang's)",
        "see [Methods](#methods); `AMX` is part of the name, not a requirement",
    ),
    Flag("--kt-cpuinfer", "usable physical cores", "threads of the worker pool, over all nodes"),
    Flag(
        "--kt-threadpool-count",
        "2 (SGLang's)",
        "NUMA nodes to use; clamped to the nodes there are, with a warning",
    ),
    Flag(
        "--kt-num-gpu-experts",
        "0",
        "experts in the slots 0 .. N-1 of each layer are the device's, see [Placement](#placement); without a GPU they "
        "are computed on the CPU from bf16",
    ),
    Flag(
        "--kt-max-deferred-experts-per-token",
        "0",
        "experts of a token whose share may come one MoE layer later, at most all but one, see [Deferral](#deferral); "
        "costs accuracy",
    ),
    Flag(
        "--kt-numa-nodes",
        "the first nodes",
        "ids of the NUMA nodes to use, e.g. `0 2`; as many as `--kt-threadpool-count`, whose default follows them",
        {"type": int, "nargs": "+", "metavar": "NODE"},
    ),
    Flag(
        "--kt-gpu-experts-ratio",
        "none",
        "share of each layer's experts on the device, rounded down; takes the place of `--kt-num-gpu-experts`",
        {"type": float, "metavar": "RATIO"},
    ),
    Flag(
        "--kt-expert-placement-strategy",
        "`uniform`",
        "`uniform`: the same number in each layer; `frequency`: the most used first, with the `--init-expert-location` "
        "file of `python -m kt_kernel.placement`; the fork's other two are refused",
        {"type": str, "metavar": "STRATEGY"},
    ),
    Flag(
        "--kt-record-expert-counts",
        "none",
        "file to record in how often each expert is chosen, see [Placement](#placement)",
        {"type": str, "metavar": "FILE"},
    ),
)
ADDED = tuple(flag for flag in FLAGS if flag.options)


def flags_table() -> str:
    """The table of the README: Flag, Default, Effect."""
    rows = ["| Flag | Default | Effect |", "|---|---|---|"]
    rows += [f"| `{flag.name}` | {flag.default} | {flag.effect} |" for flag in FLAGS]
    rows.append(
        "| `--mem-fraction-static` | 0.9 without a GPU | without a GPU: share of the KV pool's budget, a quarter of "
        "the memory left after the experts |"
    )
    return "\n".join(rows)


def add_cli_args(_result: None, parser: ArgumentParser) -> None:
    """Add our flags to SGLang's, but for those a release has itself."""
    known = parser._option_string_actions
    for flag in ADDED:
        if flag.name not in known:
            # argparse formats the text with %
            text = "kt_kernel: " + flag.effect.replace("`", "").replace("%", "%%")
            parser.add_argument(flag.name, default=None, help=text, **flag.options)


def given(args: Any) -> bool:
    """Whether one of our flags has a value."""
    return any(getattr(args, flag.attribute, None) is not None for flag in ADDED)


def hand_on(args: Any, open_source: Callable[[str, str], Any]) -> None:
    """Turn our flags into SGLang's own, or into environment variables, which the schedulers inherit.

    Parameters
    ----------
    args : Namespace
        Changed in place: ``kt_num_gpu_experts``, ``kt_threadpool_count``.
    open_source : callable
        Gives what ``--kt-weight-path`` holds, from path and method.

    Raises
    ------
    ValueError
        A value that cannot work on stock SGLang; one sentence.
    """
    if not given(args):
        return
    if args.kt_weight_path is None:
        return  # refused for that, with the fix
    strategy = getattr(args, "kt_expert_placement_strategy", None)
    check_strategy(DEFAULT_STRATEGY if strategy is None else strategy, args.init_expert_location)
    nodes = getattr(args, "kt_numa_nodes", None)
    if nodes is not None:
        os.environ["KT_NUMA_NODES"] = numa_nodes_value(nodes, args.kt_threadpool_count)
        args.kt_threadpool_count = len(nodes)
    ratio = getattr(args, "kt_gpu_experts_ratio", None)
    if ratio is not None:
        num_experts = open_source(args.kt_weight_path, args.kt_method).num_experts
        chosen = experts_of_ratio(ratio, num_experts)
        if args.kt_num_gpu_experts not in (None, chosen):
            logger.warning(
                "kt_kernel: --kt-gpu-experts-ratio %g takes the place of --kt-num-gpu-experts %d",
                ratio,
                args.kt_num_gpu_experts,
            )
        logger.info("kt_kernel: --kt-gpu-experts-ratio %g: %d of %d experts of a layer", ratio, chosen, num_experts)
        args.kt_num_gpu_experts = chosen
    record = getattr(args, "kt_record_expert_counts", None)
    if record is not None:
        from kt_kernel.config import record_path

        os.environ["KT_EXPERT_COUNTS"] = str(record_path(record, f"--kt-record-expert-counts {record}".strip()))


def numa_nodes_value(nodes: list[int], threadpool_count: int | None) -> str:
    """Return the value of ``KT_NUMA_NODES`` for ``--kt-numa-nodes``.

    Raises
    ------
    ValueError
        A negative or repeated node, one that this process may not use, or another number of nodes than thread pools.
    """
    from kt_kernel.config import check_nodes

    text = " ".join(map(str, nodes))
    if min(nodes) < 0 or len(set(nodes)) != len(nodes):
        raise ValueError(f"--kt-numa-nodes is {text}; give each node once, by its id of at least 0.")
    if threadpool_count not in (None, DEFAULT_THREADPOOL_COUNT, len(nodes)):
        raise ValueError(
            f"--kt-numa-nodes {text} names {len(nodes)} nodes but --kt-threadpool-count is {threadpool_count}; give "
            "one node per pool, or leave the count out."
        )
    check_nodes(nodes, "--kt-numa-nodes")
    return ",".join(map(str, nodes))


def experts_of_ratio(ratio: float, num_experts: int) -> int:
    """Return how many experts of a layer ``--kt-gpu-experts-ratio`` puts on the device: stock SGLang takes the same
    number in every layer, so the rest of a division is left on the CPU.

    Raises
    ------
    ValueError
        Not from 0 to 1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"--kt-gpu-experts-ratio is {ratio:g}; give a share from 0 to 1.")
    return int(ratio * num_experts + 1e-9)  # 0.3 * 40 is a little more or less than 12


def check_strategy(strategy: str, init_expert_location: str) -> None:
    """Check ``--kt-expert-placement-strategy``.

    Raises
    ------
    ValueError
        Unknown; one that needs another number of experts in each layer, which stock SGLang cannot have; or
        ``frequency`` without a location file.
    """
    from kt_kernel.placement import STRATEGIES

    if strategy not in STRATEGIES:
        raise ValueError(
            f"--kt-expert-placement-strategy is {strategy!r}; give uniform, or frequency with --init-expert-location."
        )
    if strategy == "frequency" and init_expert_location == "trivial":
        raise ValueError(
            "--kt-expert-placement-strategy frequency needs --init-expert-location FILE; make the file with "
            "python -m kt_kernel.placement from the counts of --kt-record-expert-counts."
        )
    if strategy not in (DEFAULT_STRATEGY, "frequency"):
        raise ValueError(
            f"--kt-expert-placement-strategy {strategy} needs another number of experts on the GPU in each layer, "
            "which stock SGLang cannot have; give uniform, or frequency with --init-expert-location."
        )


def check_location(args: Any, num_layers: int | None, num_experts: int) -> None:
    """Check ``--init-expert-location`` against the model, before any weight is read.

    Parameters
    ----------
    args : Namespace or ServerArgs
    num_layers : int or None
        Layers of the served model, dense ones counted; None: not known.
    num_experts : int
        Experts of a layer.

    Raises
    ------
    ValueError
        Not readable, of another size, or no permutation of the experts in some layer.
    """
    value = getattr(args, "init_expert_location", "trivial")
    if value == "trivial":
        return
    import torch

    from kt_kernel.placement.location import MAP_KEY, check_location

    content = _read_location(value)
    if MAP_KEY not in content:
        if "logical_count" in content:
            raise ValueError(
                f"--init-expert-location {value} holds counts, from which SGLang would not put the most used experts "
                f"first; make the file with python -m kt_kernel.placement --counts {value} --output FILE.pt."
            )
        raise ValueError(f"--init-expert-location {value} has no {MAP_KEY}; give a file of kt_kernel.placement.")
    if len(content) > 1:
        others = ", ".join(str(key) for key in content if key != MAP_KEY)
        raise ValueError(
            f"--init-expert-location {value} has {others} beside {MAP_KEY}, which SGLang does not take; give a file of "
            "kt_kernel.placement."
        )
    try:
        check_location(torch.as_tensor(content[MAP_KEY]), num_experts, num_layers)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"--init-expert-location: {error}") from None


def _read_location(value: str) -> dict[str, Any]:
    """Read a location as SGLang does: a .pt or .json file, or JSON itself."""
    from kt_kernel.placement.record import load_saved

    if not value.endswith((".pt", ".json")) and os.path.exists(value):
        raise ValueError(
            f"--init-expert-location {value} must end in .pt or .json, by which SGLang tells the kind of file."
        )
    try:
        if value.endswith(".pt"):
            content = load_saved(Path(value))
        else:
            content = json.loads(Path(value).read_text() if value.endswith(".json") else value)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise ValueError(
            f"--init-expert-location {value[:200]} cannot be read ({reason}); give a .pt or .json file."
        ) from None
    return content if isinstance(content, dict) else {}

"""Whether a peer runs as fast as it was seen to run: a peer that was built or started badly makes our figures too good.

Figures of `catalog` are from one kind of machine, so they are compared there only, and as shares of the limit: what the
limits then allowed over what was seen, beside what the limits of this run allow over what was measured.
"""

from __future__ import annotations

import os
from pathlib import Path

from .catalog import Format
from .layer_data import Sizes

LEAST_SHARE = 0.85
# Limits of that machine by threads: bytes/s, int8 operations/s, bf16 operations/s.
LIMITS = {1: (32.7e9, 468e9, 234e9), 2: (62e9, 936e9, 468e9)}
# Its shape: hidden, intermediate, experts, top-k.
SHAPE = (2048, 768, 128, 8)


def same_machine(cpuinfo: str, cores: int) -> bool:
    """Whether this is a two-core Zen 4 with AVX-512, by /proc/cpuinfo (family 25, models 16 to 31)."""
    found = dict(part for part in (line.split(":", 1) for line in cpuinfo.splitlines()) if len(part) == 2)
    fields = {name.strip(): value.strip() for name, value in found.items()}
    zen4 = fields.get("cpu family") == "25" and 16 <= int(fields.get("model", "0")) <= 31
    return zen4 and cores == 2 and {"avx512_vnni", "avx512_bf16"} <= set(fields.get("flags", "").split())


def figures_hold_here(sizes: Sizes) -> bool:
    """Whether the figures can be compared with this run: the machine and the shape."""
    shape = (sizes.hidden_size, sizes.intermediate_size, sizes.num_experts, sizes.top_k)
    cpuinfo = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return shape == SHAPE and same_machine(cpuinfo, len(os.sched_getaffinity(0)))


def distinct_experts(sizes: Sizes, tokens: int) -> float:
    """Expected number of experts that uniform routing touches."""
    return sizes.num_experts * (1 - (1 - sizes.top_k / sizes.num_experts) ** tokens)


def seen_share(kind: Format, sizes: Sizes, *, threads: int, tokens: int, expert_bytes: float) -> float | None:
    """Share of the limit that the figure of a format stands for; None where there is no figure."""
    figure = kind.figures.get((threads, tokens))
    if figure is None:
        return None
    read, int8, bf16 = LIMITS[threads]
    weight_bytes = distinct_experts(sizes, tokens) * expert_bytes
    operations = 2.0 * tokens * sizes.top_k * sizes.expert_weights
    seconds = weight_bytes / (figure * 1e9) if tokens == 1 else operations / (figure * 1e9)
    return max(weight_bytes / read, operations / (bf16 if kind.bf16_peak else int8)) / seconds


def shortfall(label: str, share: float, seen: float | None) -> str | None:
    """One sentence where a measured share of the limit is below LEAST_SHARE of the one that was seen."""
    if seen is None or share >= LEAST_SHARE * seen:
        return None
    return (
        f"invalid: {label} ran at {share:.2f} of the limit, below {100 * LEAST_SHARE:.0f} % of the {seen:.2f} it was "
        f"seen at on this kind of machine; see that nothing else runs, or install the peer anew."
    )

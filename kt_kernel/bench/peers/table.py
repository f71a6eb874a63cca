"""The result as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(result: dict[str, Any]) -> Iterator[str]:
    """All lines of a result of `command.main`."""
    yield f"{result['machine']}; commit {result['commit'] or 'unknown'}"
    yield f"`{result['command']}`"
    yield (
        f"{result['shape']} (hidden {result['hidden_size']}, intermediate {result['intermediate_size']}, "
        f"{result['num_experts']} experts, top-{result['top_k']}), uniform routing drawn for every pair, medians of "
        f"{result['rounds']} rounds. *of limit*: what the read bandwidth or the register peak of the same round "
        f"allows, whichever takes longer, over what it took. *ours is*: time of the peer over ours of the same "
        f"bits, within a round. Spreads are p90 - p10."
    )
    for run in result["runs"]:
        yield from run_lines(run)


def threads_label(threads: int) -> str:
    """``1 thread`` or ``n threads``."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def run_lines(run: dict[str, Any]) -> Iterator[str]:
    """Tables of one thread count."""
    threads = threads_label(run["threads"])
    yield ""
    yield f"## {threads}"
    yield ""
    yield "; ".join(f"{title} {version}" for title, version in run["versions"].items()) + "."
    yield (
        "Limits in this run: "
        + "; ".join(
            f"{name} {limit['read_gb_per_s']:.1f} GB/s, {limit['peak_gops']:.0f} GOPS"
            for name, limit in run["limits"].items()
        )
        + "."
    )
    for bits in sorted({row["bits"] for row in run["rows"]}):
        yield ""
        yield f"### {bits} bits, {threads}"
        yield ""
        yield (
            "| tokens | tokens/expert | system | format | us | GB/s | of read | GOPS | of peak | of limit | spread | "
            "ours is | spread | error |"
        )
        yield "|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
        yield from (row_line(row) for row in run["rows"] if row["bits"] == bits)
    if run["best"]:
        yield ""
        yield f"### Each peer's best format of equal or more bits, {threads}"
        yield ""
        yield "| our bits | tokens | tokens/expert | peer | its format | ours is |"
        yield "|---:|---:|---:|---|---|---:|"
        yield from (
            f"| {row['bits']} | {row['tokens']} | {row['tokens_per_expert']:.2f} | {row['title']} | {row['format']} | "
            f"{row['ours_faster']:.2f}x |"
            for row in run["best"]
        )
    if run["missing"]:
        yield ""
        yield "| missing | format | why |"
        yield "|---|---|---|"
        yield from (
            f"| {entry['system']} | {entry['format']} | {entry['reason'].replace('|', '/')} |"
            for entry in run["missing"]
        )


def row_line(row: dict[str, Any]) -> str:
    """One line of the table of a number of bits."""
    ratio, ratio_spread = row["ours_faster"], row["ours_faster_spread"]
    faster = " | " if ratio is None else f"{ratio:.2f}x | {ratio_spread:.2f}"
    return (
        f"| {row['tokens']} | {row['tokens_per_expert']:.2f} | {row['title']} | {row['format']} | {row['us']:.0f} | "
        f"{row['gb_per_s']:.1f} | {row['share_of_read']:.2f} | {row['gops']:.0f} | {row['share_of_peak']:.2f} | "
        f"{row['share_of_limit']:.2f} | {row['spread']:.2f} | {faster} | {row['relative_error']:.4f} |"
    )

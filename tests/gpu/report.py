"""Writes docs/gpu-results.md from what ``scripts/gpu_check.sh`` left in its folder: ``report.py FOLDER COMMIT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

WAYS = ("doorbell", "hostfunc")


def main(folder: Path, commit: str) -> None:
    """Print the page.

    Raises
    ------
    SystemExit
        The figures are the test double's, or some are missing.
    """
    figures = {way: json.loads((folder / f"{way}.json").read_text()) for way in WAYS}
    if any(each["is_double"] for each in figures.values()):
        raise SystemExit("these figures are the test double's; docs/gpu-results.md is for hardware only.")
    machine = figures[WAYS[0]]["machine"]
    lines = [
        "# Results on a GPU",
        "",
        f"{machine['date']}, commit {commit}, `scripts/gpu_check.sh`: {machine['gpu']}; {machine['cpu']}, "
        f"{machine['cores']} CPUs, AMX {' '.join(machine['amx']) or 'none'}; torch {machine['torch']}, Linux "
        f"{machine['kernel']}.",
        "",
        *((folder / "steps.txt").read_text().splitlines()),
        "",
        "| | doorbell | host function | wanted |",
        "|---|---|---|---|",
    ]
    pair = [figures[way]["overhead"] for way in WAYS]
    spread = [f"{each['median_us']:.1f} us ({each['p10_us']:.1f}-{each['p90_us']:.1f})" for each in pair]
    lines.append(
        f"| submit + sync of an empty layer, replayed | {spread[0]} | {spread[1]} | {pair[0]['limit_us']} us |"
    )
    hidden = [figures[way]["overlap"] for way in WAYS]
    lines.append(
        f"| CPU time hidden behind a longer GPU side | {hidden[0]['hidden']:.0%} | {hidden[1]['hidden']:.0%} | "
        f"{hidden[0]['limit']:.0%} |"
    )
    lines += [
        "",
        "A Qwen3-30B layer, AMXINT8, eager, milliseconds:",
        "",
        "| share on the GPU | tokens | doorbell | host function |",
    ]
    lines.append("|---|---|---|---|")
    for first, second in zip(*(figures[way]["layer"] for way in WAYS), strict=True):
        lines.append(
            f"| {first['share']:.0%} | {first['tokens']} | {first['median_ms']:.3f} | {second['median_ms']:.3f} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""The picture: share of the limit over tokens per expert, one line a system and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .table import threads_label


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the picture of a result of `command.main`; the suffix of the file decides its kind."""
    from matplotlib.figure import Figure

    runs = result["runs"]
    bits = sorted({row["bits"] for run in runs for row in run["rows"]})
    figure = Figure(figsize=(5 * len(bits), 4.8 * len(runs)), layout="constrained")
    pictures = figure.subplots(len(runs), len(bits), squeeze=False)
    for run, line in zip(runs, pictures, strict=True):
        for width, axes in zip(bits, line, strict=True):
            rows = [row for row in run["rows"] if row["bits"] == width]
            for key in dict.fromkeys((row["system"], row["format"]) for row in rows):
                points = sorted(
                    (row["tokens_per_expert"], row["share_of_limit"], row["title"])
                    for row in rows
                    if (row["system"], row["format"]) == key
                )
                is_ours = key[0].startswith("ours")
                axes.plot(
                    [x for x, _, _ in points],
                    [y for _, y, _ in points],
                    marker="o",
                    linewidth=2.5 if is_ours else 1.2,
                    label=f"{points[0][2]} {key[1]}",
                )
            axes.set(
                title=f"{width} bits, {threads_label(run['threads'])}",
                xlabel="tokens per expert",
                ylim=(0, 1.05),
                xscale="log",
            )
            axes.set_ylabel("share of what the machine allows")
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)  # hides no line
    figure.savefig(file, dpi=150)

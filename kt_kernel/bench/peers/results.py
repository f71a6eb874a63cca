"""From the samples of a run to rows, to each peer's best format, and to whether the run is valid."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kt_kernel.bench import conditions

from . import reference
from .catalog import ours
from .layer_data import Sizes
from .rounds import Run
from .table import threads_label


def percentile(values: Sequence[float], share: float) -> float:
    """Value below which this share of the sorted values lies."""
    return sorted(values)[int(share * (len(values) - 1))]


def spread(values: Sequence[float]) -> float:
    """p90 - p10."""
    return percentile(values, 0.9) - percentile(values, 0.1)


def rows_of(run: Run, sizes: Sizes) -> list[dict[str, Any]]:
    """One row a system, format and token count: medians over rounds.

    ``ours_faster`` is the time of the peer over ours, the median of the ratios within a round.
    """
    rows = []
    for (name, kind, tokens), rounds in run.samples.items():
        system, found = run.systems[name], run.loaded[name][kind]
        samples = [sample for one in rounds for sample in one]
        shares = [sample.share_of_limit for sample in samples]
        ratios = run.ratios.get((name, kind, tokens))
        rows.append(
            {
                "threads": run.threads,
                "system": name,
                "title": system.title,
                "against": ours(system.tier).name,
                "format": kind,
                "bits": found.kind.bits,
                "tokens": tokens,
                "tokens_per_expert": tokens * sizes.top_k / sizes.num_experts,
                "us": 1e6 * statistics.median(s.seconds for s in samples),
                "gb_per_s": statistics.median(s.weight_bytes / s.seconds for s in samples) / 1e9,
                "share_of_read": statistics.median(s.weight_bytes / s.seconds / s.read for s in samples),
                "gops": statistics.median(s.operations / s.seconds for s in samples) / 1e9,
                "share_of_peak": statistics.median(s.operations / s.seconds / s.peak for s in samples),
                "share_of_limit": statistics.median(shares),
                "spread": spread(shares),
                "ours_faster": statistics.median(ratios) if ratios else None,
                "ours_faster_spread": spread(ratios) if ratios else None,
                "relative_error": found.checked.own_error,
                "difference": found.difference,
                "difference_bound": found.difference_bound,
                "expert_bytes": found.expert_bytes,
            }
        )
    return sorted(rows, key=lambda row: (row["bits"], row["tokens"], row["against"], row["system"] != row["against"]))


def best_formats(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of our rows and each peer compared with it: the peer's fastest format of equal or more bits.

    The ratio of the same number of bits is that of the pairs; else that of the medians of the run.
    """
    found = []
    for own in (row for row in rows if row["system"] == row["against"]):
        peers = dict.fromkeys(row["system"] for row in rows if row["against"] == own["system"])
        for peer in peers:
            choices = [
                row
                for row in rows
                if row["system"] == peer and row["tokens"] == own["tokens"] and row["bits"] >= own["bits"]
            ]
            if peer == own["system"] or not choices:
                continue
            best = min(choices, key=lambda row: row["us"])
            same_bits = best["bits"] == own["bits"]
            found.append(
                {
                    "threads": own["threads"],
                    "bits": own["bits"],
                    "tokens": own["tokens"],
                    "tokens_per_expert": own["tokens_per_expert"],
                    "system": peer,
                    "title": best["title"],
                    "format": best["format"],
                    "against": own["system"],
                    "ours_faster": best["ours_faster"] if same_bits else best["us"] / own["us"],
                }
            )
    return found


def limits_of(run: Run) -> dict[str, dict[str, float]]:
    """Medians of the calibration by "system format"."""
    return {
        f"{name} {kind}": {
            "read_gb_per_s": statistics.median(read for read, _ in rounds) / 1e9,
            "peak_gops": statistics.median(peak for _, peak in rounds) / 1e9,
        }
        for (name, kind), rounds in run.limits.items()
    }


def drift(run: Run) -> float:
    """How far the calibration moved: of each round the median over our formats, each against its own median."""
    moved = []
    for which in (0, 1):
        series = [[limit[which] for limit in rounds] for rounds in run.limits.values()]
        scaled = [[value / statistics.median(values) for value in values] for values in series]
        moved.append(conditions.drift([statistics.median(values) for values in zip(*scaled, strict=True)]))
    return max(moved)


def invalid(run: Run, rows: Sequence[dict[str, Any]], sizes: Sizes, *, figures_hold: bool) -> list[str]:
    """Why the run must be thrown away, one sentence each; empty where it need not."""
    found = []
    moved = conditions.refuse_drift(drift(run))
    if moved is not None:
        found.append(f"{threads_label(run.threads)}: {moved}")
    for row in rows if figures_hold else []:
        loaded = run.loaded[row["system"]][row["format"]]
        seen = reference.seen_share(
            loaded.kind, sizes, threads=run.threads, tokens=row["tokens"], expert_bytes=loaded.expert_bytes
        )
        label = f"{row['title']} {row['format']} with {threads_label(run.threads)} and {row['tokens']} tokens"
        sentence = reference.shortfall(label, row["share_of_limit"], seen)
        if sentence is not None:
            found.append(sentence)
    return found


def describe(run: Run, sizes: Sizes, *, figures_hold: bool) -> dict[str, Any]:
    """All of a run, for JSON and the tables."""
    rows = rows_of(run, sizes)
    return {
        "threads": run.threads,
        "versions": {run.systems[name].title: version for name, version in run.versions.items()},
        "limits": limits_of(run),
        "drift": drift(run),
        "rows": rows,
        "best": best_formats(rows),
        "missing": run.missing,
        "wrong": run.wrong,
        "invalid": invalid(run, rows, sizes, figures_hold=figures_hold),
    }

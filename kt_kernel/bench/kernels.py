"""``python -m kt_kernel.bench kernels``: every GEMM row that may run here, beside what one core reads and multiplies.

One thread, its CPU time. Every round measures each row at each m once, next to its two limits:

    share of read = packed bytes of a walk through the buffer / time / bytes a second of the read probe
    share of peak = 2 * m * 64 * k operations a panel / time / operations a second on registers
    hot           = the share of the peak on one panel that stays in the cache

The calibration of a line is the limit that binds it. A line whose calibration moved is measured again, ``--attempts``
times in all; the others stay.

A row of several features is measured against the probes of these features. The probes of int4 are those of int8;
without VNNI an int4 kernel may pass them, for it sums pairs in int16 first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from itertools import product

from kt_kernel import _ext
from kt_kernel.bench import conditions

# What can be measured, by the name of a row of the table.
FORMATS = {
    "int8": "int8_n64k4_v1",
    "int4g32": "int4g32_n64k8_v1",
    "int4g128": "int4g128_n64k8_v1",
    "int4": "int4_n64k8_v1",
    "bf16": "bf16_n64k2_v1",
    # codes of files
    "int8hg32": "int8hg32_n64k4_v1",
    "int8fg128": "int8fg128_n64k4_v1",
    "int6kg16": "int6kg16_n64k16_v1",
    "int5hg32": "int5hg32_n64k8_v1",
    "int5mg32": "int5mg32_n64k8_v1",
    "int5kmg32": "int5kmg32_n64k8_v1",
    "int4hg32": "int4hg32_n64k8_v1",
    "int4hg128": "int4hg128_n64k8_v1",
    "int4fg32": "int4fg32_n64k8_v1",
    "int4zg128": "int4zg128_n64k8_v1",
    "int4mg32": "int4mg32_n64k8_v1",
    "int4kmg32": "int4kmg32_n64k8_v1",
    "int3kg16": "int3kg16_n64k16_v1",
    "int2kmg16": "int2kmg16_n64k16_v1",
    "fp4g32": "fp4g32_n64k8_v1",
    "fp4cg16": "fp4cg16_n64k8_v1",
    "iq4hg32": "iq4hg32_n64k8_v1",
    "iq4kg32": "iq4kg32_n64k8_v1",
    "fp8g32": "fp8g32_n64k4_v1",
    "fp8fg128": "fp8fg128_n64k4_v1",
}
# What is measured if nothing else is asked for: what we quantize to.
OURS = ("int8", "int4g32", "int4g128", "int4", "bf16")
PANEL_COLUMNS = 64
# A walk must come back to a panel only when no cache holds it any more.
CACHES_OF_A_BUFFER = 2
MIN_BUFFER_MB = 512


class WrongResultError(Exception):
    """A kernel does not give what the reference row gives."""


@dataclass
class Samples:
    """What the rounds measured of one kernel at one m: rates a second."""

    read: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    stream: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)


@dataclass
class Row:
    """One line of the result: medians over rounds; spread is p90 - p10 of the share that binds, drift of that limit."""

    format: str
    kernel: str
    m: int
    gb_per_s: float
    share_of_read: float
    gops: float
    share_of_peak: float
    hot_share_of_peak: float
    spread: float
    read_gb_per_s: float
    peak_gops: float
    drift: float
    thrown_away: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the bench."""
    parser.add_argument("--filter", default="", help="only rows whose '<format> <kernel>' contains this text")
    parser.add_argument("--layouts", default=",".join(OURS), help=f"comma separated, or all: {', '.join(FORMATS)}")
    parser.add_argument("--m", default="1,2,4,8,16,64", help="rows of activations, comma separated")
    parser.add_argument("--k", type=int, default=2048, help="columns of a panel, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=40)
    conditions.add_attempts(parser)
    parser.add_argument(
        "--buffer-mb", type=int, default=0, help=f"weights; default {MIN_BUFFER_MB}, or 4 last-level caches if more"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")


def main(args: argparse.Namespace) -> int:
    """Run the bench and print its result.

    Returns
    -------
    int
        Exit code: 0 done, 1 wrong result, 2 bad arguments, 3 the machine was not quiet (the result is printed anyway).
    """
    cache_mb = conditions.last_level_cache_bytes() >> 20
    buffer_mb = args.buffer_mb or max(MIN_BUFFER_MB, 4 * cache_mb)
    try:
        row_counts = conditions.positive_numbers("--m", args.m)
        conditions.positive_numbers("--rounds", str(args.rounds))
        conditions.positive_numbers("--attempts", str(args.attempts))
        if buffer_mb < CACHES_OF_A_BUFFER * cache_mb:
            raise ValueError(
                f"--buffer-mb {buffer_mb} would be read from the last-level cache of {cache_mb} MB; give at least "
                f"{CACHES_OF_A_BUFFER * cache_mb}."
            )
        formats = [name for name in layouts_of(args.layouts) if matching(name, kernels_of(name), args.filter)]
        if not formats:
            raise ValueError(
                f"--filter {args.filter} leaves no kernel that may run here; python -m kt_kernel.collect_env lists "
                f"them."
            )
        rows = [row for name in formats for row in bench_format(name, args, row_counts, buffer_mb)]
    except WrongResultError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    result = {
        "machine": conditions.machine(),
        "commit": conditions.commit(),
        "command": f"{conditions.environment()}python -m kt_kernel.bench kernels{layouts_flag(args.layouts)} "
        f"--filter '{args.filter}' --m {args.m} --k {args.k} --rounds {args.rounds} "
        f"--buffer-mb {buffer_mb}{conditions.attempts_flag(args.attempts)}",
        "last_level_cache_mb": cache_mb,
        "drift": max(row.drift for row in rows),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(result, indent=2) if args.json else table(result))
    return conditions.end_of_lines([row.drift for row in rows])


def layouts_of(text: str) -> list[str]:
    """The names of FORMATS that ``--layouts text`` asks for."""
    names = list(FORMATS) if text == "all" else text.split(",")
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"--layouts {name} cannot be measured; give all or some of {', '.join(FORMATS)}.")
    return names


def layouts_flag(text: str) -> str:
    """The flag as it stands in the command of a result; nothing for the default."""
    return "" if text == ",".join(OURS) else f" --layouts {text}"


def kernels_of(format_name: str) -> list[str]:
    """Names of the rows for a format that may run here; nothing large is allocated."""
    return list(_ext.KernelBench(FORMATS[format_name], 64, 1, 1 << 20).kernels)


def matching(format_name: str, kernels: list[str], text: str) -> list[str]:
    """The kernels that ``--filter text`` leaves of a format."""
    return [kernel for kernel in kernels if text in f"{format_name} {kernel}"]


def bench_format(name: str, args: argparse.Namespace, row_counts: list[int], buffer_mb: int) -> list[Row]:
    """Check and measure the rows of one format; returns their lines."""
    bench = _ext.KernelBench(FORMATS[name], args.k, max(row_counts), buffer_mb << 20)
    kernels = matching(name, bench.kernels, args.filter)
    for kernel, m in product(kernels, row_counts):
        if not bench.matches(kernel, m):
            raise WrongResultError(f"wrong result: {name} {kernel} at m = {m} differs from the reference row.")
    operations = {m: operations_a_byte(m, bench.panel_bytes, args.k) for m in row_counts}
    lines = conditions.until_quiet(
        list(product(kernels, row_counts)),
        args.attempts,
        lambda keys: measure(bench, keys, args.rounds),
        lambda key, taken: drift_of(taken, operations[key[1]]),
    )
    return [summarize(name, kernel, m, taken, operations[m], drift) for (kernel, m), (taken, drift) in lines.items()]


def measure(bench: _ext.KernelBench, keys: list[tuple[str, int]], rounds: int) -> dict[tuple[str, int], Samples]:
    """Interleaved rounds: each measures every kernel at its m, and the kernel's limits right before."""
    samples = {key: Samples() for key in keys}
    for _ in range(rounds):
        for (kernel, m), taken in samples.items():
            taken.peak.append(bench.peak_rate(kernel))
            taken.read.append(bench.read_rate(kernel))
            taken.stream.append(bench.stream_rate(kernel, m))
            taken.hot.append(bench.hot_rate(kernel, m))
    return samples


def operations_a_byte(m: int, panel_bytes: int, k: int) -> float:
    """Operations for a byte of packed weights at `m` rows of activations."""
    return 2 * m * PANEL_COLUMNS * k / panel_bytes


def shares(taken: Samples, operations: float) -> tuple[list[float], list[float]]:
    """By round, the shares of the read bandwidth of the round and of the median peak."""
    peak = statistics.median(taken.peak)
    by_read = [rate / read for rate, read in zip(taken.stream, taken.read, strict=True)]
    return by_read, [rate * operations / peak for rate in taken.stream]


def drift_of(taken: Samples, operations: float) -> float:
    """How far the limit that binds one kernel at one m moved."""
    by_read, by_peak = (statistics.median(values) for values in shares(taken, operations))
    return conditions.drift_of_limit(by_read, by_peak, taken.read, taken.peak)


def summarize(format_name: str, kernel: str, m: int, taken: Samples, operations: float, drift: float) -> Row:
    """Medians over the rounds of one kernel at one m; `operations` a byte of packed weights."""
    peak = statistics.median(taken.peak)
    by_read, by_peak = shares(taken, operations)
    binding = by_read if statistics.median(by_read) > statistics.median(by_peak) else by_peak
    rate = statistics.median(taken.stream)
    return Row(
        format=format_name,
        kernel=kernel,
        m=m,
        gb_per_s=rate / 1e9,
        share_of_read=statistics.median(by_read),
        gops=rate * operations / 1e9,
        share_of_peak=statistics.median(by_peak),
        hot_share_of_peak=statistics.median(taken.hot) / peak,
        spread=conditions.spread(binding),
        read_gb_per_s=statistics.median(taken.read) / 1e9,
        peak_gops=peak / 1e9,
        drift=drift,
        thrown_away=drift > conditions.MAX_DRIFT,
    )


def table(result: dict) -> str:
    """The result as a table in Markdown."""
    lines = [
        f"{result['machine']}; commit {result['commit'] or 'unknown'}",
        f"`{result['command']}`",
        f"one thread, CPU time; the calibration moved by up to {100 * result['drift']:.1f} %",
        "",
        "| format | kernel | m | GB/s | of read | GOPS | of peak | hot | spread | read GB/s | peak GOPS | moved |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['format']} | {row['kernel']} | {row['m']} | {row['gb_per_s']:.1f} | {row['share_of_read']:.2f} | "
            f"{row['gops']:.0f} | {row['share_of_peak']:.2f} | {row['hot_share_of_peak']:.2f} | {row['spread']:.2f} | "
            f"{row['read_gb_per_s']:.1f} | {row['peak_gops']:.0f} | {conditions.moved_cell(row)} |"
        )
    return "\n".join(lines)

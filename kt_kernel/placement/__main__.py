"""``python -m kt_kernel.placement``: from recorded expert counts to SGLang's ``--init-expert-location`` file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kt_kernel.placement.location import hit_rate, hottest_first, write_location
from kt_kernel.placement.record import Halves, read_halves


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m kt_kernel.placement",
        description="Put the most used experts of each layer first, so that --kt-num-gpu-experts N keeps them on the "
        "GPU. Prints the hit rate, the share of (token, expert) pairs on the GPU, on the second half of the record for "
        "experts chosen from the first half; the file is made from all of it.",
    )
    parser.add_argument(
        "--counts",
        nargs="+",
        required=True,
        metavar="FILE",
        help="record that KT_EXPERT_COUNTS named, or a dump of SGLang's expert distribution recorder; several add up",
    )
    parser.add_argument(
        "--num-gpu-experts", nargs="+", type=int, default=[], metavar="N", help="experts of a layer on the GPU"
    )
    parser.add_argument("--output", "-o", metavar="FILE", help="file to write, .pt or .json (default: none)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def describe(halves: Halves, sizes: Sequence[int]) -> dict[str, Any]:
    """Return what the command prints.

    Parameters
    ----------
    halves : Halves
    sizes : sequence of int
        Experts of a layer on the GPU, each evaluated by itself.

    Raises
    ------
    ValueError
        A size below 0 or above the number of experts.
    """
    num_layers, num_experts = halves.first.shape
    for size in sizes:
        if not 0 <= size <= num_experts:
            raise ValueError(
                f"--num-gpu-experts is {size} but the record has {num_experts} experts in a layer; give 0 to "
                f"{num_experts}."
            )
    chosen = hottest_first(halves.first)
    identity = torch.arange(num_experts).expand(num_layers, -1)
    report: dict[str, Any] = {
        "num_layers": num_layers,
        "num_moe_layers": int(halves.total.any(1).sum()),
        "num_experts": num_experts,
        "num_snapshots": halves.num_snapshots,
        "num_pairs": int(halves.total.sum()),
        "hit_rates": [
            {
                "num_gpu_experts": size,
                "hottest_first": hit_rate(chosen, halves.second, size),
                "identity": hit_rate(identity, halves.second, size),
                "uniform": size / num_experts,
            }
            for size in sizes
        ],
    }
    if halves.gpu_experts is not None and halves.gpu_experts.any():
        report["achieved"] = float(halves.total[halves.gpu_experts].sum() / halves.total.sum())
    return report


def format_report(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [
        f"{report['num_pairs']} (token, expert) pairs in {report['num_snapshots']} snapshots, "
        f"{report['num_moe_layers']} of {report['num_layers']} layers with experts, {report['num_experts']} each"
    ]
    if report["hit_rates"]:
        lines.append("hit rate on the second half, chosen on the first")
        lines.append(f"{'on the GPU':>12}{'hottest first':>16}{'as numbered':>14}{'even use':>12}")
    for row in report["hit_rates"]:
        lines.append(
            f"{row['num_gpu_experts']:>12}{row['hottest_first']:>16.1%}{row['identity']:>14.1%}{row['uniform']:>12.1%}"
        )
    if "achieved" in report:
        lines.append(f"the recording server itself had {report['achieved']:.1%} of the pairs on its GPU")
    if "output" in report:
        lines.append(f"wrote {report['output']}: serve with --init-expert-location {report['output']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        Exit code: 0 done, 1 refused.
    """
    args = build_parser().parse_args(argv)
    counts = [Path(path).expanduser() for path in args.counts]
    output = Path(args.output).expanduser() if args.output else None
    try:
        if output is not None and output.resolve() in [path.resolve() for path in counts]:
            raise ValueError(f"--output {output} is one of --counts, and would be overwritten; give another file.")
        halves = read_halves(counts)
        report = describe(halves, args.num_gpu_experts)
        if output is not None:
            write_location(output, hottest_first(halves.total))
            report["output"] = str(output)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"kt_kernel.placement: {reason}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if args.json else format_report(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

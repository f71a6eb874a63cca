"""``python -m kt_kernel.bench peers``: our MoE layer and the engines users would run instead, in one run.

Every system runs in a process of its own and only one at a time; each round measures the limits of the machine and
then, for each format of each peer, ours and the peer on the same routing. A peer that cannot be had is a row that says
why.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kt_kernel import _ext
from kt_kernel.bench import conditions
from kt_kernel.bench.shapes import SHAPES

from . import install, layer_data, reference, results, roofline, table
from .catalog import PEERS, System, ours
from .rounds import CHECK_TOKENS, Comparison, Run
from .session import PeerError

EXIT_WRONG_RESULT = 1
EXIT_BAD_ARGUMENTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the bench."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--peers", default=",".join(PEERS), help="which ones, comma separated")
    parser.add_argument(
        "--install-peers",
        nargs="*",
        metavar="NAME",
        choices=list(PEERS),
        help="install these first, if they are not there (all without names)",
    )
    parser.add_argument("--peers-dir", type=Path, help="where they are installed; default ~/.cache/kt_kernel/peers")
    parser.add_argument("--shape", default="qwen3-30b", choices=list(SHAPES))
    parser.add_argument("--bits", default="8,4,16", help="of our formats, comma separated")
    parser.add_argument(
        "--given", action="store_true", help="ours: FP8 and RAWINT4, as files have them, instead of AMXINT8 and AMXINT4"
    )
    parser.add_argument("--tokens", default="1,64,1024", help="token counts, comma separated")
    parser.add_argument("--threads", default="1" if cores == 1 else f"1,{cores}", help="thread counts, comma separated")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--plot", type=Path, help="write a picture of the shares of the limit to this file")


def main(args: argparse.Namespace) -> int:
    """Run the bench and print its result.

    Returns
    -------
    int
        Exit code: 0 done, 1 wrong result, 2 bad arguments, 3 the run is invalid: the machine was not quiet, or a peer
        was slower than it is known to be (the result is printed anyway).
    """
    try:
        peers = chosen_peers(args.peers)
        tokens = conditions.positive_numbers("--tokens", args.tokens)
        threads = conditions.positive_numbers("--threads", args.threads)
        bits = conditions.positive_numbers("--bits", args.bits)
        conditions.positive_numbers("--rounds", str(args.rounds))
        if not set(bits) <= {4, 8, 16}:
            raise ValueError(f"--bits {args.bits} must be some of 4, 8 and 16.")
        conditions.check_plot(args.plot)
        shape = SHAPES[args.shape]
        sizes = layer_data.Sizes(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            max_tokens=max(*tokens, CHECK_TOKENS),
        )
        refuse_memory(peers, sizes, bits, given=args.given)
        folder = args.peers_dir or install.default_folder()
        refused = install_asked(args.install_peers, folder)
        figures_hold = reference.figures_hold_here(sizes)
        result = {**describe(args, sizes), "runs": []}
        with tempfile.TemporaryDirectory() as name:
            layer_data.write(Path(name), sizes)
            data = layer_data.LayerData(Path(name))
            for count in threads:
                with Comparison(
                    peers, data=data, threads=count, bits=bits, given=args.given, peers_folder=folder
                ) as comparison:
                    run = measure(comparison, tokens, args.rounds, refused)
                result["runs"].append(results.describe(run, sizes, figures_hold=figures_hold))
    except (ValueError, PeerError) as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_ARGUMENTS
    return report(result, args)


def chosen_peers(text: str) -> list[System]:
    """Peers by their names."""
    names = text.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"--peers {text}: {unknown[0]!r} is unknown; known peers are {', '.join(PEERS)}.")
    return [PEERS[name] for name in names]


def refuse_memory(peers: Sequence[System], sizes: layer_data.Sizes, bits: Sequence[int], *, given: bool) -> None:
    """Raise where the systems together need more memory than there is."""
    systems = [*peers, *(ours(tier, given=given) for tier in dict.fromkeys(["", *(peer.tier for peer in peers)]))]
    layers = [
        # scales, and padding of the panels
        1.1 * kind.bits / 8 * sizes.expert_weights * sizes.num_experts
        for system in systems
        for kind in system.formats
        if kind.bits in bits
    ]
    # what the largest needs while it is packed, and fp32 of the different experts for the check
    needed = sum(layers) + 2 * max(layers) + 8 * sizes.expert_weights * sizes.kinds
    available = _ext.topology()["memory_available_bytes"]
    if needed > available:
        raise ValueError(
            f"these systems need about {needed / 1e9:.1f} GB but {available / 1e9:.1f} GB are free; choose fewer with "
            f"--peers or --bits."
        )


def install_asked(names: Sequence[str] | None, folder: Path) -> dict[str, str]:
    """Install peers; returns why those that could not be installed could not."""
    refused = {}
    for name in [] if names is None else names or PEERS:
        if install.interpreter(PEERS[name], folder) is not None:
            continue
        print(f"installing {name} in {folder}", file=sys.stderr)
        try:
            install.install(PEERS[name], folder)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            refused[name] = str(error)
    return refused


def measure(comparison: Comparison, tokens: Sequence[int], rounds: int, refused: dict[str, str]) -> Run:
    """Load and check all systems, then measure."""
    label = table.threads_label(comparison.run.threads)
    print(f"{label}: loading and checking", file=sys.stderr)
    comparison.load(refused)
    print(f"{label}: {rounds} rounds", file=sys.stderr)
    return comparison.measure(tokens, rounds)


def describe(args: argparse.Namespace, sizes: layer_data.Sizes) -> dict[str, Any]:
    """What is measured, on what, and how to repeat it."""
    return {
        "machine": conditions.machine(),
        "commit": conditions.commit(),
        "command": f"{conditions.environment()}python -m kt_kernel.bench peers --peers {args.peers} "
        f"--shape {args.shape} --bits {args.bits} --tokens {args.tokens} --threads {args.threads} "
        f"{'--given ' if args.given else ''}--rounds {args.rounds}",
        "shape": args.shape,
        "rounds": args.rounds,
        **asdict(sizes),
    }


def report(result: dict[str, Any], args: argparse.Namespace) -> int:
    """Print the result, draw the picture, and say what is wrong with the run; the exit code."""
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(table.lines(result)))
    if args.plot:
        roofline.draw(result, args.plot)
    wrong = [sentence for run in result["runs"] for sentence in run["wrong"]]
    invalid = [sentence for run in result["runs"] for sentence in run["invalid"]]
    for sentence in [*wrong, *invalid]:
        print(sentence, file=sys.stderr)
    if wrong:
        return EXIT_WRONG_RESULT
    return conditions.EXIT_NOT_QUIET if invalid else 0

"""Command line of the benches."""

from __future__ import annotations

import argparse
import logging
import sys

from kt_kernel.bench import kernels, layer, mixed, predict, serving
from kt_kernel.bench.peers import command as peers


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kt_kernel.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    benches = {
        "kernels": (kernels, "every GEMM kernel beside the limits of one core"),
        "layer": (layer, "one MoE layer beside the machine's limits"),
        "mixed": (mixed, "what a token in decode waits for beside a long prompt"),
        "peers": (peers, "our MoE layer beside other engines, interleaved"),
        "serving": (serving, "what the users of a running server get"),
        "predict": (predict, "tokens per second on machines that were not measured"),
    }
    for name, (module, text) in benches.items():
        module.add_arguments(commands.add_parser(name, help=text))
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")  # what KT_LOG_LEVEL lets through, to stderr
    return benches[args.command][0].main(args)


if __name__ == "__main__":
    sys.exit(main())

"""Command line of the benches."""

from __future__ import annotations

import argparse
import sys

from kt_kernel.bench import layer


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kt_kernel.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    layer.add_arguments(commands.add_parser("layer", help="one MoE layer beside the machine's limits"))
    return layer.main(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

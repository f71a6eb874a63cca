"""``python -m kt_kernel.device_stream [ORDINAL]``: whether doorbells work on a GPU."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from kt_kernel import _ext
from kt_kernel.device_stream import driver


def ordinal(text: str) -> int:
    """The number of a device; ValueError for what is none."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise ValueError
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Try doorbells; prints ``doorbell``, or why they do not work, which is no error: host functions always do.

    Returns
    -------
    int
        Exit code: 0 tried, 1 no driver or no such device.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kt_kernel.device_stream",
        description="Try whether a GPU's streams can ring for the CPU experts through memory words. Prints doorbell, "
        "or why they call host functions instead.",
    )
    parser.add_argument("ordinal", metavar="ORDINAL", type=ordinal, nargs="?", default=0, help="GPU (default: 0)")
    device = parser.parse_args(argv).ordinal
    if reason := driver()["reason"]:
        print(f"kt_kernel.device_stream: {reason}", file=sys.stderr)
        return 1
    problem = _ext.probe_doorbells(device)
    if problem.startswith("cuDeviceGet failed"):
        print(f"kt_kernel.device_stream: device {device} cannot be used: {problem}", file=sys.stderr)
        return 1
    print(problem or "doorbell")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a stream that hangs would keep the interpreter from ending

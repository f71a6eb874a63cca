#!/usr/bin/env python3
"""Compare a decoding server with the sum of its parts: does the CPU pool fight with the rest of the server?

    python scripts/measure_server_overhead.py MODEL WEIGHTS [--method AMXINT8] [--tokens 96] [--starts 2] [--check]

    ratio = time per token of the server / (time per token with experts that answer zeros + layers x one layer alone)

The first two are measured through /generate on servers started in turn (real, double, real, ...), the layer by
``python -m kt_kernel.bench layer --shape demo --tokens 1`` between them. A ratio above 1 is what waking threads and
sharing cores cost. ``--check`` ends with code 1 above 1.15.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

import server  # noqa: E402  (the server control of the tests)

LIMIT = 1.15
PROMPT = list(range(100, 132))


def time_per_token(running: server.Server, tokens: int) -> float:
    """Median seconds of one decode step, from pairs of requests that differ by `tokens` steps."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        running.generate(PROMPT, count)
        return time.perf_counter() - start

    seconds(8)
    return statistics.median((seconds(tokens + 1) - seconds(1)) / tokens for _ in range(5))


def layer_seconds(method: str, shape: str) -> float:
    """Median seconds of one layer for one token."""
    command = [sys.executable, "-m", "kt_kernel.bench", "layer", "--method", method, "--shape", shape]
    done = subprocess.run([*command, "--tokens", "1", "--rounds", "100", "--json"], capture_output=True, text=True)
    if not done.stdout:
        raise SystemExit(f"the layer bench failed: {done.stderr}")
    return json.loads(done.stdout)["tables"][0]["rows"][0]["us"] * 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the demo model")
    parser.add_argument("weights", type=Path, help="its converted experts, or the model itself")
    parser.add_argument("--method", default="AMXINT8")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--starts", type=int, default=2, help="starts of each of the two servers")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()

    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    flags = ["--kt-weight-path", str(args.weights.resolve()), "--kt-method", args.method]
    modules = {"real": ["-m", "kt_kernel.launch_server"], "double": [str(ROOT / "scripts" / "noop_moe_server.py")]}
    steps: dict[str, list[float]] = {name: [] for name in modules}
    alone = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(args.starts):
            for name, module in modules.items():
                with server.serve(
                    args.model.resolve(), flags, log_path=Path(folder) / f"{name}{start}.log", module=module
                ) as running:
                    steps[name].append(time_per_token(running, args.tokens))
            alone.append(layer_seconds(args.method, "demo"))
    real, double, layer = (statistics.median(values) for values in (steps["real"], steps["double"], alone))
    ratio = real / (double + layers * layer)
    print("| server, ms/token | without experts, ms/token | layers | one layer alone, us | ratio |")
    print("|---:|---:|---:|---:|---:|")
    print(f"| {real * 1e3:.2f} | {double * 1e3:.2f} | {layers} | {layer * 1e6:.0f} | {ratio:.2f} |")
    return 1 if args.check and ratio > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())

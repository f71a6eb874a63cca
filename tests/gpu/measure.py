"""Figures of the hand-off on hardware: ``python tests/gpu/measure.py --json FILE`` (run by ``scripts/gpu_check.sh``).

overhead   time of one submit and sync pair of an empty layer (every id is -1) in a replayed graph: that of a graph with
           many pairs, less that of the same graph without them, over the number of pairs
overlap    share of the CPU's time that a longer GPU side hides: ``(cpu alone + gpu alone - both) / cpu alone``, all
           three measured in turns
layer      a Qwen3-30B layer (E 128, k 8, H 2048, I 768) with a share of its experts on the GPU, eager
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import device as devices
import torch
from device import Gpu
from torch.utils._python_dispatch import _disable_current_modes

from kt_kernel import HybridMoE, KTMoEWrapper

OVERHEAD_LIMIT_US = 15.0
OVERLAP_LIMIT = 0.90
PAIRS = 48  # MoE layers of Qwen3-30B
SHARES = (0.0, 0.25, 0.5, 1.0)


def milliseconds(gpu: Gpu, launches: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall time of each launch, the device idle before and after, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in launches}
    for _ in range(rounds):
        for name, launch in launches.items():
            gpu.wait()
            start = time.perf_counter()
            launch()
            gpu.wait()
            found[name].append((time.perf_counter() - start) * 1e3)
    return found


def make_wrapper(num_experts: int, top_k: int, hidden: int, inner: int) -> KTMoEWrapper:
    with _disable_current_modes():
        wrapper = KTMoEWrapper(0, num_experts, top_k, hidden, inner, None, None, 1, "", 512, method="AMXINT8")
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(num_experts, *shape, generator=generator, dtype=torch.float32).mul_(0.05).bfloat16()
                   for shape in ((inner, hidden), (inner, hidden), (hidden, inner))]  # fmt: skip
        wrapper.load_weights_from_tensors(*weights)
        ids = torch.zeros(1, top_k, dtype=torch.int64) + torch.arange(top_k)
        wrapper.forward(torch.zeros(1, hidden, dtype=torch.bfloat16), ids, torch.ones(1, top_k))
    return wrapper


def call(wrapper: KTMoEWrapper, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    stream = torch.cuda.current_stream().cuda_stream
    wrapper.submit_forward(hidden, ids, weights, stream)
    return wrapper.sync_forward(hidden, stream)


def measure_overhead(gpu: Gpu, rounds: int) -> dict:
    """Microseconds of an empty pair, median and tenth to ninetieth percentile."""
    wrapper = make_wrapper(8, 8, 2048, 64)
    hidden = gpu.put(torch.zeros(1, 2048, dtype=torch.bfloat16))
    ids, weights = gpu.put(torch.full((1, 8), -1)), gpu.put(torch.zeros(1, 8))

    def pairs() -> torch.Tensor:
        flow = hidden
        for _ in range(PAIRS):
            flow = flow + call(wrapper, flow, ids, weights)
        return flow

    def plain() -> torch.Tensor:
        flow = hidden
        for _ in range(PAIRS):
            flow = flow + flow
        return flow

    with_pairs, _ = gpu.capture(pairs)
    without, _ = gpu.capture(plain)
    times = milliseconds(gpu, {"with": with_pairs, "without": without}, rounds)
    each = sorted((a - b) * 1e3 / PAIRS for a, b in zip(times["with"], times["without"], strict=True))
    return {
        "median_us": statistics.median(each),
        "p10_us": each[len(each) // 10],
        "p90_us": each[len(each) * 9 // 10],
        "limit_us": OVERHEAD_LIMIT_US,
    }


def busy_gpu(gpu: Gpu, matrix: torch.Tensor, products: int) -> torch.Tensor:
    flow = matrix
    for _ in range(products):
        flow = flow @ matrix
    return flow


def measure_overlap(gpu: Gpu, rounds: int) -> dict:
    """How much of the CPU's time a GPU side of about one and a half times its length hides."""
    wrapper = make_wrapper(64, 8, 2048, 768)
    count = 4
    with _disable_current_modes():
        generator = torch.Generator().manual_seed(1)
        inputs = (
            torch.randn(count, 2048, generator=generator).bfloat16(),
            torch.stack([torch.randperm(64, generator=generator)[:8] for _ in range(count)]),
            torch.rand(count, 8, generator=generator),
        )
        square = torch.randn(256 if gpu.is_double else 4096, 256 if gpu.is_double else 4096).bfloat16()
    hidden, ids, weights = (gpu.put(tensor) for tensor in inputs)
    matrix = gpu.put(square)
    cpu_alone, _ = gpu.capture(lambda: call(wrapper, hidden, ids, weights))
    one, _ = gpu.capture(lambda: busy_gpu(gpu, matrix, 8))
    start = milliseconds(gpu, {"cpu": cpu_alone, "gpu": one}, 10)
    products = max(1, round(8 * 1.5 * statistics.median(start["cpu"]) / statistics.median(start["gpu"])))

    def both() -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        wrapper.submit_forward(hidden, ids, weights, stream)
        busy_gpu(gpu, matrix, products)
        return wrapper.sync_forward(hidden, stream)

    gpu_alone, _ = gpu.capture(lambda: busy_gpu(gpu, matrix, products))
    together, _ = gpu.capture(both)
    times = milliseconds(gpu, {"cpu": cpu_alone, "gpu": gpu_alone, "both": together}, rounds)
    cpu, alone, joint = (statistics.median(times[name]) for name in ("cpu", "gpu", "both"))
    return {
        "cpu_ms": cpu,
        "gpu_ms": alone,
        "both_ms": joint,
        "hidden": (cpu + alone - joint) / cpu,
        "limit": OVERLAP_LIMIT,
    }


def measure_layer(gpu: Gpu, rounds: int) -> list[dict]:
    """Milliseconds of one layer by share of experts on the GPU and by tokens."""
    experts, top_k, hidden, inner = 128, 8, 2048, 768
    rows = []
    for share in SHARES:
        with _disable_current_modes():
            generator = torch.Generator().manual_seed(0)
            matrices = [torch.randn(experts, *shape, generator=generator).mul_(0.05).bfloat16()
                        for shape in ((inner, hidden), (inner, hidden), (hidden, inner))]  # fmt: skip
            gate, up, down = matrices
            layer = HybridMoE.from_tensors(
                (gate, up), down, top_k=top_k, method="AMXINT8", num_gpu_experts=int(share * experts), device="cuda"
            )
        for count in (1, 8, 64):
            inputs = (
                torch.randn(count, hidden, generator=generator).bfloat16(),
                torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(count)]),
                torch.rand(count, top_k, generator=generator),
            )
            placed = [gpu.put(tensor) for tensor in inputs]
            times = milliseconds(gpu, {"layer": lambda placed=placed, layer=layer: layer(*placed)}, rounds)["layer"]
            rows.append({"share": share, "tokens": count, "median_ms": statistics.median(times)})
    return rows


def machine() -> dict:
    """What the figures were taken on."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    names = Path("/proc/cpuinfo").read_text().split("model name", 1)[-1].split("\n", 1)[0].strip("\t: ")
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpu_name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu_name = "none"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "gpu": gpu_name,
        "cpu": names,
        "cores": os.cpu_count(),
        "amx": sorted(flag for flag in flags if flag.startswith("amx")),
        "torch": torch.__version__,
        "kernel": platform.release(),
        "signal": os.environ.get("KT_CUDA_SIGNAL", "chosen"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=200, help="measurements of each kind")
    options = parser.parse_args()
    with devices.open_device() as gpu:
        if gpu.is_double:
            options.rounds = 3
        figures = {
            "machine": machine(),
            "is_double": gpu.is_double,
            "overhead": measure_overhead(gpu, options.rounds),
            "overlap": measure_overlap(gpu, max(3, options.rounds // 4)),
            "layer": [] if gpu.is_double else measure_layer(gpu, max(3, options.rounds // 4)),
        }
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()

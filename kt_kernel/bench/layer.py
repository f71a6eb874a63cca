"""``python -m kt_kernel.bench layer``: one MoE layer beside what this machine reads and multiplies, in one run.

Every round measures the read bandwidth over the layer's own weights and then each token count once with fresh routing,
so drift of the machine hits both sides of a ratio. The time of a forward is the one the library counts: routing,
quantization, products and weighted sum, without Python.

    share of read = bytes of the distinct experts of the forward / time / read bandwidth of the round
    share of peak = 2 * rows * parameters of an expert / time / register peak
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass

import torch

from kt_kernel import _ext, ops
from kt_kernel.bench import conditions
from kt_kernel.bench.shapes import SHAPES, Shape
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.experts import CpuExperts, get_engine, packed_bytes
from kt_kernel.methods import METHODS, Method, get_method

# Weights must not fit the last-level cache, and everything must fit the machine.
MAX_WEIGHT_BYTES = 3 << 30
# Relative rms error against fp32 on the same weights before quantization. Derived in tests/cpp/test_moe_layer.cpp; here
# only gross errors are to be found, so twice that.
CHECK_BOUND = {"bf16": 2 / 256, "int8": 0.04, "int4": 0.4}


@dataclass
class Row:
    """One line of the result: medians over rounds, and the spread (p90 - p10) of the share."""

    tokens: int
    rows_per_expert: float
    us: float
    gb_per_s: float
    share_of_read: float
    gops: float
    share_of_peak: float
    spread: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the bench."""
    parser.add_argument("--method", default="AMXINT8", choices=list(METHODS))
    parser.add_argument("--shape", default="qwen3-30b", choices=list(SHAPES))
    parser.add_argument("--tokens", default="1,8,64,1024", help="token counts, comma separated")
    parser.add_argument("--threads", type=int, default=0, help="0: KT_NUM_THREADS, else the usable cores")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print JSON only")


def main(args: argparse.Namespace) -> int:
    """Run the bench and print its result.

    Returns
    -------
    int
        Exit code: 0 done, 1 wrong result, 2 bad arguments, 3 the machine was not quiet (the result is printed anyway).
    """
    try:
        token_counts = [int(count) for count in args.tokens.split(",")]
        if min(token_counts) < 1 or args.rounds < 1:
            raise ValueError
    except ValueError:
        print(f"--tokens {args.tokens} and --rounds {args.rounds} must be positive numbers.", file=sys.stderr)
        return 2
    method = get_method(args.method)
    shape = cut_to_machine(SHAPES[args.shape], method)
    try:
        engine = get_engine(EngineConfig.resolve(args.threads or None))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    experts, error = build_layer(shape, method, engine)
    if error > CHECK_BOUND[method.weight_dtype]:
        print(f"wrong result: relative error {error:.3f} is above {CHECK_BOUND[method.weight_dtype]}.", file=sys.stderr)
        return 1
    result = measure(experts, shape, token_counts, args.rounds)
    result.update(describe(args, shape, experts, error))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)
    return conditions.end_of_run(result["drift"])


def cut_to_machine(shape: Shape, method: Method) -> Shape:
    """Fewer experts where all of them would be more than MAX_WEIGHT_BYTES."""
    each = sum(
        packed_bytes(method.layout, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size)
    )
    return shape.cut_to(MAX_WEIGHT_BYTES // each)


def build_layer(shape: Shape, method: Method, engine: _ext.Engine) -> tuple[CpuExperts, float]:
    """A layer of random experts, and the relative error of one forward against fp32 torch."""
    config = MoEConfig(
        layer_idx=0,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )
    experts = CpuExperts(config, layout=method.layout, engine=engine)
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * shape.hidden_size**-0.5).to(torch.bfloat16)

    # Eight different experts are enough: the kernels do not look at values, and zeros (one shared page) are avoided.
    wide, tall = (shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size)
    kinds = [(random(*wide), random(*wide), random(*tall)) for _ in range(min(8, shape.num_experts))]
    for e in range(shape.num_experts):
        gate, up, down = kinds[e % len(kinds)]
        experts.load_experts([e], [gate], [up], [down])
    hidden = random(4, shape.hidden_size) * shape.hidden_size**0.5
    ids = torch.stack([torch.randperm(shape.num_experts, generator=generator)[: shape.top_k] for _ in range(4)])
    weights = torch.rand(4, shape.top_k, generator=generator)
    output = ops.moe_forward(hidden, ids, weights, None, experts.layer.handle).float()
    expected = torch.zeros(4, shape.hidden_size)
    for t in range(4):
        for s in range(shape.top_k):
            gate, up, down = (w.float() for w in kinds[int(ids[t, s]) % len(kinds)])
            x = hidden[t].float()
            expected[t] += weights[t, s] * (down @ (torch.nn.functional.silu(gate @ x) * (up @ x)))
    return experts, float((output - expected).norm() / expected.norm())


def measure(experts: CpuExperts, shape: Shape, token_counts: list[int], rounds: int) -> dict:
    """Interleaved rounds; returns the rows and the calibration."""
    layer = experts.layer
    generator = torch.Generator().manual_seed(2)
    inputs = {
        tokens: torch.randn(tokens, shape.hidden_size, generator=generator).to(torch.bfloat16)
        for tokens in token_counts
    }
    samples: dict[int, list[tuple[float, float, float, float]]] = {tokens: [] for tokens in token_counts}
    layer.probe_read()  # first touch of the scratch, frequency, page tables
    layer.probe_peak(milliseconds=100)
    reads, peaks = [], []
    for _ in range(rounds):
        reads.append(layer.probe_read())
        peaks.append(layer.probe_peak(milliseconds=5))
        for tokens, hidden in inputs.items():
            scores = torch.rand(tokens, shape.num_experts, generator=generator)
            ids = scores.topk(shape.top_k, dim=-1).indices
            weights = torch.full((tokens, shape.top_k), 1.0 / shape.top_k)
            before = layer.counters()
            ops.moe_forward(hidden, ids, weights, None, layer.handle)
            after = layer.counters()
            samples[tokens].append(
                (
                    (after["busy_ns"] - before["busy_ns"]) * 1e-9,
                    after["weight_bytes"] - before["weight_bytes"],
                    2.0 * (after["rows"] - before["rows"]) * 3 * shape.hidden_size * shape.intermediate_size,
                    len(reads) - 1,
                )
            )
    peak = statistics.median(peaks)
    rows = [asdict(summarize(tokens, samples[tokens], shape, reads, peak)) for tokens in token_counts]
    return {
        "rows": rows,
        "read_gb_per_s": statistics.median(reads) / 1e9,
        "peak_gops": peak / 1e9,
        "dispatch_ns": experts.engine.probe_dispatch(),
        "drift": conditions.drift(reads),
    }


def summarize(tokens: int, samples: list, shape: Shape, reads: list[float], peak: float) -> Row:
    """Medians over the samples of one token count.

    Parameters
    ----------
    tokens : int
        Tokens of a forward.
    samples : list of tuple
        ``(seconds, weight bytes, operations, round)`` of each forward.
    shape : Shape
        The layer.
    reads : list of float
        Read bandwidth in bytes a second, by round.
    peak : float
        Register peak in operations a second.
    """
    by_read = [size / seconds / reads[int(index)] for seconds, size, _, index in samples]
    by_peak = [operations / seconds / peak for seconds, _, operations, _ in samples]
    # the limit that binds is the one whose share is larger
    shares = by_read if statistics.median(by_read) > statistics.median(by_peak) else by_peak
    return Row(
        tokens=tokens,
        rows_per_expert=tokens * shape.top_k / shape.num_experts,
        us=1e6 * statistics.median(seconds for seconds, *_ in samples),
        gb_per_s=statistics.median(size / seconds for seconds, size, *_ in samples) / 1e9,
        share_of_read=statistics.median(by_read),
        gops=statistics.median(operations / seconds for seconds, _, operations, _ in samples) / 1e9,
        share_of_peak=statistics.median(by_peak),
        spread=conditions.spread(shares),
    )


def describe(args: argparse.Namespace, shape: Shape, experts: CpuExperts, error: float) -> dict:
    """What was measured, on what and how to repeat it."""
    pages = experts.layer.pages()
    return {
        "method": args.method,
        "shape": args.shape,
        **asdict(shape),
        "threads": experts.engine.num_threads,
        "nodes": experts.engine.num_nodes,
        "kernels": experts.layer.explain,
        "relative_error": error,
        "huge_page_share": pages["huge_bytes"] / max(pages["resident_bytes"], 1),
        "machine": conditions.machine(),
        "commit": conditions.commit(),
        "command": f"python -m kt_kernel.bench layer --method {args.method} --shape {args.shape} "
        f"--tokens {args.tokens} --threads {args.threads} --rounds {args.rounds}",
    }


def print_table(result: dict) -> None:
    """Print a result of :func:`measure` and :func:`describe` as a table in Markdown."""
    print(f"{result['machine']}; commit {result['commit'] or 'unknown'}")
    print(f"`{result['command']}`")
    print(
        f"{result['method']}, {result['shape']} (hidden {result['hidden_size']}, intermediate "
        f"{result['intermediate_size']}, {result['num_experts']} experts, top-{result['top_k']}), "
        f"{result['threads']} threads on {result['nodes']} nodes; {result['kernels']}"
    )
    print(
        f"limits in this run: read {result['read_gb_per_s']:.1f} GB/s, peak {result['peak_gops']:.0f} GOPS, dispatch "
        f"and join {result['dispatch_ns']:.0f} ns; {100 * result['huge_page_share']:.0f} % of the weights on huge "
        f"pages; relative error {result['relative_error']:.4f}\n"
    )
    print("| tokens | rows/expert | us | GB/s | of read | GOPS | of peak | spread |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in result["rows"]:
        print(
            f"| {row['tokens']} | {row['rows_per_expert']:.2f} | {row['us']:.0f} | {row['gb_per_s']:.1f} | "
            f"{row['share_of_read']:.2f} | {row['gops']:.0f} | {row['share_of_peak']:.2f} | {row['spread']:.2f} |"
        )

"""``python -m kt_kernel.bench layer``: one MoE layer beside what this machine reads and multiplies, in one run.

Every round measures, for each number of threads, the read bandwidth over the layer's own weights, the register peak,
and then each token count once with fresh routing, so drift of the machine hits both sides of a ratio. The time of a
forward is the one the library counts: routing, quantization, products and weighted sum, without Python.

    share of read  = bytes of the distinct experts of the forward / time / read bandwidth of the round
    share of peak  = 2 * rows * parameters of an expert / time / register peak
    share of limit = the larger of the two: what the roofline allows is 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kt_kernel import _ext, ops
from kt_kernel.bench import conditions
from kt_kernel.bench.shapes import SHAPES, Shape
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.experts import CpuExperts, get_engine, packed_bytes
from kt_kernel.methods import METHODS, get_method, weight_dtype_of

# Weights must not fit the last-level cache, and everything must fit the machine: of the layers of all thread counts.
MAX_WEIGHT_BYTES = 3 << 30
# Relative rms error against fp32 on the same weights before quantization. Derived in tests/cpp/test_moe_layer.cpp; here
# only gross errors are to be found, so twice that.
CHECK_BOUND = {"bf16": 2 / 256, "int8": 0.04, "int4": 0.4}
ROUTINGS = {"uniform": "every expert as likely as any other", "zipf": "the n-th expert 1/n as likely as the first"}


@dataclass
class Row:
    """One line of a table: medians over rounds, and the spread (p90 - p10) of the share of the limit."""

    tokens: int
    rows_per_expert: float
    us: float
    gb_per_s: float
    share_of_read: float
    gops: float
    share_of_peak: float
    share_of_limit: float
    spread: float


@dataclass
class Speedup:
    """How much faster more threads are, and how much faster the limit that binds is; medians over rounds."""

    threads: int
    beside: int
    tokens: int
    speedup: float
    of_the_limit: float


@dataclass
class Sample:
    """One forward: its time, the bytes and operations it needed, and the read bandwidth of its round."""

    seconds: float
    weight_bytes: float
    operations: float
    read: float

    def limit_seconds(self, peak: float) -> float:
        """What the forward takes at the limit; `peak` in operations a second."""
        return max(self.weight_bytes / self.read, self.operations / peak)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the bench."""
    add_layer_arguments(parser)
    parser.add_argument("--tokens", default="1,2,4,8,16,64,256,1024,4096", help="token counts, comma separated")
    parser.add_argument("--threads", help="thread counts, a table each; default KT_NUM_THREADS, else the usable cores")
    parser.add_argument("--routing", default="uniform", choices=list(ROUTINGS))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the shares of the limit over rows per expert")


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which layer is measured, and how often."""
    parser.add_argument("--method", default="AMXINT8", choices=list(METHODS))
    parser.add_argument("--group-size", type=int, help="AMXINT4: weights under one scale, 0 for the whole row")
    parser.add_argument("--shape", default="qwen3-30b", choices=list(SHAPES))
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
        token_counts = conditions.positive_numbers("--tokens", args.tokens)
        conditions.positive_numbers("--rounds", str(args.rounds))
        threads = conditions.positive_numbers("--threads", args.threads) if args.threads else [None]
        conditions.check_plot(args.plot)
        shape, layers, error = prepare(args, threads)
    except WrongResultError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as refused:
        print(refused, file=sys.stderr)
        return 2
    result = describe(args, shape, layers, error) | measure(layers, shape, token_counts, args.routing, args.rounds)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)
    if args.plot:
        plot(result, args.plot)
    return conditions.end_of_run(result["drift"])


class WrongResultError(Exception):
    """The layer does not give what fp32 gives, or other bits for another number of threads."""


def prepare(args: argparse.Namespace, threads: Sequence[int | None]) -> tuple[Shape, list[CpuExperts], float]:
    """The layer that the flags of :func:`add_layer_arguments` name, once for each number of threads, and its error.

    Raises
    ------
    ValueError, RuntimeError
        Flags, threads or kernels that cannot be had here.
    WrongResultError
        As :func:`build_layers`.
    """
    layout = get_method(args.method).layout_with_group(args.group_size)
    engines = [get_engine(EngineConfig.resolve(count)) for count in dict.fromkeys(threads)]
    shape = cut_to_machine(SHAPES[args.shape], layout, len(engines))
    return shape, *build_layers(shape, layout, engines)


def cut_to_machine(shape: Shape, layout: str, num_layers: int = 1) -> Shape:
    """Fewer experts where all of them, in so many layers, would be more than MAX_WEIGHT_BYTES."""
    each = sum(packed_bytes(layout, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size))
    return shape.cut_to(MAX_WEIGHT_BYTES // num_layers // each)


def build_layers(shape: Shape, layout: str, engines: list[_ext.Engine]) -> tuple[list[CpuExperts], float]:
    """The same layer of random experts on each engine, and its relative error against fp32 torch in one forward.

    Raises
    ------
    WrongResultError
        An error above CHECK_BOUND, or results that differ between the engines.
    """
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * shape.hidden_size**-0.5).to(torch.bfloat16)

    # Eight different experts are enough: the kernels do not look at values, and zeros (one shared page) are avoided.
    wide, tall = (shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size)
    kinds = [(random(*wide), random(*wide), random(*tall)) for _ in range(min(8, shape.num_experts))]
    hidden = random(4, shape.hidden_size) * shape.hidden_size**0.5
    ids = draw_experts(shape, 4, "uniform", generator)
    weights = torch.rand(4, shape.top_k, generator=generator)
    layers = [load_layer(shape, layout, engine, kinds) for engine in engines]
    outputs = [ops.moe_forward(hidden, ids, weights, None, experts.layer.handle) for experts in layers]
    for engine, output in zip(engines, outputs, strict=True):
        if not torch.equal(output, outputs[0]):
            raise WrongResultError(
                f"wrong result: {engine.num_threads} threads give other bits than {engines[0].num_threads}."
            )
    expected = torch.zeros(4, shape.hidden_size)
    for t in range(4):
        for s in range(shape.top_k):
            gate, up, down = (w.float() for w in kinds[int(ids[t, s]) % len(kinds)])
            x = hidden[t].float()
            expected[t] += weights[t, s] * (down @ (torch.nn.functional.silu(gate @ x) * (up @ x)))
    error = float((outputs[0].float() - expected).norm() / expected.norm())
    bound = CHECK_BOUND[weight_dtype_of(layout)]
    if not error <= bound:
        raise WrongResultError(f"wrong result: relative error {error:.3f} is above {bound}.")
    return layers, error


def load_layer(shape: Shape, layout: str, engine: _ext.Engine, kinds: list[tuple[torch.Tensor, ...]]) -> CpuExperts:
    """A layer on one engine; expert e gets the weights number ``e % len(kinds)``."""
    config = MoEConfig(
        layer_idx=0,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )
    experts = CpuExperts(config, layout=layout, engine=engine)
    for e in range(shape.num_experts):
        gate, up, down = kinds[e % len(kinds)]
        experts.load_experts([e], [gate], [up], [down])
    return experts


def draw_experts(shape: Shape, tokens: int, routing: str, generator: torch.Generator) -> torch.Tensor:
    """Experts of each token, int64 ``[tokens, top_k]``, all different within a token.

    Drawn one after the other without return, with probabilities of 1 (uniform) or 1 / rank (zipf): the top_k of
    ``log p + Gumbel noise``. The ranks are shuffled once, the same way in every call.
    """
    noise = -torch.rand(tokens, shape.num_experts, generator=generator).clamp_min(1e-30).log().neg().log()
    if routing == "zipf":
        order = torch.randperm(shape.num_experts, generator=torch.Generator().manual_seed(3))
        noise -= (order + 1.0).log()
    return noise.topk(shape.top_k, dim=-1).indices


def measure(layers: list[CpuExperts], shape: Shape, token_counts: list[int], routing: str, rounds: int) -> dict:
    """Interleaved rounds; returns a table for each layer, the speed-ups between them and the drift."""
    generator = torch.Generator().manual_seed(2)
    inputs = {
        tokens: torch.randn(tokens, shape.hidden_size, generator=generator).to(torch.bfloat16)
        for tokens in token_counts
    }
    samples: list[dict[int, list[Sample]]] = [{tokens: [] for tokens in token_counts} for _ in layers]
    limits: list[list[tuple[float, float]]] = [[] for _ in layers]
    for experts in layers:  # first touch of the scratch, frequency, page tables
        experts.layer.probe_read()
        experts.layer.probe_peak(milliseconds=100)
    for _ in range(rounds):
        ids = {tokens: draw_experts(shape, tokens, routing, generator) for tokens in token_counts}
        for experts, taken, limit in zip(layers, samples, limits, strict=True):
            read = experts.layer.probe_read()
            limit.append((read, experts.layer.probe_peak(milliseconds=5)))
            for tokens, hidden in inputs.items():
                taken[tokens].append(Sample(*forward(experts, shape, hidden, ids[tokens]), read))
    tables, peaks = [], [statistics.median(peak for _, peak in limit) for limit in limits]
    for experts, taken, limit, peak in zip(layers, samples, limits, peaks, strict=True):
        rows = [asdict(summarize(tokens, taken[tokens], shape, peak)) for tokens in token_counts]
        pages = experts.layer.pages()
        tables.append(
            {
                "threads": experts.engine.num_threads,
                "nodes": experts.engine.num_nodes,
                "read_gb_per_s": statistics.median(read for read, _ in limit) / 1e9,
                "peak_gops": peak / 1e9,
                "dispatch_ns": experts.engine.probe_dispatch(),
                "huge_page_share": pages["huge_bytes"] / max(pages["resident_bytes"], 1),
                "rows": rows,
            }
        )
    series = [values for limit in limits for values in zip(*limit, strict=True)]
    counts = [experts.engine.num_threads for experts in layers]
    return {
        "tables": tables,
        "speedups": [asdict(one) for one in speedups(counts, samples, peaks)],
        "drift": max(conditions.drift(values) for values in series),
    }


def forward(experts: CpuExperts, shape: Shape, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[float, float, float]:
    """One forward: its seconds, the bytes of its distinct experts and its operations."""
    weights = torch.full(ids.shape, 1.0 / shape.top_k)
    before = experts.layer.counters()
    ops.moe_forward(hidden, ids, weights, None, experts.layer.handle)
    after = experts.layer.counters()
    spent = {name: after[name] - before[name] for name in ("busy_ns", "weight_bytes", "rows")}
    operations = 2.0 * spent["rows"] * 3 * shape.hidden_size * shape.intermediate_size
    return spent["busy_ns"] * 1e-9, spent["weight_bytes"], operations


def summarize(tokens: int, samples: list[Sample], shape: Shape, peak: float) -> Row:
    """Medians over the samples of one token count; `peak` is the register peak, operations a second."""
    by_read = statistics.median(one.weight_bytes / one.seconds / one.read for one in samples)
    by_peak = statistics.median(one.operations / one.seconds / peak for one in samples)
    by_limit = [one.limit_seconds(peak) / one.seconds for one in samples]
    return Row(
        tokens=tokens,
        rows_per_expert=tokens * shape.top_k / shape.num_experts,
        us=1e6 * statistics.median(one.seconds for one in samples),
        gb_per_s=statistics.median(one.weight_bytes / one.seconds for one in samples) / 1e9,
        share_of_read=by_read,
        gops=statistics.median(one.operations / one.seconds for one in samples) / 1e9,
        share_of_peak=by_peak,
        share_of_limit=statistics.median(by_limit),
        spread=conditions.spread(by_limit),
    )


def speedups(counts: list[int], samples: list[dict[int, list[Sample]]], peaks: list[float]) -> list[Speedup]:
    """Each thread count beside the first; `samples` by thread count and tokens, the same routing in each round."""
    found = []
    for count, taken, peak in zip(counts[1:], samples[1:], peaks[1:], strict=True):
        for tokens, many in taken.items():
            pairs = list(zip(samples[0][tokens], many, strict=True))
            found.append(
                Speedup(
                    threads=count,
                    beside=counts[0],
                    tokens=tokens,
                    speedup=statistics.median(few.seconds / one.seconds for few, one in pairs),
                    of_the_limit=statistics.median(
                        few.limit_seconds(peaks[0]) / one.limit_seconds(peak) for few, one in pairs
                    ),
                )
            )
    return found


def describe(args: argparse.Namespace, shape: Shape, layers: list[CpuExperts], error: float) -> dict:
    """What is measured, on what and how to repeat it."""
    flags = [f"--method {args.method}", f"--shape {args.shape}", f"--tokens {args.tokens}"]
    flags += [f"--threads {','.join(str(experts.engine.num_threads) for experts in layers)}"]
    flags += [f"--group-size {args.group_size}"] if args.group_size is not None else []
    return {
        "method": args.method,
        "layout": layers[0].layout,
        "shape": args.shape,
        **asdict(shape),
        "routing": args.routing,
        "kernels": layers[0].layer.explain,
        "environment": conditions.environment().strip(),
        "relative_error": error,
        "machine": conditions.machine(),
        "commit": conditions.commit(),
        "command": f"{conditions.environment()}python -m kt_kernel.bench layer {' '.join(flags)} "
        f"--routing {args.routing} --rounds {args.rounds}",
    }


def print_tables(result: dict) -> None:
    """Print a result of :func:`describe` and :func:`measure` as tables in Markdown."""
    print(f"{result['machine']}; commit {result['commit'] or 'unknown'}")
    print(f"`{result['command']}`")
    print(
        f"{result['method']}, {result['shape']} (hidden {result['hidden_size']}, intermediate "
        f"{result['intermediate_size']}, {result['num_experts']} experts, top-{result['top_k']}), {result['routing']} "
        f"routing; {result['kernels']}; {result['environment'] or 'KT_FORCE_ISA not set'}; "
        f"relative error {result['relative_error']:.4f}; the calibration moved by {100 * result['drift']:.1f} %"
    )
    for table in result["tables"]:
        print(
            f"\n{table['threads']} threads on {table['nodes']} nodes; limits in this run: read "
            f"{table['read_gb_per_s']:.1f} GB/s, peak {table['peak_gops']:.0f} GOPS, dispatch and join "
            f"{table['dispatch_ns']:.0f} ns; {100 * table['huge_page_share']:.0f} % of the weights on huge pages\n"
        )
        print("| tokens | rows/expert | us | GB/s | of read | GOPS | of peak | of limit | spread |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
        for row in table["rows"]:
            print(
                f"| {row['tokens']} | {row['rows_per_expert']:.2f} | {row['us']:.0f} | {row['gb_per_s']:.1f} | "
                f"{row['share_of_read']:.2f} | {row['gops']:.0f} | {row['share_of_peak']:.2f} | "
                f"{row['share_of_limit']:.2f} | {row['spread']:.2f} |"
            )
    if result["speedups"]:
        print("\n| threads | tokens | speed-up | of the limit |")
        print("|---:|---:|---:|---:|")
    for one in result["speedups"]:
        print(
            f"| {one['threads']} beside {one['beside']} | {one['tokens']} | {one['speedup']:.2f} | "
            f"{one['of_the_limit']:.2f} |"
        )


def plot(result: dict, file: Path) -> None:
    """Draw a result over the rows of an expert: one line a number of threads, 1 is the roofline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots(1, 1)
    for table in result["tables"]:
        rows = [row["rows_per_expert"] for row in table["rows"]]
        shares = [row["share_of_limit"] for row in table["rows"]]
        axes.plot(rows, shares, marker="o", label=f"{table['threads']} threads")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(
        title=f"{result['method']}, {result['shape']}, {result['routing']} routing",
        xlabel="tokens per expert",
        ylabel="share of what the machine allows",
        xscale="log",
        ylim=(0, 1.05),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)

"""``python -m kt_kernel.bench layer``: one MoE layer beside what this machine reads and multiplies, in one run.

Every round measures, for each number of threads, each token count with fresh routing (SHORT_SAMPLES times where a
forward is short), and right before each forward the read bandwidth over the layer's own weights and the register peak,
so drift of the machine hits both sides of a ratio. The time of a forward is the one the library counts: routing,
quantization, products and weighted sum, without Python.

    share of read  = bytes of the distinct experts of the forward / time / read bandwidth right before it
    share of peak  = 2 * rows * parameters of an expert / time / median register peak of the token count
    share of limit = the larger of the two: what the roofline allows is 1

The calibration of a token count is the limit that binds it. A token count whose calibration moved, for any number of
threads, is measured again for all of them, ``--attempts`` times in all; the others stay.
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
from kt_kernel.config import EngineConfig
from kt_kernel.experts import CpuExperts, get_engine, packed_bytes
from kt_kernel.methods import FLOAT_METHODS, get_method, weight_dtype_of

# Weights must not fit the last-level cache, and everything must fit the machine: of the layers of all thread counts.
MAX_WEIGHT_BYTES = 3 << 30
# Relative rms error against fp32 on the same weights before quantization. Derived in tests/cpp/test_moe_layer.cpp; here
# only gross errors are to be found, so twice that.
CHECK_BOUND = {"bf16": 2 / 256, "int8": 0.04, "int4": 0.4}
# A forward of so few tokens is short, and sees the bandwidth of one moment. Where that scatters by 20 %, the median of
# 40 samples is itself 4 % off (1.25 * 20 % / sqrt(40)), that of 120 only 2 %.
SHORT_TOKENS = 8
SHORT_SAMPLES = 3
ROUTINGS = {"uniform": "every expert as likely as any other", "zipf": "the n-th expert 1/n as likely as the first"}


@dataclass
class Row:
    """One line of a table: medians over samples, the spread (p90 - p10) of the share of the limit, and its drift."""

    tokens: int
    rows_per_expert: float
    us: float
    gb_per_s: float
    share_of_read: float
    gops: float
    share_of_peak: float
    share_of_limit: float
    spread: float
    drift: float
    thrown_away: bool


@dataclass
class Speedup:
    """How much faster more threads are, and how much faster the limit that binds is; medians over samples."""

    threads: int
    beside: int
    tokens: int
    speedup: float
    of_the_limit: float
    drift: float
    thrown_away: bool


@dataclass
class Sample:
    """One forward: its time, the bytes and operations it needed, and both limits right before it, a second."""

    seconds: float
    weight_bytes: float
    operations: float
    read: float
    peak: float

    def limit_seconds(self, peak: float) -> float:
        """What the forward takes at the limit; `peak`, operations a second, is the median over samples."""
        return max(self.weight_bytes / self.read, self.operations / peak)


# By token count: the samples of each layer, and the drift of the limit that binds.
Lines = dict[int, tuple[list[list[Sample]], float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the bench."""
    add_layer_arguments(parser)
    parser.add_argument("--tokens", default="1,2,4,8,16,64,256,1024,4096", help="token counts, comma separated")
    parser.add_argument("--threads", help="thread counts, a table each; default KT_NUM_THREADS, else the usable cores")
    parser.add_argument("--routing", default="uniform", choices=list(ROUTINGS))
    conditions.add_attempts(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the shares of the limit over rows per expert")


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which layer is measured, and how often."""
    parser.add_argument("--method", default="AMXINT8", choices=list(FLOAT_METHODS))
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
        conditions.positive_numbers("--attempts", str(args.attempts))
        threads = conditions.positive_numbers("--threads", args.threads) if args.threads else [None]
        conditions.check_plot(args.plot)
        shape, layers, error = prepare(args, threads)
    except WrongResultError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as refused:
        print(refused, file=sys.stderr)
        return 2
    lines = conditions.until_quiet(
        token_counts,
        args.attempts,
        lambda counts: measure(layers, shape, counts, args.routing, args.rounds),
        drift_of,
    )
    result = describe(args, shape, layers, error) | summarize_lines(layers, shape, lines)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)
    if args.plot:
        plot(result, args.plot)
    return conditions.end_of_lines([drift for _, drift in lines.values()])


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
    # torch's OpenMP threads spin for milliseconds after their work, on the cores the pool is measured on
    torch.set_num_threads(1)
    layout = get_method(args.method).layout_with_group(args.group_size)
    engines = [get_engine(EngineConfig.resolve(count)) for count in dict.fromkeys(threads)]
    shape = cut_to_machine(SHAPES[args.shape], layout, len(engines))
    return shape, *build_layers(shape, layout, engines)


def cut_to_machine(shape: Shape, layout: str, num_layers: int = 1) -> Shape:
    """Fewer experts where all of them, in so many layers, would be more than MAX_WEIGHT_BYTES."""
    each = sum(packed_bytes((layout, layout), hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size))
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
    experts = CpuExperts(shape.config(), layouts=(layout, layout), engine=engine)
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


def measure(
    layers: list[CpuExperts], shape: Shape, token_counts: list[int], routing: str, rounds: int
) -> dict[int, list[list[Sample]]]:
    """Interleaved rounds; returns by token count the samples of each layer, the same routing in each of them."""
    generator = torch.Generator().manual_seed(2)
    inputs = {
        tokens: torch.randn(tokens, shape.hidden_size, generator=generator).to(torch.bfloat16)
        for tokens in token_counts
    }
    # one entry a sample of a round
    drawn_for = [tokens for tokens in token_counts for _ in range(SHORT_SAMPLES if tokens <= SHORT_TOKENS else 1)]
    samples: dict[int, list[list[Sample]]] = {tokens: [[] for _ in layers] for tokens in token_counts}
    for experts in layers:  # first touch of the scratch, frequency, page tables
        experts.layer.probe_read()
        experts.layer.probe_peak(milliseconds=100)
    for _ in range(rounds):
        routings = [(tokens, draw_experts(shape, tokens, routing, generator)) for tokens in drawn_for]
        for i, experts in enumerate(layers):
            for tokens, ids in routings:
                limits = probe_limits(experts)
                samples[tokens][i].append(Sample(*forward(experts, shape, inputs[tokens], ids), *limits))
    return samples


def wake(experts: CpuExperts) -> None:
    """Have every worker do nothing, often, so that none sleeps when the next job comes.

    In a server the layers of a model follow one another and the workers stay awake. Between two samples of a bench they
    fall asleep, and on a virtual machine it takes milliseconds to wake a halted core.
    """
    experts.engine.probe_dispatch()


def probe_limits(experts: CpuExperts) -> tuple[float, float]:
    """The read bandwidth over the layer's weights, bytes a second, and the register peak, operations a second."""
    wake(experts)
    read = experts.layer.probe_read()
    wake(experts)
    return read, experts.layer.probe_peak(milliseconds=5)


def forward(experts: CpuExperts, shape: Shape, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[float, float, float]:
    """One forward on woken workers: its seconds, the bytes of its distinct experts and its operations."""
    weights = torch.full(ids.shape, 1.0 / shape.top_k)
    wake(experts)
    before = experts.layer.counters()
    ops.moe_forward(hidden, ids, weights, None, experts.layer.handle)
    after = experts.layer.counters()
    spent = {name: after[name] - before[name] for name in ("busy_ns", "weight_bytes", "rows")}
    operations = 2.0 * spent["rows"] * 3 * shape.hidden_size * shape.intermediate_size
    return spent["busy_ns"] * 1e-9, spent["weight_bytes"], operations


def median_peak(samples: list[Sample]) -> float:
    """Operations a second; a single probe of a few milliseconds dips when the hypervisor takes a core."""
    return statistics.median(one.peak for one in samples)


def shares(samples: list[Sample]) -> tuple[float, float]:
    """Medians of the share of the read bandwidth and of the share of the register peak."""
    peak = median_peak(samples)
    return (
        statistics.median(one.weight_bytes / one.seconds / one.read for one in samples),
        statistics.median(one.operations / one.seconds / peak for one in samples),
    )


def drift_of(_tokens: int, by_layer: list[list[Sample]]) -> float:
    """How far the limit that binds a token count moved: of the thread counts, which are compared, the largest."""
    return max(
        conditions.drift_of_limit(*shares(samples), [one.read for one in samples], [one.peak for one in samples])
        for samples in by_layer
    )


def summarize_lines(layers: list[CpuExperts], shape: Shape, lines: Lines) -> dict:
    """A table for each layer, the speed-ups between them and the largest drift."""
    tables = []
    for i, experts in enumerate(layers):
        pages = experts.layer.pages()
        samples = [one for by_layer, _ in lines.values() for one in by_layer[i]]
        rows = [summarize(tokens, by_layer[i], shape, drift) for tokens, (by_layer, drift) in lines.items()]
        tables.append(
            {
                "threads": experts.engine.num_threads,
                "nodes": experts.engine.num_nodes,
                "read_gb_per_s": statistics.median(one.read for one in samples) / 1e9,
                "peak_gops": median_peak(samples) / 1e9,
                "dispatch_ns": experts.engine.probe_dispatch(),
                "huge_page_share": pages["huge_bytes"] / max(pages["resident_bytes"], 1),
                "rows": [asdict(row) for row in rows],
            }
        )
    counts = [experts.engine.num_threads for experts in layers]
    return {
        "tables": tables,
        "speedups": [asdict(one) for one in speedups(counts, lines)],
        "drift": max(drift for _, drift in lines.values()),
    }


def summarize(tokens: int, samples: list[Sample], shape: Shape, drift: float) -> Row:
    """Medians over the samples of one token count, whose calibration moved by `drift`."""
    by_read, by_peak = shares(samples)
    peak = median_peak(samples)
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
        drift=drift,
        thrown_away=drift > conditions.MAX_DRIFT,
    )


def speedups(counts: list[int], lines: Lines) -> list[Speedup]:
    """Each thread count beside the first, at each number of tokens; pairs of samples have the same routing."""
    found = []
    for i, count in list(enumerate(counts))[1:]:
        for tokens, (by_layer, drift) in lines.items():
            pairs = list(zip(by_layer[0], by_layer[i], strict=True))
            few_peak, peak = median_peak(by_layer[0]), median_peak(by_layer[i])
            found.append(
                Speedup(
                    threads=count,
                    beside=counts[0],
                    tokens=tokens,
                    speedup=statistics.median(few.seconds / one.seconds for few, one in pairs),
                    of_the_limit=statistics.median(
                        few.limit_seconds(few_peak) / one.limit_seconds(peak) for few, one in pairs
                    ),
                    drift=drift,
                    thrown_away=drift > conditions.MAX_DRIFT,
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
        "layout": layers[0].layouts[0],
        "shape": args.shape,
        **asdict(shape),
        "routing": args.routing,
        "kernels": layers[0].layer.explain,
        "environment": conditions.environment().strip(),
        "relative_error": error,
        "machine": conditions.machine(),
        "commit": conditions.commit(),
        "command": f"{conditions.environment()}python -m kt_kernel.bench layer {' '.join(flags)} "
        f"--routing {args.routing} --rounds {args.rounds}{conditions.attempts_flag(args.attempts)}",
    }


def print_tables(result: dict) -> None:
    """Print a result of :func:`describe` and :func:`measure` as tables in Markdown."""
    print(f"{result['machine']}; commit {result['commit'] or 'unknown'}")
    print(f"`{result['command']}`")
    print(
        f"{result['method']}, {result['shape']} (hidden {result['hidden_size']}, intermediate "
        f"{result['intermediate_size']}, {result['num_experts']} experts, top-{result['top_k']}), {result['routing']} "
        f"routing; {result['kernels']}; {result['environment'] or 'KT_FORCE_ISA not set'}; "
        f"relative error {result['relative_error']:.4f}; the calibration moved by up to {100 * result['drift']:.1f} %"
    )
    for table in result["tables"]:
        print(
            f"\n{table['threads']} threads on {table['nodes']} nodes; limits in this run: read "
            f"{table['read_gb_per_s']:.1f} GB/s, peak {table['peak_gops']:.0f} GOPS, dispatch and join "
            f"{table['dispatch_ns']:.0f} ns; {100 * table['huge_page_share']:.0f} % of the weights on huge pages\n"
        )
        print("| tokens | rows/expert | us | GB/s | of read | GOPS | of peak | of limit | spread | moved |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
        for row in table["rows"]:
            print(
                f"| {row['tokens']} | {row['rows_per_expert']:.2f} | {row['us']:.0f} | {row['gb_per_s']:.1f} | "
                f"{row['share_of_read']:.2f} | {row['gops']:.0f} | {row['share_of_peak']:.2f} | "
                f"{row['share_of_limit']:.2f} | {row['spread']:.2f} | {conditions.moved_cell(row)} |"
            )
    if result["speedups"]:
        print("\n| threads | tokens | speed-up | of the limit | moved |")
        print("|---:|---:|---:|---:|---:|")
    for one in result["speedups"]:
        print(
            f"| {one['threads']} beside {one['beside']} | {one['tokens']} | {one['speedup']:.2f} | "
            f"{one['of_the_limit']:.2f} | {conditions.moved_cell(one)} |"
        )


def plot(result: dict, file: Path) -> None:
    """Draw a result over the rows of an expert, but for what is thrown away: one line a number of threads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots(1, 1)
    for table in result["tables"]:
        kept = [row for row in table["rows"] if not row["thrown_away"]]
        rows = [row["rows_per_expert"] for row in kept]
        axes.plot(rows, [row["share_of_limit"] for row in kept], marker="o", label=f"{table['threads']} threads")
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

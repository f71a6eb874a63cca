"""``python -m kt_kernel.bench mixed``: what a token in decode waits for while a long prompt is computed, one layer.

SGLang's scheduler has one forward in flight. By default it runs the chunks of all waiting prompts first, so a decode
waits for a chunk in every layer, and for every chunk that is left; with ``--enable-mixed-chunk`` the decode's token is
a row of the chunk's own batch. In both cases ``--chunked-prefill-size`` bounds the wait. The engine computes jobs in
their order, whole layers of at most 4096 tokens at a time, so the same bound holds for programs that submit a decode of
their own while a chunk is in flight. Every round measures for each size of a chunk:

    alone    one token by itself
    chunk    the chunk by itself
    batched  the chunk and the token as one batch: what the token waits in one layer under --enable-mixed-chunk
    behind   one token submitted right after the chunk, until its result is there: the engine's longest wait
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch

from kt_kernel import ops
from kt_kernel.bench import conditions, layer
from kt_kernel.bench.shapes import Shape
from kt_kernel.experts import CpuExperts


@dataclass
class Row:
    """One line of the table: medians over rounds, in microseconds of one layer."""

    chunk: int
    alone_us: float
    chunk_us: float
    chunk_us_per_token: float
    batched_us: float
    behind_us: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the bench."""
    layer.add_layer_arguments(parser)
    parser.add_argument("--chunks", default="256,512,1024,2048", help="tokens of a prefill chunk, comma separated")
    parser.add_argument("--threads", type=int, help="default KT_NUM_THREADS, else the usable cores")


def main(args: argparse.Namespace) -> int:
    """Run the bench and print its result.

    Returns
    -------
    int
        Exit code: 0 done, 1 wrong result, 2 bad arguments, 3 the machine was not quiet (the result is printed anyway).
    """
    try:
        chunks = conditions.positive_numbers("--chunks", args.chunks)
        conditions.positive_numbers("--rounds", str(args.rounds))
        if args.threads is not None:
            conditions.positive_numbers("--threads", str(args.threads))
        shape, (experts,), error = layer.prepare(args, [args.threads])
    except layer.WrongResultError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as refused:
        print(refused, file=sys.stderr)
        return 2
    result = measure(experts, shape, chunks, args.rounds)
    result |= {
        "method": args.method,
        "shape": args.shape,
        "threads": experts.engine.num_threads,
        "kernels": experts.layer.explain,
        "relative_error": error,
        "machine": conditions.machine(),
        "commit": conditions.commit(),
        "command": f"{conditions.environment()}python -m kt_kernel.bench mixed --method {args.method} "
        f"--shape {args.shape} --chunks {args.chunks} --threads {experts.engine.num_threads} --rounds {args.rounds}"
        + (f" --group-size {args.group_size}" if args.group_size is not None else ""),
    }
    print(json.dumps(result, indent=2) if args.json else table(result))
    return conditions.end_of_run(result["drift"])


def measure(experts: CpuExperts, shape: Shape, chunks: list[int], rounds: int) -> dict:
    """Interleaved rounds; returns the rows and the drift."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(max(chunks) + 1, shape.hidden_size, generator=generator).to(torch.bfloat16)
    samples: dict[int, list[tuple[float, float, float, float]]] = {chunk: [] for chunk in chunks}
    reads, peaks = [], []
    experts.layer.probe_read()
    experts.layer.probe_peak(milliseconds=100)
    for _ in range(rounds):
        read, peak = layer.probe_limits(experts)
        reads.append(read)
        peaks.append(peak)
        for chunk in chunks:
            ids = layer.draw_experts(shape, chunk + 1, "uniform", generator)
            token, prompt = slice(chunk, chunk + 1), slice(0, chunk)
            alone = layer.forward(experts, shape, hidden[token], ids[token])[0]
            by_itself = layer.forward(experts, shape, hidden[prompt], ids[prompt])[0]
            batched = layer.forward(experts, shape, hidden[: chunk + 1], ids)[0]
            layer.wake(experts)
            behind = seconds_behind(experts, (hidden[prompt], ids[prompt]), (hidden[token], ids[token]))
            samples[chunk].append((alone, by_itself, batched, behind))
    return {
        "rows": [asdict(summarize(chunk, taken)) for chunk, taken in samples.items()],
        "read_gb_per_s": statistics.median(reads) / 1e9,
        "peak_gops": statistics.median(peaks) / 1e9,
        "drift": max(conditions.drift(reads), conditions.drift(peaks)),
    }


def seconds_behind(
    experts: CpuExperts, chunk: tuple[torch.Tensor, torch.Tensor], token: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Seconds from the submission of a token right behind a chunk until its result is there."""
    weights = [torch.full(ids.shape, 1.0 / ids.shape[1]) for _, ids in (chunk, token)]
    first = ops.submit(*chunk, weights[0], None, experts.layer.handle)
    start = time.perf_counter()
    second = ops.submit(*token, weights[1], None, experts.layer.handle)
    ops.sync(second, token[0])
    seconds = time.perf_counter() - start
    ops.sync(first, chunk[0])
    return seconds


def summarize(chunk: int, samples: list[tuple[float, float, float, float]]) -> Row:
    """Medians; `samples` are (alone, chunk, batched, behind) in seconds."""
    alone, by_itself, batched, behind = (1e6 * statistics.median(values) for values in zip(*samples, strict=True))
    return Row(chunk, alone, by_itself, by_itself / chunk, batched, behind)


def table(result: dict) -> str:
    """The result as a table in Markdown."""
    lines = [
        f"{result['machine']}; commit {result['commit'] or 'unknown'}",
        f"`{result['command']}`",
        f"one layer of {result['shape']}, {result['method']}, {result['threads']} threads; {result['kernels']}; read "
        f"{result['read_gb_per_s']:.1f} GB/s, peak {result['peak_gops']:.0f} GOPS; the calibration moved by "
        f"{100 * result['drift']:.1f} %",
        "",
        "| chunk | token alone us | chunk us | us a token of it | token in its batch us | token behind it us |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['chunk']} | {row['alone_us']:.0f} | {row['chunk_us']:.0f} | {row['chunk_us_per_token']:.1f} | "
            f"{row['batched_us']:.0f} | {row['behind_us']:.0f} |"
        )
    lines += [
        "",
        "SGLang has one forward in flight: a decode waits for the chunk in every layer (the default), or is a row of "
        "its batch (--enable-mixed-chunk); --chunked-prefill-size chooses the line of this table.",
    ]
    return "\n".join(lines)

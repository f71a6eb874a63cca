#!/usr/bin/env python3
"""Measure what every weight format costs in accuracy: the tables of docs/accuracy.md.

    python scripts/measure_accuracy.py MODEL [--peers FOLDER] [--only FP8 ...] [--write docs/accuracy.md]

MODEL, text and figures are those of ``measure_kl.py``. For each format the model is written with its experts in it
(``write_formats.py``), loaded as ``--kt-weight-path`` is, measured through our kernels, and deleted again.

The second table takes the weights as they are and asks what the rounding of activations costs beside them: KL to the
same weights with activations in fp32, for activations in bf16, in int8 with a scale a block of 128 and in int8 with a
scale a row (all computed in fp32 by torch), and for what our kernels do.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf_quantizers
import torch
from measure_kl import WINDOW, Score, load_experts, windows
from torch import Tensor, nn
from write_formats import write_format

from kt_kernel import KTMoEWrapper, _ext
from kt_kernel.bench.conditions import commit, machine
from kt_kernel.experts import packed_bytes

BLOCK = 128
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A row: what it is called, the method, the format of ``write_formats.py`` ("": the model itself), who rounded."""

    title: str
    method: str
    form: str
    quantizer: str
    activations: bool = False  # in the second table


OURS, HERE, GGML = "kt_kernel, while loading", "`format_quantizers.py`", "ggml"
CASES = (
    Case("AMXINT8", "AMXINT8", "", OURS, True),
    Case("AMXINT4", "AMXINT4", "", OURS, True),
    Case("AMXINT8, converted by kt-kernel for 2 nodes", "AMXINT8", "AMXINT8:2", "kt-kernel's rule", True),
    Case("FP8, blocks of 128 x 128", "FP8", "FP8", HERE, True),
    Case("FP8_PERCHANNEL", "FP8_PERCHANNEL", "FP8_PERCHANNEL", HERE),
    Case("MXFP8", "MXFP8", "MXFP8", HERE, True),
    Case("RAWINT4, group 32", "RAWINT4", "RAWINT4", HERE, True),
    Case("GPTQ_INT4, symmetric", "GPTQ_INT4", "GPTQ_INT4", HERE),
    Case("GPTQ_INT4, zero points", "GPTQ_INT4", "GPTQ_INT4:zeros", HERE),
    Case("AWQ", "AWQ", "AWQ", HERE),
    Case("MXFP4", "MXFP4", "MXFP4", HERE, True),
    Case("NVFP4", "NVFP4", "NVFP4", HERE, True),
    *(
        Case(f"LLAMAFILE, {kind}", "LLAMAFILE", f"LLAMAFILE:{kind}", GGML, kind in ("Q8_0", "Q6_K", "Q4_K_M"))
        for kind in (
            "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K",
        )
    ),
)  # fmt: skip


class Experts(nn.Module):
    """Stands in for the experts of one layer; `compute` may be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.compute: Compute | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the routed experts: ``[num_tokens, hidden_size]``, fp32."""
        assert self.compute is not None
        return self.compute(hidden_states, top_k_index, top_k_weights)


class Model:
    """The model in fp32 without its experts, and the text."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.threads = threads
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.config = self._model.config
        self.layers = []
        for layer in self._model.model.layers:
            layer.mlp.experts = Experts()
            self.layers.append(layer.mlp.experts)

    @property
    def num_weights(self) -> int:
        """Weights of all experts."""
        config = self.config
        return 3 * len(self.layers) * config.num_experts * config.hidden_size * config.moe_intermediate_size

    @torch.no_grad()
    def log_probabilities(self, computes: list[Compute], ids: Tensor) -> Tensor:
        """``[num_tokens, vocabulary]`` of one window."""
        for layer, compute in zip(self.layers, computes, strict=True):
            layer.compute = compute
        return self._model(ids[None]).logits[0].log_softmax(-1)

    def score(self, computes: list[Compute], text: list[Tensor], expected: list[Tensor]) -> Score:
        """Compare with the log-probabilities of another model."""
        score = Score()
        for ids, log_p in zip(text, expected, strict=True):
            score.add(log_p, self.log_probabilities(computes, ids), ids[1:])
        return score

    @contextmanager
    def loaded(self, case: Case, folder: Path) -> Iterator[list[KTMoEWrapper]]:
        """The experts of all layers as a server loads them."""
        wrappers = []
        try:
            for layer in range(len(self.layers)):
                wrappers.append(load_experts(layer, self.config, folder, case.method, self.threads))
            yield wrappers
        finally:
            for wrapper in wrappers:
                wrapper.moe.close()


def through_kernels(wrappers: list[KTMoEWrapper]) -> list[Compute]:
    """What our kernels compute."""
    return [lambda x, ids, weights, layer=layer: layer.forward(x, ids, weights, None) for layer in wrappers]


class ExactExperts:
    """The experts of a layer with the packed weights of a wrapper, in fp32, after a rounding of activations."""

    def __init__(self, wrapper: KTMoEWrapper) -> None:
        ops, config, layouts = torch.ops.kt_kernel, wrapper.config, wrapper.moe.layouts
        hidden, inter = config.hidden_size, config.intermediate_size
        self._weights = []
        for expert in range(config.num_experts):
            w13, w2 = wrapper.moe.export_packed(expert)
            pair = ops.dequantize_w13(w13, layouts[0], inter, hidden)
            self._weights.append((*pair, ops.dequantize(w2, layouts[1], hidden, inter)))

    def rounding(self, rounded: Rounding) -> Compute:
        """Experts whose products take rounded activations."""

        def compute(hidden_states: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
            output = torch.zeros_like(hidden_states)
            x = rounded(hidden_states)
            for expert, (gate, up, down) in enumerate(self._weights):
                token, slot = (ids == expert).nonzero(as_tuple=True)
                if len(token):
                    inner = torch.nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T)
                    share = topk_weights[token, slot, None].float()
                    output.index_add_(0, token, share * (rounded(inner) @ down.T))
            return output

        return compute


def in_fp32(x: Tensor) -> Tensor:
    """No rounding."""
    return x


def in_bf16(x: Tensor) -> Tensor:
    """Rounded to bf16."""
    return x.bfloat16().float()


def in_int8(x: Tensor, block: int) -> Tensor:
    """Rounded to int8 with a scale a block, the last one short where it must be."""
    k = x.shape[1]
    blocks = torch.nn.functional.pad(x, (0, -k % block)).unflatten(1, (-1, block))
    scale = (blocks.abs().amax(2, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / scale).round() * scale).flatten(1)[:, :k]


ROUNDINGS: dict[str, Rounding] = {
    "bf16": in_bf16,
    f"int8 a block of {BLOCK}": lambda x: in_int8(x, BLOCK),
    "int8 a row": lambda x: in_int8(x, x.shape[1]),
}


class Row(NamedTuple):
    """What the first table says of a case, and its line of the second, if it has one."""

    case: Case
    layouts: list[tuple[str, str]]  # of w13 and w2 of each layer
    bits: float
    score: Score
    activations: list[float] | None


def taken_by(layouts: tuple[str, str], sizes: tuple[int, int]) -> str:
    """How the kernels of layouts take activations of these sizes, in words."""
    found = []
    for layout, k in zip(layouts, sizes, strict=True):
        info = _ext.layout_info(layout, 64, k)
        if info["bf16_rows"]:
            found.append("bf16")
        elif info["rotation_block"] > 1:
            found.append("int8 a row, rotated")
        else:
            blocks = info["num_activation_blocks"]
            found.append("int8 a row" if blocks == 1 else f"int8 a block of {_block_size(k, blocks, info)}")
    return ", ".join(dict.fromkeys(found))


def _block_size(k: int, blocks: int, info: dict[str, Any]) -> int:
    step = math.lcm(info["group_size"], 64)
    return next(size for size in range(step, k + step, step) if -(-k // size) == blocks and size >= BLOCK)


def measure(model: Model, case: Case, folder: Path, text: list[Tensor], expected: list[Tensor], cost: int) -> Row:
    """Measure one case on the windows `text`, its activations on the first `cost` of them."""
    config = model.config
    with model.loaded(case, folder) as wrappers:
        computes = through_kernels(wrappers)
        score = model.score(computes, text, expected)
        sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.moe_intermediate_size}
        num_bytes = sum(sum(packed_bytes(wrapper.moe.layouts, **sizes)) for wrapper in wrappers) * config.num_experts
        activations = None
        if case.activations and cost:
            exact = [ExactExperts(wrapper) for wrapper in wrappers]
            few = text[:cost]
            truth = [model.log_probabilities([e.rounding(in_fp32) for e in exact], ids) for ids in few]
            tried = [[e.rounding(rounded) for e in exact] for rounded in ROUNDINGS.values()]
            scores = [model.score(option, few, truth) for option in (*tried, computes)]
            activations = [found.kl / found.positions for found in scores]
        layouts = [wrapper.moe.layouts for wrapper in wrappers]
        return Row(case, layouts, 8 * num_bytes / model.num_weights, score, activations)


def table(header: list[str], lines: list[list[str]]) -> str:
    """Markdown, the first column to the left."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def formats_table(rows: list[Row]) -> str:
    """Bits, KL, perplexity and agreement of every case."""
    header = ["weights", "quantized by", "layouts", "bits a weight", "KL to BF16", "perplexity", "same top-1"]
    lines = []
    for row in rows:
        score = row.score
        layouts = ", ".join(f"`{layout}`" for layout in dict.fromkeys(itertools.chain(*row.layouts)))
        agreement = f"{100 * score.agreement / score.positions:.2f} %"
        figures = [f"{score.kl / score.positions:.5f}", f"{math.exp(score.nll / score.predicted):.3f}", agreement]
        lines.append([row.case.title, row.case.quantizer, layouts, f"{row.bits:.2f}", *figures])
    return table(header, lines)


def activations_table(rows: list[Row], sizes: tuple[int, int]) -> str:
    """KL of each rounding of activations to none, the weights being equal."""
    header = ["weights", *ROUNDINGS, "our kernels", "which take"]
    lines = [
        [row.case.title, *(f"{kl:.5f}" for kl in row.activations), taken_by(row.layouts[0], sizes)]
        for row in rows
        if row.activations is not None
    ]
    return table(header, lines)


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """A document with what stands between its markers replaced."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the document must have {begin} and {end} once each.")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    return text


def chosen_cases(only: list[str] | None, ggml: Path | None) -> list[Case]:
    """The cases to measure.

    Raises
    ------
    ValueError
        An unknown method, or types that need ggml where it is not installed.
    """
    cases = [case for case in CASES if not only or case.method in only or case.form in only]
    if not cases:
        raise ValueError(f"none of {', '.join(only or [])} is measured; use methods or formats of write_formats.py.")
    if ggml is None and any(case.quantizer == GGML for case in cases):
        raise ValueError("GGUF types need ggml; run python -m kt_kernel.bench peers --install llama, or use --only.")
    return cases


def run(args: argparse.Namespace) -> dict[str, str]:
    """Measure and return the blocks of the document."""
    from kt_kernel.integrations.torchvision_repair import repair_torchvision

    cases = chosen_cases(args.only, gguf_quantizers.find_ggml(args.peers))
    repair_torchvision()
    started = time.monotonic()
    model = Model(args.model, args.threads)
    text = list(windows(args.model, args.tokens))
    base = Case("BF16", "BF16", "", "as it is", True)
    with model.loaded(base, args.model) as wrappers:
        expected = [model.log_probabilities(through_kernels(wrappers), ids) for ids in text]
    cost = args.activation_tokens // WINDOW
    rows = []
    for case in (base, *cases):
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            folder = write_format(args.model, Path(work) / "model", case.form, peers=args.peers) if case.form else None
            rows.append(measure(model, case, folder or args.model, text, expected, cost))
        line = formats_table(rows[-1:]).splitlines()[-1]
        print(f"{time.monotonic() - started:.0f} s", line, rows[-1].activations or "", flush=True)
    told = (
        f"{machine()}, commit {commit()}, {_ext.cpu_features()['tier']}, {torch.get_num_threads()} threads; "
        f"{len(text) * WINDOW:,} tokens, the second table {cost * WINDOW:,}; {time.monotonic() - started:.0f} s."
    )
    sizes = model.config.hidden_size, model.config.moe_intermediate_size
    return {"run": told, "formats": formats_table(rows), "activations": activations_table(rows, sizes)}


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the demo model")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods or formats; default: all")
    parser.add_argument("--tokens", type=int, default=4 * WINDOW)
    parser.add_argument("--activation-tokens", type=int, default=WINDOW, help="for the second table; 0: none")
    parser.add_argument("--threads", type=int, help="threads of the worker pool (default: usable cores)")
    parser.add_argument("--peers", type=Path, help="folder of `python -m kt_kernel.bench peers --install`")
    parser.add_argument("--work", type=Path, help="folder for a model at a time (default: the system's for such files)")
    parser.add_argument("--write", type=Path, help="document whose tables are replaced")
    args = parser.parse_args()
    try:
        blocks = run(args)
    except ValueError as error:
        print(f"measure_accuracy.py: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(blocks.values()))
    if args.write:
        args.write.write_text(with_blocks(args.write.read_text(), blocks))
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measure what quantized experts cost: KL divergence and top-1 agreement against BF16 experts, through our kernels.

    python scripts/measure_kl.py MODEL [--methods AMXINT8 AMXINT4] [--tokens 5120] [--check]

MODEL is the demo model (``python -m kt_kernel.demo --output DIR``) or another Qwen2-MoE folder. Attention, router and
head run in fp32 with Hugging Face transformers; every MoE layer is computed by kt_kernel, activation quantization
included. The text is the English documentation inside Python's standard library (``pydoc_data.topics``), in windows of
512 tokens. ``KL(BF16 || method)`` and agreement are means over all positions.

``--check`` ends with code 1 if a mean KL is above its limit (AMXINT8 0.007, AMXINT4 0.27).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kt_kernel import KTMoEWrapper

WINDOW = 512
BASE = "BF16"
KL_LIMITS = {"AMXINT8": 0.007, "AMXINT4": 0.27}


def english_text() -> str:
    """Return the language documentation that comes with Python, without its lists of grammar."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def load_experts(layer_idx: int, config: Any, folder: Path, method: str, threads: int | None) -> KTMoEWrapper:
    """Return the experts of one layer, loaded from the model's folder."""
    wrapper = KTMoEWrapper(
        layer_idx=layer_idx,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        cpuinfer_threads=threads,
        weight_path=str(folder),
        method=method,
    )
    wrapper.load_weights()
    return wrapper


class CpuMoe(nn.Module):
    """Stands in for the experts of one layer; ``method`` says whose output counts."""

    def __init__(self, layer_idx: int, config: Any, folder: Path, methods: list[str], threads: int | None) -> None:
        super().__init__()
        self.method = methods[0]
        self.wrappers = {method: load_experts(layer_idx, config, folder, method, threads) for method in methods}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the routed experts: ``[num_tokens, hidden_size]``, fp32."""
        return self.wrappers[self.method].forward(hidden_states, top_k_index, top_k_weights, None)


@dataclass
class Score:
    """Sums over positions, for one method."""

    kl: float = 0.0
    agreement: int = 0
    nll: float = 0.0
    predicted: int = 0
    positions: int = 0

    def add(self, log_p: Tensor, log_q: Tensor, next_ids: Tensor) -> None:
        """Count one window: log-probabilities of BF16 and of the method, and the tokens that follow."""
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        self.agreement += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.nll -= float(log_q[:-1].gather(1, next_ids[:, None]).sum())
        self.predicted += len(next_ids)
        self.positions += len(log_p)

    def row(self, method: str) -> str:
        """Return the line of the table."""
        perplexity = math.exp(self.nll / self.predicted)
        kl, agreement = self.kl / self.positions, 100 * self.agreement / self.positions
        return f"{method:<10} {kl:>10.5f} {agreement:>9.2f} % {perplexity:>11.3f}"


def windows(folder: Path, num_tokens: int) -> Iterator[Tensor]:
    """Yield ids of `num_tokens` tokens of text in windows of 512."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(english_text())["input_ids"])
    count = math.ceil(num_tokens / WINDOW)
    if len(ids) < count * WINDOW:
        raise ValueError(f"the text has {len(ids)} tokens; give --tokens of at most {len(ids) // WINDOW * WINDOW}.")
    # spread over the whole text, not its beginning
    stride = (len(ids) - WINDOW) // max(count - 1, 1)
    for i in range(count):
        yield ids[i * stride : i * stride + WINDOW]


def load_model(folder: Path, methods: list[str], threads: int | None) -> tuple[nn.Module, list[CpuMoe]]:
    """Return the model in fp32 and its MoE layers, whose experts are ours."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.experts = CpuMoe(i, model.config, folder, methods, threads)
        layers.append(layer.mlp.experts)
    return model, layers


@torch.no_grad()
def measure(folder: Path, methods: list[str], num_tokens: int, threads: int | None) -> dict[str, Score]:
    """Return the score of each method, BF16 first."""
    model, layers = load_model(folder, methods, threads)
    scores = {method: Score() for method in methods}
    for ids in windows(folder, num_tokens):
        log_p = None
        for method in methods:
            for layer in layers:
                layer.method = method
            log_q = model(ids[None]).logits[0].log_softmax(-1)
            log_p = log_q if log_p is None else log_p
            scores[method].add(log_p, log_q, ids[1:])
    return scores


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the demo model")
    parser.add_argument("--methods", nargs="+", default=list(KL_LIMITS))
    parser.add_argument("--tokens", type=int, default=10 * WINDOW)
    parser.add_argument("--threads", type=int, help="threads of the worker pool (default: usable cores)")
    parser.add_argument("--check", action="store_true", help="fail if a KL is above its limit")
    args = parser.parse_args()
    from kt_kernel.integrations.torchvision_repair import repair_torchvision

    repair_torchvision()
    started = time.monotonic()
    methods = [BASE, *(method for method in args.methods if method != BASE)]
    scores = measure(args.model, methods, args.tokens, args.threads)
    print(f"{args.model}: {scores[BASE].positions} tokens of pydoc_data.topics, windows of {WINDOW}")
    print(f"{'method':<10} {'KL to BF16':>10} {'top-1 same':>11} {'perplexity':>11}")
    for method, score in scores.items():
        print(score.row(method))
    print(f"{time.monotonic() - started:.0f} s")
    failed = [
        f"{method}: KL {score.kl / score.positions:.5f} is not below {KL_LIMITS[method]}"
        for method, score in scores.items()
        if method in KL_LIMITS and not score.kl / score.positions < KL_LIMITS[method]
    ]
    if failed and args.check:
        print("\n".join(failed), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

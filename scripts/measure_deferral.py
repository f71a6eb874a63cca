#!/usr/bin/env python3
"""Measure what deferred experts cost: KL divergence and top-1 agreement against the same model without deferral.

    python scripts/measure_deferral.py MODEL [--deferred 1 2] [--batch 1 8 512] [--tokens 5120]

MODEL, text and figures as for ``measure_kl.py``; experts are BF16 through our kernels. Each window of 512 tokens is
computed in one go, but its tokens are split into those of now and those of later as if they came in batches of
``--batch`` tokens, far apart in the text: 1 is what decoding one request does from its first token on, 8 what decoding
eight requests does, 512 one prefill. What a layer defers is added to the output of the next MoE layer; the last layer
defers nothing. The column *deferred* is the share of (token, expert) pairs that came one layer late.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure_kl import BASE, WINDOW, Score, load_experts, windows
from torch import Tensor, nn

from kt_kernel import KTMoEWrapper
from kt_kernel.deferral import select_deferred_experts


@dataclass
class Deferral:
    """How the layers defer now, and what is on its way from one to the next."""

    deferred: int = 0
    batch: int = 1
    carried: Tensor | None = None
    pairs: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # deferred and all, by (deferred, batch)

    def split(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids of now and of later, each ``[num_tokens, top_k]``, for batches of strided tokens."""
        now, later = torch.full_like(ids, -1), torch.full_like(ids, -1)
        stride = max(len(ids) // self.batch, 1)
        for first in range(stride):
            rows = slice(first, None, stride)
            now[rows], later[rows] = select_deferred_experts(ids[rows], weights[rows], ids.shape[1] - self.deferred)
        return now, later


class DeferringMoe(nn.Module):
    """Stands in for the experts of one layer."""

    def __init__(self, wrapper: KTMoEWrapper, state: Deferral, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.state = state
        self.is_first = is_first
        self.is_last = is_last

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the routed experts: ``[num_tokens, hidden_size]``, fp32."""
        state = self.state
        if self.is_first:
            state.carried = None
        ids, later = top_k_index, None
        if state.deferred and not self.is_last:
            ids, later = state.split(top_k_index, top_k_weights)
            counts = state.pairs.setdefault((state.deferred, state.batch), [0, 0])
            counts[0] += int((later >= 0).sum())
            counts[1] += later.numel()
        output = self.wrapper.forward(hidden_states, ids, top_k_weights, None)
        if state.carried is not None:
            output += state.carried
        state.carried = None if later is None else self.wrapper.forward(hidden_states, later, top_k_weights, None)
        return output


def load_model(folder: Path, threads: int | None) -> tuple[nn.Module, Deferral]:
    """Return the model in fp32, whose experts are ours, and the switch of its deferral."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config: Any = model.config
    state = Deferral()
    for i, layer in enumerate(model.model.layers):
        wrapper = load_experts(i, config, folder, BASE, threads)
        layer.mlp.experts = DeferringMoe(wrapper, state, is_first=i == 0, is_last=i + 1 == len(model.model.layers))
    return model, state


@torch.no_grad()
def measure(folder: Path, variants: list[tuple[int, int]], num_tokens: int, threads: int | None) -> None:
    """Print the score of each (deferred, batch)."""
    model, state = load_model(folder, threads)
    scores = {variant: Score() for variant in variants}
    for ids in windows(folder, num_tokens):
        log_p = None
        for variant in variants:
            state.deferred, state.batch = variant
            log_q = model(ids[None]).logits[0].log_softmax(-1)
            log_p = log_q if log_p is None else log_p
            scores[variant].add(log_p, log_q, ids[1:])
    print(f"{'':<28} {'KL':>10} {'top-1 same':>11} {'perplexity':>11} {'deferred':>10}")
    for (deferred, batch), score in scores.items():
        late, pairs = state.pairs.get((deferred, batch), (0, 1))
        name = f"defer {deferred}, batches of {batch}" if deferred else "no deferral"
        print(f"{name:<18}{score.row('')} {100 * late / pairs:>8.1f} %")


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the demo model")
    parser.add_argument("--deferred", type=int, nargs="+", default=[1, 2], help="experts a token may defer")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, WINDOW], help="tokens of a batch, 1 to 512")
    parser.add_argument("--tokens", type=int, default=10 * WINDOW)
    parser.add_argument("--threads", type=int, help="threads of the worker pool (default: usable cores)")
    args = parser.parse_args()
    from kt_kernel.integrations.torchvision_repair import repair_torchvision

    repair_torchvision()
    started = time.monotonic()
    variants = [(0, 1), *((deferred, batch) for deferred in args.deferred for batch in args.batch)]
    measure(args.model, variants, args.tokens, args.threads)
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

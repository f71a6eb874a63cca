"""A mixture of experts in plain torch: what every path of kt_kernel must equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def moe_reference(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    skip: Tensor | None = None,
    act: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: torch.nn.functional.silu(gate) * up,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """``output[t] = sum_s topk_weights[t, s] * (down_e act(gate_e x_t + b, up_e x_t + b) + b)``, e = topk_ids[t, s].

    In fp64, ``[T, H]``. hidden_states ``[T, H]``; topk_ids, topk_weights ``[T, k]``; gate, up ``[E, I, H]``; down
    ``[E, H, I]``; skip ``[E]`` bool; biases of gate, up ``[E, I]`` and down ``[E, H]``. Ids of -1 and skipped experts
    add nothing.
    """
    x = hidden_states.double()
    output = torch.zeros_like(x)
    for expert in range(gate.shape[0]):
        if skip is not None and skip[expert]:
            continue
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        rows = x[token]
        of_gate, of_up, of_down = (0, 0, 0) if biases is None else (bias[expert].double() for bias in biases)
        inner = act(rows @ gate[expert].double().T + of_gate, rows @ up[expert].double().T + of_up)
        scale = topk_weights[token, slot].double()[:, None]
        output.index_add_(0, token, scale * (inner @ down[expert].double().T + of_down))
    return output


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|`` in the Frobenius norm."""
    return ((found.double() - wanted).norm() / wanted.norm()).item()


# Bounds on relative_error of one layer, with u = 2^-8 (half the spacing of bf16 at 1).
#
# BF16     x and the intermediate are rounded to bf16 (u each at most; gate and up see the same rounded x, so x counts
#          twice where it is not bf16 already), the output at most u: 2^-6.
# AMXINT8  a row of K <= 512 normal values has max |w| <= 4.5 sigma, so rounding to 1/127 of it gives an error of
#          4.5 / 127 / sqrt(12) = 0.0102 of sigma. Weights and x, for gate and up: up to 2 + 4 squares of it if x's part
#          adds up, then the intermediate and down: sqrt(8) or less; with bf16 output sqrt(8) * 0.0102 + u = 0.033.
# AMXINT4  a group of 32 normal values has max |w| of about 2.1 sigma; 15 steps over twice that have an error of
#          0.08 sigma, the search makes it smaller; three weight matrices and the int8 part: sqrt(3) * 0.08 + 0.033.
BOUNDS = {"BF16": 2**-6, "AMXINT8": 0.033, "AMXINT4": 0.172}

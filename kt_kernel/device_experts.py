"""Experts on a torch device, in plain torch: the device's part of :class:`kt_kernel.hybrid_moe.HybridMoE`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from kt_kernel.activations import SILU, Activation

# (token, expert) pairs up to which copying the weights of each pair costs less than a trip to the host for the routing.
_GATHERED_PAIRS = 32


class DeviceWeights(NamedTuple):
    """Weights of the experts on a device, as :func:`device_experts` takes them, and what they compute."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    act: Activation = SILU

    def inner(self, products: Tensor, r: int | Tensor) -> Tensor:
        """Return ``act(gate + b, up + b)`` of products with gate_up[r], in their dtype."""
        if self.gate_up_bias is not None:
            products = (products + self.gate_up_bias[r]).to(products.dtype)
        return self.act(*products.chunk(2, dim=-1))

    def outer(self, products: Tensor, r: int | Tensor) -> Tensor:
        """Return products with down[r], in fp32, with the bias."""
        return products.float() if self.down_bias is None else products.float() + self.down_bias[r]


@torch.library.custom_op("kt_kernel::device_experts", mutates_args=())
def device_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """Compute the experts of one layer that live on the tensors' device.

    ``output[t] = sum_s topk_weights[t, s] * (down_r act(gate_r x_t + b, up_r x_t + b) + b)``,
    ``r = rows[topk_ids[t, s]]``, over slots with an id of at least 0 and r of at least 0, b the biases if there are any

    Matrix products are in the weights' dtype, the weighted sum in fp32. In a CUDA graph's capture nothing depends on
    the routing but values.

    Parameters
    ----------
    hidden_states : Tensor
        ``[num_tokens, H]``, a float type.
    topk_ids, topk_weights : Tensor
        ``[num_tokens, top_k]``, integers and floats.
    gate_up, down : Tensor
        ``[G, 2 * I, H]`` and ``[G, H, I]``, G of at least 1.
    rows : Tensor
        ``[num_experts]``, int64: the place of an expert in gate_up, -1 for experts that live elsewhere.
    gate_up_bias, down_bias : Tensor, optional
        ``[G, 2 * I]`` and ``[G, H]``, added in their own dtype; both or neither.
    activation, limit, alpha : str and float
        Of :class:`kt_kernel.activations.Activation`.

    Returns
    -------
    Tensor
        ``[num_tokens, H]``, fp32.

    Raises
    ------
    ValueError
        An id out of range, where the ids are on the CPU.
    """
    on_cpu = topk_ids.device.type == "cpu"
    if on_cpu and topk_ids.numel() and int(topk_ids.max()) >= rows.numel():
        raise ValueError(f"topk_ids holds {int(topk_ids.max())}, but expert ids are below {rows.numel()}.")
    row = torch.where(topk_ids >= 0, rows[topk_ids.clamp(min=0).long()], -1)
    x = hidden_states.to(gate_up.dtype)
    weights = topk_weights.float()
    experts = DeviceWeights(gate_up, down, gate_up_bias, down_bias, Activation(activation, limit, alpha))
    if on_cpu:
        return by_expert(x, row, weights, experts)
    if row.numel() <= min(_GATHERED_PAIRS, gate_up.shape[0]):
        return by_pair(x, row, weights, experts)
    if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
        return by_every_expert(x, row, weights, experts)
    return by_expert(x, row, weights, experts)


@device_experts.register_fake
def _(hidden_states, *_args, **_options):
    return hidden_states.new_empty(hidden_states.shape, dtype=torch.float32)


def by_expert(x: Tensor, row: Tensor, weights: Tensor, experts: DeviceWeights) -> Tensor:
    """One product for each expert that has rows; asks the device which those are."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for r in row.unique().tolist():
        if r < 0:
            continue
        token, slot = torch.where(row == r)
        inner = experts.inner(linear(x[token], experts.gate_up[r]), r)
        outer = experts.outer(linear(inner, experts.down[r]), r)
        output.index_add_(0, token, outer * weights[token, slot, None])
    return output


def by_pair(x: Tensor, row: Tensor, weights: Tensor, experts: DeviceWeights) -> Tensor:
    """One product for each (token, expert) pair, on copies of the experts; shapes do not depend on the routing."""
    tokens, top_k = row.shape
    flat = row.reshape(-1).clamp(min=0)
    repeated = x.repeat_interleave(top_k, dim=0).unsqueeze(-1)
    inner = experts.inner(torch.bmm(experts.gate_up[flat], repeated).squeeze(-1), flat)
    outer = experts.outer(torch.bmm(experts.down[flat], inner.unsqueeze(-1)).squeeze(-1), flat)
    weighted = outer.view(tokens, top_k, -1) * weights[:, :, None]
    # not by a weight of 0: the row of an absent expert may be infinite
    return torch.where((row >= 0)[:, :, None], weighted, 0.0).sum(dim=1)


def by_every_expert(x: Tensor, row: Tensor, weights: Tensor, experts: DeviceWeights) -> Tensor:
    """Every expert for every token; shapes do not depend on the routing, and no weight is copied."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for r in range(experts.gate_up.shape[0]):
        chosen = row == r
        inner = experts.inner(linear(x, experts.gate_up[r]), r)
        outer = experts.outer(linear(inner, experts.down[r]), r)
        weight = torch.where(chosen, weights, 0.0).sum(dim=1, keepdim=True)
        output += torch.where(chosen.any(dim=1, keepdim=True), outer * weight, 0.0)
    return output

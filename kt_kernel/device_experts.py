"""Experts on a torch device, in plain torch: the device's part of :class:`kt_kernel.hybrid_moe.HybridMoE`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

# (token, expert) pairs up to which copying the weights of each pair costs less than a trip to the host for the routing.
_GATHERED_PAIRS = 32


@torch.library.custom_op("kt_kernel::device_experts", mutates_args=())
def device_experts(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, rows: Tensor
) -> Tensor:
    """Compute the experts of one layer that live on the tensors' device.

    ``output[t] = sum_s topk_weights[t, s] * down_r(silu(gate_r x_t) * up_r x_t)``, ``r = rows[topk_ids[t, s]]``, over
    slots with an id of at least 0 and r of at least 0

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
    if on_cpu:
        return by_expert(x, row, weights, gate_up, down)
    if row.numel() <= min(_GATHERED_PAIRS, gate_up.shape[0]):
        return by_pair(x, row, weights, gate_up, down)
    if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
        return by_every_expert(x, row, weights, gate_up, down)
    return by_expert(x, row, weights, gate_up, down)


@device_experts.register_fake
def _(hidden_states, topk_ids, topk_weights, gate_up, down, rows):
    return hidden_states.new_empty(hidden_states.shape, dtype=torch.float32)


def by_expert(x: Tensor, row: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One product for each expert that has rows; asks the device which those are."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for r in row.unique().tolist():
        if r < 0:
            continue
        token, slot = torch.where(row == r)
        gate, up = linear(x[token], gate_up[r]).chunk(2, dim=-1)
        inner = linear(silu(gate) * up, down[r])
        output.index_add_(0, token, inner.float() * weights[token, slot, None])
    return output


def by_pair(x: Tensor, row: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One product for each (token, expert) pair, on copies of the experts; shapes do not depend on the routing."""
    tokens, top_k = row.shape
    flat = row.reshape(-1).clamp(min=0)
    repeated = x.repeat_interleave(top_k, dim=0).unsqueeze(-1)
    gate, up = torch.bmm(gate_up[flat], repeated).squeeze(-1).chunk(2, dim=-1)
    inner = torch.bmm(down[flat], (silu(gate) * up).unsqueeze(-1)).view(tokens, top_k, -1)
    weighted = inner.float() * weights[:, :, None]
    # not by a weight of 0: the row of an absent expert may be infinite
    return torch.where((row >= 0)[:, :, None], weighted, 0.0).sum(dim=1)


def by_every_expert(x: Tensor, row: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every expert for every token; shapes do not depend on the routing, and no weight is copied."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for r in range(gate_up.shape[0]):
        chosen = row == r
        gate, up = linear(x, gate_up[r]).chunk(2, dim=-1)
        inner = linear(silu(gate) * up, down[r])
        weight = torch.where(chosen, weights, 0.0).sum(dim=1, keepdim=True)
        output += torch.where(chosen.any(dim=1, keepdim=True), inner.float() * weight, 0.0)
    return output

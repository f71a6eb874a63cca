"""Which experts of a batch wait for the next layer: the rule of deferral, for programs that schedule it themselves.

The library defers by itself (``KTMoEWrapper(max_deferred_experts_per_token=...)``); this is the same rule in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_deferred_experts(topk_ids: Tensor, topk_weights: Tensor, protected_k: int) -> tuple[Tensor, Tensor]:
    """Split the experts of a batch into those computed now and those that may be computed later.

    ``immediate[t, s] = topk_ids[t, s] if topk_ids[t, s] in P else -1``, and deferred the other way round, where ``P``
    holds the experts of the `protected_k` largest weights of every token: an expert that one token protects is
    computed now for all tokens.

    Parameters
    ----------
    topk_ids : Tensor
        ``[num_tokens, top_k]``, any integer type and device; -1 = no expert, in both results too: it takes no place.
        Experts on the GPU take places among the protected ones like any other.
    topk_weights : Tensor
        Like topk_ids, a float type. Of equal weights the one in the lower slot is taken first.
    protected_k : int
        Slots of a token that are never deferred; below 0 counts as 0, above top_k as top_k.

    Returns
    -------
    tuple of Tensor
        (immediate, deferred), of topk_ids' shape, dtype and device.

    Raises
    ------
    ValueError
        Shapes that differ or are not two-dimensional, ids that are no integers.
    """
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"topk_ids has shape {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)}; both must be "
            f"[num_tokens, top_k]."
        )
    if topk_ids.dtype.is_floating_point or topk_ids.dtype == torch.bool:
        raise ValueError(f"topk_ids is {topk_ids.dtype}; it must be an integer type.")
    places = min(max(protected_k, 0), topk_ids.shape[1])
    order = torch.argsort(topk_weights, dim=1, descending=True, stable=True)
    ranked = topk_ids.gather(1, order)
    absent_last = torch.argsort((ranked < 0).to(torch.int8), dim=1, stable=True)
    is_protected = torch.isin(topk_ids, ranked.gather(1, absent_last[:, :places]))
    absent = torch.full_like(topk_ids, -1)
    return torch.where(is_protected, topk_ids, absent), torch.where(is_protected, absent, topk_ids)

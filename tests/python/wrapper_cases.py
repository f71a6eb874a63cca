"""A small layer in KTMoEWrapper, and batches for it."""

from __future__ import annotations

import torch
from checkpoints import Experts

from kt_kernel import KTMoEWrapper
from kt_kernel.methods import FLOAT_METHODS

E, K, H, INNER = 8, 2, 192, 96
METHOD_NAMES = list(FLOAT_METHODS)


def make(method: str = "AMXINT8", **changes) -> KTMoEWrapper:
    arguments = {
        "layer_idx": 3,
        "num_experts": E,
        "num_experts_per_tok": K,
        "hidden_size": H,
        "moe_intermediate_size": INNER,
        "cpuinfer_threads": 2,
        "threadpool_count": 1,
        "chunked_prefill_size": 16,
        "method": method,
    }
    return KTMoEWrapper(**{**arguments, **changes})


def loaded(experts: Experts, method: str = "AMXINT8", mapping: torch.Tensor | None = None, **changes) -> KTMoEWrapper:
    wrapper = make(method, **changes)
    wrapper.load_weights_from_tensors(*experts, mapping)
    return wrapper


def batch(tokens: int, *, seed: int = 1, dtype: torch.dtype = torch.bfloat16, top_k: int = K, experts: int = E):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator).to(dtype)
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return hidden, ids, weights

"""The size of the KV pool on a host without a GPU.

SGLang reserves a share of the *device's* memory and touches it. Here the device is the host, whose memory also holds
the experts, so the pool gets at most a quarter of what is left after loading, and no more than can be used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from kt_kernel.integrations.sglang import memory

logger = logging.getLogger(__name__)

MAX_SHARE = 0.25  # of the memory left after the experts; the rest is for activations, page cache, other processes

_budget_reason: str | None = None  # set by the first function, told by the second: SGLang's object has slots


def profile_available_bytes(original: Callable, configurator, pre_model_load_memory: float) -> int:
    """Return the budget of the KV pool in bytes.

    ``mem_fraction_static * 0.25 * available``

    Parameters
    ----------
    original : Callable
        SGLang's method; used as it is for models with a recurrent state, whose budget it also takes out.
    configurator : KVCacheConfigurator
    pre_model_load_memory : float
        GiB, unused here.
    """
    if configurator.mambaish_config is not None:
        return original(configurator, pre_model_load_memory)
    from sglang.srt.runtime_context import get_schedule

    available, _ = memory.usable_memory()
    fraction = get_schedule().mem_fraction_static
    budget = int(available * MAX_SHARE * fraction)
    global _budget_reason
    _budget_reason = (
        f"{memory.gigabytes(budget)} GB = --mem-fraction-static {fraction:g} of a quarter "
        f"of the {memory.gigabytes(available)} GB left after loading"
    )
    return budget


def cap_tokens(token_capacity: int, configurator, *_args, **_kwargs) -> int:
    """Cut the pool to what context length and running requests can use, and say what set its size.

    ``min(token_capacity, context_length * max_running_requests)``
    """
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    context_length = configurator.model_config.context_len
    requests = schedule.max_running_requests
    usable = context_length * requests if requests else token_capacity
    capped = min(token_capacity, usable)
    if _budget_reason is not None:
        limit = f"memory budget of {_budget_reason}"
        if usable < token_capacity:
            limit = f"context length {context_length} x {requests} running requests, within a {limit}"
        elif schedule.max_total_tokens == capped:
            limit = f"--max-total-tokens, within a {limit}"
        logger.info("kt_kernel: KV pool of %d tokens, set by %s", capped, limit)
    return capped

"""What the plug-in changes in the scheduler of a host with a GPU.

SGLang's ``KTEPWrapperMethod`` does the hand-off: it submits the layer's input to the CPU's experts, computes the GPU's
and adds both. Around it stand here: layers without experts on the GPU, whose method is not called at all; rows that
only pad a CUDA graph, which get the expert id -1 and so cost the CPU nothing; and errors of a replayed graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kt_kernel.integrations.sglang import device_methods, layers, scaling

_row_count: Tensor | None = None  # while a graph is captured: the buffer with the number of rows that are real


def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
    """Prepare the GPU's experts, if there are any, and load the CPU's.

    Takes the place of SGLang's method, which also processes tensors of 0 experts (a division by 0, or an index beyond
    the end), and has no location map for model classes that publish none.
    """
    if self.num_gpu_experts and hasattr(self.gpu_method, "process_weights_after_loading"):
        self.gpu_method.process_weights_after_loading(layer)
    if self.tp_rank != 0 or self.wrapper is None:
        return
    torch.cuda.synchronize()
    self.wrapper.load_weights(layers.physical_to_logical_map(self))


def apply(original: Callable, self: Any, layer: nn.Module, dispatch_output: Any) -> Any:
    """Compute one MoE layer on GPU and CPU, or on the CPU alone where the flags put no expert on the GPU.

    Around SGLang's method; the first tensor-parallel rank adds the CPU's experts, the others add nothing.

    Raises
    ------
    TypeError
        A routing without expert ids.
    """
    dispatch_output = scaling.with_scaled_weights(self, with_padded_rows_marked(self, dispatch_output))
    if self.num_gpu_experts:
        return original(self, layer, dispatch_output)
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    self.submit(layer, dispatch_output)
    return StandardCombineInput(hidden_states=self.sync(dispatch_output.hidden_states))


# --- padded rows ---


def with_padded_rows_marked(method: Any, dispatch_output: Any) -> Any:
    """Return `dispatch_output` with id -1 in the rows that only pad a captured graph.

    ``topk_ids'[t, s] = topk_ids[t, s] if t < count else -1``, where `count` is read from the buffer that SGLang fills
    before each replay. Outside a capture, and on releases whose TopK does this itself, nothing changes.
    """
    ids, _weights = device_methods.topk_tensors(dispatch_output)
    # with all experts on the GPU SGLang's kernels expect no -1
    if _row_count is None or method.num_gpu_experts == method.global_num_experts:
        return dispatch_output
    rows = torch.arange(ids.shape[0], device=ids.device)
    marked = ids.masked_fill((rows >= _row_count)[:, None], -1)
    return dispatch_output._replace(topk_output=dispatch_output.topk_output._replace(topk_ids=marked))


def enable_num_token_non_padded(original: Callable) -> bool:
    """Tell SGLang to keep the number of real rows of each batch, which it does by itself for expert parallelism only.

    Not where a layer sees the rows of several attention ranks, or of a sequence in several parts: there the real rows
    are no prefix.
    """
    return bool(original()) or (_some_experts_on_cpu() and _rows_are_a_prefix())


def capture(original: Callable, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Capture SGLang's graphs with the buffer of real rows bound, so that the layers can mark the others."""
    registry = getattr(runner, "buffer_registry", None)
    if registry is None or topk_reads_row_count() or not registry.has_slot("num_token_non_padded"):
        return original(runner, *args, **kwargs)
    with bound_row_count(registry.get_slot("num_token_non_padded").buffer):
        return original(runner, *args, **kwargs)


def after_fill(_result: None, registry: Any, forward_batch: Any, *_args: Any, **kwargs: Any) -> None:
    """Write the number of real rows for batches that do not carry it; the last batch's would mask real rows."""
    if not registry.has_slot("num_token_non_padded"):
        return
    names = ("num_token_non_padded", "global_num_token_non_padded")
    if all(getattr(forward_batch, name, None) is None for name in names):
        registry.get_slot("num_token_non_padded").buffer.fill_(kwargs["raw_num_tokens"])


@contextmanager
def bound_row_count(count: Tensor) -> Iterator[None]:
    """Bind the buffer that holds the number of real rows, ``[1]`` int32, for the layers called inside."""
    global _row_count
    before, _row_count = _row_count, count
    try:
        yield
    finally:
        _row_count = before


def topk_reads_row_count() -> bool:
    """Whether this release's TopK takes the number of real rows from the forward context and marks the rows itself."""
    from sglang.srt.model_executor.forward_context import ForwardContext

    return "moe_num_token_non_padded" in getattr(ForwardContext, "__dataclass_fields__", {})


def _some_experts_on_cpu() -> bool:
    return any(method.num_gpu_experts < method.global_num_experts for method in layers.wrapped_methods())


def _rows_are_a_prefix() -> bool:
    from sglang.srt.runtime_context import get_parallel, get_server_args
    from sglang.srt.utils.common import require_gathered_buffer

    if get_parallel().attn_dp_size != 1 or get_parallel().attn_cp_size != 1:
        return False
    takes_args = inspect.signature(require_gathered_buffer).parameters
    return not (require_gathered_buffer(get_server_args()) if takes_args else require_gathered_buffer())


# --- errors ---


def raise_pending_errors(_result: Any, _model_runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """Raise what went wrong on the CPU in a pass that is already over; a replayed graph calls no Python of ours.

    Raises
    ------
    RuntimeError
        Names layer and expert.
    """
    from kt_kernel.experts import check_devices

    check_devices()

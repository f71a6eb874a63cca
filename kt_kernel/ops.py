"""torch.ops.kt_kernel: typed entries and the fake implementations that torch.compile and opcheck use.

Shapes: ``hidden_states`` ``[num_tokens, hidden_size]`` bf16, fp16 or fp32; ``topk_ids`` ``[num_tokens, top_k]``
integers, -1 for an absent expert; ``topk_weights`` the same shape, float; ``skip`` ``[num_experts]`` bool, True for
experts computed elsewhere, or None. All on the CPU. ``layer`` is the ``handle`` of a ``kt_kernel._ext.Layer``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_native = torch.ops.kt_kernel


def moe_forward(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, skip: Tensor | None, layer: int
) -> Tensor:
    """Compute the experts of one layer and wait for the result.

    ``output[t] = sum_s topk_weights[t, s] * down_e(silu(gate_e x_t) * up_e x_t)``, ``e = topk_ids[t, s]``, over slots
    whose expert is neither -1 nor skipped.

    Returns
    -------
    Tensor
        ``[num_tokens, hidden_size]``, dtype of ``hidden_states``, freshly allocated.

    Raises
    ------
    RuntimeError
        Wrong device, dtype or shape; an id out of range; an expert that was never loaded.
    """
    return _native.moe_forward(hidden_states, topk_ids, topk_weights, skip, layer)


def submit(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, skip: Tensor | None, layer: int) -> Tensor:
    """Queue what `moe_forward` computes; the inputs are copied before this returns.

    Returns
    -------
    Tensor
        Ticket, int64 ``[1]``, to be given to `sync` exactly once.
    """
    return _native.submit(hidden_states, topk_ids, topk_weights, skip, layer)


def sync(ticket: Tensor, hidden_states: Tensor) -> Tensor:
    """Wait for a submitted forward and return its result; an error of the computation is raised here.

    ``hidden_states`` gives the shape and dtype of the result and is not read.
    """
    return _native.sync(ticket, hidden_states)


def submit_on_stream(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    skip: Tensor | None,
    layer: int,
    stream: int,
    current_stream: int,
) -> Tensor:
    """Enqueue on a device's stream a snapshot of the inputs and the call for what `moe_forward` computes.

    Inputs on one device, contiguous; ids int32 or int64, weights fp32. `skip` is on the CPU and read when the forward
    runs, so it may be changed in place, also between launches of a graph. `current_stream` made the inputs and is
    ordered against `stream` by events.

    Returns
    -------
    Tensor
        Ticket, int64 ``[1]``, CPU, to be given to `sync_on_stream` exactly once.

    Raises
    ------
    RuntimeError
        No CUDA driver; a wrong device, type or shape; what went wrong in an earlier forward of a stream.
    """
    return _native.submit_on_stream(hidden_states, topk_ids, topk_weights, skip, layer, stream, current_stream)


def sync_on_stream(ticket: Tensor, hidden_states: Tensor, stream: int, current_stream: int) -> Tensor:
    """Enqueue the wait for a forward and the copy of its result into a fresh tensor of hidden_states' shape and type.

    Returns at once; `current_stream` may use the result. Raises RuntimeError as `submit_on_stream` does.
    """
    return _native.sync_on_stream(ticket, hidden_states, stream, current_stream)


@torch.library.register_fake("kt_kernel::moe_forward")
def _(hidden_states, topk_ids, topk_weights, skip, layer):
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.register_fake("kt_kernel::submit")
def _(hidden_states, topk_ids, topk_weights, skip, layer):
    return hidden_states.new_empty((1,), dtype=torch.int64)


@torch.library.register_fake("kt_kernel::sync")
def _(ticket, hidden_states):
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.register_fake("kt_kernel::submit_on_stream")
def _(hidden_states, topk_ids, topk_weights, skip, layer, stream, current_stream):
    return hidden_states.new_empty((1,), dtype=torch.int64, device="cpu")


@torch.library.register_fake("kt_kernel::sync_on_stream")
def _(ticket, hidden_states, stream, current_stream):
    return hidden_states.new_empty(hidden_states.shape)


def _packed_bytes(layout: str, n: int, k: int) -> int:
    from kt_kernel._ext import layout_info

    return layout_info(layout, n, k)["matrix_bytes"]


@torch.library.register_fake("kt_kernel::quantize_pack")
def _(w, layout):
    return (
        w.new_empty((_packed_bytes(layout, *w.shape),), dtype=torch.uint8),
        w.new_empty((2,), dtype=torch.float64),
    )


@torch.library.register_fake("kt_kernel::quantize_pack_w13")
def _(gate, up, layout):
    # gate and up rows are interleaved by 32 in panels of 64, so w13 is as large as a matrix of 2 * round_up(I, 32) rows
    rows = (gate.shape[0] + 31) // 32 * 64
    return (
        gate.new_empty((_packed_bytes(layout, rows, gate.shape[1]),), dtype=torch.uint8),
        gate.new_empty((2,), dtype=torch.float64),
    )


@torch.library.register_fake("kt_kernel::pack")
def _(codes, scales, layout, k):
    return codes.new_empty((_packed_bytes(layout, codes.shape[0], k),), dtype=torch.uint8)


@torch.library.register_fake("kt_kernel::unpack")
def _(packed, layout, n, k):
    from kt_kernel._ext import layout_info

    info = layout_info(layout, n, k)
    code_dtype = torch.bfloat16 if layout.startswith("bf16") else torch.int8
    return (
        packed.new_empty((n, info["padded_k"]), dtype=code_dtype),
        packed.new_empty((n, info["num_groups"]), dtype=torch.float32),
    )


@torch.library.register_fake("kt_kernel::dequantize")
def _(packed, layout, n, k):
    return packed.new_empty((n, k), dtype=torch.float32)


@torch.library.register_fake("kt_kernel::multiply_panel")
def _(kernel, a, row_idx, a_scale, panel, c):
    return None


@torch.library.register_fake("kt_kernel::dequantize_w13")
def _(packed, layout, intermediate_size, k):
    return tuple(packed.new_empty((intermediate_size, k), dtype=torch.float32) for _ in range(2))


@torch.library.register_fake("kt_kernel::repack")
def _(parts, source, layout, n, k):
    return parts[0].new_empty((_packed_bytes(layout, n, k),), dtype=torch.uint8)


@torch.library.register_fake("kt_kernel::repack_w13")
def _(gate, up, source, layout, n, k):
    rows = (n + 31) // 32 * 64  # as of quantize_pack_w13
    return gate[0].new_empty((_packed_bytes(layout, rows, k),), dtype=torch.uint8)


@torch.library.register_fake("kt_kernel::decode_source")
def _(parts, source, n, k):
    return parts[0].new_empty((n, k), dtype=torch.float32)

"""Checks of what ``KTMoEWrapper`` is given: each returns it in the form that is used, or says what is wrong with it."""

from __future__ import annotations

import torch
from torch import Tensor

from kt_kernel import device_stream
from kt_kernel.config import MoEConfig, is_count

_HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# A tensor of inference mode counts no changes, and can be changed in that mode only.
@torch.inference_mode(False)
def gpu_experts_mask(mask: Tensor | None, num_gpu_experts: int | None, *, num_experts: int) -> Tensor:
    """Return the mask of experts on the GPU: a copy of `mask`, else the first `num_gpu_experts`.

    ``result[e] = mask[e]``, or ``e < num_gpu_experts`` without a mask: ``[num_experts]``, bool, CPU

    Raises
    ------
    ValueError
        A mask of another shape, type or device, or a number out of range.
    """
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or list(mask.shape) != [num_experts]:
            found = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
            raise ValueError(f"gpu_experts_mask is {found}; it must be a bool tensor of shape [{num_experts}].")
        if mask.device.type != "cpu":
            raise ValueError(f"gpu_experts_mask is on {mask.device}; it must be on the CPU.")
        return mask.detach().clone().contiguous()
    count = 0 if num_gpu_experts is None else num_gpu_experts
    if not is_count(count) or not 0 <= count <= num_experts:
        raise ValueError(f"num_gpu_experts is {count!r}; it must be an integer from 0 to num_experts = {num_experts}.")
    result = torch.zeros(num_experts, dtype=torch.bool)
    result[:count] = True
    return result


def num_deferred(value: int | None) -> int:
    """Return ``max_deferred_experts_per_token``, 0 for None.

    Raises
    ------
    ValueError
        No integer of at least 0.
    """
    count = 0 if value is None else value
    if not is_count(count) or count < 0:
        raise ValueError(f"max_deferred_experts_per_token is {count!r}; it must be an integer of at least 0.")
    return count


def expert_order(mapping: Tensor | None, *, num_slots: int, num_logical: int) -> list[int]:
    """Return which of the model's experts each id computes.

    Parameters
    ----------
    mapping : Tensor, optional
        ``[num_slots]``, int64, CPU; None: the identity.
    num_slots : int
        Ids of the router.
    num_logical : int
        Experts that the weights have; each must be computed by at least one id.

    Raises
    ------
    ValueError
        Another shape, type or device, an expert that is not there, or one that no id computes.
    """
    if mapping is None:
        mapping = torch.arange(num_slots, dtype=torch.int64)
    if not isinstance(mapping, Tensor) or mapping.dtype != torch.int64:
        found = mapping.dtype if isinstance(mapping, Tensor) else type(mapping).__name__
        raise ValueError(f"physical_to_logical_map is {found}; it must be an int64 tensor.")
    if mapping.device.type != "cpu":
        raise ValueError(f"physical_to_logical_map is on {mapping.device}; it must be on the CPU.")
    if list(mapping.shape) != [num_slots]:
        raise ValueError(
            f"physical_to_logical_map has shape {list(mapping.shape)}; it must be [{num_slots}], one entry per expert "
            f"id."
        )
    order: list[int] = mapping.tolist()
    for slot, logical in enumerate(order):
        if not 0 <= logical < num_logical:
            fused = ""
            if num_slots > num_logical:
                fused = " (a shared expert fused into the routed ones? pass --disable-shared-experts-fusion)"
            raise ValueError(
                f"physical_to_logical_map[{slot}] is {logical}, but the weights have experts 0-{num_logical - 1}"
                f"{fused}."
            )
    if len(set(order)) != num_logical:
        missing = sorted(set(range(num_logical)) - set(order))[0]
        why = "repeats an expert" if num_slots == num_logical else "leaves an expert out"
        raise ValueError(f"physical_to_logical_map {why}: no id computes expert {missing} of the model.")
    return order


def check_expert_tensors(config: MoEConfig, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> int:
    """Return how many experts there are in gate and up ``[E, I, H]`` and down ``[E, H, I]``.

    Raises
    ------
    ValueError
        Shapes, types or devices that do not fit the layer or each other.
    """
    rows, columns = config.intermediate_size, config.hidden_size
    shapes = {"gate_proj": (rows, columns), "up_proj": (rows, columns), "down_proj": (columns, rows)}
    num_logical = gate_proj.shape[0] if gate_proj.dim() == 3 else 0
    for (name, shape), tensor in zip(shapes.items(), (gate_proj, up_proj, down_proj), strict=True):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; it must be on the CPU.")
        if tensor.dtype not in _HIDDEN_DTYPES or tensor.dtype != gate_proj.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}; gate_proj, up_proj and down_proj must all be bf16, fp16 or fp32."
            )
        if list(tensor.shape) != [num_logical, *shape] or not 0 < num_logical <= config.num_experts:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; it must be [{config.num_experts}, {shape[0]}, {shape[1]}]."
            )
    return num_logical


def check_device(name: str, tensor: Tensor, cuda_stream: int | None) -> None:
    """Check that a tensor is where a forward with this stream can read it.

    Raises
    ------
    TypeError
        No tensor.
    ValueError
        A device that is neither the CPU nor CUDA, or a CPU tensor with a stream.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} is {type(tensor).__name__}, but kt_kernel takes tensors: topk_ids and topk_weights as of SGLang's "
            f"standard top-k output; choose a --moe-runner-backend that uses it, e.g. triton."
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {tensor.device}; kt_kernel takes tensors on the CPU or on a CUDA device.")
    if cuda_stream and not device_stream.is_on_device(tensor, cuda_stream):
        raise ValueError(f"cuda_stream is {cuda_stream}, but {name} is a CPU tensor; pass 0 or None.")


def forward_inputs(
    config: MoEConfig, hidden: Tensor, ids: Tensor, weights: Tensor, cuda_stream: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of a forward, contiguous: ``[num_tokens, H]``, int32 or int64 and fp32 ``[num_tokens, top_k]``.

    Raises
    ------
    TypeError
        No tensors.
    ValueError
        A wrong shape, type or device.
    """
    for name, tensor in (("hidden_states", hidden), ("topk_ids", ids), ("topk_weights", weights)):
        check_device(name, tensor, cuda_stream)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, but hidden_states is on {hidden.device}.")
    size, top_k = config.hidden_size, config.top_k
    if hidden.dim() < 1 or hidden.shape[-1] != size:
        raise ValueError(f"hidden_states has shape {list(hidden.shape)}; its last dimension must be {size}.")
    if hidden.dtype not in _HIDDEN_DTYPES:
        raise ValueError(f"hidden_states is {hidden.dtype}; it must be bf16, fp16 or fp32.")
    if hidden.dim() != 2 or not hidden.is_contiguous():
        hidden = hidden.reshape(hidden.numel() // size, size).contiguous()
    tokens = hidden.shape[0]
    for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
        if tensor.dim() < 1 or tensor.shape[-1] != top_k or tensor.numel() != tokens * top_k:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [{tokens}, {top_k}].")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"topk_ids is {ids.dtype}; it must be an integer type.")
    if weights.dtype not in _WEIGHT_DTYPES:
        raise ValueError(f"topk_weights is {weights.dtype}; it must be a float type.")
    if ids.dtype != torch.int32:
        ids = ids.to(torch.int64)
    shape = (tokens, top_k)
    return hidden, ids.reshape(shape).contiguous(), weights.to(torch.float32).reshape(shape).contiguous()

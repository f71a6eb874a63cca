"""Which of SGLang's MoE methods can hold some of a layer's experts on a GPU, with which runner, and with how many.

``KTEPWrapperMethod`` gives the device's method ``num_gpu_experts`` experts and masks the ids of the others to -1. Some
methods look at the layer's own count instead, or need a runner whose top-k format has no ids. The table says what was
read in SGLang 0.5.18 and 0.5.23; nothing that is not in it gets experts. Without experts on the device (0) its method
is not called at all, and any method will do whose tensors really have no experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RUNNER_BACKENDS = ("auto", "triton", "marlin")  # those of --moe-runner-backend whose top-k output has ids


@dataclass(frozen=True)
class DeviceMethod:
    """What one method can do: ``runners`` that may compute it, and whether ``0 < N < E`` and ``N = 0`` work."""

    runners: tuple[str, ...]
    some: bool = True
    none: bool = True
    why: str = ""


TRITON, MARLIN = ("triton",), ("marlin",)
_WHOLE_LAYER = "its weights are processed for every expert of the layer, also those that are not on the GPU"
DEVICE_METHODS = {
    "UnquantizedFusedMoEMethod": DeviceMethod(TRITON),
    "Fp8MoEMethod, block": DeviceMethod(TRITON),
    "Fp8MoEMethod, tensor": DeviceMethod(TRITON, some=False, why=_WHOLE_LAYER),
    "W8A8FP8MoEMethod": DeviceMethod(TRITON),
    "W8A8Int8MoEMethod": DeviceMethod(TRITON),
    "BlockInt8MoEMethod": DeviceMethod(TRITON),
    "MoeWNA16Method": DeviceMethod(TRITON),
    "MoeWNA16Method, zero points": DeviceMethod(
        TRITON, some=False, none=False, why="its zero points are loaded for every expert of the layer"
    ),
    "AWQMoEScheme": DeviceMethod(MARLIN),
    "GPTQMarlinMoEScheme": DeviceMethod(MARLIN),
    "CompressedTensorsWNA16MoE": DeviceMethod(MARLIN),
    "CompressedTensorsWNA16TritonMoE": DeviceMethod(TRITON),
    "CompressedTensorsW8A8Fp8MoE, block": DeviceMethod(TRITON),
    "CompressedTensorsW8A8Fp8MoE, channel": DeviceMethod(TRITON),
    "CompressedTensorsW8A8Fp8MoE, tensor": DeviceMethod(TRITON, some=False, why=_WHOLE_LAYER),
}


def method_key(gpu_method: Any, layer: nn.Module) -> str:
    """Return the row of :data:`DEVICE_METHODS` for a method: its class, or its scheme's, and how it quantizes."""
    scheme = getattr(layer, "scheme", None)
    part = scheme if scheme is not None else gpu_method
    name = type(part).__name__
    if name == "Fp8MoEMethod":
        return f"{name}, {'block' if part.block_quant else 'tensor'}"
    if name == "CompressedTensorsW8A8Fp8MoE":
        return f"{name}, {getattr(part.weight_quant.strategy, 'value', part.weight_quant.strategy)}"
    if name == "MoeWNA16Method" and part.quant_config.has_zp:
        return f"{name}, zero points"
    return name


def check_count(key: str, num_gpu_experts: int, num_experts: int) -> None:
    """Refuse a number of experts on the GPU that a method cannot hold.

    Raises
    ------
    ValueError
        Names the method, the number, the reason and a number that works.
    """
    row = DEVICE_METHODS.get(key)
    if num_gpu_experts == 0:
        if row is None or row.none:
            return
        raise ValueError(
            f"kt_kernel: the experts of this checkpoint are loaded by SGLang's {key}, and {row.why}; serve it without "
            "--kt-* flags."
        )
    if row is None:
        raise ValueError(
            f"kt_kernel: --kt-num-gpu-experts is {num_gpu_experts}, but SGLang's {key} is not one of the methods that "
            "are known to compute a part of a layer's experts on a GPU; give --kt-num-gpu-experts 0."
        )
    if num_gpu_experts < num_experts and not row.some:
        possible = f"0 or {num_experts}" if row.none else str(num_experts)
        raise ValueError(
            f"kt_kernel: --kt-num-gpu-experts is {num_gpu_experts}, but SGLang's {key} cannot hold a part of a layer: "
            f"{row.why}; give {possible}."
        )


def check_runner(key: str, runner: str | None) -> None:
    """Refuse the runner that SGLang made for experts on the GPU, unless it is one that skips ids of -1.

    Raises
    ------
    ValueError
        Names both, and the flag.
    """
    row = DEVICE_METHODS[key]
    if runner not in row.runners:
        raise ValueError(
            f"kt_kernel: SGLang computes {key} with the runner {runner or 'of another kind'}, but experts shared "
            f"between GPU and CPU need {' or '.join(row.runners)}; give --moe-runner-backend {row.runners[0]}"
            f"{' or auto' if row.runners == MARLIN else ''}, or --kt-num-gpu-experts 0."
        )


def before_create_weights(method: Any, layer: nn.Module, num_experts: int, *_args: Any, **attributes: Any) -> None:
    """Refuse a layer whose experts cannot be split between GPU and CPU, before its tensors are made.

    Raises
    ------
    ValueError
        Experts that are loaded all at once, or with a bias; a count that the device's method cannot hold.
    """
    loader = attributes.get("weight_loader")
    if getattr(loader, "__name__", "") == "weight_loader_fused":
        raise ValueError(
            f"kt_kernel: this model loads all experts of layer {method.kt_config.layer_idx} as one tensor, which "
            "SGLang cannot split between GPU and CPU; serve it without --kt-* flags."
        )
    if attributes.get("with_bias"):
        raise ValueError(
            f"kt_kernel: the experts of layer {method.kt_config.layer_idx} have biases, and SGLang's device side loads "
            "such experts in a way that the plug-in does not split between GPU and CPU; serve the model without --kt-* "
            "flags, or compute it by kt_kernel.integrations.transformers or kt_kernel.HybridMoE."
        )


def check_before_weights(method: Any, layer: nn.Module, num_experts: int, *_args: Any, **_kwargs: Any) -> None:
    """Compare the number of experts on the GPU with :data:`DEVICE_METHODS`, before tensors are made."""
    check_count(method_key(method.gpu_method, layer), method.num_gpu_experts, num_experts)


def check_after_weights(_result: None, method: Any, layer: nn.Module, *_args: Any, **_kwargs: Any) -> None:
    """Refuse a method that made tensors for more experts than it was asked for.

    Raises
    ------
    ValueError
        Names the tensor, its experts, and how many there should be.
    """
    if method.num_gpu_experts == method.global_num_experts:
        return
    for name, tensor in layer.named_parameters(recurse=False):
        if tensor.dim() and tensor.shape[0] == method.global_num_experts:
            raise ValueError(
                f"kt_kernel: SGLang's {method_key(method.gpu_method, layer)} made {name} for all "
                f"{method.global_num_experts} experts of layer {method.kt_config.layer_idx} although only "
                f"{method.num_gpu_experts} are on the GPU; serve this checkpoint without --kt-* flags."
            )


def check_after_runner(_result: None, method: Any, layer: nn.Module, *_args: Any, **_kwargs: Any) -> None:
    """Look at the runner SGLang made for the layer; weights are read later."""
    if method.num_gpu_experts:
        check_runner(method_key(method.gpu_method, layer), runner_of(method.gpu_method, layer))


def runner_of(gpu_method: Any, layer: nn.Module) -> str | None:
    """Return the runner backend of a layer by its name in ``--moe-runner-backend``, or None."""
    scheme = getattr(layer, "scheme", None)
    for owner in (gpu_method, scheme, getattr(scheme, "kernel", None)):
        backend = getattr(getattr(owner, "runner", None), "runner_backend", None)
        if backend is not None:
            return str(getattr(backend, "value", backend))
    return None


def fill_in_method(method: Any, gpu_method: Any, kt_config: Any) -> tuple[tuple, dict] | None:
    """Give a layer that its quantization leaves alone the unquantized method, as SGLang does without ``--kt-*``.

    A BEFORE hook of ``KTEPWrapperMethod.__init__``, which would fail with an AttributeError on None.
    """
    if gpu_method is not None:
        return None
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    return (method, UnquantizedFusedMoEMethod(), kt_config), {}


def refuse_lora(layer: nn.Module) -> None:
    """Take the place of what SGLang asks a method for when it puts LoRA adapters on a layer's experts.

    Raises
    ------
    ValueError
        Always: the adapters would be applied to the experts on the GPU only.
    """
    raise ValueError(
        f"kt_kernel: a LoRA adapter changes the experts of layer {getattr(layer, 'layer_id', '?')}, which are computed "
        "on the CPU without it; use an adapter without expert weights, or no --kt-* flags."
    )


def topk_tensors(dispatch_output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights of a layer's routing.

    Raises
    ------
    TypeError
        A top-k format of a runner backend that keeps the routing to itself.
    """
    topk_output = dispatch_output.topk_output
    found = tuple(getattr(topk_output, name, None) for name in ("topk_ids", "topk_weights"))
    if not all(isinstance(tensor, torch.Tensor) for tensor in found):
        raise TypeError(
            f"kt_kernel was given a {type(topk_output).__name__}, which has no expert ids; use --moe-runner-backend "
            "triton."
        )
    return found  # type: ignore[return-value]

"""The MoE layers of SGLang whose experts we compute: their configuration, loading and forward.

``KTEPWrapperMethod`` is SGLang's class around a device's MoE method. On a CUDA host ``cuda_host.py`` stands around it;
on a host without CUDA the functions `process_weights_after_loading` and `apply` here take the place of its methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kt_kernel.activations import Activation
from kt_kernel.integrations.sglang import device_methods, scaling

logger = logging.getLogger(__name__)

_methods: list[Any] = []


def wrapped_methods() -> list[Any]:
    """Return the ``KTEPWrapperMethod`` objects of this process in the order of their construction."""
    return _methods


def create_kt_config(original: Callable, server_args: Any, layer_idx: int) -> Any:
    """Return the layer's ``KTConfig`` with open values filled in, or None where kt is not asked for.

    Draft models (speculative decoding) get None: their layer 0 is not layer 0 of the checkpoint that holds the
    experts.
    """
    if _in_speculative_scope():
        return None
    config = original(server_args, layer_idx)
    if config is None:
        return None
    if not _methods:  # once for a model: between its layers no hook comes or goes
        from kt_kernel.integrations.sglang.plugin import verify_hooks

        verify_hooks()
    return replace(config, num_gpu_experts=config.num_gpu_experts or 0)


def remember_method(_result: None, method: Any, *_args: Any, **_kwargs: Any) -> None:
    """Note a newly constructed ``KTEPWrapperMethod``.

    Raises
    ------
    RuntimeError
        Its layer was wrapped before: a second model in this process, whose layers are not those of the weights.
    """
    config = method.kt_config
    here = (config.layer_idx, config.weight_path)
    if any((other.kt_config.layer_idx, other.kt_config.weight_path) == here for other in _methods):
        raise RuntimeError(
            f"kt_kernel: layer {config.layer_idx} of {config.weight_path} was wrapped twice; a draft model would get "
            "the experts of the model it drafts for, so serve without it or without --kt-* flags."
        )
    # what SGLang asks a method for when it puts adapters on a layer's experts, and KTEPWrapperMethod passes on
    method.get_triton_quant_info = method.get_marlin_quant_info = device_methods.refuse_lora
    _methods.append(method)


def take_activation(method: Any, layer: nn.Module, moe_runner_config: Any) -> None:
    """Give the layer's CPU experts the activation of its GPU experts, before weights are read.

    Stock SGLang passes its limits to the device's runner only.

    Raises
    ------
    ValueError
        A layer whose experts are not ``down act(gate(x), up(x))``: names the property and its value.
    """
    activation = activation_of(moe_runner_config)
    if method.wrapper is not None:
        method.wrapper.config = replace(method.wrapper.config, activation=activation)


def activation_of(config: Any) -> Activation:
    """Return what SGLang's Triton runner computes between gate, up and down for a ``MoeRunnerConfig``.

    Raises
    ------
    ValueError
        Something that kt_kernel does not compute.
    """
    found = []
    if config.activation not in ("silu", "gelu"):
        found.append(f"activation {config.activation!r}")
    alpha, limit_after = getattr(config, "gemm1_alpha", None), getattr(config, "gemm1_clamp_limit", None)
    limit, beta = getattr(config, "swiglu_limit", None), getattr(config, "gemm1_beta", None)
    plain = [("is_gated", True), ("apply_router_weight_on_input", False), ("no_combine", False)]
    if config.activation == "gelu":
        plain += [("gemm1_alpha", None), ("gemm1_clamp_limit", None), ("swiglu_limit", None)]
    for name, value in plain:
        if getattr(config, name, value) != value:
            found.append(f"{name}={getattr(config, name)}")
    if beta not in (None, 1.0 if alpha is not None else None):
        found.append(f"gemm1_beta={beta}")
    if found:
        raise ValueError(
            f"kt_kernel computes experts of the form down(act(gate x, up x)) with SiLU or GeLU, but layer "
            f"{config.layer_id} of this model has {', '.join(found)}; serve it without --kt-* flags."
        )
    try:
        if config.activation == "gelu" or (alpha is None and limit_after is None):
            return Activation(config.activation, limit or 0.0)
        if alpha is not None:
            return Activation("silu", limit_after or 0.0, alpha)
        return Activation("silu_then_limit", limit_after)
    except ValueError as error:
        raise ValueError(f"layer {config.layer_id} of this model: {error}") from None


def check_model_was_wrapped(model: nn.Module, *_args: Any, **_kwargs: Any) -> None:
    """Refuse ``--kt-weight-path`` for a model none of whose layers asked for it; no weight has been read yet.

    Raises
    ------
    RuntimeError
        Names the model class.
    """
    from sglang.srt.runtime_context import get_server_args

    if _methods or _in_speculative_scope() or get_server_args().kt_weight_path is None:
        return
    raise RuntimeError(
        f"kt_kernel: --kt-weight-path is given but {type(model).__name__} has no MoE layer of SGLang's FusedMoE class, "
        "so no expert would run on the CPU; remove the --kt-* flags or serve a model with such layers."
    )


def load_device_expert(original: Callable, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Skip the weights of experts that have no place on the device.

    SGLang does so itself only for model classes with expert-location metadata; the others (Mixtral and 18 more) would
    write behind the end of a tensor that has ``num_gpu_experts`` experts.
    """
    method = getattr(layer, "quant_method", None)
    expert_id = kwargs.get("expert_id")
    if method in _methods and expert_id is not None and expert_id >= method.num_gpu_experts:
        return
    original(layer, *args, **kwargs)


def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
    """Load the CPU experts of one layer; experts meant for the device become ours too, in bf16 panels.

    Takes the place of SGLang's method on a host without CUDA.
    """
    if self.tp_rank != 0 or self.wrapper is None:
        return
    self.kt_device_experts = None
    if self.num_gpu_experts:
        self.kt_device_experts = _pack_device_experts(self, layer)
        self.kt_device_skip = torch.arange(self.global_num_experts) >= self.num_gpu_experts
    self.wrapper.load_weights(physical_to_logical_map(self))


def apply(self: Any, layer: nn.Module, dispatch_output: Any) -> Any:
    """Compute one MoE layer: the CPU experts, plus the device's where the flags placed some there.

    Takes the place of SGLang's method on a host without CUDA; returns a ``StandardCombineInput``.
    """
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    hidden_states = dispatch_output.hidden_states
    if self.tp_rank != 0 or self.wrapper is None:
        return StandardCombineInput(hidden_states=torch.zeros_like(hidden_states))
    topk_ids, topk_weights = device_methods.topk_tensors(scaling.with_scaled_weights(self, dispatch_output))
    output = self.wrapper.forward(hidden_states, topk_ids, topk_weights, 0)
    if self.kt_device_experts is not None:
        output += self.kt_device_experts.forward(hidden_states, topk_ids, topk_weights, skip=self.kt_device_skip)
    return StandardCombineInput(hidden_states=output)


def _pack_device_experts(method: Any, layer: nn.Module) -> Any:
    """Return experts ``0 .. num_gpu_experts`` in bf16 panels, and free the tensors SGLang loaded them into."""
    from kt_kernel.config import MoEConfig
    from kt_kernel.experts import CpuExperts
    from kt_kernel.methods import METHODS

    weights = [getattr(layer, name, None) for name in ("w13_weight", "w2_weight")]
    if any(weight is None or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32) for weight in weights):
        raise ValueError(
            f"kt_kernel: --kt-num-gpu-experts {method.num_gpu_experts} on a host without a GPU needs expert weights in "
            "bf16, fp16 or fp32; use --kt-num-gpu-experts 0 with this checkpoint."
        )
    gate_up, down = (weight.data for weight in weights)
    ids = list(range(method.num_gpu_experts))
    intermediate_size = down.shape[2]
    experts = CpuExperts(
        MoEConfig(
            layer_idx=method.kt_config.layer_idx,
            num_experts=method.global_num_experts,
            top_k=layer.top_k,
            hidden_size=down.shape[1],
            intermediate_size=intermediate_size,
            activation=method.wrapper.config.activation,
        ),
        layouts=(METHODS["BF16"].layout,) * 2,
        engine=method.wrapper.cpu_infer,
        expert_ids=ids,
    )
    experts.load_experts(
        ids,
        [gate_up[e, :intermediate_size] for e in ids],
        [gate_up[e, intermediate_size:] for e in ids],
        [down[e] for e in ids],
    )
    for weight in weights:
        weight.data = weight.data.new_empty(0)
    return experts


def physical_to_logical_map(method: Any) -> Tensor:
    """Return the model's expert in each slot of a layer: ``[num_experts]``, int64, CPU.

    Raises
    ------
    ValueError
        A map of fewer layers, for a model whose config.json was not there to compare with.
    """
    from sglang.srt.eplb.expert_location_dispatch import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    if metadata is None:  # 19 model files of 0.5.18 publish no expert location; their slots are their experts
        return torch.arange(method.global_num_experts, dtype=torch.int64)
    location, layer = metadata.physical_to_logical_map_cpu, method.kt_config.layer_idx
    if layer >= len(location):
        raise ValueError(
            f"kt_kernel: --init-expert-location has {len(location)} layers but the model has a layer {layer}; make it "
            "from a record of this model."
        )
    return location[layer].contiguous()


def _in_speculative_scope() -> bool:
    from sglang.srt.runtime_context import get_flags

    return bool(get_flags().moe.in_speculative_scope)

"""Hugging Face transformers: experts of its MoE models computed by kt_kernel, and reading models.

Importing this module registers ``kt_kernel`` as an implementation of experts::

    import kt_kernel.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="kt_kernel")

Each layer's experts are packed when the layer first runs (or all at once by :func:`pack_experts`), and the model's own
weights are freed: at most one layer is in memory twice. A model that was packed can be neither saved nor trained, nor
switched to another implementation; ``register(free_weights=False)`` keeps the weights for that.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kt_kernel.activations import Activation
from kt_kernel.config import EngineConfig, default_method
from kt_kernel.hybrid_moe import HybridMoE
from kt_kernel.integrations.torchvision_repair import repair_torchvision
from kt_kernel.methods import get_float_method

repair_torchvision()  # transformers imports torchvision for any model

logger = logging.getLogger("kt_kernel.transformers")

NAME = "kt_kernel"
_ATTRIBUTE = "_kt_kernel_experts"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class _Settings:
    method: str | None = None
    num_gpu_experts: int = 0
    free_weights: bool = True
    engine: EngineConfig | None = None


_settings = _Settings()
_packed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Return model (fp32) and tokenizer of a GGUF file, both dequantized by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model.eval(), tokenizer


def register(
    method: str | None = None,
    *,
    num_gpu_experts: int = 0,
    free_weights: bool = True,
    engine: EngineConfig | None = None,
) -> None:
    """Make ``experts_implementation="kt_kernel"`` known; importing this module has called it with the defaults.

    Layers that are packed from now on use these settings.

    Parameters
    ----------
    method : str, optional
        BF16, AMXINT8 or AMXINT4; None: ``KT_METHOD``, else BF16.
    num_gpu_experts : int
        Experts 0 .. num_gpu_experts - 1 of each layer stay in torch, on the device of the layer's input.
    free_weights : bool
        Whether the model's own weights of a layer are freed when it has been packed.
    engine : EngineConfig, optional
        Threads and NUMA nodes; None: from the environment, else all usable cores.

    Raises
    ------
    ImportError
        A transformers that has no such implementations (before version 5).
    ValueError
        An unknown method, or one that only keeps the codes of files, here or in ``KT_METHOD``.
    """
    global _settings
    if method is None:
        default_method()  # a wrong one is told now, not when a layer first runs
    else:
        get_float_method(method)
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(f"experts_implementation needs transformers 5, but here: {error}") from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    _settings = _Settings(method, num_gpu_experts, free_weights, engine)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute what the experts of a layer of transformers compute, by kt_kernel; what :func:`register` registers.

    ``output[t] = sum_s top_k_weights[t, s] * (down_e act(gate_e x_t + b, up_e x_t + b) + b)``,
    ``e = top_k_index[t, s]``, over slots with e below the number of experts (transformers marks absent ones with that
    number), act the gate of the model, b the biases of its experts if it has some

    Parameters
    ----------
    module : Module
        The layer's experts, with ``gate_up_proj`` ``[E, 2 * I, H]`` and ``down_proj`` ``[E, H, I]``, or their
        transposed, and rows of gate and up one after the other or in turn.
    hidden_states : Tensor
        ``[num_tokens, H]``, bf16, fp16 or fp32.
    top_k_index, top_k_weights : Tensor
        ``[num_tokens, top_k]``.

    Raises
    ------
    NotImplementedError
        Experts that kt_kernel cannot compute; one sentence.
    RuntimeError
        Training mode, weights that are gone.
    """
    if module.training and torch.is_grad_enabled():
        raise RuntimeError("kt_kernel's experts cannot be trained; call model.eval() or choose another implementation.")
    layer = getattr(module, _ATTRIBUTE, None)
    if layer is None:
        layer = _pack(module, top_k_index.shape[-1])
    if layer.num_device_experts and layer.gate_up_proj.device != hidden_states.device:
        layer.to(hidden_states.device)
    ids = top_k_index.masked_fill(top_k_index >= layer.config.num_experts, -1)
    return layer(hidden_states, ids, top_k_weights)


def pack_experts(model: nn.Module) -> int:
    """Pack every layer's experts now, instead of when the layer first runs; again where the weights are still there.

    Parameters
    ----------
    model : PreTrainedModel
        Made with ``experts_implementation="kt_kernel"``.

    Returns
    -------
    int
        Layers that were packed; those whose weights were freed before are packed already and not counted.

    Raises
    ------
    ValueError
        A model without such layers.
    NotImplementedError
        Experts that kt_kernel cannot compute.
    """
    found = [module for module in model.modules() if _is_experts(module)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts to pack; make it with from_pretrained(..., "
            f'experts_implementation="{NAME}").'
        )
    count = 0
    for index, module in enumerate(found):
        if module.gate_up_proj.numel():
            _pack(module, int(module.config.num_experts_per_tok), index)
            count += 1
    return count


def _is_experts(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(module, "gate_up_proj") and getattr(config, "_experts_implementation", None) == NAME


@torch.compiler.disable
def _pack(module: nn.Module, top_k: int, index: int | None = None) -> HybridMoE:
    """Make the layer of `module`. Without an index it is the next of its model: layers of one model, and only they,
    share a config object, but for models made of the same one by from_config.
    """
    activation = _check(module)
    if index is None:
        index = sum(other.config is module.config for other in list(_packed))
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    biases = None
    if module.has_bias:
        halves = _halves(module, module.gate_up_proj_bias.detach(), 1)
        biases = (torch.cat(halves, dim=1), module.down_proj_bias.detach())
    layer = HybridMoE.from_tensors(
        _halves(module, gate_up, 1),
        down,
        top_k=top_k,
        biases=biases,
        activation=activation,
        layer_idx=index,
        method=_settings.method or default_method(),
        num_gpu_experts=_settings.num_gpu_experts,
        device=module.gate_up_proj.device,
        engine=_settings.engine,
    )
    # not as a submodule: its tensors are no part of the model's state
    module.__dict__[_ATTRIBUTE] = layer
    _packed.add(module)
    if _settings.free_weights:
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(module, name)
            setattr(module, name, nn.Parameter(weight.new_empty(0), requires_grad=False))
        module.register_state_dict_pre_hook(_refuse_state)
        module.register_forward_pre_hook(_refuse_switch)
    if index == 0:
        logger.info("experts are computed by kt_kernel, method %s: %s", layer.wrapper.method, layer.wrapper.moe.explain)
    return layer


def _refuse_state(module: nn.Module, prefix: str, keep_vars: bool) -> NoReturn:
    raise RuntimeError(
        f"the weights of {prefix}gate_up_proj were freed when kt_kernel packed them; to save the model, load it again "
        f"without kt_kernel or after register(free_weights=False)."
    )


def _refuse_switch(module: nn.Module, _args: Any) -> None:
    wanted = module.config._experts_implementation
    if wanted != NAME:
        raise RuntimeError(
            f"the weights of {type(module).__name__} were freed when kt_kernel packed them; load the model again with "
            f"experts_implementation={wanted!r}, or load it after register(free_weights=False) to switch."
        )


def _halves(module: nn.Module, gate_up: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """gate and up of a tensor of both."""
    if module.is_concatenated:
        gate, up = gate_up.chunk(2, dim)
        return gate, up
    order = torch.arange(gate_up.shape[dim], device=gate_up.device)
    return gate_up.index_select(dim, order[::2]), gate_up.index_select(dim, order[1::2])


def _activation(module: nn.Module) -> Activation | None:
    """The activation that gives what the module's own gate gives, or None."""
    limit = float(getattr(module, "limit", None) or 0.0)
    alpha = float(getattr(module, "swiglu_alpha", None) or getattr(module, "alpha", None) or 0.0)
    # values on either side of every limit, in an order that gate and up do not share
    values = torch.linspace(-3, 3, 512, dtype=torch.float64) * (limit or 4.0)
    values = values[torch.randperm(512, generator=torch.Generator().manual_seed(1))].reshape(4, 128)
    with torch.no_grad():
        wanted = module._apply_gate(values)
    candidates = [("silu", limit, alpha), ("silu", limit, 0.0), ("silu_then_limit", limit, 0.0)]
    for name, own_limit, own_alpha in (*candidates, ("silu", 0.0, 0.0), ("gelu", 0.0, 0.0), ("gelu_tanh", 0.0, 0.0)):
        if name == "silu_then_limit" and not own_limit:
            continue
        found = Activation(name, own_limit, own_alpha)
        result = found(*_halves(module, values, 1))
        if result.shape == wanted.shape and torch.allclose(result, wanted, rtol=1e-9, atol=1e-12):
            return found
    return None


def _check(module: nn.Module) -> Activation:
    """Refuse experts that are something else than ``down act(gate x, up x)``; returns their activation."""
    name = type(module).__name__

    def refuse(what: str) -> NoReturn:
        raise NotImplementedError(
            f"kt_kernel cannot compute {name}: {what}; choose another experts_implementation, such as eager."
        )

    if not getattr(module, "has_gate", True) or not hasattr(module, "gate_up_proj"):
        refuse("its experts have no gate")
    activation = _activation(module)
    if activation is None:
        own = type(getattr(module, "act_fn", None)).__name__
        refuse(f"it combines gate and up in a way of its own (activation {own})")
    for weight in (module.gate_up_proj, module.down_proj):
        if weight.device.type == "meta":
            refuse("its weights are offloaded; load the model with its experts on the CPU")
        if weight.dtype not in _DTYPES:
            refuse(f"its weights are {weight.dtype}, and only bf16, fp16 and fp32 are supported")
        if weight.dim() != 3:
            refuse(f"a weight has shape {list(weight.shape)}, as after its weights were freed")
    return activation


try:
    register()
except ImportError:
    # a transformers before version 5 can still read models
    logger.debug("this transformers has no experts_implementation", exc_info=True)

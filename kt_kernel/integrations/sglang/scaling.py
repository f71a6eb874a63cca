"""The routed scaling factor: applied once on every path of every model class that has one.

SGLang gives the factor to the device's MoE runner, to the top-k weights or to the model's own code, and not every class
does the same on every path. Here the runner's factor is always cleared before the runner is made, so that what the
layer returns is unscaled on both sides, and a table says for each class who applies it then. The table holds for the
code it was read in: a class whose source is another one is refused, and ``tests/python/test_scaling_sources.py`` fails.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

MODELS = "sglang.srt.models."
SHARED_ADD = "sglang.srt.layers.quantization.mxfp4_flashinfer_trtllm_moe.maybe_fuse_routed_scale_and_shared_add"


class Applied(Enum):
    """Who multiplies by the factor once the runner's is cleared."""

    MODEL = "the block multiplies the experts' sum on every path, CPU and CUDA"
    LAYER = "the block never multiplies: the layer scales its top-k weights"
    LAYER_ALONE = "the block multiplies on some paths: its own factor becomes 1, the layer scales its top-k weights"


@dataclass(frozen=True)
class Rule:
    """One model class.

    ``sources`` are the dotted names whose text the decision was read in, the class first; ``digests`` what
    :func:`source_digest` gives for them, by the SGLang release that has this text.
    """

    applied: Applied
    sources: tuple[str, ...]
    digests: dict[str, str]


_RULES = (
    Rule(
        Applied.MODEL,
        (MODELS + "deepseek_v2.DeepseekV2MoE", SHARED_ADD),
        {"0.5.18": "a96dc1c2152728ae", "0.5.23": "844742d84a772344"},
    ),
    Rule(
        Applied.LAYER_ALONE,
        (MODELS + "glm4_moe.Glm4MoeSparseMoeBlock",),
        {"0.5.18": "622c98384540a699", "0.5.23": "683953928e0aff80"},
    ),
    Rule(
        Applied.LAYER_ALONE,
        (MODELS + "glm4_moe_lite.Glm4MoeLiteSparseMoeBlock",),
        {"0.5.18": "928dc7d877aa43ef", "0.5.23": "c2b585592ad90f81"},
    ),
    Rule(
        Applied.LAYER,
        (MODELS + "kimi_linear.KimiMoE",),
        {"0.5.18": "153205fc89703c71", "0.5.23": "ba8c2ecbc4b17f8e"},
    ),
    Rule(
        Applied.LAYER,
        (MODELS + "bailing_moe.BailingMoESparseMoeBlock",),
        {"0.5.18": "2321edf691b9c5c3", "0.5.23": "2db8bf2572462e30"},
    ),
    Rule(
        Applied.LAYER,
        (MODELS + "bailing_moe_linear.BailingMoE",),
        {"0.5.18": "a9d48cf9853d670e", "0.5.23": "6bd74e1f8b6ae07e"},
    ),
    Rule(
        Applied.LAYER,
        (MODELS + "bailing_moe_v3.BailingMoE",),
        {"0.5.23": "55128757e1b82e74"},
    ),
    Rule(
        Applied.LAYER,
        (MODELS + "llada2.LLaDA2MoeSparseMoeBlock",),
        {"0.5.18": "88f4bdb8de99c459", "0.5.23": "f358f141b0072209"},
    ),
)
RULES: dict[str, Rule] = {rule.sources[0]: rule for rule in _RULES}


def take_factor(method: Any, layer: nn.Module, moe_runner_config: Any) -> None:
    """Clear the runner's factor before ``KTEPWrapperMethod.create_moe_runner``, and remember it on the method."""
    factor = moe_runner_config.routed_scaling_factor
    method.kt_routed_scaling_factor = 1.0 if factor is None else float(factor)
    moe_runner_config.routed_scaling_factor = None


def settle(model: nn.Module, *_args: Any, **_kwargs: Any) -> None:
    """Decide for each wrapped layer of a model that was just built who applies the factor; no weight has been read.

    Raises
    ------
    ValueError
        A factor other than 1 in a class that is not in the table, or whose code is not the code the table was read in.
    """
    for block, method in wrapped_layers(model):
        factor = method.kt_routed_scaling_factor
        method.kt_weight_scale = 1.0
        if factor == 1.0:
            continue
        rule = checked_rule(type(block), factor)
        if rule.applied is Applied.LAYER_ALONE:
            block.routed_scaling_factor = 1.0
        if rule.applied is not Applied.MODEL:
            method.kt_weight_scale = factor


def wrapped_layers(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield each block that owns a wrapped ``FusedMoE`` layer, and the layer's ``KTEPWrapperMethod``."""
    from kt_kernel.integrations.sglang import layers

    methods = layers.wrapped_methods()
    for block in model.modules():
        for child in block.children():
            method = getattr(child, "quant_method", None)
            if any(method is known for known in methods):
                yield block, method


def checked_rule(block_class: type, factor: float) -> Rule:
    """Return the rule of a class after comparing the code it was read in.

    Raises
    ------
    ValueError
        See :func:`settle`.
    """
    name = f"{block_class.__module__}.{block_class.__qualname__}"
    rule = RULES.get(name)
    if rule is None:
        raise ValueError(
            f"kt_kernel: the experts of {name} are scaled by {factor:g}, and where this class applies the factor is "
            "not known to this version, so its answers could be wrong; serve it without --kt-* flags."
        )
    if source_digest(rule.sources) not in rule.digests.values():
        raise ValueError(
            f"kt_kernel: the experts of {name} are scaled by {factor:g}, and this SGLang's code of that class is not "
            f"what was checked ({', '.join(rule.digests)}); use one of these releases."
        )
    return rule


def with_scaled_weights(method: Any, dispatch_output: Any) -> Any:
    """Return `dispatch_output` with the top-k weights multiplied by the factor where the layer applies it.

    ``topk_weights' = kt_weight_scale * topk_weights``, in fp32, which scales the device's and the CPU's share alike.
    """
    scale = getattr(method, "kt_weight_scale", 1.0)
    if scale == 1.0:
        return dispatch_output
    topk_output = dispatch_output.topk_output
    scaled = topk_output._replace(topk_weights=topk_output.topk_weights * scale)
    return dispatch_output._replace(topk_output=scaled)


def source_digest(names: tuple[str, ...]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the named definitions' text without white space."""
    text = "".join("".join(inspect.getsource(_resolve(name)).split()) for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)

"""The hooks on SGLang: which function is changed, where, and the check that all of them took."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kt_kernel.integrations.sglang import (
    PLATFORM_NAME,
    checks,
    cuda_host,
    device_methods,
    expert_counts,
    flags,
    kv_pool,
    layers,
    metrics,
    placement,
    report,
    scaling,
    shared_expert,
)

WRAPPER = "sglang.srt.layers.moe.kt_ep_wrapper."
METHOD = WRAPPER + "KTEPWrapperMethod."
FUSED_MOE = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE."
SERVER_ARGS = "sglang.srt.server_args.ServerArgs."
MODEL_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner."
INITIALIZE_MODEL = "sglang.srt.model_loader.loader._initialize_model"
GRAPH_RUNNERS = "sglang.srt.model_executor.runner."
KV_POOL = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator."


@dataclass(frozen=True)
class Hook:
    """One change of SGLang: ``kind`` is a name of SGLang's ``HookType``."""

    target: str
    kind: str
    function: Callable


ALL_HOSTS = (
    Hook(SERVER_ARGS + "add_cli_args", "AFTER", flags.add_cli_args),
    Hook(SERVER_ARGS + "from_cli_args", "AROUND", checks.from_cli_args),
    Hook(SERVER_ARGS + "check_server_args", "AFTER", checks.check_server_args),
    Hook(WRAPPER + "create_kt_config_from_server_args", "AROUND", layers.create_kt_config),
    Hook(METHOD + "__init__", "BEFORE", device_methods.fill_in_method),
    Hook(METHOD + "__init__", "AFTER", layers.remember_method),
    Hook(METHOD + "create_weights", "BEFORE", device_methods.before_create_weights),
    Hook(METHOD + "create_moe_runner", "BEFORE", layers.take_activation),
    Hook(METHOD + "create_moe_runner", "BEFORE", scaling.take_factor),
    Hook(FUSED_MOE + "_weight_loader_impl", "AROUND", layers.load_device_expert),
    Hook("sglang.srt.layers.moe.topk.TopK.forward", "AROUND", placement.route),
    Hook(INITIALIZE_MODEL, "AFTER", layers.check_model_was_wrapped),
    Hook(INITIALIZE_MODEL, "AFTER", scaling.settle),
    Hook(INITIALIZE_MODEL, "AFTER", placement.check_location_is_used),
    Hook(MODEL_RUNNER + "load_model", "AFTER", report.after_load_model),
    Hook(MODEL_RUNNER + "load_model", "AFTER", metrics.after_load_model),
    Hook(MODEL_RUNNER + "load_model", "AFTER", placement.after_load_model),
    Hook(MODEL_RUNNER + "load_model", "AFTER", expert_counts.after_load_model),
    Hook(MODEL_RUNNER + "forward", "AFTER", report.after_forward),
    Hook(MODEL_RUNNER + "forward", "AFTER", expert_counts.after_forward),
)

# Upstream's methods ask for a CUDA stream; on a host without CUDA ours take their place.
WITHOUT_CUDA = (
    Hook(METHOD + "process_weights_after_loading", "REPLACE", layers.process_weights_after_loading),
    Hook(METHOD + "apply", "REPLACE", layers.apply),
)

# Upstream's methods hand over to the CPU; ours stand around them.
WITH_CUDA = (
    Hook(METHOD + "create_weights", "BEFORE", device_methods.check_before_weights),
    Hook(METHOD + "create_weights", "AFTER", device_methods.check_after_weights),
    Hook(METHOD + "create_moe_runner", "AFTER", device_methods.check_after_runner),
    Hook(METHOD + "process_weights_after_loading", "REPLACE", cuda_host.process_weights_after_loading),
    Hook(METHOD + "apply", "AROUND", cuda_host.apply),
    Hook(
        "sglang.srt.model_executor.forward_batch_info.enable_num_token_non_padded",
        "AROUND",
        cuda_host.enable_num_token_non_padded,
    ),
    Hook(GRAPH_RUNNERS + "decode_cuda_graph_runner.DecodeCudaGraphRunner.capture", "AROUND", cuda_host.capture),
    Hook(GRAPH_RUNNERS + "prefill_cuda_graph_runner.PrefillCudaGraphRunner.capture", "AROUND", cuda_host.capture),
    Hook(
        "sglang.srt.model_executor.cuda_graph_buffer_registry.CudaGraphBufferRegistry.fill_from",
        "AFTER",
        cuda_host.after_fill,
    ),
    Hook(MODEL_RUNNER + "forward", "AFTER", cuda_host.raise_pending_errors),
)

CPU_PLATFORM = (
    Hook(KV_POOL + "_profile_available_bytes", "AROUND", kv_pool.profile_available_bytes),
    Hook(KV_POOL + "_apply_token_constraints", "AFTER", kv_pool.cap_tokens),
    Hook(
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        "REPLACE",
        shared_expert.add_gated_shared_expert,
    ),
)


def hooks_for_this_host() -> tuple[Hook, ...]:
    """Return the hooks this process needs: all hosts', plus those of a host without CUDA and of our platform."""
    import torch

    hooks = (*ALL_HOSTS, Hook(SERVER_ARGS + resolution_step(), "BEFORE", checks.before_resolution))
    hooks += WITH_CUDA if torch.cuda.is_available() else WITHOUT_CUDA
    if os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME:
        hooks += CPU_PLATFORM
    return hooks


def resolution_step() -> str:
    """Return the method of this release's ``ServerArgs`` that resolves the flags; before it they can be changed."""
    from importlib.util import find_spec

    package = find_spec("sglang")
    source = Path(str(package.origin)).parent / "srt" / "server_args.py" if package and package.origin else None
    text = source.read_text() if source is not None and source.exists() else ""
    return "resolve_once" if "def resolve_once(" in text else "__post_init__"


def install() -> None:
    """Register the hooks; SGLang applies them when all plug-ins have run."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks_for_this_host():
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])
    if os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME:
        _register_mla_attention()


def verify_hooks() -> None:
    """Check that SGLang applied every hook.

    Raises
    ------
    RuntimeError
        Names the targets that are missing: this SGLang release has other names than the ones tested.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [hook.target for hook in hooks_for_this_host() if hook.target not in HookRegistry._patched]
    if missing:
        import sglang

        raise RuntimeError(
            f"kt_kernel could not hook {', '.join(missing)} of SGLang {getattr(sglang, '__version__', '?')}; "
            "use the SGLang release that install.sh pins, or see 'Failed to apply hooks' in the log above."
        )


def _register_mla_attention() -> None:
    """Give ``torch_native`` attention an MLA handler.

    It has none of its own and falls to Triton's, whose prefill reads keys that an MLA pool does not hold.
    """
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    handlers.AttentionBackendRegistry.register("torch_native", lambda attn, batch: handlers.AttnForwardMethod.MLA)

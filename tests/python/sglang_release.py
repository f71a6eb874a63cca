"""Ask an installed SGLang what the plug-in relies on, and print the answers.

A script for a process of its own, because it imports SGLang: ``python tests/python/sglang_release.py`` with the
interpreter of the release in question. Prints one line ``FOUND{...}``.

targets  hooks whose target this release does not have, by the reason
padded   ids of a batch of 5 in a bucket of 8, from SGLang's own buffers and our hooks
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("SGLANG_PLATFORM", "kt_cpu")

import torch

from kt_kernel.integrations.torchvision_repair import repair_torchvision

ROWS, BUCKET, EXPERTS = 5, 8, 4


class TopK(NamedTuple):
    """SGLang's standard top-k output."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Dispatched(NamedTuple):
    """A dispatcher's output."""

    hidden_states: torch.Tensor
    topk_output: TopK


def missing_targets() -> dict[str, str]:
    """Return the hook targets of both kinds of hosts that cannot be resolved."""
    from kt_kernel.integrations.sglang import plugin

    hooks = set()
    for cuda in (False, True):
        with mock.patch.object(torch.cuda, "is_available", lambda cuda=cuda: cuda):
            hooks |= {hook.target for hook in plugin.hooks_for_this_host()}
    missing = {}
    for target in sorted(hooks):
        owner, _, name = target.rpartition(".")
        try:
            getattr(pkgutil.resolve_name(owner), name)
        except Exception as error:
            missing[target] = repr(error)
    return missing


def hook_in(*targets: str) -> None:
    """Let SGLang apply the named hooks of a CUDA host."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kt_kernel.integrations.sglang import plugin

    for hook in plugin.WITH_CUDA:
        if hook.target.rpartition(".")[2] in targets:
            HookRegistry.register(hook.target, hook.function, HookType[hook.kind])
    HookRegistry.apply_hooks()


def padded_rows() -> dict[str, Any]:
    """Fill SGLang's buffers with a batch of 5 in a bucket of 8, and route it."""
    from sglang.srt.model_executor import cuda_graph_buffer_registry, forward_batch_info
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner

    from kt_kernel.integrations.sglang import cuda_host, layers

    hook_in("enable_num_token_non_padded", "fill_from")
    method = SimpleNamespace(num_gpu_experts=0, global_num_experts=EXPERTS)
    parallel = mock.MagicMock(moe_ep_size=1, attn_dp_size=1, attn_cp_size=1)
    backend = mock.MagicMock(is_customized=lambda: False)
    found: dict[str, Any] = {}
    with (
        mock.patch.object(forward_batch_info, "get_parallel", lambda: parallel),
        mock.patch("sglang.srt.runtime_context.get_parallel", lambda: parallel),
        mock.patch("sglang.srt.runtime_context.get_server_args", lambda: None),
        mock.patch("sglang.srt.utils.common.require_gathered_buffer", _no_gather()),
        mock.patch.object(layers, "_methods", []),
        mock.patch.object(forward_batch_info, "world_dp_gather_enabled", lambda: False, create=True),
        mock.patch("sglang.srt.layers.moe.utils.get_moe_a2a_backend", lambda: backend),
    ):  # fmt: skip
        found["without kt"] = bool(decode_cuda_graph_runner.enable_num_token_non_padded())
        layers._methods.append(method)
        enabled = bool(decode_cuda_graph_runner.enable_num_token_non_padded())
        found["with kt"] = enabled
        parallel.attn_dp_size = 2
        found["with kt, DP attention"] = bool(decode_cuda_graph_runner.enable_num_token_non_padded())
        parallel.attn_dp_size, parallel.attn_cp_size = 1, 2
        found["with kt, context parallel"] = bool(decode_cuda_graph_runner.enable_num_token_non_padded())
        parallel.attn_cp_size = 1
        registry = cuda_graph_buffer_registry.build_decode_registry(
            device=torch.device("cpu"), max_bs=BUCKET, max_num_token=BUCKET, seq_len_fill_value=1,
            cache_loc_dtype=torch.int64, enable_num_token_non_padded=enabled, share_pool=False,
            **_extra(cuda_graph_buffer_registry.build_decode_registry),
        )  # fmt: skip
        count = registry.get_slot("num_token_non_padded").buffer
        for name, value in {"batch": torch.tensor(ROWS, dtype=torch.int32), "batch without count": None}.items():
            count.fill_(2)  # of the last batch
            fields = dict.fromkeys(("num_token_non_padded", "global_num_token_non_padded"), value)
            batch = mock.MagicMock(**fields, input_ids=torch.arange(ROWS), global_num_token_non_padded_cpu=ROWS)
            for slot in registry.slot_names():
                if slot not in (*fields, "input_ids"):
                    setattr(batch, slot, None)
            registry.fill_from(batch, raw_bs=ROWS, padded_bs=BUCKET, raw_num_tokens=ROWS, padded_num_tokens=BUCKET)
            found[name] = count.tolist()
        found["ids"] = routed(count, registry)
    found["topk reads the count"] = cuda_host.topk_reads_row_count()
    return found


def routed(count: torch.Tensor, registry: Any) -> list[int]:
    """Return the first id of each row as the CPU's experts get it while a graph is captured."""
    from kt_kernel.integrations.sglang import cuda_host

    seen: list[torch.Tensor] = []
    method = SimpleNamespace(
        num_gpu_experts=0, global_num_experts=EXPERTS, tp_rank=0,
        submit=lambda _layer, dispatched: seen.append(dispatched.topk_output.topk_ids),
        sync=torch.zeros_like,
    )  # fmt: skip
    ids = torch.arange(2 * BUCKET, dtype=torch.int32).reshape(BUCKET, 2) % EXPERTS

    def run(runner: Any) -> None:
        assert runner.buffer_registry is registry
        if cuda_host.topk_reads_row_count():
            route_with_sglang(ids, count)
        output = TopK(torch.ones(BUCKET, 2), ids, torch.zeros(BUCKET, EXPERTS))
        cuda_host.apply(None, method, None, Dispatched(torch.zeros(BUCKET, 8), output))  # type: ignore[arg-type]

    cuda_host.capture(run, SimpleNamespace(buffer_registry=registry))
    assert cuda_host._row_count is None, "the buffer stays bound after the capture"
    return seen[0][:, 0].tolist()


def route_with_sglang(ids: torch.Tensor, count: torch.Tensor) -> None:
    """Mark the rows as this release's TopK does: the count comes from the forward context."""
    from sglang.srt.layers.moe import topk
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    context = ForwardContext(attn_backend=None, moe_num_token_non_padded=lambda: count)  # type: ignore[call-arg]
    with forward_context(context):
        bound, _ = topk.resolve_routing_inputs(layer_id=0, is_draft=True)
    topk._mask_topk_ids_padded_region(ids, bound)


def _no_gather() -> Any:
    import inspect

    from sglang.srt.utils.common import require_gathered_buffer

    if inspect.signature(require_gathered_buffer).parameters:
        return lambda server_args: False
    return lambda: False


def _extra(function: Any) -> dict[str, Any]:
    import inspect

    wanted = {"attn_tp_sharded_fn": lambda _rows: False}
    return {name: value for name, value in wanted.items() if name in inspect.signature(function).parameters}


def main() -> None:
    """Print what was found."""
    print("FOUND" + json.dumps({"targets": missing_targets(), "padded": padded_rows()}))


if __name__ == "__main__":
    repair_torchvision()
    sys.exit(main())

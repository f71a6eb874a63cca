"""Run the forward code of every model class in the table of scaling factors, and print what factor came out.

A script for a process of its own, because it imports SGLang. The blocks are SGLang's classes without their
constructors: gate, top-k, shared expert and experts are stand-ins, the code that adds and multiplies is the real one.
Prints one line ``FOUND{...}``: for each class, host and path the factor on the routed experts' output.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from torch import nn

from kt_kernel.integrations.torchvision_repair import repair_torchvision

FACTOR, SHARED = 2.5, 1000.0


class Stream:
    """A stand-in for a CUDA stream."""

    def wait_stream(self, _other: Stream) -> None:
        pass


class Experts(nn.Module):
    """A stand-in for ``FusedMoE`` under ``KTEPWrapperMethod``: its output is the sum of its top-k weights."""

    supports_deferred_finalize = False
    should_fuse_routed_scaling_factor_in_topk = False
    num_local_experts = 4
    runner_backend = None

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.quant_method = method
        self.moe_runner_config = SimpleNamespace(inplace=False, routed_scaling_factor=FACTOR)

    def forward(self, hidden_states: torch.Tensor, topk_output: Any, **_kwargs: Any) -> torch.Tensor:
        from kt_kernel.integrations.sglang import scaling

        dispatched = scaling.with_scaled_weights(self.quant_method, Dispatched(hidden_states, topk_output))
        # what SGLang's own runner would do
        factor = self.moe_runner_config.routed_scaling_factor or 1.0
        weights = dispatched.topk_output.topk_weights.sum(1, keepdim=True) * factor
        return weights.expand_as(hidden_states).clone()


class Replaceable(SimpleNamespace):
    """Has the ``_replace`` of a named tuple."""

    def _replace(self, **changes: Any) -> Replaceable:
        return Replaceable(**{**vars(self), **changes})


def Dispatched(hidden_states: torch.Tensor, topk_output: Any) -> Replaceable:
    """Return a dispatcher's output."""
    return Replaceable(hidden_states=hidden_states, topk_output=topk_output)


def make_block(block_class: type, method: Any) -> Any:
    """Return a block of the class with stand-ins for all its parts."""
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    block = block_class.__new__(block_class)
    nn.Module.__init__(block)
    topk_output = Replaceable(
        topk_weights=torch.full((3, 2), 0.5),
        topk_ids=torch.zeros(3, 2, dtype=torch.int32),
        format=TopKOutputFormat.STANDARD,
    )
    gate = mock.MagicMock(side_effect=lambda *a, **k: torch.zeros(3, 4))
    gate.e_score_correction_bias_vl = None
    if block_class.__name__ == "KimiMoE":
        gate = mock.MagicMock(side_effect=lambda *a, **k: (torch.zeros(3, 4), None))

    def shared(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.full_like(hidden_states, SHARED)

    plain = {
        "routed_scaling_factor": FACTOR,
        "tp_size": 1, "ep_size": 1, "moe_ep_size": 1, "layer_id": 3, "layer_idx": 3, "is_nextn": False,
        "is_hash": False,
        "num_fused_shared_experts": 0, "num_shared_experts": 1, "n_shared_experts": 1, "multi_gate": False,
        "_enable_a2a_moe": False, "_fuse_shared_experts_inside_sbo": False, "_shared_expert_tp1": False,
        "routed_scaling_factor_fused_in_topk": False, "reduce_results": False, "_deferred_finalize_max_tokens": 0,
        "alt_stream": Stream(), "routed_quant_stream": Stream(), "gate": gate, "block_size": None,
        "topk": mock.MagicMock(return_value=topk_output), "shared_experts": mock.MagicMock(side_effect=shared),
        "use_block_routing": False, "experts": Experts(method),
        "_maybe_quant_moe_input_once": lambda _x: None,
        "_should_quant_routed_input_mxfp8": lambda _x: False,
        "_can_dual_stream_graph": lambda _x: False,
        "config": SimpleNamespace(),
    }  # fmt: skip
    for name, value in plain.items():
        object.__setattr__(block, name, value) if not isinstance(value, nn.Module) else setattr(block, name, value)
    return block


@contextlib.contextmanager
def host(module: Any, *, cuda: bool, capturing: bool) -> Any:
    """Make a model's module believe in a host with or without CUDA, and in a capture."""
    names = {
        "_is_cuda": cuda, "_use_aiter": False, "_is_hip": False, "_is_npu": False, "_is_musa": False, "_is_xpu": False,
        "get_is_capture_mode": lambda: capturing, "is_in_breakable_cuda_graph": lambda: False,
        "use_intel_amx_backend": lambda _layer: False,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in names.items():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", Stream))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", lambda _stream: contextlib.nullcontext()))
        for name, value in {
            "should_skip_post_experts_all_reduce": lambda **_k: True,
            "is_allocation_symmetric": lambda: False,
            "use_symmetric_memory": lambda *_a, **_k: contextlib.nullcontext(),
            "get_moe_a2a_backend": lambda: mock.MagicMock(is_deepep=lambda: False, is_none=lambda: True),
            "get_forward": lambda: SimpleNamespace(flashinfer_trtllm_bypass=False, defer_moe_finalize=False),
            "get_parallel": mock.MagicMock(),
            "get_exec": lambda: SimpleNamespace(moe=SimpleNamespace(enable_eplb=False)),
            "parallel_state": mock.MagicMock(),
            "post_experts_all_reduce": lambda x: x,
        }.items():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, value))
        yield


def factor_of(name: str, *, cuda: bool, capturing: bool, plugin: bool) -> float:
    """Return the factor on the routed output of a class, with the plug-in's rule applied or without."""
    from sglang.srt.layers.moe.kt_ep_wrapper import KTEPWrapperMethod

    from kt_kernel.integrations.sglang import layers, scaling

    module_name, _, class_name = name.rpartition(".")
    module = importlib.import_module(module_name)
    method = KTEPWrapperMethod.__new__(KTEPWrapperMethod)
    method.gpu_method = SimpleNamespace()
    block = make_block(getattr(module, class_name), method)
    layers._methods[:] = [method]
    if plugin:
        scaling.take_factor(method, block.experts, block.experts.moe_runner_config)
        scaling.settle(nn.ModuleList([block]))
    hidden = torch.ones(3, 8)
    with host(module, cuda=cuda, capturing=capturing):
        normal = getattr(block, "forward_normal", None)
        if class_name in ("DeepseekV2MoE", "Glm4MoeSparseMoeBlock", "Glm4MoeLiteSparseMoeBlock"):
            output = block.forward_normal_dual_stream(hidden) if capturing else normal(hidden)
        else:
            output = normal(hidden) if normal is not None else block.forward(hidden)
    return round(float(output[0, 0]) - SHARED, 4)


def main() -> None:
    """Print the factors of all classes that this release has."""
    from kt_kernel.integrations.sglang import scaling

    found = {}
    for name in scaling.RULES:
        try:
            importlib.import_module(name.rpartition(".")[0])
        except ModuleNotFoundError:
            continue
        for cuda in (False, True):
            for capturing in (False, True) if cuda else (False,):
                key = f"{name.rpartition('.')[2]} {'cuda' if cuda else 'cpu'}{' captured' if capturing else ''}"
                key = f"{name.split('.')[-2]}.{key}"
                found[key] = [factor_of(name, cuda=cuda, capturing=capturing, plugin=p) for p in (False, True)]
    print("FOUND" + json.dumps(found))


if __name__ == "__main__":
    repair_torchvision()
    sys.exit(main())

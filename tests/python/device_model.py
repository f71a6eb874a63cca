"""A small MoE model as SGLang runs it on a GPU: real ``KTEPWrapperMethod`` layers around a GPU method in plain torch.

The same code computes the asynchronous answer, inside ``AsyncDevice``, and the synchronous one, in :func:`on_host`,
where the stream's handle is 0 and kt_kernel computes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from checkpoints import Experts, random_experts
from torch import Tensor, nn

from kt_kernel.integrations.torchvision_repair import repair_torchvision

repair_torchvision()

from sglang.srt.layers.moe import kt_ep_wrapper  # noqa: E402
from sglang.srt.layers.moe.kt_ep_wrapper import KTConfig, KTEPWrapperMethod  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput  # noqa: E402
from sglang.srt.layers.moe.topk import StandardTopKOutput  # noqa: E402

E, K, H, INNER = 8, 2, 64, 32


@contextmanager
def on_host() -> Iterator[None]:
    """Run the same calls synchronously: the current stream is 0, compiled functions are Python."""
    stream = SimpleNamespace(cuda_stream=0)
    patched = mock.patch.object(torch.cuda, "current_stream", lambda device=None: stream)
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), patched:
        yield


class GpuMethod:
    """Computes experts 0 .. N - 1, skips ids of -1, and leaves no input whole: an in-place kernel may do so."""

    def create_weights(self, layer: nn.Module, num_experts: int, **_kwargs: Any) -> None:
        layer.num_gpu_experts = num_experts

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        pass

    def apply(self, layer: nn.Module, dispatch_output: Any) -> StandardCombineInput:
        hidden = dispatch_output.hidden_states
        weights, ids = dispatch_output.topk_output[:2]
        output = torch.zeros_like(hidden)
        for expert in range(layer.num_gpu_experts):
            gate, up, down = (matrix[expert] for matrix in layer.experts)
            share = (weights * (ids == expert)).sum(dim=1, keepdim=True)
            inner = torch.nn.functional.silu(hidden @ gate.t()) * (hidden @ up.t())
            output = output + (share * (inner @ down.t())).to(hidden.dtype)
        hidden.fill_(float("nan"))
        return StandardCombineInput(hidden_states=output)


class MoeLayer(nn.Module):
    """A router and its experts, N of them on the GPU."""

    def __init__(self, index: int, *, num_gpu_experts: int, method: str, id_dtype: torch.dtype, deferred: int) -> None:
        super().__init__()
        self.top_k, self.intermediate_size_per_partition, self.moe_tp_size = K, INNER, 1
        self.experts: Experts = random_experts(E, H, INNER, seed=index)
        self.id_dtype = id_dtype
        self.router = torch.randn(H, E, generator=torch.Generator().manual_seed(100 + index))
        config = KTConfig(
            layer_idx=index,
            num_gpu_experts=num_gpu_experts,
            cpuinfer_threads=2,
            threadpool_count=1,
            weight_path="",
            chunked_prefill_size=64,
            max_deferred_experts_per_token=deferred,
            method=method,
        )
        with mock.patch.object(kt_ep_wrapper, "get_parallel", lambda: SimpleNamespace(tp_rank=0)):
            self.method = KTEPWrapperMethod(GpuMethod(), config)
        self.method.create_weights(
            self, num_experts=E, hidden_size=H, intermediate_size_per_partition=INNER, params_dtype=torch.bfloat16
        )
        runner = SimpleNamespace(activation="silu", num_local_experts=E, routed_scaling_factor=None)
        self.method.create_moe_runner(self, runner)
        self.method.wrapper.load_weights_from_tensors(*self.experts)
        self.apply: Callable[[Any], Any] = lambda dispatched: self.method.apply(self, dispatched)

    def route(self, hidden: Tensor) -> StandardTopKOutput:
        logits = hidden.float() @ self.router
        weights, ids = torch.topk(torch.softmax(logits, dim=-1), K, dim=-1)
        return StandardTopKOutput(weights, ids.to(self.id_dtype), logits)

    def forward(self, hidden: Tensor) -> Tensor:
        routed = self.route(hidden)
        return self.apply(StandardDispatchOutput(hidden, None, routed)).hidden_states


class Model:
    """Layers with a residual, a norm between them and a shared expert.

    With an `alternate` stream the routed experts run there, beside the shared one, as in SGLang's captured GLM-4.
    """

    def __init__(
        self,
        *,
        layers: int = 3,
        num_gpu_experts: int = 2,
        method: str = "AMXINT8",
        id_dtype: torch.dtype = torch.int64,
        max_deferred: int = 0,
    ) -> None:
        options = {"num_gpu_experts": num_gpu_experts, "method": method, "id_dtype": id_dtype}
        # the last layer has no successor, SGLang passes 0 there
        deferred = [max_deferred] * (layers - 1) + [0]
        self.layers = [MoeLayer(index, deferred=deferred[index], **options) for index in range(layers)]

    def wrappers(self) -> list[Any]:
        return [layer.method.wrapper for layer in self.layers]

    def __call__(self, hidden: Tensor, *, alternate: Any = None) -> Tensor:
        for layer in self.layers:
            size = hidden.float().pow(2).mean(-1, keepdim=True)
            normed = (hidden.float() * torch.rsqrt(size + 1e-5)).to(hidden.dtype)
            if alternate is None:
                routed = layer(normed.clone())
                shared = torch.tanh(normed)
            else:
                current = torch.cuda.current_stream()
                alternate.wait_stream(current)
                shared = torch.tanh(normed)
                with torch.cuda.stream(alternate):
                    routed = layer(normed.clone())
                current.wait_stream(alternate)
            hidden = hidden + routed + shared
        return hidden


def tokens(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, H, generator=generator).to(torch.bfloat16)


def answer(model: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """The synchronous answer."""
    with on_host():
        return model(hidden.clone())

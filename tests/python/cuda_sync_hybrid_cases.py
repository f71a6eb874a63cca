"""HybridMoE on a device's stream; cases of test_cuda_sync.py, run by it where the CUDA driver is the test double."""

from __future__ import annotations

import pytest
import torch
from async_device import AsyncDevice, captured
from checkpoints import random_experts
from torch.utils._python_dispatch import _disable_current_modes
from wrapper_cases import INNER, E, H, K, batch

from kt_kernel import HybridMoE
from kt_kernel.config import EngineConfig

pytest_plugins = ("async_device",)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make(num_gpu_experts: int) -> HybridMoE:
    with _disable_current_modes():
        experts = random_experts(E, H, INNER)
        return HybridMoE.from_tensors(
            (experts.gate, experts.up),
            experts.down,
            top_k=K,
            num_gpu_experts=num_gpu_experts,
            engine=EngineConfig(num_threads=2, num_nodes=1),
        )


def on_host(module: HybridMoE, tokens: int, seed: int) -> tuple[Inputs, torch.Tensor]:
    with _disable_current_modes():
        inputs = batch(tokens, seed=seed)
        return inputs, module(*inputs)


def moved(device: AsyncDevice, module: HybridMoE) -> HybridMoE:
    """What ``module.to("cuda")`` does; the double's tensors are on the CPU by name."""
    for parameter in (module.gate_up_proj, module.down_proj):
        parameter.data = device.tensor(parameter.data)
    module.device_rows = device.tensor(module.device_rows)
    return module


def forward(module: HybridMoE, inputs: Inputs) -> torch.Tensor:
    """The path that a CUDA tensor takes."""
    return module._compute_on_stream(*module._flat(*inputs))


@pytest.mark.parametrize("num_gpu_experts", [0, 3, E])
def test_hybrid(device: AsyncDevice, num_gpu_experts: int) -> None:
    module = make(num_gpu_experts)
    expected = [on_host(module, tokens, seed=tokens) for tokens in (1, 9, 40)]
    moved(device, module)
    for inputs, wanted in expected:
        given = [device.tensor(tensor) for tensor in inputs]
        output = forward(module, given)
        for tensor in given:
            tensor.zero_()  # the caller may
        assert torch.equal(output.cpu(), wanted)


def test_hybrid_in_a_graph(device: AsyncDevice) -> None:
    module = make(0)
    expected = [on_host(module, 5, seed=seed) for seed in range(4)]
    given = [device.tensor(tensor) for tensor in expected[0][0]]
    graph, output = captured(device, lambda: forward(module, given))
    for inputs, wanted in expected[1:]:
        for target, source in zip(given, inputs, strict=True):
            target.copy_(device.tensor(source))
        graph.replay()
        assert torch.equal(output.cpu(), wanted)


def test_a_forward_that_fails_on_the_device_leaves_nothing_behind(
    device: AsyncDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(3)
    expected = [on_host(module, 5, seed=seed) for seed in range(2)]
    moved(device, module)
    given = [[device.tensor(tensor) for tensor in inputs] for inputs, _ in expected]

    def full(*_inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("the device is full")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_device_part", full)
        with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
            forward(module, given[0])
    assert torch.equal(forward(module, given[1]).cpu(), expected[1][1])

"""The asynchronous device as a fixture, for the files of cases that test_cuda_sync.py runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kt_kernel import device_stream

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake_cuda.async_torch import AsyncDevice, FakeEvent, FakeGraph, FakeStream

__all__ = ["AsyncDevice", "FakeEvent", "FakeGraph", "FakeStream", "calls", "captured"]

MODES = ("plain", "delays", "shared_channel", "store_buffer")


@pytest.fixture(params=MODES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncDevice]:
    """The asynchronous device in each of its modes."""

    def current_stream(tensor: torch.Tensor, _given: int) -> int:
        return torch.cuda.current_stream(tensor.device).cuda_stream  # as for the tensors of a real device

    monkeypatch.setattr(device_stream, "current_stream", current_stream)
    delayed = request.param != "plain"
    with torch.no_grad(), AsyncDevice(os.environ["KT_CUDA_DRIVER"], seed=7, max_delay_us=400 * delayed) as made:
        made.driver.control.fake_cuda_set_shared_channel(request.param == "shared_channel")
        made.driver.control.fake_cuda_set_store_buffer(request.param == "store_buffer")
        made.driver.control.fake_cuda_set_deadlock_timeout(20_000)
        yield made
        made.synchronize()
        assert made.driver.report() == ""


def calls(device: AsyncDevice, function: str) -> int:
    return int(device.driver.control.fake_cuda_calls(function.encode()))


def captured(
    device: AsyncDevice, run: Callable[[], torch.Tensor], *, warm_up: int = 2
) -> tuple[FakeGraph, torch.Tensor]:
    """Capture as SGLang does: run twice, then record. Returns the graph and its output."""
    for _ in range(warm_up):
        run()
    device.synchronize()
    with device.capture() as graph:
        output = run()
    return graph, output

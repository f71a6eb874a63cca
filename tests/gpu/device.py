"""The device of these tests: a CUDA GPU, or the driver's test double where the tests themselves are tried out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

DOUBLE = os.environ.get("KT_CUDA_DRIVER", "")


class Gpu:
    """A CUDA device through torch."""

    is_double = False

    def put(self, tensor: Tensor) -> Tensor:
        """Return a copy in the device's memory."""
        return tensor.to("cuda", copy=True)

    def wait(self) -> None:
        """Wait for everything launched so far."""
        torch.cuda.synchronize()

    def stream(self) -> Any:
        """Return a new stream."""
        return torch.cuda.Stream()

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run twice, capture, and return the replay and the captured output, as SGLang does."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        return graph.replay, output


class Double(Gpu):
    """The test double: shows that the tests run, and nothing about hardware."""

    is_double = True

    def __init__(self, device: Any) -> None:
        self._device = device

    def put(self, tensor: Tensor) -> Tensor:
        return self._device.tensor(tensor)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()
        run()
        self._device.synchronize()
        with self._device.capture() as graph:
            output = run()
        return graph.replay, output


@contextmanager
def open_device() -> Iterator[Gpu]:
    """The device of this process.

    Raises
    ------
    RuntimeError
        There is neither a CUDA device nor the double.
    """
    with torch.no_grad():
        if DOUBLE:
            from fake_cuda.async_torch import AsyncDevice

            with AsyncDevice(DOUBLE) as device:
                yield Double(device)
                device.synchronize()
                assert device.driver.report() == ""
            return
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; run scripts/gpu_check.sh on a machine that has one.")
        yield Gpu()
        torch.cuda.synchronize()

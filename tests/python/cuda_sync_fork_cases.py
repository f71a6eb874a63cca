"""Cases of test_cuda_sync.py: the calls of SGLang's fork, as recorded from its ``kt_ep_wrapper.py``.

The fork makes the wrapper with a mask, remaps ids out of place, submits and syncs on a CPU stream of its own with a
staging buffer that all layers share, and changes masks in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from async_device import AsyncDevice, FakeEvent, FakeStream, captured
from checkpoints import random_experts
from device_model import INNER, E, H, K, on_host, tokens

from kt_kernel import KTMoEWrapper

pytest_plugins = ("async_device",)


class ForkLayer:
    """One layer of the fork: mask in the constructor, ids remapped out of place, a CPU stream with a staging buffer."""

    staging: torch.Tensor  # of all layers

    def __init__(self, layer_idx: int, mask: torch.Tensor) -> None:
        self.wrapper = KTMoEWrapper(
            layer_idx=layer_idx,
            num_experts=E,
            num_experts_per_tok=K,
            hidden_size=H,
            moe_intermediate_size=INNER,
            gpu_experts_mask=mask,
            cpuinfer_threads=2,
            threadpool_count=1,
            numa_nodes=None,
            weight_path="",
            chunked_prefill_size=64,
            method="AMXINT8",
            max_deferred_experts_per_token=0,
            swiglu_limit=0.0,
            swiglu_alpha=0.0,
        )
        self.wrapper.load_weights_from_tensors(*random_experts(E, H, INNER, seed=layer_idx))
        self.cpu_stream: FakeStream | None = None
        self.done: FakeEvent | None = None

    def dual_stream(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``_submit_with_staged_input`` ... ``sync``; the GPU's part is ``tanh(x)``."""
        main = torch.cuda.current_stream()
        staged = self.staging[: x.shape[0]]
        staged.copy_(x, non_blocking=True)
        self.cpu_stream.wait_stream(main)
        with torch.cuda.stream(self.cpu_stream):
            self.wrapper.submit_forward(staged, ids, weights, torch.cuda.current_stream().cuda_stream)
        gpu = torch.tanh(x)
        x.fill_(float("nan"))
        with torch.cuda.stream(self.cpu_stream):
            cpu = self.wrapper.sync_forward(staged, torch.cuda.current_stream().cuda_stream)
            self.done.record(self.cpu_stream)
        main.wait_event(self.done)
        return gpu + cpu

    def given_stream(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The CPU stream is only given, another one is current: the wrapper has to order the two."""
        self.wrapper.submit_forward(x, ids, weights, self.cpu_stream.cuda_stream)
        gpu = torch.tanh(x)
        x.fill_(float("nan"))
        return gpu + self.wrapper.sync_forward(x, self.cpu_stream.cuda_stream)

    def one_stream(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As with ``SGLANG_KT_NO_CPU_STREAM``."""
        stream = torch.cuda.current_stream().cuda_stream
        self.wrapper.submit_forward(x, ids, weights, stream)
        gpu = torch.tanh(x)
        x.fill_(float("nan"))
        return gpu + self.wrapper.sync_forward(x, stream)


def fork_layers() -> list[ForkLayer]:
    mask = torch.tensor([True, False] * (E // 2))
    KTMoEWrapper.set_capture_batch_sizes([1 * 2, 4 * 2])  # the fork counts tokens
    layers = [ForkLayer(index, mask if index else ~mask) for index in range(2)]
    assert layers[0].wrapper.gpu_experts_mask.tolist() == (~mask).tolist()
    return layers


def routing(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, E, generator=generator).argsort(dim=1)[:, :K].contiguous()
    return ids, torch.rand(count, K, generator=generator) + 0.1


def fork_pass(layers: list[ForkLayer], way: str, hidden: torch.Tensor, route: tuple) -> torch.Tensor:
    for layer in layers:
        hidden = getattr(layer, way)(hidden.clone(), *route)
    return hidden


def fork_answer(layers: list[ForkLayer], hidden: torch.Tensor, route: tuple) -> torch.Tensor:
    with on_host():
        return fork_pass(layers, "one_stream", hidden, route)


@contextmanager
def on_streams(device: AsyncDevice, layers: list[ForkLayer]) -> Iterator[None]:
    """Give the layers the one CPU stream, the staging buffer, and an event each."""
    stream = FakeStream()
    ForkLayer.staging = device.tensor(torch.zeros(64, H, dtype=torch.bfloat16))
    for layer in layers:
        layer.cpu_stream, layer.done = stream, FakeEvent()
    yield
    del ForkLayer.staging


WAYS = ("dual_stream", "given_stream", "one_stream")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("replayed", [False, True])
def test_fork(device: AsyncDevice, way: str, replayed: bool) -> None:
    layers = fork_layers()
    with on_streams(device, layers):
        hidden, ids, weights = (device.tensor(part) for part in (tokens(6), *routing(6, 0)))
        if replayed:
            graph, output = captured(device, lambda: fork_pass(layers, way, hidden, (ids, weights)))
        for seed in range(4):
            route = routing(6, seed)
            hidden.copy_(tokens(6, seed))
            ids.copy_(route[0])
            weights.copy_(route[1])
            if replayed:
                graph.replay()
            else:
                output = fork_pass(layers, way, hidden, (ids, weights))
            assert torch.equal(output.cpu(), fork_answer(layers, tokens(6, seed), route))


@pytest.mark.parametrize("replayed", [False, True])
def test_fork_changes_masks_in_place(device: AsyncDevice, replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic expert update: ``gpu_experts_mask.copy_()`` between passes; a graph of before sees it too."""
    monkeypatch.setenv("KT_HOST_ALL_EXPERTS", "1")
    layers = fork_layers()
    hidden, route = tokens(6), routing(6, 1)
    on_device = [device.tensor(part) for part in (hidden, *route)]
    answers = []

    def run() -> torch.Tensor:
        return fork_pass(layers, "dual_stream", on_device[0], on_device[1:])

    with on_streams(device, layers):
        if replayed:
            graph, output = captured(device, run)
        for rotation in range(4):
            for layer in layers:
                layer.wrapper.gpu_experts_mask.copy_(torch.arange(E).add(rotation) % E < E // 2)
            if replayed:
                graph.replay()
            else:
                output = run()
            found = output.cpu()
            answers.append(fork_answer(layers, hidden, route))
            assert torch.equal(found, answers[-1])
    assert not torch.equal(answers[0], answers[2])


def write_experts(layer: ForkLayer, experts: list[int]) -> list[torch.Tensor]:
    """The fork's loop before a prefill on the GPU alone: two slots of host memory, one expert written ahead."""
    shapes = ((2 * INNER, H), (H, INNER))
    slots = [[torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes] for _ in range(2)]
    copied = []
    for number, expert in enumerate(experts):
        w13, w2 = slots[number % 2]
        layer.wrapper.submit_write_weight_scale_to_buffer(1, expert, [w13.data_ptr()], [0], [w2.data_ptr()], [0])
        layer.wrapper.sync_write_weight_scale_to_buffer()
        copied += [w13.clone(), w2.clone()]
    return copied


def test_fork_writes_experts_while_passes_are_under_way(device: AsyncDevice) -> None:
    """Writes are the host's: they wait for no stream, and a pass before or after them is right."""
    layers = fork_layers()
    alone = write_experts(layers[0], [0, 2, 4])
    assert all(part.any() for part in alone)
    hidden, route = tokens(6), routing(6, 3)
    on_device = [device.tensor(part) for part in (hidden, *route)]
    with on_streams(device, layers):
        before = fork_pass(layers, "dual_stream", on_device[0], on_device[1:])
        device.stream.pause()
        during = fork_pass(layers, "dual_stream", on_device[0], on_device[1:])
        written = write_experts(layers[0], [0, 2, 4])
        device.stream.resume()
        expected = fork_answer(layers, hidden, route)
        assert torch.equal(before.cpu(), expected)
        assert torch.equal(during.cpu(), expected)
    assert all(torch.equal(found, wanted) for found, wanted in zip(written, alone, strict=True))

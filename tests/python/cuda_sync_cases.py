"""Cases of test_cuda_sync.py; run by it in a process whose CUDA driver is the test double.

Every answer must equal the synchronous one bit for bit, and the double must have nothing to report at the end.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from async_device import AsyncDevice, FakeStream, calls, captured
from device_model import E, K, Model, answer, on_host, tokens

from kt_kernel import _ext
from kt_kernel.integrations.sglang import cuda_host
from kt_kernel.methods import METHODS

pytest_plugins = ("async_device",)

MODELS: dict[str, dict] = {
    "num_gpu_experts=2": {},
    "num_gpu_experts=0": {"num_gpu_experts": 0},
    "int32 ids": {"id_dtype": torch.int32},
    "AMXINT4": {"method": "AMXINT4", "layers": 2},
    "deferred": {"max_deferred": 1, "num_gpu_experts": 0},
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Model:
    return Model(**MODELS[request.param])


@pytest.fixture
def small() -> Model:
    return Model()


# --- the harness itself ---


def test_operations_wait_for_their_stream(device: AsyncDevice) -> None:
    value = device.tensor(tokens(3))
    device.stream.pause()
    doubled = value * 2
    value.zero_()
    assert device.driver.control.fake_cuda_pending() == 2
    assert not torch.equal(device.peek(doubled), tokens(3) * 2)
    device.stream.resume()
    assert torch.equal(doubled.cpu(), tokens(3) * 2)
    assert not value.cpu().any()


def test_waiting_inside_a_capture_fails(device: AsyncDevice) -> None:
    value = device.tensor(tokens(3))
    with pytest.raises(RuntimeError, match="CAPTURE"):
        with device.capture():
            (value * 2).sum().item()
    device.driver.control.fake_cuda_restore_defaults()  # its report is what was provoked


# --- KTEPWrapperMethod ---


def test_eager(model: Model, device: AsyncDevice) -> None:
    for count in (1, 5, 17, 5):
        output = model(device.tensor(tokens(count, seed=count)))
        assert torch.equal(output.cpu(), answer(model, tokens(count, seed=count)))


def test_deferred_experts_are_computed_in_the_next_layer(device: AsyncDevice) -> None:
    model = Model(**MODELS["deferred"])
    output = model(device.tensor(tokens(1)))
    device.synchronize()
    rows = [wrapper.moe.counters()["deferred_rows"] for wrapper in model.wrappers()]
    assert rows == [1, 1, 0]
    assert torch.equal(output.cpu(), answer(model, tokens(1)))


def test_the_signal_is_the_one_asked_for(small: Model, device: AsyncDevice) -> None:
    small(device.tensor(tokens(3)))
    device.synchronize()
    doorbell = os.environ["KT_CUDA_SIGNAL"] == "doorbell"
    assert (calls(device, "cuStreamWaitValue32_v2") >= len(small.layers)) == doorbell
    assert (calls(device, "cuLaunchHostFunc") >= 2 * len(small.layers)) == (not doorbell)


def test_a_pass_is_launched_before_the_last_one_ends(small: Model, device: AsyncDevice) -> None:
    expected = [answer(small, tokens(count, seed=count)) for count in (4, 1, 9, 4)]
    inputs = [device.tensor(tokens(count, seed=count)) for count in (4, 1, 9, 4)]
    small(inputs[0])  # memory is pinned now: what follows need not wait for anything
    small(inputs[2])
    device.synchronize()
    device.stream.pause()
    outputs = [small(hidden) for hidden in inputs]
    assert not device.stream.query()
    device.stream.resume()
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output.cpu(), wanted)


def test_decode_graph(model: Model, device: AsyncDevice) -> None:
    buffer = device.tensor(tokens(4))
    graph, output = captured(device, lambda: model(buffer))
    pinned = calls(device, "cuMemHostAlloc")
    for seed in range(6):
        buffer.copy_(tokens(4, seed))
        graph.replay()
        assert torch.equal(output.cpu(), answer(model, tokens(4, seed)))
    assert calls(device, "cuMemHostAlloc") == pinned


def test_replays_are_launched_before_the_last_one_ends(small: Model, device: AsyncDevice) -> None:
    expected = [answer(small, tokens(4, seed)) for seed in range(5)]
    inputs = [tokens(4, seed) for seed in range(5)]
    buffer = device.tensor(tokens(4))
    graph, output = captured(device, lambda: small(buffer))
    device.stream.pause()
    outputs = []
    for hidden in inputs:
        buffer.copy_(hidden)
        graph.replay()
        outputs.append(output.clone())
    device.stream.resume()
    for found, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)


def test_batch_of_5_in_a_bucket_of_8(device: AsyncDevice) -> None:
    model = Model(num_gpu_experts=2)
    for layer in model.layers:
        with_plugin(layer)
    buffer = device.tensor(tokens(8))
    count = device.tensor(torch.full((1,), 8, dtype=torch.int32))
    with cuda_host.bound_row_count(count):
        graph, output = captured(device, lambda: model(buffer))
    for rows in (5, 8, 1, 5):
        buffer.copy_(tokens(8, seed=rows))  # rows behind the real ones hold what was there: here, tokens
        count.fill_(rows)
        device.synchronize()
        before = [wrapper.moe.counters()["expert_counts"].sum() for wrapper in model.wrappers()]
        graph.replay()
        found = output.cpu()
        with cuda_host.bound_row_count(torch.tensor([rows], dtype=torch.int32)):
            after = [wrapper.moe.counters()["expert_counts"].sum() for wrapper in model.wrappers()]
            assert torch.equal(found, answer(model, tokens(8, seed=rows)))
        # a row of -1 is no work
        assert [int(now - then) for now, then in zip(after, before, strict=True)] == [rows * K] * len(model.layers)


def with_plugin(layer: Any) -> None:
    """Put the plug-in's hook around the layer's method, as SGLang's hook registry does."""
    method = layer.method
    layer.apply = lambda dispatched: cuda_host.apply(type(method).apply, method, layer, dispatched)


def test_without_gpu_experts_their_method_is_not_called(device: AsyncDevice) -> None:
    model = Model(num_gpu_experts=0)
    for layer in model.layers:
        with_plugin(layer)
        layer.method.gpu_method.apply = None
    output = model(device.tensor(tokens(6)))
    assert torch.equal(output.cpu(), answer(model, tokens(6)))


def test_captured_prefill(small: Model, device: AsyncDevice) -> None:
    """Buckets from large to small, each run twice before its capture, then replayed in any order."""
    small.wrappers()[0].set_capture_batch_sizes([1, 2])  # says nothing about these buckets
    graphs = {}
    for bucket in (48, 20, 7):
        buffer = device.tensor(tokens(bucket))
        graphs[bucket] = (buffer, *captured(device, lambda buffer=buffer: small(buffer)))

    def check(bucket: int, seed: int) -> None:
        buffer, graph, output = graphs[bucket]
        buffer.copy_(tokens(bucket, seed))
        graph.replay()
        assert torch.equal(output.cpu(), answer(small, tokens(bucket, seed)))

    for seed, bucket in enumerate((7, 48, 20, 7, 48)):
        check(bucket, seed)
    # growth: a batch larger than all memory pinned so far; what graphs refer to stays
    output = small(device.tensor(tokens(300)))
    assert torch.equal(output.cpu(), answer(small, tokens(300)))
    for seed, bucket in enumerate((20, 48, 7), start=10):
        check(bucket, seed)


def test_a_capture_without_a_run_before_it(device: AsyncDevice) -> None:
    """Memory is pinned during the capture, in a mode that does not break it."""
    model = Model(layers=2)
    buffer = device.tensor(tokens(130))
    graph, output = captured(device, lambda: model(buffer), warm_up=0)
    buffer.copy_(tokens(130))
    graph.replay()
    assert torch.equal(output.cpu(), answer(model, tokens(130)))


@pytest.mark.parametrize("replayed", [False, True])
def test_alternate_stream(small: Model, device: AsyncDevice, replayed: bool) -> None:
    alternate = FakeStream()
    buffer = device.tensor(tokens(6))
    if replayed:
        graph, output = captured(device, lambda: small(buffer, alternate=alternate))
    for seed in range(4):
        buffer.copy_(tokens(6, seed))
        if replayed:
            graph.replay()
        else:
            output = small(buffer, alternate=alternate)
        assert torch.equal(output.cpu(), answer(small, tokens(6, seed)))


def test_successive_layers_on_different_streams(small: Model, device: AsyncDevice) -> None:
    streams = [FakeStream() for _ in small.layers]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        for layer, stream in zip(small.layers, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                hidden = hidden + layer(hidden.clone())
            torch.cuda.current_stream().wait_stream(stream)
        return hidden

    def on_one_stream(hidden: torch.Tensor) -> torch.Tensor:
        for layer in small.layers:
            hidden = hidden + layer(hidden.clone())
        return hidden

    for seed in range(4):
        assert torch.equal(run(device.tensor(tokens(3, seed))).cpu(), answer(on_one_stream, tokens(3, seed)))


def test_graphs_replayed_on_another_stream_and_eager_passes_between(small: Model, device: AsyncDevice) -> None:
    other = FakeStream()
    buffer = device.tensor(tokens(4))
    graph, output = captured(device, lambda: small(buffer))
    for seed in range(3):
        eager = small(device.tensor(tokens(9, seed)))
        buffer.copy_(tokens(4, seed))
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            graph.replay()
            kept = output.clone()
        torch.cuda.current_stream().wait_stream(other)
        assert torch.equal(eager.cpu(), answer(small, tokens(9, seed)))
        assert torch.equal(kept.cpu(), answer(small, tokens(4, seed)))


def test_inputs_may_change_right_after_submit(small: Model, device: AsyncDevice) -> None:
    wrapper = small.layers[0].method.wrapper
    with on_host():
        hidden = tokens(5)
        weights, ids, _logits = small.layers[0].route(hidden)
        expected = wrapper.forward(hidden, ids, weights, 0)
    ids, weights, hidden = device.tensor(ids), device.tensor(weights), device.tensor(hidden)
    stream = torch.cuda.current_stream().cuda_stream
    wrapper.submit_forward(hidden, ids, weights, stream)
    ids[ids >= 2] = -1
    hidden.fill_(float("nan"))
    weights.zero_()
    assert torch.equal(wrapper.sync_forward(hidden, stream).cpu(), expected)


def test_an_error_of_a_job_reaches_the_caller(small: Model, device: AsyncDevice) -> None:
    """An id that is no expert, in a replayed graph: the next call says so, nothing hangs, later passes are right."""
    wrapper = small.layers[1].method.wrapper
    hidden, weights = device.tensor(tokens(2)), device.tensor(torch.ones(2, K))
    ids = device.tensor(torch.zeros(2, K, dtype=torch.int64))
    stream = torch.cuda.current_stream
    ids[:, 1] = 5

    def run() -> torch.Tensor:
        return wrapper.forward(hidden, ids, weights, stream().cuda_stream)

    graph, output = captured(device, run)
    ids[:, 1] = E + 3
    graph.replay()
    device.synchronize()
    with pytest.raises(RuntimeError, match="layer 1"):
        wrapper.submit_forward(hidden, ids, weights, stream().cuda_stream)
    ids[:, 1] = 5
    graph.replay()
    with on_host():
        expected = wrapper.forward(tokens(2), torch.tensor([[0, 5]] * 2), torch.ones(2, K), 0)
    assert torch.equal(output.cpu(), expected)


def test_other_threads_run_while_the_last_of_an_engine_is_dropped(device: AsyncDevice) -> None:
    """The stream does not drain, so the engine's end takes its 2 s; the host must not stand still for them."""
    engine = _ext.Engine(num_threads=1, num_nodes=1)
    layer = _ext.Layer(engine, 0, E, K, 256, 256, *(METHODS["AMXINT8"].layout,) * 2, list(range(E)))
    hidden = device.tensor(torch.zeros(1, 256, dtype=torch.bfloat16))
    ids, weights = device.tensor(torch.zeros(1, K, dtype=torch.int64)), device.tensor(torch.ones(1, K))
    stream = torch.cuda.current_stream().cuda_stream
    device.stream.pause()
    torch.ops.kt_kernel.submit_on_stream(hidden, ids, weights, None, layer.handle, stream, stream)
    layer.close()
    ended = threading.Event()
    ticks = []

    def tick() -> None:
        while not ended.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    del layer, engine
    end = time.monotonic()
    ended.set()
    thread.join()
    device.stream.resume()
    assert end - start > 1
    assert sum(start < moment < end for moment in ticks) > 10


def test_release_0_5_23_converts_a_bypassed_routing_first(small: Model, device: AsyncDevice) -> None:
    """The one step of 0.5.23's ``apply`` that 0.5.18's lacks; with 0.5.23 installed all cases here run its code."""
    from sglang.srt.layers.moe.topk import BypassedTopKOutput

    class Bypassed(BypassedTopKOutput):
        def to_standard(self, *_args: Any) -> Any:
            return routed

    layer = small.layers[0]
    hidden = device.tensor(tokens(5))
    routed = layer.route(hidden)
    dispatched = Replaceable(hidden_states=hidden, topk_output=Bypassed(hidden, routed.router_logits, None))
    if "to_standard" not in inspect.getsource(type(layer.method).apply):
        dispatched = dispatched._replace(topk_output=dispatched.topk_output.to_standard())
    found = layer.method.apply(layer, dispatched).hidden_states
    assert torch.equal(found.cpu(), answer(layer, tokens(5)))


class Replaceable(SimpleNamespace):
    """Has the ``_replace`` of a named tuple."""

    def _replace(self, **changes: Any) -> Replaceable:
        return Replaceable(**{**vars(self), **changes})

"""The hand-off on hardware: every answer must equal the CPU's own bit for bit. Run by ``scripts/gpu_check.sh``.

The signalling way is that of ``KT_CUDA_SIGNAL``; the script runs this file once with each, and the digests that
``test_answers_do_not_depend_on_the_way`` leaves behind must agree.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device as devices
import device_model
import pytest
import torch
from checkpoints import random_experts
from device import Gpu
from device_model import Model, tokens
from torch.utils._python_dispatch import _disable_current_modes

from kt_kernel import KTMoEWrapper

E, K, H, INNER = 16, 4, 512, 256
DIGESTS = Path(os.environ.get("KT_GPU_CHECK_FOLDER", "build/gpu-check"))


@pytest.fixture()
def gpu() -> Iterator[Gpu]:
    with devices.open_device() as made:
        yield made


def make_wrapper(index: int = 0, *, method: str = "AMXINT8", num_gpu_experts: int = 0, **options: Any) -> KTMoEWrapper:
    wrapper = KTMoEWrapper(
        index, E, K, H, INNER, None, None, 1, "", 64, method=method, num_gpu_experts=num_gpu_experts, **options
    )
    with _disable_current_modes():
        wrapper.load_weights_from_tensors(*random_experts(E, H, INNER, seed=index))
        answer([wrapper], make_inputs(1))  # checks the mask, which is host memory
    return wrapper


def make_inputs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors on the host: made, as all that belongs to the host, outside the double's asynchronous mode."""
    with _disable_current_modes():
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(count, H, generator=generator).to(torch.bfloat16)
        ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(count)])
        return hidden, ids, torch.rand(count, K, generator=generator)


def answer(wrappers: list[KTMoEWrapper], inputs: Any, *, residual: bool = False) -> torch.Tensor:
    """The synchronous answer on the host, through all wrappers where there is a residual."""
    flow, ids, weights = inputs
    with _disable_current_modes():
        for wrapper in wrappers:
            output = wrapper.forward(flow, ids, weights)
            flow = flow + output if residual else output
        return flow


def on_device(wrapper: KTMoEWrapper, inputs: Any) -> torch.Tensor:
    """Submit, spoil the inputs as SGLang's GPU method may, sync."""
    hidden, ids, weights = inputs
    stream = torch.cuda.current_stream().cuda_stream
    wrapper.submit_forward(hidden, ids, weights, stream)
    ids.fill_(-1)
    weights.zero_()
    output = wrapper.sync_forward(hidden, stream)
    hidden.fill_(float("nan"))
    return output


@pytest.mark.parametrize("method", ["AMXINT8", "AMXINT4", "BF16"])
@pytest.mark.parametrize("count", [1, 3, 64, 700])
def test_eager(gpu: Gpu, method: str, count: int) -> None:
    wrapper = make_wrapper(method=method)
    inputs = make_inputs(count)
    found = on_device(wrapper, [gpu.put(tensor) for tensor in inputs])
    assert torch.equal(found.cpu(), answer([wrapper], inputs))


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_replayed_graph(gpu: Gpu, id_dtype: torch.dtype) -> None:
    wrappers = [make_wrapper(index) for index in range(3)]
    hidden, ids, weights = (gpu.put(tensor) for tensor in make_inputs(8))
    ids = ids.to(id_dtype)

    def run() -> torch.Tensor:
        flow = hidden.clone()
        for wrapper in wrappers:
            flow = flow + on_device(wrapper, (flow.clone(), ids.clone(), weights.clone()))
        return flow

    replay, output = gpu.capture(run)
    for seed in range(1, 20):
        fresh = make_inputs(8, seed)
        with _disable_current_modes():
            fresh[1][5:] = -1  # padded rows
        for target, source in zip((hidden, ids, weights), fresh, strict=True):
            target.copy_(gpu.put(source).to(target.dtype))
        replay()
        assert torch.equal(output.cpu(), answer(wrappers, fresh, residual=True))


def test_mask_changed_between_replays(gpu: Gpu) -> None:
    wrapper = make_wrapper()
    inputs = make_inputs(4)
    hidden, ids, weights = (gpu.put(tensor) for tensor in inputs)
    replay, output = gpu.capture(lambda: on_device(wrapper, (hidden.clone(), ids.clone(), weights.clone())))
    for hot in ((), (0, 1, 2), tuple(range(E)), (3,)):
        gpu.wait()
        with _disable_current_modes():
            wrapper.gpu_experts_mask.zero_()
            wrapper.gpu_experts_mask[list(hot)] = True
        replay()
        assert torch.equal(output.cpu(), answer([wrapper], inputs))


def test_large_batch_after_a_graph(gpu: Gpu) -> None:
    """Memory grows; the graph keeps what it was captured with."""
    wrapper = make_wrapper()
    small, large = make_inputs(4), make_inputs(3000, seed=5)
    hidden, ids, weights = (gpu.put(tensor) for tensor in small)
    replay, output = gpu.capture(lambda: on_device(wrapper, (hidden.clone(), ids.clone(), weights.clone())))
    assert torch.equal(on_device(wrapper, [gpu.put(t) for t in large]).cpu(), answer([wrapper], large))
    for _ in range(3):
        replay()
        assert torch.equal(output.cpu(), answer([wrapper], small))


def test_alternate_stream(gpu: Gpu) -> None:
    wrapper, side = make_wrapper(), gpu.stream()
    inputs = make_inputs(8)
    for _ in range(5):
        copies = [gpu.put(tensor) for tensor in inputs]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = on_device(wrapper, copies)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(found.cpu(), answer([wrapper], inputs))


def test_error_in_a_replay_is_raised(gpu: Gpu) -> None:
    wrapper = make_wrapper(index=7)
    hidden, ids, weights = (gpu.put(tensor) for tensor in make_inputs(2))
    replay, _ = gpu.capture(lambda: on_device(wrapper, (hidden.clone(), ids.clone(), weights.clone())))
    ids.fill_(E + 3)
    replay()
    gpu.wait()
    with pytest.raises(RuntimeError, match=r"layer 7"):
        KTMoEWrapper.check_errors()
    good = make_inputs(2)
    ids.copy_(gpu.put(good[1]))
    replay()
    gpu.wait()
    KTMoEWrapper.check_errors()


@pytest.mark.parametrize("num_gpu_experts", [0, 3])
def test_stock_sglang_method_in_a_graph(gpu: Gpu, num_gpu_experts: int) -> None:
    """``KTEPWrapperMethod`` itself, eager against captured and replayed."""
    with _disable_current_modes():
        model = Model(num_gpu_experts=num_gpu_experts)
        device_model.answer(model, tokens(1))  # as in make_wrapper
    for layer in model.layers:
        layer.router = gpu.put(layer.router)
        layer.experts = tuple(gpu.put(matrix) for matrix in layer.experts)
    buffer = gpu.put(tokens(6))
    replay, output = gpu.capture(lambda: model(buffer))
    for seed in range(8):
        buffer.copy_(gpu.put(tokens(6, seed)))
        expected = model(buffer)
        replay()
        assert torch.equal(output, expected)


def test_answers_do_not_depend_on_the_way(gpu: Gpu) -> None:
    """Writes a digest under the name of the signalling way; the digests of earlier runs must be the same."""
    digest = hashlib.sha256()
    for method in ("AMXINT8", "AMXINT4", "BF16"):
        wrapper = make_wrapper(method=method)
        for count in (1, 5, 40):
            copies = [gpu.put(tensor) for tensor in make_inputs(count, seed=count)]
            found = on_device(wrapper, copies).cpu()
            with _disable_current_modes():
                digest.update(found.view(torch.int16).numpy().tobytes())
    DIGESTS.mkdir(parents=True, exist_ok=True)
    way = os.environ.get("KT_CUDA_SIGNAL", "chosen")
    (DIGESTS / f"digest-{way}").write_text(digest.hexdigest())
    assert len({path.read_text() for path in DIGESTS.glob("digest-*")}) == 1

"""torch.ops.kt_kernel: schemas, fake implementations, torch.compile, and messages for bad arguments."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import threading

import pytest
import torch
from checkpoints import random_experts
from reference import BOUNDS, moe_reference, relative_error
from torch import Tensor

from kt_kernel import _ext
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.experts import CpuExperts, get_engine
from kt_kernel.methods import FLOAT_METHODS

E, K, H, INNER = 6, 2, 128, 96
OPS = torch.ops.kt_kernel
LAYOUTS = [method.layout for method in FLOAT_METHODS.values()]


@pytest.fixture(scope="module")
def weights():
    return random_experts(E, H, INNER)


@pytest.fixture(scope="module")
def layer(weights) -> CpuExperts:
    experts = CpuExperts(
        MoEConfig(layer_idx=5, num_experts=E, top_k=K, hidden_size=H, intermediate_size=INNER),
        layouts=(FLOAT_METHODS["AMXINT8"].layout,) * 2,
        engine=get_engine(EngineConfig(num_threads=2)),
    )
    experts.load_experts(range(E), list(weights.gate), list(weights.up), list(weights.down))
    return experts


def batch(tokens: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, H, generator=generator).bfloat16(),
        torch.randint(-1, E, (tokens, K), generator=generator),
        torch.rand(tokens, K, generator=generator),
    )


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("skip", [None, torch.tensor([True, False] * 3)])
def test_opcheck_of_the_layer(layer: CpuExperts, tokens: int, skip: Tensor | None) -> None:
    torch.library.opcheck(OPS.moe_forward.default, (*batch(tokens), skip, layer.layer.handle))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_opcheck_of_packing(layout: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(70, 96).to(dtype)
    torch.library.opcheck(OPS.quantize_pack.default, (matrix, layout))
    torch.library.opcheck(OPS.quantize_pack_w13.default, (matrix, matrix.flip(0), layout))
    packed, _ = OPS.quantize_pack(matrix, layout)
    torch.library.opcheck(OPS.unpack.default, (packed, layout, 70, 96))
    torch.library.opcheck(OPS.dequantize.default, (packed, layout, 70, 96))
    torch.library.opcheck(OPS.pack.default, (*OPS.unpack(packed, layout, 70, 96), layout, 96))
    merged, _ = OPS.quantize_pack_w13(matrix, matrix.flip(0), layout)
    torch.library.opcheck(OPS.dequantize_w13.default, (merged, layout, 70, 96))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_round_trips(layout: str) -> None:
    matrix = torch.randn(70, 128)
    packed, error = OPS.quantize_pack(matrix, layout)
    assert torch.equal(OPS.pack(*OPS.unpack(packed, layout, 70, 128), layout, 128), packed)
    found = OPS.dequantize(packed, layout, 70, 128).double()
    # k = 128 has no padding, where the recorded error would count what rounding did to it, too.
    squares = torch.stack(((found - matrix.double()).square().sum(), matrix.double().square().sum()))
    torch.testing.assert_close(error, squares, rtol=1e-4, atol=0)
    merged, _ = OPS.quantize_pack_w13(matrix, -matrix, layout)
    gate, up = OPS.dequantize_w13(merged, layout, 70, 128)
    assert torch.equal(gate, found.float()) and relative_error(up, -matrix.double()) < 0.1


class Layer(torch.nn.Module):
    """What a compiled model would contain."""

    def __init__(self, handle: int, split: bool) -> None:
        super().__init__()
        self.handle = handle
        self.split = split

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = hidden * 2
        if self.split:
            ticket = OPS.submit(hidden, ids, weights, None, self.handle)
            beside = hidden.sin()
            return OPS.sync(ticket, hidden) + beside
        return OPS.moe_forward(hidden, ids, weights, None, self.handle) + hidden.sin()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("split", [False, True])
def test_a_compiled_module_really_runs_the_layer(layer: CpuExperts, weights, split: bool, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Layer(layer.layer.handle, split), backend=backend, fullgraph=True)
    for step in range(3):
        hidden, ids, scales = batch(seed=step)
        before = layer.counters()
        output = compiled(hidden, ids, scales)
        after = layer.counters()
        assert after["forwards"] == before["forwards"] + 1
        assert after["tokens"] == before["tokens"] + 7
        assert after["rows"] == before["rows"] + int((ids >= 0).sum())
        counted = torch.bincount(ids[ids >= 0], minlength=len(after["expert_counts"]))
        assert after["expert_counts"].dtype == torch.int64
        assert torch.equal(after["expert_counts"] - before["expert_counts"], counted)
        wanted = moe_reference(hidden * 2, ids, scales, *weights) + (hidden * 2).sin().double()
        assert relative_error(output, wanted) < BOUNDS["AMXINT8"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda x, i, w, h: (x.double(), i, w, None, h), "hidden_states"),
        (lambda x, i, w, h: (x[0], i, w, None, h), "hidden_states has shape"),
        (lambda x, i, w, h: (x[:, 1:], i, w, None, h), r"hidden_states has shape .*128"),
        (lambda x, i, w, h: (x, i[1:], w, None, h), "topk_ids has shape"),
        (lambda x, i, w, h: (x, torch.cat((i, i), 1), w, None, h), "names 4 experts a token.*2"),
        (lambda x, i, w, h: (x, i.float(), w, None, h), "topk_ids"),
        (lambda x, i, w, h: (x, i, w[1:], None, h), "topk_weights"),
        (lambda x, i, w, h: (x, i, w.long(), None, h), "topk_weights"),
        (lambda x, i, w, h: (x, i, w, torch.zeros(E), h), "skip"),
        (lambda x, i, w, h: (x, i, w, torch.zeros(E + 1, dtype=torch.bool), h), "skip"),
        (lambda x, i, w, h: (x, i, w, None, 987654), "987654"),
        (lambda x, i, w, h: (x, i + E, w, None, h), "topk_ids|expert"),
    ],
)
def test_bad_arguments_of_the_layer_are_named(layer: CpuExperts, arguments, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        OPS.moe_forward(*arguments(*batch(), layer.layer.handle))


def test_a_ticket_is_good_for_one_sync(layer: CpuExperts) -> None:
    hidden, ids, scales = batch()
    ticket = layer.submit(hidden, ids, scales)
    layer.sync(ticket, hidden)
    with pytest.raises(RuntimeError, match="already fetched"):
        layer.sync(ticket, hidden)


def test_a_ticket_of_another_operator_is_refused_and_not_spent(layer: CpuExperts) -> None:
    hidden, ids, scales = batch()
    ticket = layer.submit(hidden, ids, scales)
    with pytest.raises(RuntimeError, match="not one for sync_on_stream; give it to sync"):
        OPS.sync_on_stream(ticket, hidden, 0, 0)
    with pytest.raises(RuntimeError, match="not one for wait_written; give it to sync"):
        OPS.wait_written(int(ticket))
    buffers = [torch.zeros(2 * INNER, H, dtype=torch.bfloat16), torch.zeros(H, INNER, dtype=torch.bfloat16)]
    write = OPS.write_expert(layer.layer.handle, 0, 1, [buffers[0].data_ptr()], [buffers[1].data_ptr()], [], [])
    with pytest.raises(RuntimeError, match="not one for sync; give it to wait_written"):
        OPS.sync(torch.tensor([write]), hidden)
    with pytest.raises(RuntimeError, match="not one for sync_on_stream; give it to wait_written"):
        OPS.sync_on_stream(torch.tensor([write]), hidden, 0, 0)
    OPS.wait_written(write)
    assert torch.equal(layer.sync(ticket, hidden), layer.forward(hidden, ids, scales))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: OPS.quantize_pack(torch.zeros(4, 32), "int9_v1"), "int9_v1"),
        (lambda: OPS.quantize_pack(torch.zeros(4, 32), "int4hg32_n64k8_v1"), "quantize to int8, int4 or bf16"),
        (lambda: OPS.quantize_pack(torch.zeros(4), LAYOUTS[0]), "shape"),
        (lambda: OPS.quantize_pack(torch.zeros(4, 32).long(), LAYOUTS[0]), "w"),
        (lambda: OPS.quantize_pack(torch.full((4, 32), float("inf")), LAYOUTS[0]), "(?i)inf|finite"),
        (lambda: OPS.quantize_pack_w13(torch.zeros(4, 32), torch.zeros(5, 32), LAYOUTS[0]), "up"),
        (lambda: OPS.dequantize(torch.zeros(3, dtype=torch.uint8), LAYOUTS[0], 4, 32), "needs .* bytes"),
        # products of these are 0 in 64 bits
        (lambda: OPS.dequantize(torch.zeros(0, dtype=torch.uint8), LAYOUTS[0], 2**58, 1024), "n must be from 1"),
        (lambda: OPS.dequantize_w13(torch.zeros(0, dtype=torch.uint8), LAYOUTS[0], 2**58, 1024), "n must be from 1"),
        (lambda: OPS.dequantize(torch.zeros(0, dtype=torch.uint8), LAYOUTS[0], 64, 2**40), "k must be from 1"),
    ],
)
def test_bad_arguments_of_packing_are_named(call, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        call()


def test_bad_loads_are_named(layer: CpuExperts, weights) -> None:
    gate, up, down = (list(stack) for stack in weights)
    with pytest.raises(RuntimeError, match="down"):
        layer.load_experts([0], gate[:1], up[:1], [down[0].t()])
    with pytest.raises(RuntimeError, match="1 experts"):
        layer.load_experts([0], gate[:2], up[:2], down[:2])
    with pytest.raises(RuntimeError, match="expert.*99|99.*expert"):
        layer.load_experts([99], gate[:1], up[:1], down[:1])
    for expert in (2**32, -(2**32)):  # 0 in 32 bits
        with pytest.raises(RuntimeError, match=f"{expert} is no expert id"):
            layer.load_experts([expert], gate[:1], up[:1], down[:1])
        with pytest.raises(RuntimeError, match=f"{expert} is no expert id"):
            layer.export_packed(expert)
    with pytest.raises(RuntimeError, match="w13"):
        layer.load_packed([0], [torch.zeros(3, dtype=torch.uint8)], [torch.zeros(3, dtype=torch.uint8)])


def test_export_is_the_inverse_of_load(layer: CpuExperts) -> None:
    other = CpuExperts(layer.config, layouts=layer.layouts, engine=layer.engine, expert_ids=[1, 4])
    for expert in (1, 4):
        w13, w2 = layer.export_packed(expert)
        other.load_packed([expert], [w13], [w2])
        assert all(torch.equal(a, b) for a, b in zip(other.export_packed(expert), (w13, w2), strict=True))
    assert other.layer.loaded and 0 < other.bytes < layer.bytes
    handle = other.layer.handle
    other.close()
    with pytest.raises(RuntimeError, match=str(handle)):
        OPS.moe_forward(*batch(), None, handle)


def test_closing_a_layer_while_other_threads_measure_it() -> None:
    for _ in range(20):
        engine = _ext.Engine(num_threads=2)
        native = _ext.Layer(engine, 0, E, K, 256, 256, LAYOUTS[0], LAYOUTS[0], list(range(E)))
        go = threading.Barrier(3)

        def measure(native=native, go=go) -> str:
            go.wait()
            try:
                while native.probe_read() > 0:
                    pass
            except RuntimeError as error:
                return str(error)
            return "the probe read nothing"

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            results = [threads.submit(measure) for _ in range(2)]
            del engine
            go.wait()
            native.close()
            native.close()
        assert {result.result() for result in results} == {"this layer is closed."}


def test_layout_sizes_are_those_of_packed_tensors() -> None:
    for layout in LAYOUTS:
        packed, _ = OPS.quantize_pack(torch.zeros(70, 96), layout)
        assert _ext.layout_info(layout, 70, 96)["matrix_bytes"] == packed.numel()


FORK = """
import os, sys
from kt_kernel.config import EngineConfig
from kt_kernel.experts import get_engine
config = EngineConfig.resolve(1)
parents = get_engine(config)
child = os.fork()
if child == 0:
    engine = get_engine(config)
    os._exit(0 if engine is not parents and engine.probe_dispatch() >= 0 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or get_engine(config) is not parents)
"""


def test_a_fork_gets_an_engine_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

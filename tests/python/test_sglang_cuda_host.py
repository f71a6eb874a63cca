"""The plug-in on a host with a GPU, as far as it can be seen without one.

What SGLang itself does is asked of the installed release, and of those whose interpreters ``KT_TEST_SGLANG_PYTHONS``
names (separated by colons), by ``sglang_release.py`` in a process of its own.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import server
import torch
from torch import nn

from kt_kernel import experts
from kt_kernel.integrations.sglang import cuda_host, device_methods, layers, plugin
from kt_kernel.integrations.sglang.device_methods import DEVICE_METHODS, check_count, check_runner, method_key

# --- what the installed SGLang does ---

PYTHONS = [sys.executable, *filter(None, os.environ.get("KT_TEST_SGLANG_PYTHONS", "").split(":"))]


@pytest.fixture(scope="module", params=PYTHONS)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    environment = server.server_environment(TORCHDYNAMO_DISABLE="1", SGLANG_PLATFORM="kt_cpu")
    if request.param != sys.executable:
        environment["PYTHONPATH"] = str(root)
    result = subprocess.run(
        [request.param, str(root / "tests" / "python" / "sglang_release.py")], capture_output=True, text=True,
        env=environment, timeout=300, cwd=tmp_path_factory.mktemp("release"),
    )  # fmt: skip
    match = re.search(r"FOUND(\{.*\})", result.stdout)
    assert match, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(match[1])


def test_every_hook_has_a_target(release: dict[str, Any]) -> None:
    assert release["targets"] == {}


def test_padded_rows_of_a_graph_have_no_expert(release: dict[str, Any]) -> None:
    """A batch of 5 in a bucket of 8, through SGLang's own buffers; also after a batch that carries no count."""
    padded = release["padded"]
    assert padded["without kt"] is False
    assert padded["with kt"] is True
    assert padded["with kt, DP attention"] is padded["with kt, context parallel"] is False
    assert padded["batch"] == padded["batch without count"] == [5]
    assert padded["ids"] == [0, 2, 0, 2, 0, -1, -1, -1]


# --- one layer ---


class TopK(NamedTuple):
    """SGLang's standard top-k output."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class Dispatched(NamedTuple):
    """A dispatcher's output."""

    hidden_states: torch.Tensor
    topk_output: Any


class Combined(NamedTuple):
    """What a layer returns."""

    hidden_states: torch.Tensor


class Wrapper:
    """Experts e that multiply by e + 1, on one rank."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.output: torch.Tensor | None = None

    def load_weights(self, order: torch.Tensor) -> None:
        self.loaded.append(order)

    def submit_forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, _stream: int) -> None:
        scale = torch.where(ids < 0, torch.zeros_like(weights), weights * (ids + 1)).sum(1, keepdim=True)
        self.output = x * scale


class Method:
    """``KTEPWrapperMethod`` of one rank, without experts on the GPU unless told otherwise."""

    def __init__(self, tp_rank: int = 0, *, num_gpu_experts: int = 0) -> None:
        self.tp_rank = tp_rank
        self.num_gpu_experts = num_gpu_experts
        self.global_num_experts = 4
        self.wrapper = Wrapper() if tp_rank == 0 else None
        self.gpu_method = SimpleNamespace()
        self.kt_config = SimpleNamespace(layer_idx=1, weight_path="/w")

    def submit(self, _layer: nn.Module, dispatched: Dispatched) -> None:
        if self.wrapper is not None:
            topk = dispatched.topk_output
            self.wrapper.submit_forward(dispatched.hidden_states, topk.topk_ids, topk.topk_weights, 0)

    def sync(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) if self.wrapper is None else self.wrapper.output


@pytest.fixture()
def dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for SGLang's module with ``StandardCombineInput``."""
    for name in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.moe"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("sglang.srt.layers.moe.token_dispatcher")
    module.StandardCombineInput = Combined  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def routed() -> Dispatched:
    ids = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
    return Dispatched(torch.ones(2, 4), TopK(torch.tensor([[0.5, 0.25], [1.0, 2.0]]), ids))


def never_called(*_args: Any) -> Any:
    pytest.fail("the method of a layer without experts on the GPU was called")


def test_other_ranks_add_nothing(dispatcher: None) -> None:
    """Two tensor-parallel ranks, whose outputs are summed: the CPU's experts count once."""
    outputs = []
    for rank in (0, 1):
        dispatched = routed()
        outputs.append(cuda_host.apply(never_called, Method(rank), None, dispatched).hidden_states)  # type: ignore[arg-type]
    assert outputs[1].eq(0).all()
    assert sum(outputs)[:, 0].tolist() == [0.5 * 1 + 0.25 * 4, 1.0 * 2 + 2.0 * 3]


def test_other_ranks_add_nothing_without_cuda(dispatcher: None) -> None:
    zeros = layers.apply(Method(1), None, routed()).hidden_states  # type: ignore[arg-type]
    assert zeros.eq(0).all() and zeros.shape == (2, 4)


def test_factor_reaches_both_sides(dispatcher: None) -> None:
    method = Method()
    method.kt_weight_scale = 2.0  # type: ignore[attr-defined]
    output = cuda_host.apply(never_called, method, None, routed()).hidden_states  # type: ignore[arg-type]
    assert output[:, 0].tolist() == [3.0, 16.0]
    method.num_gpu_experts = 2
    seen: list[Dispatched] = []
    cuda_host.apply(lambda _self, _layer, dispatched: seen.append(dispatched), method, None, routed())  # type: ignore[arg-type]
    assert seen[0].topk_output.topk_weights.tolist() == [[1.0, 0.5], [2.0, 4.0]]


def test_rows_are_marked_unless_all_experts_are_on_the_gpu(dispatcher: None) -> None:
    method = Method()
    with cuda_host.bound_row_count(torch.tensor([1], dtype=torch.int32)):
        marked = cuda_host.with_padded_rows_marked(method, routed())
        assert marked.topk_output.topk_ids.tolist() == [[0, 3], [-1, -1]]
        method.num_gpu_experts = method.global_num_experts
        assert cuda_host.with_padded_rows_marked(method, routed()).topk_output.topk_ids.min() == 0
    assert cuda_host.with_padded_rows_marked(Method(), routed()).topk_output.topk_ids.min() == 0


def test_routing_without_ids_is_an_error(dispatcher: None) -> None:
    bypassed = Dispatched(torch.ones(2, 4), SimpleNamespace(router_logits=torch.ones(2, 4)))
    for apply in (lambda: cuda_host.apply(never_called, Method(), None, bypassed), lambda: device_methods.topk_tensors(bypassed)):  # type: ignore[arg-type]  # fmt: skip  # noqa: E501
        with pytest.raises(TypeError, match=r"no expert ids; use --moe-runner-backend triton\."):
            apply()


@pytest.mark.parametrize("num_gpu_experts", [0, 2])
def test_weights_without_experts_are_not_processed(monkeypatch: pytest.MonkeyPatch, num_gpu_experts: int) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(layers, "physical_to_logical_map", lambda _method: "map")
    method = Method(num_gpu_experts=num_gpu_experts)
    method.gpu_method.process_weights_after_loading = lambda _layer: calls.append("process")
    cuda_host.process_weights_after_loading(method, nn.Module())
    assert calls == (["process"] if num_gpu_experts else []) + ["synchronize"]
    assert method.wrapper is not None and method.wrapper.loaded == ["map"]
    other = Method(1)
    cuda_host.process_weights_after_loading(other, nn.Module())
    assert len(calls) == (2 if num_gpu_experts else 1), "another rank has nothing to load"


def test_errors_of_a_replay_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise RuntimeError("layer 3, expert 5")

    monkeypatch.setattr(experts, "check_devices", check)
    with pytest.raises(RuntimeError, match="layer 3, expert 5"):
        cuda_host.raise_pending_errors(None, None)


# --- layers that are refused before their weights are read ---


def test_second_wrapper_of_a_layer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_methods", [])
    layers.remember_method(None, Method())
    other = Method()
    other.kt_config.layer_idx = 2
    layers.remember_method(None, other)
    with pytest.raises(RuntimeError, match=r"layer 1 of /w was wrapped twice; a draft model .*\.$"):
        layers.remember_method(None, Method())
    assert len(layers.wrapped_methods()) == 2


def test_adapters_on_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_methods", [])
    method = Method()
    layers.remember_method(None, method)
    for name in ("get_triton_quant_info", "get_marlin_quant_info"):
        with pytest.raises(ValueError, match="LoRA adapter changes the experts of layer 7"):
            getattr(method, name)(SimpleNamespace(layer_id=7))


class Layer:
    """A layer with both of SGLang's weight loaders."""

    def weight_loader(self) -> None: ...

    def weight_loader_fused(self) -> None: ...


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"weight_loader": Layer().weight_loader_fused}, "loads all experts of layer 1 as one tensor"),
        ({"weight_loader": Layer().weight_loader, "with_bias": True}, "layer 1 have biases, .* not split .*HybridMoE"),
        ({"weight_loader": Layer().weight_loader, "with_bias": False}, None),
    ],
)
def test_experts_that_cannot_be_split_are_refused(attributes: dict[str, Any], words: str | None) -> None:
    def check() -> None:
        device_methods.before_create_weights(Method(), layer=nn.Module(), num_experts=4, **attributes)

    if words is None:
        check()
        return
    with pytest.raises(ValueError, match=words):
        check()


def test_missing_method_becomes_the_unquantized_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("sglang.srt.layers.quantization.unquant")
    module.UnquantizedFusedMoEMethod = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert device_methods.fill_in_method("self", "given", "config") is None
    assert device_methods.fill_in_method("self", None, "config") == (("self", {}, "config"), {})


# --- the matrix: method x number of experts on the GPU x runner ---

WORKS, REFUSED = True, False
MATRIX = {
    # key: (0 of 8, 4 of 8, 8 of 8), runners
    "UnquantizedFusedMoEMethod": ((WORKS, WORKS, WORKS), ["triton"]),
    "Fp8MoEMethod, block": ((WORKS, WORKS, WORKS), ["triton"]),
    "Fp8MoEMethod, tensor": ((WORKS, REFUSED, WORKS), ["triton"]),
    "W8A8FP8MoEMethod": ((WORKS, WORKS, WORKS), ["triton"]),
    "W8A8Int8MoEMethod": ((WORKS, WORKS, WORKS), ["triton"]),
    "BlockInt8MoEMethod": ((WORKS, WORKS, WORKS), ["triton"]),
    "MoeWNA16Method": ((WORKS, WORKS, WORKS), ["triton"]),
    "MoeWNA16Method, zero points": ((REFUSED, REFUSED, WORKS), ["triton"]),
    "AWQMoEScheme": ((WORKS, WORKS, WORKS), ["marlin"]),
    "GPTQMarlinMoEScheme": ((WORKS, WORKS, WORKS), ["marlin"]),
    "CompressedTensorsWNA16MoE": ((WORKS, WORKS, WORKS), ["marlin"]),
    "CompressedTensorsWNA16TritonMoE": ((WORKS, WORKS, WORKS), ["triton"]),
    "CompressedTensorsW8A8Fp8MoE, block": ((WORKS, WORKS, WORKS), ["triton"]),
    "CompressedTensorsW8A8Fp8MoE, channel": ((WORKS, WORKS, WORKS), ["triton"]),
    "CompressedTensorsW8A8Fp8MoE, tensor": ((WORKS, REFUSED, WORKS), ["triton"]),
    "ModelOptNvFp4FusedMoEMethod": ((WORKS, REFUSED, REFUSED), []),
    "Mxfp4MoEMethod": ((WORKS, REFUSED, REFUSED), []),
}
BACKENDS = ("triton", "marlin", "deep_gemm", "flashinfer_trtllm", "cutlass", None)


@pytest.mark.parametrize("key", MATRIX)
def test_matrix(key: str) -> None:
    counts, runners = MATRIX[key]
    for number, works in zip((0, 4, 8), counts, strict=True):
        if works:
            check_count(key, number, 8)
        else:
            with pytest.raises(ValueError, match=r"^kt_kernel: .*\.$"):
                check_count(key, number, 8)
    for backend in BACKENDS if key in DEVICE_METHODS else ():
        if backend in runners:
            check_runner(key, backend)
        else:
            with pytest.raises(ValueError, match=r"--moe-runner-backend (triton|marlin)"):
                check_runner(key, backend)


def test_matrix_is_whole() -> None:
    assert set(DEVICE_METHODS) <= set(MATRIX)


def test_methods_of_the_matrix_are_sglangs() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "srt" / "layers" / "quantization"
    names = {
        node.name
        for path in folder.rglob("*.py")
        for node in ast.parse(path.read_text("utf-8-sig")).body
        if isinstance(node, ast.ClassDef)
    }
    assert {key.split(",")[0] for key in MATRIX} <= names


def named(name: str, **attributes: Any) -> Any:
    return type(name, (), attributes)()


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (named("Fp8MoEMethod", block_quant=True), "Fp8MoEMethod, block"),
        (named("Fp8MoEMethod", block_quant=False), "Fp8MoEMethod, tensor"),
        (named("MoeWNA16Method", quant_config=SimpleNamespace(has_zp=True)), "MoeWNA16Method, zero points"),
        (named("MoeWNA16Method", quant_config=SimpleNamespace(has_zp=False)), "MoeWNA16Method"),
        (
            named("CompressedTensorsW8A8Fp8MoE", weight_quant=SimpleNamespace(strategy="channel")),
            "CompressedTensorsW8A8Fp8MoE, channel",
        ),
        (named("UnquantizedFusedMoEMethod"), "UnquantizedFusedMoEMethod"),
    ],
)  # fmt: skip
def test_method_keys(part: Any, key: str) -> None:
    assert method_key(part, SimpleNamespace()) == key  # type: ignore[arg-type]
    assert method_key(named("Outer"), SimpleNamespace(scheme=part)) == key  # type: ignore[arg-type]


def test_runner_is_found_where_methods_keep_it() -> None:
    runner = SimpleNamespace(runner_backend=SimpleNamespace(value="marlin"))
    owner = SimpleNamespace(runner=runner)
    assert device_methods.runner_of(owner, SimpleNamespace()) == "marlin"  # type: ignore[arg-type]
    assert device_methods.runner_of(None, SimpleNamespace(scheme=owner)) == "marlin"  # type: ignore[arg-type]
    kernel = SimpleNamespace(scheme=SimpleNamespace(kernel=owner))
    assert device_methods.runner_of(None, kernel) == "marlin"  # type: ignore[arg-type]
    assert device_methods.runner_of(None, SimpleNamespace()) is None  # type: ignore[arg-type]


def test_tensors_for_all_experts_are_refused() -> None:
    method = Method(num_gpu_experts=2)
    method.gpu_method = named("Mxfp4MoEMethod")
    layer = nn.Module()
    layer.w13_weight = nn.Parameter(torch.empty(2, 8))
    device_methods.check_after_weights(None, method, layer=layer)
    layer.w2_weight = nn.Parameter(torch.empty(4, 8))
    with pytest.raises(ValueError, match=r"made w2_weight for all 4 experts of layer 1 although only 2 are on the GPU"):
        device_methods.check_after_weights(None, method, layer=layer)


# --- hooks ---


def test_hooks_of_a_cuda_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kinds = {(hook.target, hook.kind) for hook in plugin.hooks_for_this_host()}
    assert (plugin.METHOD + "apply", "AROUND") in kinds
    assert (plugin.METHOD + "apply", "REPLACE") not in kinds
    assert (plugin.SERVER_ARGS + plugin.resolution_step(), "BEFORE") in kinds
    whole = [target for target, kind in kinds if kind in ("AROUND", "REPLACE")]
    assert len(whole) == len(set(whole)), "one hook would leave out the other"

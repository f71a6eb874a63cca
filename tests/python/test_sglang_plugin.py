"""The parts of the SGLang plug-in that need no server: refusals of layers, the KV pool, memory."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from kt_kernel.integrations import sglang as entry_points
from kt_kernel.integrations.sglang import checks, kv_pool, layers, memory, plugin, report, shared_expert
from kt_kernel.methods import METHODS

GB = 10**9


@pytest.fixture()
def runtime_context(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for SGLang's module of the same name, so that SGLang is not imported here."""
    names = ["sglang", "sglang.srt", "sglang.srt.runtime_context"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return sys.modules[names[-1]]


@pytest.mark.parametrize(("value", "active"), [("kt_cpu", True), ("other", False), (None, False)])
def test_platform_only_on_request(monkeypatch: pytest.MonkeyPatch, value: str | None, active: bool) -> None:
    if value is None:
        monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    else:
        monkeypatch.setenv("SGLANG_PLATFORM", value)
    assert (entry_points.activate() is not None) == active


@pytest.mark.parametrize(
    ("argv", "device", "chosen"),
    [
        (["--kt-weight-path", "x"], False, True),
        (["--kt-method=BF16"], False, True),
        (["--kt-weight-path", "x"], True, False),
        (["--model-path", "x"], False, False),
        (["--kt-weight-path", "x", "--device", "cpu"], False, False),
        (["--kt-weight-path", "x", "--device=cpu"], False, False),
    ],
)
def test_platform_where_sglang_knows_no_device(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], device: bool, chosen: bool
) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    monkeypatch.setattr(sys, "argv", ["sglang", *argv])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device)
    assert (entry_points.activate() is not None) == chosen
    assert (os.environ.get("SGLANG_PLATFORM") == "kt_cpu") == chosen


def test_hooks_of_a_host_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    hooks = plugin.hooks_for_this_host()
    assert (plugin.METHOD + "apply", "REPLACE") in {(hook.target, hook.kind) for hook in hooks}
    whole = [hook.target for hook in hooks if hook.kind in ("AROUND", "REPLACE")]
    assert len(whole) == len(set(whole)), "one hook would leave out the other"


def test_gated_shared_expert() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, shared, routed = (torch.randn(5, 64, generator=generator).bfloat16() for _ in range(3))
    gate = torch.randn(64, generator=generator).bfloat16()
    expected = routed.double() + torch.sigmoid(hidden.double() @ gate.double())[:, None] * shared.double()
    shared_expert.add_gated_shared_expert(hidden, gate, shared, routed)
    # one rounding to bf16, and fp32 sums before it
    torch.testing.assert_close(routed.double(), expected, rtol=2**-8, atol=1e-5)


def test_weights_of_cpu_experts_are_not_loaded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    method, other_method = mock.Mock(num_gpu_experts=2), mock.Mock(num_gpu_experts=2)
    monkeypatch.setattr(layers, "_methods", [method])
    loaded: list[int] = []

    def original(_layer: Any, *, expert_id: int) -> None:
        loaded.append(expert_id)

    for owner in (method, other_method):
        for expert_id in range(4):
            layers.load_device_expert(original, SimpleNamespace(quant_method=owner), expert_id=expert_id)  # type: ignore[arg-type]
    assert loaded == [0, 1, 0, 1, 2, 3]


def test_no_wrapped_layer_is_an_error(monkeypatch: pytest.MonkeyPatch, runtime_context: ModuleType) -> None:
    monkeypatch.setattr(layers, "_methods", [])
    monkeypatch.setattr(layers, "_in_speculative_scope", lambda: False)
    args = SimpleNamespace(kt_weight_path=None)
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: args, raising=False)
    layers.check_model_was_wrapped(torch.nn.Linear(1, 1))
    args.kt_weight_path = "/x"
    with pytest.raises(RuntimeError, match="Linear has no MoE layer"):
        layers.check_model_was_wrapped(torch.nn.Linear(1, 1))
    monkeypatch.setattr(layers, "_methods", [object()])
    layers.check_model_was_wrapped(torch.nn.Linear(1, 1))


def test_hooks_are_verified_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first layer is made; 60 layers would look up SGLang's source 60 times."""

    @dataclass
    class LayerConfig:
        layer_idx: int
        num_gpu_experts: int | None = None
        weight_path: str = "/x"

    calls: list[int] = []
    monkeypatch.setattr(plugin, "verify_hooks", lambda: calls.append(len(layers.wrapped_methods())))
    monkeypatch.setattr(layers, "_methods", [])
    monkeypatch.setattr(layers, "_in_speculative_scope", lambda: False)
    for index in range(3):
        config = layers.create_kt_config(lambda _args, layer_idx: LayerConfig(layer_idx), None, index)
        assert (config.layer_idx, config.num_gpu_experts) == (index, 0)
        layers.remember_method(None, SimpleNamespace(kt_config=config))
    assert calls == [0]
    assert layers.create_kt_config(lambda _args, _layer_idx: None, None, 3) is None


@pytest.mark.parametrize(
    ("max_total_tokens", "requests", "capacity", "expected", "words"),
    [
        (None, 4, 10_000, 8_000, "context length 2000 x 4 running requests"),
        (None, 4, 5_000, 5_000, "memory budget"),
        (3_000, 4, 3_000, 3_000, "--max-total-tokens"),
    ],
)
def test_kv_pool_is_capped(
    monkeypatch: pytest.MonkeyPatch, runtime_context: ModuleType, caplog: pytest.LogCaptureFixture,
    max_total_tokens: int | None, requests: int, capacity: int, expected: int, words: str,
) -> None:  # fmt: skip
    schedule = SimpleNamespace(
        mem_fraction_static=0.5, max_running_requests=requests, max_total_tokens=max_total_tokens
    )
    monkeypatch.setattr(runtime_context, "get_schedule", lambda: schedule, raising=False)
    monkeypatch.setattr(memory, "usable_memory", lambda: (16 * GB, 32 * GB))
    configurator = SimpleNamespace(mambaish_config=None, model_config=SimpleNamespace(context_len=2_000))
    with caplog.at_level("INFO", logger="kt_kernel"):
        assert kv_pool.profile_available_bytes(lambda *_: pytest.fail("not called"), configurator, 0.0) == 2 * GB
        assert kv_pool.cap_tokens(capacity, configurator) == expected
    assert words in caplog.messages[-1]
    assert "--mem-fraction-static 0.5 of a quarter of the 16.0 GB left" in caplog.messages[-1]


def needs(**changes: int) -> memory.Needs:
    return memory.Needs(**{"experts": 10 * GB, "other_weights": GB, "kv_pool": GB, "scratch": GB, **changes})


def test_memory_is_refused_with_needed_and_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "usable_memory", lambda: (16 * GB, 32 * GB))
    checks.check_memory(needs())
    with pytest.raises(ValueError, match=r"needs 25\.1 GB .*\(experts 20\.0, .*16\.0 GB of 32\.0 GB are usable"):
        checks.check_memory(needs(experts=20 * GB))
    with pytest.raises(ValueError, match=r"are usable; lower --max-total-tokens, .* or --context-length, free memory"):
        checks.check_memory(needs(kv_pool=20 * GB))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_memory_counts_every_expert_that_is_loaded(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    source = checks.ExpertSource(Path(), ((METHODS["AMXINT8"].layout,) * 2,) * 2, 16, 256, 128)
    of_one = source.bytes_of(1)
    bf16 = source.bytes_of(4, METHODS["BF16"].layout) if not on_gpu else 0
    assert checks.expert_bytes(source, 4, on_gpu=on_gpu) == 12 * of_one + bf16
    monkeypatch.setenv("KT_HOST_ALL_EXPERTS", "1")
    assert checks.expert_bytes(source, 4, on_gpu=on_gpu) == 16 * of_one + bf16
    monkeypatch.setattr(memory, "usable_memory", lambda: (16 * GB, 32 * GB))
    with pytest.raises(ValueError, match="unset KT_HOST_ALL_EXPERTS"):
        checks.check_memory(needs(experts=20 * GB))


def test_flags_are_seen_by_value_and_by_name() -> None:
    plain = SimpleNamespace(kt_weight_path=None, **checks.FLAG_DEFAULTS)
    assert not checks.kt_flags_given(plain, argv=["--model-path", "x"])
    assert checks.kt_flags_given(plain, argv=["--kt-method", "AMXINT4"])
    assert checks.kt_flags_given(SimpleNamespace(**{**vars(plain), "kt_cpuinfer": 4}), argv=[])
    assert checks.kt_flags_given(SimpleNamespace(**{**vars(plain), "kt_weight_path": "x"}), argv=[])


def test_open_flags_get_values_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_has_shared_experts", lambda _folder: True)
    args = SimpleNamespace(
        model_path="/model",
        kt_weight_path="/experts",
        kt_num_gpu_experts=None,
        kt_max_deferred_experts_per_token=2,
        watchdog_timeout=checks.SGLANG_WATCHDOG_SECONDS,
        disable_shared_experts_fusion=False,
        sleep_on_idle=True,
    )
    checks.adjust(args)
    assert vars(args) == {
        "model_path": "/model",
        "kt_weight_path": "/experts",
        "kt_num_gpu_experts": 0,
        "kt_max_deferred_experts_per_token": 2,
        "watchdog_timeout": checks.WATCHDOG_SECONDS,
        "disable_shared_experts_fusion": True,
        "sleep_on_idle": True,
    }
    args.watchdog_timeout = 77
    checks.adjust(args)
    assert args.watchdog_timeout == 77, "a value the user chose is kept"


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ("avx2 avx512 avx512vnni avx512bf16", "vnni bf16"),
        ("avx2 avx512 avx512vnni amxint8 amxbf16", "vnni amxint8 amxbf16"),
        ("avx2 avx512", "avx2 avx512"),
        ("avx2", "avx2"),
        ("reference", "reference"),
    ],
)
def test_instruction_sets_are_named_shortly(chosen: str, text: str) -> None:
    assert report._short_names(chosen) == text


@pytest.mark.parametrize(("value", "text"), [(6e8, "0.60"), (1.2e9, "1.2"), (3.456e11, "346")])
def test_gigabytes(value: float, text: str) -> None:
    assert memory.gigabytes(value) == text

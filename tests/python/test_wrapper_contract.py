"""KTMoEWrapper: its arguments, those of stock SGLang and of the fork, and a message for each that is wrong."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import Experts, random_experts, write_checkpoint
from reference import BOUNDS, moe_reference, relative_error
from wrapper_cases import INNER, METHOD_NAMES, E, H, K, batch, loaded, make

from kt_kernel import KTMoEWrapper, _ext, device_stream


@pytest.fixture(scope="module")
def experts() -> Experts:
    return random_experts(E, H, INNER)


@pytest.fixture(scope="module")
def int8(experts: Experts) -> KTMoEWrapper:
    return loaded(experts)


# --- construction ---


def test_the_signature_is_the_incumbents() -> None:
    names = list(inspect.signature(KTMoEWrapper.__init__).parameters)[1:]
    assert names == [
        *("layer_idx", "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size"),
        *("gpu_experts_mask", "cpuinfer_threads", "threadpool_count", "weight_path", "chunked_prefill_size"),
        *("cpu_save", "max_deferred_experts_per_token", "method", "numa_nodes", "mode", "num_gpu_experts"),
        *("lora_rank", "lora_alpha", "lora_dropout", "max_cache_depth", "group_size", "zero_point"),
        *("full_weight_grad", "swiglu_limit", "swiglu_alpha", "unknown"),
    ]


def test_stock_sglang_constructs_with_num_gpu_experts() -> None:
    wrapper = KTMoEWrapper(
        layer_idx=0,
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        moe_intermediate_size=INNER,
        num_gpu_experts=3,
        cpuinfer_threads=2,
        threadpool_count=2,
        weight_path="/nowhere",
        chunked_prefill_size=4096,
        method="AMXINT4",
        max_deferred_experts_per_token=0,
    )
    assert isinstance(wrapper, KTMoEWrapper)
    assert wrapper.gpu_experts_mask.tolist() == [True] * 3 + [False] * 5
    assert (wrapper.num_gpu_experts, wrapper.layer_idx, wrapper.method) == (3, 0, "AMXINT4")
    assert (wrapper.num_experts, wrapper.num_experts_per_tok, wrapper.max_deferred_experts_per_token) == (E, K, 0)
    assert wrapper.cpu_infer is not None and wrapper.moe is None


def test_the_fork_constructs_with_a_mask_that_wins() -> None:
    mask = torch.tensor([False, True] * 4)
    wrapper = KTMoEWrapper(
        layer_idx=0,
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        moe_intermediate_size=INNER,
        gpu_experts_mask=mask,
        cpuinfer_threads=2,
        threadpool_count=1,
        weight_path="/nowhere",
        chunked_prefill_size=-1,
        max_deferred_experts_per_token=None,
        method=None,
        numa_nodes=None,
        num_gpu_experts=8,
        swiglu_limit=0.0,
        swiglu_alpha=0.0,
    )
    assert torch.equal(wrapper.gpu_experts_mask, mask) and wrapper.gpu_experts_mask is not mask
    assert wrapper.num_gpu_experts == 4 and wrapper.method == "AMXINT4"


def test_threads_and_pools_left_out_mean_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_kernel import _ext

    topology = _ext.topology()
    wrapper = make(cpuinfer_threads=None, threadpool_count=None, num_gpu_experts=None)
    assert wrapper.cpuinfer_threads == topology["num_cores"]
    assert wrapper.threadpool_count == len(topology["nodes"])
    monkeypatch.setenv("KT_NUM_THREADS", "1")
    assert make(cpuinfer_threads=None).cpuinfer_threads == 1


def test_more_pools_than_nodes_are_clamped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kt_kernel"):
        wrappers = [make(threadpool_count=61) for _ in range(2)]
    assert wrappers[0].threadpool_count < 61
    assert len([record for record in caplog.records if "61" in record.getMessage()]) == 1
    assert wrappers[0].cpu_infer is wrappers[1].cpu_infer


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"future_option": 7}, TypeError, "future_option=7"),
        ({"mode": "sft"}, ValueError, "mode 'sft'"),
        ({"method": "SYCL_GPTQ_INT4"}, ValueError, "SYCL_GPTQ_INT4 computes on Intel GPUs.*GPTQ_INT4"),
        ({"method": "INT3"}, ValueError, "'INT3' is unknown.*AMXINT8, AMXINT4, BF16"),
        ({"swiglu_limit": -7.0}, ValueError, "swiglu_limit is -7.0"),
        ({"swiglu_alpha": float("nan")}, ValueError, "swiglu_alpha is nan"),
        ({"num_gpu_experts": 9}, ValueError, "num_gpu_experts is 9.*8"),
        ({"num_gpu_experts": -1}, ValueError, "num_gpu_experts is -1"),
        ({"gpu_experts_mask": torch.zeros(7, dtype=torch.bool)}, ValueError, r"shape \[7\].*\[8\]"),
        ({"gpu_experts_mask": torch.zeros(8)}, ValueError, "float32.*bool"),
        ({"gpu_experts_mask": torch.zeros(8, dtype=torch.bool, device="meta")}, ValueError, "on meta.*CPU"),
        ({"gpu_experts_mask": [True] * 8}, ValueError, "list"),
        ({"num_experts_per_tok": 9}, ValueError, "top_k is 9, above num_experts = 8"),
        ({"num_experts": 0}, ValueError, "num_experts is 0"),
        ({"hidden_size": -4}, ValueError, "hidden_size is -4"),
        ({"moe_intermediate_size": 2.5}, ValueError, "intermediate_size is 2.5"),
        ({"layer_idx": -1}, ValueError, "layer_idx is -1"),
        ({"cpuinfer_threads": 0}, ValueError, "cpuinfer_threads is 0"),
        ({"threadpool_count": -2}, ValueError, "threadpool_count is -2"),
        ({"numa_nodes": [0, 1]}, ValueError, "names 2 nodes and threadpool_count is 1"),
        ({"numa_nodes": [0, 0], "threadpool_count": 2}, ValueError, "only once"),
        ({"numa_nodes": [977]}, RuntimeError, "977"),
        ({"max_deferred_experts_per_token": -1}, ValueError, "max_deferred_experts_per_token is -1"),
    ],
)
def test_a_bad_constructor_argument_is_named(changes: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**changes)


def test_a_wrapper_made_in_inference_mode_is_one_like_any_other(experts: Experts) -> None:
    inputs = batch(3)
    expected = loaded(experts).forward(*inputs, 0)
    with torch.inference_mode():
        wrapper = loaded(experts)
        assert torch.equal(wrapper.forward(*inputs, 0), expected)
    wrapper.gpu_experts_mask.fill_(True)
    assert not wrapper.forward(*inputs, 0).any()


def test_an_environment_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="KT_NUM_THREADS='many'"):
        make(cpuinfer_threads=None)
    monkeypatch.setenv("KT_NUMA_NODES", "0;1")
    with pytest.raises(ValueError, match="KT_NUMA_NODES='0;1'"):
        make()


def test_deferral_may_name_more_experts_than_a_token_has() -> None:
    assert make(max_deferred_experts_per_token=K + 1).max_deferred_experts_per_token == K + 1


# --- maps ---


def test_a_map_moves_experts(experts: Experts) -> None:
    mapping = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    wrapper = loaded(experts, "AMXINT8", mapping)
    hidden, ids, weights = batch(20)
    wanted = moe_reference(hidden, mapping[ids], weights, *experts)
    assert relative_error(wrapper.forward(hidden, ids, weights), wanted) < BOUNDS["AMXINT8"]


def test_redundant_slots_may_repeat_experts(experts: Experts) -> None:
    mapping = torch.tensor([*range(E), 0, 5])
    wrapper = loaded(experts, "AMXINT8", mapping, num_experts=E + 2)
    hidden, ids, weights = batch(20, experts=E + 2)
    wanted = moe_reference(hidden, mapping[ids], weights, *experts)
    assert relative_error(wrapper.forward(hidden, ids, weights), wanted) < BOUNDS["AMXINT8"]


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        (torch.arange(E, dtype=torch.int32), "int32.*int64"),
        (torch.arange(E - 1), r"shape \[7\].*\[8\]"),
        (torch.arange(E).view(2, 4), r"shape \[2, 4\]"),
        (torch.arange(E, device="meta"), "on meta.*CPU"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]), r"\[7\] is 8.*0-7"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, -1]), r"\[7\] is -1"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), "repeats an expert.*expert 7"),
        (list(range(E)), "list"),
    ],
)
def test_a_bad_map_is_refused(experts: Experts, mapping, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make().load_weights_from_tensors(*experts, mapping)


def test_redundant_slots_must_hold_every_expert(experts: Experts) -> None:
    mapping = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6, 6])
    with pytest.raises(ValueError, match="leaves an expert out.*expert 7"):
        make(num_experts=E + 2).load_weights_from_tensors(*experts, mapping)
    fused = torch.arange(E + 1)
    with pytest.raises(ValueError, match="--disable-shared-experts-fusion"):
        make(num_experts=E + 1).load_weights_from_tensors(*experts, fused)


# --- weights ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: Experts(w.gate.long(), w.up, w.down), "gate_proj is torch.int64"),
        (lambda w: Experts(w.gate, w.up.half(), w.down), "up_proj is torch.float16.*all"),
        (
            lambda w: Experts(w.gate, w.up, w.down.transpose(1, 2)),
            r"down_proj has shape \[8, 96, 192\].*\[8, 192, 96\]",
        ),
        (lambda w: Experts(w.gate[0], w.up, w.down), r"gate_proj has shape \[96, 192\]"),
        (lambda w: Experts(w.gate, w.up[:4], w.down), r"up_proj has shape \[4, 96, 192\]"),
        (lambda w: Experts(w.gate, w.up, w.down.to("meta")), "down_proj is on meta"),
    ],
)
def test_bad_weight_tensors_are_refused(experts: Experts, change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make().load_weights_from_tensors(*change(experts))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    bad = random_experts(E, H, INNER)
    bad.down[5, 7, 11] = float("nan")
    wrapper = make()
    with pytest.raises(RuntimeError, match="(?i)nan"):
        wrapper.load_weights_from_tensors(*bad)
    with pytest.raises(RuntimeError, match="has no weights yet"):
        wrapper.forward(*batch(1))


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_checkpoint_gives_the_bytes_of_its_tensors(tmp_path, method: str, dtype: torch.dtype) -> None:
    weights = random_experts(E, H, INNER, dtype=dtype)
    write_checkpoint(tmp_path, {3: weights})
    mapping = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    from_tensors = loaded(weights, method, mapping)
    from_file = make(method, weight_path=str(tmp_path))
    from_file.load_weights(mapping)
    for expert in range(E):
        for found, wanted in zip(
            from_file.moe.export_packed(expert), from_tensors.moe.export_packed(expert), strict=True
        ):
            assert torch.equal(found, wanted)


def test_weights_can_be_loaded_again(experts: Experts) -> None:
    wrapper = loaded(experts, num_gpu_experts=4)
    other = random_experts(E, H, INNER, seed=5)
    wrapper.gpu_experts_mask.zero_()
    wrapper.load_weights_from_tensors(*other)
    hidden, ids, weights = batch(8)
    assert relative_error(wrapper.forward(hidden, ids, weights), moe_reference(hidden, ids, weights, *other)) < 0.033
    wrapper.submit_forward(hidden, ids, weights)
    with pytest.raises(RuntimeError, match="1 submitted forwards"):
        wrapper.load_weights_from_tensors(*other)
    wrapper.sync_forward(hidden)


def test_sizes_the_kernels_cannot_compute_are_named() -> None:
    with pytest.raises(ValueError, match="intermediate_size is 40; the kernels compute multiples of 16 only"):
        make(moe_intermediate_size=40)
    with pytest.raises(ValueError, match="hidden_size is 200; the kernels compute multiples of 16 only"):
        make(hidden_size=200)


@pytest.mark.parametrize(
    ("path", "words"),
    [(None, "without weight_path"), ("", "without weight_path"), ("/nowhere/at/all", "/nowhere/at/all does not exist")],
)
def test_a_missing_weight_path_is_named(path: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(weight_path=path).load_weights(torch.arange(E))


def test_loading_holds_the_packed_layer_and_a_few_experts(tmp_path) -> None:
    # 40 experts of 6 MiB: 252 MB of source for 126 MB of packed experts.
    write_checkpoint(tmp_path, {0: random_experts(40, 1024, 1024)})
    code = (
        "import torch\n"
        "from memory import anonymous_kib, anonymous_peak_kib\n"
        "from kt_kernel import KTMoEWrapper\n"
        f"w = KTMoEWrapper(0, 40, 2, 1024, 1024, None, 2, None, {str(tmp_path)!r}, 512, method='AMXINT8')\n"
        "before = anonymous_kib()\n"
        "peak = anonymous_peak_kib(lambda: w.load_weights(torch.arange(40)))\n"
        "print(peak, anonymous_kib() - before, w.moe.bytes // 1024)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    peak, after, packed = map(int, result.stdout.split())
    # The source is read where the kernel caches it; what is left are the allocator's leftovers.
    assert packed < peak < packed + 30_000
    assert after < packed + 30_000


# --- misuse of the forward ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, i, w: (x[:, :-1], i, w), r"hidden_states has shape \[4, 191\].*192"),
        (lambda x, i, w: (x.double(), i, w), "hidden_states is torch.float64"),
        (lambda x, i, w: (x.to("meta"), i, w), "hidden_states is on meta"),
        (lambda x, i, w: (x, i.to("meta"), w), "topk_ids is on meta"),
        (lambda x, i, w: (x, i, w.to("meta")), "topk_weights is on meta"),
        (lambda x, i, w: (x, i[:3], w), r"topk_ids has shape \[3, 2\].*\[4, 2\]"),
        (lambda x, i, w: (x, i[:, :1], w), r"topk_ids has shape \[4, 1\].*\[4, 2\]"),
        (lambda x, i, w: (x, i, w[:, :1]), r"topk_weights has shape \[4, 1\].*\[4, 2\]"),
        (lambda x, i, w: (x, i.float(), w), "topk_ids is torch.float32.*integer"),
        (lambda x, i, w: (x, i.bool(), w), "topk_ids is torch.bool.*integer"),
        (lambda x, i, w: (x, i, w.long()), "topk_weights is torch.int64.*float"),
    ],
)
def test_bad_inputs_are_refused(int8: KTMoEWrapper, change, words: str) -> None:
    inputs = change(*batch(4))
    for call in (int8.submit_forward, int8.forward):
        with pytest.raises(ValueError, match=words):
            call(*inputs)
    with pytest.raises(RuntimeError, match="without submit_forward"):
        int8.sync_forward(batch(4)[0])


def test_a_stream_with_cpu_tensors_is_refused(int8: KTMoEWrapper) -> None:
    with pytest.raises(ValueError, match="cuda_stream is 4711"):
        int8.submit_forward(*batch(4), 4711)


@pytest.mark.parametrize("bad", [E, -2, 1 << 40])
def test_an_id_out_of_range_is_named_and_the_layer_lives_on(int8: KTMoEWrapper, bad: int) -> None:
    hidden, ids, weights = batch(4)
    wrong = ids.clone()
    wrong[2, 1] = bad
    int8.submit_forward(hidden, wrong, weights)
    int8.submit_forward(hidden, ids, weights)
    with pytest.raises(RuntimeError, match=str(bad)):
        int8.sync_forward(hidden)
    assert torch.equal(int8.sync_forward(hidden), int8.forward(hidden, ids, weights))


def test_sync_with_another_shape_is_refused_and_can_be_repeated(int8: KTMoEWrapper) -> None:
    hidden, ids, weights = batch(4)
    int8.submit_forward(hidden, ids, weights)
    with pytest.raises(ValueError, match=r"\[3, 192\].*\[4, 192\]"):
        int8.sync_forward(hidden[:3])
    with pytest.raises(ValueError, match="torch.float16"):
        int8.sync_forward(hidden.half())
    assert torch.equal(int8.sync_forward(hidden), int8.forward(hidden, ids, weights))


def test_forward_before_load_is_refused() -> None:
    with pytest.raises(RuntimeError, match="layer 3 has no weights yet"):
        make().submit_forward(*batch(1))


# --- the rest of the surface ---


def test_each_device_is_probed_and_each_layer_names_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(device_stream, "choose_signal", lambda ordinal: calls.append(("probe", ordinal)))
    monkeypatch.setattr(device_stream, "current_stream", lambda _tensor, given: given)
    monkeypatch.setattr(_ext, "expect_batch", lambda num_tokens: calls.append(("batch", num_tokens)))
    first, second = (make(chunked_prefill_size=size) for size in (64, 128))
    for ordinal in (0, 1, 0, 1):
        tensor = SimpleNamespace(device=torch.device("cuda", ordinal))
        assert first._streams(tensor, 5) == (5, 5)  # type: ignore[arg-type]
    second._streams(SimpleNamespace(device=torch.device("cuda", 1)), 5)  # type: ignore[arg-type]
    assert calls == [("probe", 0), ("batch", 64), ("probe", 1), ("batch", 64), ("probe", 1), ("batch", 128)]


def test_capture_batch_sizes_are_remembered() -> None:
    KTMoEWrapper.set_capture_batch_sizes([1, 2, 4])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 4]
    KTMoEWrapper.set_capture_batch_sizes([8])
    assert KTMoEWrapper.get_capture_batch_sizes() == [8]
    with pytest.raises(ValueError, match="at least 1"):
        KTMoEWrapper.set_capture_batch_sizes([0])
    KTMoEWrapper.clear_buffer_cache()


def test_import_is_cheap_and_silent() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import kt_kernel; "
        "heavy = {'safetensors', 'tqdm', 'rich', 'transformers', 'sglang', 'psutil', 'huggingface_hub'}; "
        "sys.exit(', '.join(sorted(heavy & (set(sys.modules) - before))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

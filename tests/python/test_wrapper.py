"""KTMoEWrapper: the contract with stock SGLang and its fork, point by point, against a torch MoE."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys

import pytest
import torch
from checkpoints import Experts, random_experts, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BOUNDS, moe_reference, relative_error

from kt_kernel import KTMoEWrapper
from kt_kernel.experts import packed_bytes
from kt_kernel.methods import METHODS

E, K, H, INNER = 8, 2, 192, 96
METHOD_NAMES = list(METHODS)


def make(method: str = "AMXINT8", **changes) -> KTMoEWrapper:
    arguments = {
        "layer_idx": 3,
        "num_experts": E,
        "num_experts_per_tok": K,
        "hidden_size": H,
        "moe_intermediate_size": INNER,
        "cpuinfer_threads": 2,
        "threadpool_count": 1,
        "chunked_prefill_size": 16,
        "method": method,
    }
    return KTMoEWrapper(**{**arguments, **changes})


def loaded(experts: Experts, method: str = "AMXINT8", mapping: torch.Tensor | None = None, **changes) -> KTMoEWrapper:
    wrapper = make(method, **changes)
    wrapper.load_weights_from_tensors(*experts, mapping)
    return wrapper


def batch(tokens: int, *, seed: int = 1, dtype: torch.dtype = torch.bfloat16, top_k: int = K, experts: int = E):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator).to(dtype)
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return hidden, ids, weights


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
        ({"method": "FP8"}, ValueError, "FP8 is not supported by this version.*AMXINT8, AMXINT4, BF16"),
        ({"method": "INT3"}, ValueError, "'INT3' is unknown.*AMXINT8, AMXINT4, BF16"),
        ({"swiglu_limit": 7.0}, ValueError, "swiglu_limit is 7.0"),
        ({"swiglu_alpha": 1.7}, ValueError, "swiglu_alpha is 1.7"),
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
        ({"max_deferred_experts_per_token": 3}, ValueError, "max_deferred_experts_per_token is 3"),
    ],
)
def test_a_bad_constructor_argument_is_named(changes: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**changes)


def test_an_environment_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="KT_NUM_THREADS='many'"):
        make(cpuinfer_threads=None)
    monkeypatch.setenv("KT_NUMA_NODES", "0;1")
    with pytest.raises(ValueError, match="KT_NUMA_NODES='0;1'"):
        make()


def test_deferral_is_accepted_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kt_kernel"):
        wrappers = [make(max_deferred_experts_per_token=2) for _ in range(3)]
    assert wrappers[0].max_deferred_experts_per_token == 2
    assert len([record for record in caplog.records if "not used yet" in record.getMessage()]) == 1


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_layer_equals_the_torch_moe(experts: Experts, method: str, dtype: torch.dtype) -> None:
    wrapper = loaded(experts, method)
    hidden, ids, weights = batch(33, dtype=dtype)
    output = wrapper.forward(hidden, ids, weights, 0)
    assert output.dtype == dtype and output.shape == hidden.shape
    wanted = moe_reference(hidden, ids, weights, *experts)
    assert relative_error(output, wanted) < BOUNDS[method]
    # The bound is worth something: one wrong expert in eight breaks it.
    swapped = torch.where(ids == 0, 1, torch.where(ids == 1, 0, ids))
    assert relative_error(output, moe_reference(hidden, swapped, weights, *experts)) > 2 * BOUNDS[method]


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(METHOD_NAMES),
    num_experts=st.integers(1, 9),
    hidden=st.integers(1, 13).map(lambda n: 16 * n),
    inter=st.integers(1, 10).map(lambda n: 16 * n),
    tokens=st.integers(0, 20),
    data=st.data(),
)
def test_any_sizes_equal_the_torch_moe(method, num_experts, hidden, inter, tokens, data) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    seed = data.draw(st.integers(0, 1000))
    weights = random_experts(num_experts, hidden, inter, seed=seed)
    wrapper = loaded(
        weights,
        method,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        hidden_size=hidden,
        moe_intermediate_size=inter,
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    ids = torch.randint(-1, num_experts, (tokens, top_k), generator=generator)
    scales = torch.rand(tokens, top_k, generator=generator)
    output = wrapper.forward(x, ids, scales)
    wanted = moe_reference(x, ids, scales, *weights)
    # Few values have no average: sizes below the blocks of the format may miss the bound of normal rows, by the ratio
    # of max to mean, at most a factor of 4 for int4 (a group of one or two values is exact or nearly so).
    assert (output.double() - wanted).norm() <= 4 * BOUNDS[method] * wanted.norm() + 1e-6


def test_submit_then_sync_equals_forward(int8: KTMoEWrapper) -> None:
    hidden, ids, weights = batch(5)
    int8.submit_forward(hidden, ids, weights, 0)
    assert torch.equal(int8.sync_forward(hidden, 0), int8.forward(hidden, ids, weights))


def test_inputs_may_be_overwritten_right_after_submit(int8: KTMoEWrapper) -> None:
    hidden, ids, weights = batch(64)
    wanted = int8.forward(hidden, ids, weights)
    for _ in range(20):
        x, i, w = hidden.clone(), ids.clone(), weights.clone()
        mask = int8.gpu_experts_mask.clone()
        int8.submit_forward(x, i, w, 0)
        x.zero_()
        i.fill_(-1)
        w.fill_(float("nan"))
        int8.gpu_experts_mask.fill_(True)
        found = int8.sync_forward(x, 0)
        int8.gpu_experts_mask.copy_(mask)
        assert torch.equal(found, wanted)


def test_several_submits_come_back_in_order(int8: KTMoEWrapper) -> None:
    batches = [batch(tokens, seed=tokens) for tokens in (1, 7, 3, 7)]
    for hidden, ids, weights in batches:
        int8.submit_forward(hidden, ids, weights, None)
    for hidden, ids, weights in batches:
        assert torch.equal(int8.sync_forward(hidden), int8.forward(hidden, ids, weights))


def test_results_are_fresh_tensors(int8: KTMoEWrapper) -> None:
    hidden, ids, weights = batch(4)
    first = int8.forward(hidden, ids, weights)
    kept = first.clone()
    int8.forward(*batch(4, seed=9))
    assert torch.equal(first, kept)


def test_absent_and_repeated_ids(experts: Experts, int8: KTMoEWrapper) -> None:
    hidden, ids, weights = batch(6)
    ids[0] = -1
    ids[1, 0] = -1
    ids[2] = ids[2, 0]
    output = int8.forward(hidden, ids, weights)
    assert torch.count_nonzero(output[0]) == 0
    assert relative_error(output, moe_reference(hidden, ids, weights, *experts)) < BOUNDS["AMXINT8"]
    assert torch.count_nonzero(int8.forward(hidden, torch.full_like(ids, -1), weights)) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_ids_of_any_integer_type(int8: KTMoEWrapper, dtype: torch.dtype) -> None:
    hidden, ids, weights = batch(6)
    assert torch.equal(int8.forward(hidden, ids.to(dtype), weights), int8.forward(hidden, ids, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_type(int8: KTMoEWrapper, dtype: torch.dtype) -> None:
    hidden, ids, weights = batch(6)
    weights = weights.to(dtype)
    assert torch.equal(int8.forward(hidden, ids, weights), int8.forward(hidden, ids, weights.float()))


def test_zero_tokens(int8: KTMoEWrapper) -> None:
    hidden, ids, weights = batch(0)
    assert int8.forward(hidden, ids, weights, 0).shape == (0, H)
    int8.submit_forward(hidden, ids, weights, 0)
    assert int8.sync_forward(hidden, 0).shape == (0, H)


def test_three_dimensions_and_strides(int8: KTMoEWrapper) -> None:
    hidden, ids, weights = batch(6)
    wanted = int8.forward(hidden, ids, weights)
    assert torch.equal(int8.forward(hidden.view(2, 3, H), ids, weights), wanted)
    int8.submit_forward(hidden.view(2, 3, H), ids.view(2, 3, K), weights)
    assert torch.equal(int8.sync_forward(hidden.view(2, 3, H)), wanted)
    strided = torch.stack((hidden, hidden), dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(int8.forward(strided, ids.t().contiguous().t(), weights.t().contiguous().t()), wanted)


def test_more_tokens_than_the_chunk_size(experts: Experts) -> None:
    wrapper = loaded(experts, chunked_prefill_size=4)
    hidden, ids, weights = batch(300)
    output = wrapper.forward(hidden, ids, weights)
    assert relative_error(output, moe_reference(hidden, ids, weights, *experts)) < BOUNDS["AMXINT8"]


def test_int8_bits_do_not_depend_on_batch_or_threads(experts: Experts) -> None:
    one, two = (loaded(experts, cpuinfer_threads=threads) for threads in (1, 2))
    hidden, ids, weights = batch(40)
    wanted = one.forward(hidden, ids, weights)
    assert torch.equal(two.forward(hidden, ids, weights), wanted)
    for token in (0, 17, 39):
        part = slice(token, token + 1)
        assert torch.equal(two.forward(hidden[part], ids[part], weights[part]), wanted[part])


def test_two_models_in_one_process(experts: Experts) -> None:
    other = random_experts(5, 64, 48, seed=7)
    big = loaded(experts, "BF16")
    small = loaded(
        other, "AMXINT4", num_experts=5, num_experts_per_tok=3, hidden_size=64, moe_intermediate_size=48, layer_idx=3
    )
    hidden, ids, weights = batch(9)
    x = torch.randn(9, 64)
    small_ids = torch.randint(0, 5, (9, 3))
    small_weights = torch.rand(9, 3)
    big.submit_forward(hidden, ids, weights)
    small.submit_forward(x, small_ids, small_weights)
    assert relative_error(big.sync_forward(hidden), moe_reference(hidden, ids, weights, *experts)) < BOUNDS["BF16"]
    wanted = moe_reference(x, small_ids, small_weights, *other)
    assert relative_error(small.sync_forward(x), wanted) < BOUNDS["AMXINT4"]


# --- placement ---


def test_experts_on_the_gpu_are_skipped_and_take_no_memory(experts: Experts) -> None:
    mask = torch.tensor([True, False, False, True, False, False, True, False])
    wrapper = loaded(experts, "AMXINT8", gpu_experts_mask=mask)
    one = sum(packed_bytes(METHODS["AMXINT8"].layout, hidden_size=H, intermediate_size=INNER))
    assert 5 * one <= wrapper.moe.bytes < 6 * one
    hidden, ids, weights = batch(20)
    output = wrapper.forward(hidden, ids, weights)
    assert relative_error(output, moe_reference(hidden, ids, weights, *experts, skip=mask)) < BOUNDS["AMXINT8"]


def test_every_expert_on_the_gpu_gives_zeros(experts: Experts) -> None:
    wrapper = loaded(experts, num_gpu_experts=E)
    hidden, ids, weights = batch(3)
    assert torch.count_nonzero(wrapper.forward(hidden, ids, weights)) == 0


def test_the_mask_is_read_at_every_forward(experts: Experts) -> None:
    wrapper = loaded(experts)
    hidden, ids, weights = batch(20)
    mask = torch.zeros(E, dtype=torch.bool)
    mask[[2, 5]] = True
    wrapper.gpu_experts_mask.copy_(mask)
    wanted = moe_reference(hidden, ids, weights, *experts, skip=mask)
    assert relative_error(wrapper.forward(hidden, ids, weights), wanted) < BOUNDS["AMXINT8"]
    wrapper.gpu_experts_mask.zero_()
    wanted = moe_reference(hidden, ids, weights, *experts)
    assert relative_error(wrapper.forward(hidden, ids, weights), wanted) < BOUNDS["AMXINT8"]


def test_an_expert_taken_off_the_gpu_without_weights_is_named(experts: Experts) -> None:
    wrapper = loaded(experts, num_gpu_experts=3)
    hidden, ids, weights = batch(4)
    wrapper.gpu_experts_mask[1] = False
    with pytest.raises(RuntimeError, match="expert 1 of layer 3 is not on the GPU and was not loaded"):
        wrapper.submit_forward(hidden, ids, weights)
    wrapper.gpu_experts_mask[1] = True
    # Through memory torch does not watch, as a C++ host would change it: the library itself finds it.
    wrapper.forward(hidden, ids, weights)
    wrapper.gpu_experts_mask.numpy()[1] = False
    wrapper.submit_forward(hidden, torch.full_like(ids, 1), weights)
    with pytest.raises(RuntimeError, match="expert 1"):
        wrapper.sync_forward(hidden)


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
    with pytest.raises(RuntimeError, match="moe_intermediate_size 40 must be multiples of 16"):
        loaded(random_experts(E, H, 40), moe_intermediate_size=40)


@pytest.mark.parametrize(
    ("path", "words"),
    [(None, "without weight_path"), ("/nowhere/at/all", "/nowhere/at/all does not exist")],
)
def test_a_missing_weight_path_is_named(path: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(weight_path=path).load_weights(torch.arange(E))


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

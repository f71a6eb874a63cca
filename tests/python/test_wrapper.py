"""KTMoEWrapper: what it computes, against a torch MoE, and which experts it holds."""

from __future__ import annotations

import pytest
import torch
from checkpoints import Experts, random_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BOUNDS, moe_reference, relative_error
from wrapper_cases import INNER, METHOD_NAMES, E, H, K, batch, loaded

from kt_kernel import KTMoEWrapper
from kt_kernel.experts import packed_bytes
from kt_kernel.methods import METHODS


@pytest.fixture(scope="module")
def experts() -> Experts:
    return random_experts(E, H, INNER)


@pytest.fixture(scope="module")
def int8(experts: Experts) -> KTMoEWrapper:
    return loaded(experts)


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
    one = sum(packed_bytes((METHODS["AMXINT8"].layout,) * 2, hidden_size=H, intermediate_size=INNER))
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

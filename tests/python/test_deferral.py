"""Deferral through KTMoEWrapper: bit for bit against layers that do not defer, given the ids of each part."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from checkpoints import Experts, random_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BOUNDS, moe_reference, relative_error
from torch import Tensor
from wrapper_cases import INNER, H, make

from kt_kernel import KTMoEWrapper, layer_chain
from kt_kernel.deferral import select_deferred_experts

E, K = 10, 4
LAYERS = (1, 3, 4, 9)  # MoE layers of a model that has dense ones between them


@pytest.fixture(scope="module")
def weights() -> dict[int, Experts]:
    return {layer_idx: random_experts(E, H, INNER, seed=layer_idx) for layer_idx in (*LAYERS, 0, 2)}


def make_layer(layer_idx: int, weights: dict[int, Experts], deferred: int, **changes) -> KTMoEWrapper:
    changes = {"num_experts": E, "num_experts_per_tok": K, **changes}
    wrapper = make("AMXINT8", layer_idx=layer_idx, max_deferred_experts_per_token=deferred, **changes)
    wrapper.load_weights_from_tensors(*weights[layer_idx])
    return wrapper


def make_model(weights: dict[int, Experts], deferred: int, layers=LAYERS, **changes) -> list[KTMoEWrapper]:
    return [make_layer(layer_idx, weights, deferred, **changes) for layer_idx in layers]


@pytest.fixture(scope="module")
def plain(weights) -> dict[int, KTMoEWrapper]:
    """Layers that defer nothing."""
    return {layer_idx: make_layer(layer_idx, weights, 0) for layer_idx in weights}


def batch(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator).to(dtype)
    ids = torch.rand(tokens, E, generator=generator).argsort(dim=1)[:, :K].contiguous()
    return hidden, ids, torch.rand(tokens, K, generator=generator) + 0.1


def split(ids: Tensor, weights: Tensor, deferred: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the ids computed now and the ids computed later, by the words of the rule."""
    protected = set()
    for token_ids, token_weights in zip(ids.tolist(), weights.tolist(), strict=True):
        slots = [slot for slot in range(len(token_ids)) if token_ids[slot] >= 0]
        slots.sort(key=lambda slot: (-token_weights[slot], slot))
        protected |= {token_ids[slot] for slot in slots[: max(len(token_ids) - deferred, 0)]}
    here = torch.tensor([expert >= 0 and not (mask is not None and mask[expert]) for expert in ids.flatten().tolist()])
    first = torch.tensor([expert in protected for expert in ids.flatten().tolist()])
    here, first = here.reshape(ids.shape), first.reshape(ids.shape)
    return ids.where(here & first, -1), ids.where(here & ~first, -1)


def run(wrapper: KTMoEWrapper, inputs: tuple[Tensor, Tensor, Tensor], form: str = "forward") -> Tensor:
    if form == "forward":
        return wrapper.forward(*inputs)
    copies = [tensor.clone() for tensor in inputs]
    wrapper.submit_forward(*copies)
    for tensor in copies:  # the deferred part must not see it
        tensor.fill_(3)
    return wrapper.sync_forward(inputs[0])


def dropped(model: list[KTMoEWrapper]) -> int:
    return sum(wrapper.moe.counters()["dropped_shares"] for wrapper in model)


def check_pass(model: list[KTMoEWrapper], plain, tokens: int, deferred: int, form: str = "forward", seed: int = 0):
    """Run a pass; every layer must give its own part plus what the one before deferred."""
    carried = torch.zeros(tokens, H)
    for position, wrapper in enumerate(model):
        hidden, ids, scales = batch(tokens, seed + wrapper.layer_idx)
        now, later = split(ids, scales, deferred if position + 1 < len(model) else 0)
        alone = plain[wrapper.layer_idx]
        found = run(wrapper, (hidden, ids, scales), form)
        assert torch.equal(found, alone.forward(hidden, now, scales) + carried), (tokens, wrapper.layer_idx)
        carried = alone.forward(hidden, later, scales)


@pytest.mark.parametrize("form", ["forward", "submit"])
@pytest.mark.parametrize("deferred", [0, 1, 3, K, K + 5])
def test_every_layer_adds_what_the_one_before_deferred(weights, plain, deferred: int, form: str) -> None:
    model = make_model(weights, deferred)
    for tokens in (1, 2, 30, 1):
        check_pass(model, plain, tokens, deferred, form, seed=tokens)
    counters = [wrapper.moe.counters() for wrapper in model]
    assert [each["deferred_rows"] > 0 for each in counters] == [deferred > 0] * 3 + [False]
    assert all(each["forwards"] == 4 and each["tokens"] == 34 and each["rows"] == 34 * K for each in counters)
    assert all(int(each["expert_counts"].sum()) == 34 * K for each in counters)
    assert dropped(model) == 0


def test_nothing_is_lost_and_nothing_computed_twice(weights) -> None:
    """The sum of all layers' outputs is that of the model without deferral, up to the bounds of the method."""
    model = make_model(weights, 2)
    found, wanted = 0, 0
    for wrapper in model:
        hidden, ids, scales = batch(1, wrapper.layer_idx)
        found = found + wrapper.forward(hidden, ids, scales)
        wanted = wanted + moe_reference(hidden, ids, scales, *weights[wrapper.layer_idx])
    assert relative_error(found, wanted) < BOUNDS["AMXINT8"]


def test_a_share_is_rounded_once(weights, plain) -> None:
    first, last = make_model(weights, K, layers=(1, 3))
    hidden, ids, scales = batch(2, dtype=torch.bfloat16)
    assert not run(first, (hidden, ids, scales)).any()
    both = plain[1].forward(hidden.float(), ids, scales) + plain[3].forward(hidden.float(), ids, scales)
    assert torch.equal(run(last, (hidden, ids, scales)), both.bfloat16())


weights_of_slots = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # many ties


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(
        st.lists(st.tuples(st.integers(-1, E - 1), weights_of_slots), min_size=K, max_size=K), min_size=1, max_size=4
    ),
    deferred=st.integers(1, K + 1),
    on_gpu=st.sets(st.integers(0, E - 1)),
    narrow=st.booleans(),
)
def test_absent_ids_masks_and_ties(weights, plain, slots, deferred: int, on_gpu: set[int], narrow: bool) -> None:
    mask = torch.tensor([expert in on_gpu for expert in range(E)])
    layer_chain._latest.clear()
    first, last = make_model(weights, deferred, layers=(1, 3))
    for wrapper in (first, last):
        wrapper.gpu_experts_mask[:] = mask
    ids = torch.tensor([[expert for expert, _ in row] for row in slots])
    scales = torch.tensor([[weight for _, weight in row] for row in slots])
    now, later = split(ids, scales, deferred, mask)
    hidden = batch(len(slots))[0]
    given_ids = ids.int() if narrow else ids
    assert torch.equal(first.forward(hidden, given_ids, scales), plain[1].forward(hidden, now, scales))
    everything, _ = split(ids, scales, 0, mask)
    wanted = plain[3].forward(hidden, everything, scales) + plain[1].forward(hidden, later, scales)
    assert torch.equal(last.forward(hidden, given_ids, scales), wanted)

    # the same rule in torch, which knows no mask
    now, later = split(ids, scales, deferred)
    in_torch = select_deferred_experts(given_ids, scales, K - deferred)
    assert torch.equal(in_torch[0].long(), now) and torch.equal(in_torch[1].long(), later)


def test_an_aborted_pass_leaves_nothing_to_the_next(weights, plain) -> None:
    model = make_model(weights, 2)
    run(model[0], batch(3, 1))
    run(model[1], batch(3, 2), "submit")
    check_pass(model, plain, 3, 2)
    assert dropped(model) == 1
    run(model[0], batch(3, 1))
    check_pass(model, plain, 1, 2)
    assert dropped(model) == 2


def test_a_share_is_for_the_same_number_of_tokens_and_the_next_layer(weights, plain) -> None:
    model = make_model(weights, 2)
    for position, tokens in ((1, 2), (1, 4), (2, 3), (3, 3), (0, 3)):
        run(model[0], batch(3, 1))
        hidden, ids, scales = batch(tokens, 9)
        wrapper = model[position]
        now, _ = split(ids, scales, 0 if position == 3 else 2)
        assert torch.equal(run(wrapper, (hidden, ids, scales)), plain[wrapper.layer_idx].forward(hidden, now, scales))
    assert dropped(model) == 5 + 3  # and those of 1, 1 and 2, which the next round's layer 0 found; 3 defers nothing


def test_no_tokens(weights, plain) -> None:
    model = make_model(weights, 2)
    for wrapper in model:
        assert run(wrapper, batch(0)).shape == (0, H)
    check_pass(model, plain, 2, 2)
    assert dropped(model) == 0


def test_a_failed_forward_leaves_nothing(weights, plain) -> None:
    model = make_model(weights, 2)
    hidden, ids, scales = batch(2)
    ids[1, 0] = E
    run(model[0], batch(2))
    for form in ("forward", "submit"):
        with pytest.raises((ValueError, RuntimeError), match=f"layer 3: topk_ids.*{E}"):
            run(model[1], (hidden, ids, scales), form)
    check_pass(model, plain, 2, 2)
    assert dropped(model) == 0


def test_two_models_at_the_same_time(weights, plain) -> None:
    """Two instances of one checkpoint, made one after the other; their passes alternate layer by layer."""
    first, second = make_model(weights, 2), make_model(weights, 2)
    carried = {}
    for position, layer_idx in enumerate(LAYERS):
        for name, model in (("first", first), ("second", second)):
            hidden, ids, scales = batch(2, 10 * layer_idx + len(name))
            now, later = split(ids, scales, 2 if position < 3 else 0)
            wanted = plain[layer_idx].forward(hidden, now, scales) + carried.get(name, 0)
            carried[name] = plain[layer_idx].forward(hidden, later, scales)
            assert torch.equal(run(model[position], (hidden, ids, scales)), wanted)
    assert dropped([*first, *second]) == 0


def test_a_draft_model_is_apart(weights, plain) -> None:
    """A draft's layer 0 is made after the target's last layer and is not the predecessor of the target's first."""
    model = make_model(weights, 2)
    draft = make_layer(0, weights, 2)
    hidden, ids, scales = batch(1)
    assert torch.equal(draft.forward(hidden, ids, scales), plain[0].forward(hidden, ids, scales))
    check_pass(model, plain, 1, 2)
    assert [wrapper.moe.layer.chain_position for wrapper in (*model, draft)] == [0, 1, 2, 3, 0]


def test_layers_made_after_a_forward_are_another_model(weights) -> None:
    first = make_layer(1, weights, 2)
    run(first, batch(1))
    second = make_layer(3, weights, 2)
    run(first, batch(1))
    run(second, batch(1))
    assert first._chain is not second._chain
    assert first.moe.layer.max_deferred == second.moe.layer.max_deferred == 0


@pytest.mark.parametrize("change", [{"num_experts_per_tok": 2}, {"method": "BF16"}, {"weight_path": "/elsewhere"}])
def test_other_sizes_are_another_model(change: dict) -> None:
    arguments = {"num_experts": E, "num_experts_per_tok": K, "method": "AMXINT8"}
    assert make(**arguments, layer_idx=1)._chain is not make(**{**arguments, **change}, layer_idx=2)._chain


def test_models_made_by_turns_can_be_named(weights, plain) -> None:
    models = []
    for _ in range(2):
        with layer_chain.one_model():
            models.append(make_model(weights, 2))
            with pytest.raises(ValueError, match="layer 9 is made out of order"):
                make_layer(9, weights, 2)
    beside = make_layer(9, weights, 2)
    assert len({id(wrapper._chain) for wrapper in (models[0][0], models[1][0], beside)}) == 3
    for model in models:
        check_pass(model, plain, 2, 2)


def test_layers_with_new_weights_are_linked_anew(weights, plain) -> None:
    model = make_model(weights, 2)
    check_pass(model, plain, 2, 2)
    for wrapper in (model[1], model[3]):
        wrapper.load_weights_from_tensors(*weights[wrapper.layer_idx])
    check_pass(model, plain, 2, 2)
    assert [wrapper.moe.layer.chain_position for wrapper in model] == [0, 1, 2, 3]


def test_layers_that_are_gone_get_nothing(weights, plain) -> None:
    model = make_model(weights, 2)
    check_pass(model, plain, 2, 2)
    del model[1]
    gc.collect()
    check_pass(model, plain, 2, 2)
    del model[2]  # the last one: its predecessor defers no more
    gc.collect()
    check_pass(model, plain, 2, 2)
    assert dropped(model) == 0


def test_a_layer_may_go_while_its_second_part_is_queued(weights) -> None:
    for _ in range(20):
        model = make_model(weights, 2, layers=(1, 3))
        inputs = batch(20)
        model[0].submit_forward(*inputs)
        output = model[0].sync_forward(inputs[0])
        del model, output


def test_off_by_default(weights) -> None:
    model = make_model(weights, 0, layers=(1, 3))
    assert make().max_deferred_experts_per_token == 0
    for wrapper in model:
        run(wrapper, batch(1))
        assert (wrapper.moe.layer.chain_position, wrapper.moe.layer.max_deferred) == (0, 0)


def test_one_line_says_what_it_does(weights, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kt_kernel"):
        model = make_model(weights, 2)
        for _ in range(2):
            for wrapper in model:
                run(wrapper, batch(1))
    lines = [record.getMessage() for record in caplog.records if "deferral" in record.getMessage()]
    assert len(lines) == 1
    assert "of 4 experts a token, up to 2 are added one MoE layer later, in 3 of 4 layers" in lines[0]
    assert ("saves no time" in lines[0]) == (not torch.cuda.is_available())

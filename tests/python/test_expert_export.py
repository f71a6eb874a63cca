"""What SGLang's fork calls besides forwards: write buffers, changed placement, the split of deferral, buffer caches."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoints import Experts, random_experts, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from wrapper_cases import INNER, METHOD_NAMES, E, H, K, batch, loaded, make

from kt_kernel import KTMoEWrapper, loader
from kt_kernel.deferral import select_deferred_experts
from kt_kernel.experts import packed_bytes
from kt_kernel.methods import METHODS

LAYER = 3


@pytest.fixture(scope="module")
def experts() -> Experts:
    return random_experts(E, H, INNER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, experts: Experts) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), {LAYER: experts})


def mask_of(*on_gpu: int) -> torch.Tensor:
    mask = torch.zeros(E, dtype=torch.bool)
    mask[list(on_gpu)] = True
    return mask


def from_folder(folder: Path, method: str = "BF16", mapping: torch.Tensor | None = None, **changes) -> KTMoEWrapper:
    wrapper = make(method, weight_path=str(folder), layer_idx=LAYER, **changes)
    wrapper.load_weights(mapping)
    return wrapper


# --- write buffers ---


class Buffers:
    """Buffers of all ranks, filled with what no weight is."""

    def __init__(self, ranks: int) -> None:
        self.w13 = [torch.full((2 * INNER // ranks, H), torch.nan, dtype=torch.bfloat16) for _ in range(ranks)]
        self.w2 = [torch.full((H, INNER // ranks), torch.nan, dtype=torch.bfloat16) for _ in range(ranks)]

    def submit(self, wrapper: KTMoEWrapper, expert: int, **changes) -> None:
        ranks = len(self.w13)
        arguments = {
            "gpu_tp_count": ranks,
            "expert_id": expert,
            "w13_weight_ptrs": [tensor.data_ptr() for tensor in self.w13],
            "w13_scale_ptrs": [0] * ranks,
            "w2_weight_ptrs": [tensor.data_ptr() for tensor in self.w2],
            "w2_scale_ptrs": [0] * ranks,
        }
        # by position, as the fork does
        wrapper.submit_write_weight_scale_to_buffer(*{**arguments, **changes}.values())

    def untouched(self) -> bool:
        return all(bool(tensor.isnan().all()) for tensor in self.w13 + self.w2)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up and down, put together from the ranks."""
        halves = [tensor.chunk(2) for tensor in self.w13]
        gate, up = (torch.cat([half[i] for half in halves]) for i in range(2))
        return gate, up, torch.cat(self.w2, dim=1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_experts_are_written_for_every_rank(experts: Experts, method: str, ranks: int) -> None:
    mapping = torch.arange(E - 1, -1, -1)
    wrapper = loaded(experts, method, mapping)
    slots = [Buffers(ranks), Buffers(ranks)]
    layout = METHODS[method].layout
    for expert in range(E):
        # two experts under way, as the fork's double buffer has it
        slots[expert % 2].submit(wrapper, expert)
        if expert % 2:
            wrapper.sync_write_weight_scale_to_buffer()
            for written in (expert - 1, expert):
                found = slots[written % 2].whole()
                logical = int(mapping[written])
                if method == "BF16":
                    wanted = tuple(weights[logical] for weights in experts)
                else:
                    w13, w2 = wrapper.moe.export_packed(written)
                    gate, up = torch.ops.kt_kernel.dequantize_w13(w13, layout, INNER, H)
                    wanted = (gate, up, torch.ops.kt_kernel.dequantize(w2, layout, H, INNER))
                for name, a, b in zip(("gate", "up", "down"), found, wanted, strict=True):
                    assert torch.equal(a, b.bfloat16()), (written, name)
    wrapper.sync_write_weight_scale_to_buffer()  # nothing under way: nothing to wait for


def test_writes_and_forwards_share_the_pool(experts: Experts) -> None:
    wrapper = loaded(experts, "BF16")
    hidden, ids, weights = batch(64)
    wanted = wrapper.forward(hidden, ids, weights)
    buffers = [Buffers(2) for _ in range(E)]
    for expert in range(E):
        wrapper.submit_forward(hidden, ids, weights)
        buffers[expert].submit(wrapper, expert)
    results = [wrapper.sync_forward(hidden) for _ in range(E)]
    wrapper.sync_write_weight_scale_to_buffer()
    assert all(torch.equal(result, wanted) for result in results)
    assert all(torch.equal(buffers[e].whole()[2], experts.down[e]) for e in range(E))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu_tp_count": 0}, "gpu_tp_count is 0; it must be an integer of at least 1"),
        ({"gpu_tp_count": 5}, "gpu_tp_count is 5; the intermediate size 96 cannot be cut into so many equal parts"),
        ({"gpu_tp_count": 3}, "w13_weight_ptrs has 2 addresses; it must have one for each of 3 ranks"),
        ({"expert_id": E}, "expert_id is 8; layer 3 has experts 0 to 7"),
        ({"expert_id": -1}, "expert_id is -1; layer 3 has experts 0 to 7"),
        ({"w13_weight_ptrs": [0, 0]}, r"w13_weight_ptrs is \[0, 0\]; 0 is no address of host memory"),
        ({"w2_weight_ptrs": [64]}, "w2_weight_ptrs has 1 addresses; it must have one for each of 2 ranks"),
        ({"w2_weight_ptrs": [4096, 4098]}, "two buffers of expert 1 overlap; give every rank memory of its own"),
        ({"w2_weight_ptrs": [4097, 1 << 30]}, "a w2 buffer is at address 4097; .* at a multiple of 2"),
        ({"w13_scale_ptrs": [0, 64]}, r"w13_scale_ptrs is \[0, 64\]; give an address for each of 2 ranks, or 0"),
        ({"w2_scale_ptrs": [0]}, r"w2_scale_ptrs is \[0\]; give an address for each of 2 ranks, or 0 for each"),
        ({"w2_scale_ptrs": [64, 128]}, "one of w13_scale_ptrs and w2_scale_ptrs has addresses; give both"),
        (
            {"w13_scale_ptrs": [64, 128], "w2_scale_ptrs": [192, 256]},
            "int8_n64k4_r512_v1, which are written without scales only; give scale addresses of 0",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(experts: Experts, changes: dict, words: str) -> None:
    wrapper = loaded(experts, "AMXINT8")
    buffers = Buffers(2)
    with pytest.raises((ValueError, RuntimeError), match=words):
        buffers.submit(wrapper, 1, **changes)
    wrapper.sync_write_weight_scale_to_buffer()
    assert buffers.untouched()


def test_an_expert_without_weights_cannot_be_written(experts: Experts) -> None:
    buffers = Buffers(1)
    with pytest.raises(RuntimeError, match="layer 3 has no weights yet; call load_weights first"):
        buffers.submit(make("BF16"), 1)
    wrapper = loaded(experts, "BF16", gpu_experts_mask=mask_of(1))
    with pytest.raises(RuntimeError, match="layer 3: expert 1 is not on the CPU and cannot be written"):
        buffers.submit(wrapper, 1)
    buffers.submit(wrapper, 2)
    wrapper.load_weights_from_tensors(*experts)  # waits for the write, which names the old memory
    assert torch.equal(buffers.whole()[0], experts.gate[2])


def test_writing_an_expert_of_the_gpu_loads_what_is_missing(folder: Path, experts: Experts) -> None:
    """The fork writes every expert of the layer, those of the GPU included."""
    wrapper = from_folder(folder, gpu_experts_mask=mask_of(1, 6))
    buffers = Buffers(1)
    buffers.submit(wrapper, 6)
    wrapper.sync_write_weight_scale_to_buffer()
    assert torch.equal(buffers.whole()[1], experts.up[6])
    assert wrapper.load_missing_experts() == []


# --- placement that changes ---


def test_experts_are_loaded_when_the_mask_gives_them_to_the_cpu(
    folder: Path, experts: Experts, caplog: pytest.LogCaptureFixture
) -> None:
    mapping = torch.roll(torch.arange(E), 3)
    wrapper = from_folder(folder, mapping=mapping, gpu_experts_mask=mask_of(0, 4, 5))
    one = sum(packed_bytes((METHODS["BF16"].layout,) * 2, hidden_size=H, intermediate_size=INNER))
    # matrices begin on a page of their own: two matrices, less than a page each
    assert 5 * one <= wrapper.moe.bytes <= 5 * (one + 8192)
    everything = loaded(experts, "BF16", mapping)
    hidden, ids, weights = batch(40)
    with caplog.at_level(logging.INFO, "kt_kernel.loader"):
        for on_gpu in ((0, 4, 5), (0, 1, 5), (0, 1, 2), (), (3,)):
            wrapper.gpu_experts_mask.copy_(mask_of(*on_gpu))
            everything.gpu_experts_mask.copy_(mask_of(*on_gpu))
            assert torch.equal(wrapper.forward(hidden, ids, weights), everything.forward(hidden, ids, weights))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(", 0.")[0] for line in lines] == [
        "layer 3: loaded 1 more experts for the CPU (4)",
        "layer 3: loaded 1 more experts for the CPU (5)",
        "layer 3: loaded 1 more experts for the CPU (0)",
    ]
    assert 8 * one <= wrapper.moe.bytes <= 8 * (one + 8192)


def test_a_submitted_forward_loads_them_too(folder: Path, experts: Experts) -> None:
    wrapper = from_folder(folder, num_gpu_experts=4)
    hidden, ids, weights = batch(9)
    wrapper.submit_forward(hidden, ids, weights)
    wrapper.gpu_experts_mask.fill_(False)
    wrapper.submit_forward(hidden, ids, weights)
    everything = loaded(experts, "BF16", num_gpu_experts=4)
    assert torch.equal(wrapper.sync_forward(hidden), everything.forward(hidden, ids, weights))
    assert torch.equal(wrapper.sync_forward(hidden), loaded(experts, "BF16").forward(hidden, ids, weights))


def test_a_caller_announces_the_change_before_a_replay(folder: Path) -> None:
    wrapper = from_folder(folder, num_gpu_experts=3)
    assert wrapper.load_missing_experts() == []
    # through memory, as C code would: torch does not see it
    wrapper.gpu_experts_mask.numpy()[1] = False
    assert wrapper.load_missing_experts() == [1]
    hidden, ids, weights = batch(9)
    assert wrapper.forward(hidden, ids, weights).isfinite().all()


def test_experts_from_tensors_cannot_be_loaded_later(experts: Experts) -> None:
    wrapper = loaded(experts, "BF16", num_gpu_experts=3)
    wrapper.gpu_experts_mask[1] = False
    for call in (wrapper.load_missing_experts, lambda: wrapper.forward(*batch(1))):
        with pytest.raises(RuntimeError, match="expert 1 of layer 3 is not on the GPU and was not loaded here"):
            call()


@pytest.mark.parametrize("value", ["1", "0"])
def test_all_experts_are_hosted_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("KT_HOST_ALL_EXPERTS", value)
    wrapper = from_folder(folder, num_gpu_experts=3)
    wrapper.gpu_experts_mask.fill_(False)
    assert wrapper.load_missing_experts() == ([] if value == "1" else [0, 1, 2])
    monkeypatch.setenv("KT_HOST_ALL_EXPERTS", "yes")
    with pytest.raises(ValueError, match="KT_HOST_ALL_EXPERTS='yes' is neither 0 nor 1; unset it or give 1"):
        from_folder(folder)


# --- deferral ---


def split_by_hand(ids: list[list[int]], weights: list[list[float]], protected_k: int) -> tuple[list, list]:
    protected = set()
    for row, scores in zip(ids, weights, strict=True):
        slots = sorted((s for s in range(len(row)) if row[s] >= 0), key=lambda s: (-scores[s], s))
        protected |= {row[s] for s in slots[: max(protected_k, 0)]}
    now = [[e if e in protected else -1 for e in row] for row in ids]
    later = [[-1 if e in protected else e for e in row] for row in ids]
    return now, later


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda k: st.lists(st.lists(st.tuples(st.integers(-1, 6), st.integers(0, 4)), min_size=k, max_size=k))
    ),
    protected_k=st.integers(-1, 6),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_the_split_of_deferral(rows: list, protected_k: int, dtype: torch.dtype) -> None:
    top_k = len(rows[0]) if rows else 2
    ids = [[expert for expert, _ in row] for row in rows]
    weights = [[weight / 4 for _, weight in row] for row in rows]
    shape = (len(rows), top_k)
    tensors = torch.tensor(ids, dtype=dtype).view(shape), torch.tensor(weights, dtype=torch.float32).view(shape)
    now, later = KTMoEWrapper.select_deferred_experts(*tensors, protected_k)
    assert now.dtype == later.dtype == dtype
    assert (now.tolist(), later.tolist()) == split_by_hand(ids, weights, protected_k)


def test_the_split_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"topk_ids has shape \[2, 2\] and topk_weights \[2, 3\]"):
        select_deferred_experts(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match="topk_ids is torch.float32; it must be an integer type"):
        select_deferred_experts(torch.zeros(2, 2), torch.zeros(2, 2), 1)


# --- caches ---


def test_caches_can_be_dropped(folder: Path) -> None:
    wrapper = from_folder(folder, num_gpu_experts=3)
    assert loader._sources
    assert KTMoEWrapper.force_release_loader() is None
    assert not loader._sources
    assert KTMoEWrapper.clear_sft_buffer_cache() is None
    assert KTMoEWrapper.clear_buffer_cache() is None
    wrapper.gpu_experts_mask.fill_(False)
    hidden, ids, weights = batch(4, top_k=K)
    assert wrapper.forward(hidden, ids, weights).isfinite().all()  # opened again

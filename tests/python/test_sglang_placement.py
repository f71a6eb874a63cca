"""Expert ids under a location map, against stand-ins of SGLang's routers that remap, do not, or do it wrong."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kt_kernel.integrations.sglang import expert_counts, layers, placement
from kt_kernel.placement.record import read_halves, read_record

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 6, 2
# Neither map is its own inverse, so that applying it twice, or backwards, shows.
CYCLE = torch.tensor([[1, 2, 3, 4, 5, 0], [2, 0, 1, 4, 5, 3], [0, 1, 2, 3, 4, 5]])


@dataclass
class Metadata:
    """The fields of SGLang's ExpertLocationMetadata that matter."""

    physical_to_logical_map: Tensor
    physical_to_logical_map_cpu: Tensor
    logical_to_all_physical_map: Tensor
    logical_to_all_physical_map_cpu: Tensor
    logical_to_all_physical_map_num_valid: Tensor
    logical_to_rank_dispatch_physical_map: Tensor | None
    num_layers: int = NUM_LAYERS
    num_logical_experts: int = NUM_EXPERTS
    num_physical_experts: int = NUM_EXPERTS


def metadata_of(location: Tensor) -> Metadata:
    to_slots = torch.full((*location.shape, NUM_EXPERTS), -1)
    to_slots[:, :, 0] = location.argsort(1)
    return Metadata(location, location, to_slots, to_slots, torch.ones_like(location), None)


class Output(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor


class Experts(nn.Module):
    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id


class Recorder:
    """SGLang's ExpertDistributionRecorder while it records."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._disabled = False

    @contextmanager
    def disable_this_region(self) -> Iterator[None]:
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def on_select_experts(self, topk_ids: Tensor) -> None:
        self.num_tokens += 0 if self._disabled else len(topk_ids)


class Router(nn.Module):
    """A TopK that applies the map in force `times` times, as releases do (0 or 1) and as none may (2)."""

    times = 0

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id

    def plain_forward(self, hidden_states: Tensor, router_logits: Tensor, **_kwargs: Any) -> Output:
        weights, ids = router_logits.topk(TOP_K, dim=-1)
        for _ in range(self.times):
            ids = placement_modules().current.logical_to_all_physical_map[self.layer_id][ids, 0]
        placement_modules().recorder.on_select_experts(ids)
        return Output(weights, ids.int())

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        return placement.route(Router.plain_forward, self, *args, **kwargs)


class Layer(nn.Module):
    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.topk = Router(layer_id)
        self.experts = Experts(layer_id)


def placement_modules() -> Any:
    return sys.modules["sglang.srt.eplb.expert_location"]


@pytest.fixture()
def sglang_with_map(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand-ins of SGLang's modules, CYCLE in force; returns the module that holds it as `current`."""
    names = (
        "sglang", "sglang.srt", "sglang.srt.eplb", "sglang.srt.eplb.expert_location",
        "sglang.srt.eplb.expert_location_dispatch", "sglang.srt.eplb.expert_distribution", "sglang.srt.layers",
        "sglang.srt.layers.moe",
        "sglang.srt.layers.moe.topk", "sglang.srt.layers.moe.fused_moe_triton",
        "sglang.srt.layers.moe.fused_moe_triton.layer", "sglang.srt.runtime_context",
    )  # fmt: skip
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(modules[parent], child, module)
    location = modules["sglang.srt.eplb.expert_location"]
    location.current = metadata_of(CYCLE)
    location.get_global_expert_location_metadata = lambda: location.current

    def set_metadata(value: Any, allow_overwrite: bool = False) -> None:
        location.current = value

    location.set_global_expert_location_metadata = set_metadata

    class Info(SimpleNamespace):
        @classmethod
        def init_new(cls, layer_id: int) -> Any:
            return cls(partial_logical_to_all_physical_map=location.current.logical_to_all_physical_map[layer_id])

    location.recorder = Recorder()
    modules["sglang.srt.eplb.expert_distribution"].get_global_expert_distribution_recorder = lambda: location.recorder
    dispatch = modules["sglang.srt.eplb.expert_location_dispatch"]
    dispatch.ExpertLocationDispatchInfo = Info
    dispatch.topk_ids_logical_to_physical = lambda ids, info: info.partial_logical_to_all_physical_map[ids, 0].to(
        ids.dtype
    )
    modules["sglang.srt.layers.moe.topk"].TopK = Router
    modules["sglang.srt.layers.moe.fused_moe_triton.layer"].FusedMoE = Experts
    return location


def model_of() -> nn.Module:
    return nn.Sequential(*(Layer(layer) for layer in range(NUM_LAYERS)))


def check_ids(model: nn.Module) -> None:
    """Every router gives the slots that hold the experts it chose."""
    logits = torch.randn(50, NUM_EXPERTS, generator=torch.Generator().manual_seed(3))
    for layer in model:
        ids = layer.topk(torch.zeros(50, 4), logits).topk_ids
        assert ids.dtype == torch.int32
        assert torch.equal(CYCLE[layer.topk.layer_id][ids.long()], logits.topk(TOP_K, dim=-1).indices)


@pytest.mark.parametrize(("times", "remapped"), [(0, NUM_LAYERS), (1, 0)])
def test_ids_become_slots_once(
    sglang_with_map: Any, monkeypatch: pytest.MonkeyPatch, times: int, remapped: int
) -> None:
    monkeypatch.setattr(Router, "times", times)
    model = model_of()
    assert placement.install(model, sglang_with_map.current) == remapped
    check_ids(model)
    assert torch.equal(sglang_with_map.current.physical_to_logical_map, CYCLE), "the map in force is back"


def test_the_tokens_of_the_trial_are_not_recorded(sglang_with_map: Any) -> None:
    """SGLang's recorder may record since the start (``--expert-balancedness-report-mode``)."""
    model = model_of()
    placement.install(model, sglang_with_map.current)
    assert sglang_with_map.recorder.num_tokens == 0
    check_ids(model)
    assert sglang_with_map.recorder.num_tokens == 50 * NUM_LAYERS, "what comes later is recorded"


def test_a_remap_applied_twice_is_found(sglang_with_map: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a release that remaps is taken for one that does not, so both do it."""
    monkeypatch.setattr(Router, "times", 1)
    model = model_of()
    for layer in model:
        setattr(layer.topk, placement.REMAP_ATTRIBUTE, layer.topk.layer_id)
    with pytest.raises(AssertionError):
        check_ids(model)
    with pytest.raises(placement.LocationError, match="under a map that shifts each by one slot"):
        placement.install(model, sglang_with_map.current)


def test_a_hook_that_is_gone_is_found(sglang_with_map: Any) -> None:
    """Planted: a model that puts another function in the place of its router's forward."""
    model = model_of()
    router = model[1].topk
    router.forward = lambda *args, **kwargs: Router.plain_forward(router, *args, **kwargs)
    with pytest.raises(placement.LocationError, match="the ids of layer 1 do not become slots"):
        placement.install(model, sglang_with_map.current)


def test_ids_in_two_places_are_refused(sglang_with_map: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that packs the ids once more for a kernel of its own: only one of the two would be turned."""
    packed = namedtuple("packed", ["topk_weights", "topk_ids", "packed_ids"])
    plain = Router.plain_forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        return packed(output.topk_weights, output.topk_ids, output.topk_ids)

    monkeypatch.setattr(Router, "plain_forward", forward)
    with pytest.raises(placement.LocationError, match="also gives packed_ids"):
        placement.install(model_of(), sglang_with_map.current)


def test_a_router_that_remaps_when_asked_is_left_alone(sglang_with_map: Any) -> None:
    """Paths that pass the map themselves (expert parallelism) are SGLang's."""
    model = model_of()
    placement.install(model, sglang_with_map.current)
    logits = torch.randn(4, NUM_EXPERTS)
    output = model[0].topk(torch.zeros(4, 4), logits, expert_location_dispatch_info=object())
    assert torch.equal(output.topk_ids.long(), logits.topk(TOP_K, dim=-1).indices)


def test_layers_loaded_by_number_keep_their_ids(sglang_with_map: Any) -> None:
    """Draft layers, in releases that load them without the map, and rows the map does not have."""
    model = model_of()
    model[0].experts.uses_expert_location = False
    model[1].experts.layer_id = NUM_LAYERS
    assert placement.install(model, sglang_with_map.current) == 1
    assert hasattr(model[2].topk, placement.REMAP_ATTRIBUTE)


def test_unknown_routers_are_refused_with_cpu_experts_only(
    sglang_with_map: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    model[1].topk = nn.Identity()
    runner = SimpleNamespace(model=model)
    monkeypatch.setattr(layers, "_methods", [])
    with caplog.at_level("WARNING", logger="kt_kernel"):
        placement.after_load_model(None, runner)
    assert "1 has 0 routers of SGLang's class TopK beside its experts" in caplog.text
    monkeypatch.setattr(layers, "_methods", [object()])
    with pytest.raises(RuntimeError, match="beside its experts; remove --init-expert-location"):
        placement.after_load_model(None, runner)


def test_without_a_map_nothing_is_tried(sglang_with_map: Any) -> None:
    runner = SimpleNamespace(model=None)
    sglang_with_map.current = None
    placement.after_load_model(None, runner)
    sglang_with_map.current = metadata_of(torch.arange(NUM_EXPERTS).expand(NUM_LAYERS, -1))
    placement.after_load_model(None, runner)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(0, 5), layer=st.integers(0, NUM_LAYERS - 1))
def test_rows_without_an_expert_stay_so(sglang_with_map: Any, seed: int, tokens: int, layer: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, NUM_EXPERTS + 1, (tokens, TOP_K), generator=generator)  # -1: padding; 6: a shared expert
    before = ids.clone()
    slots = placement.slots_of(ids, layer)
    assert torch.equal(ids, before)
    routed = (ids >= 0) & (ids < NUM_EXPERTS)
    assert torch.equal(slots[~routed], ids[~routed])
    assert torch.equal(CYCLE[layer][slots[routed]], ids[routed])


def test_a_class_without_locations_is_refused(sglang_with_map: Any) -> None:
    args = SimpleNamespace(kt_weight_path="W", init_expert_location="map.pt")
    sys.modules["sglang.srt.runtime_context"].get_server_args = lambda: args  # type: ignore[attr-defined]
    placement.check_location_is_used(nn.Linear(1, 1))
    sglang_with_map.current = None
    with pytest.raises(RuntimeError, match="--init-expert-location has no effect on Linear"):
        placement.check_location_is_used(nn.Linear(1, 1))
    args.init_expert_location = "trivial"
    placement.check_location_is_used(nn.Linear(1, 1))


# Recording.


class Counting:
    """Totals that grow, and a recorder of them."""

    def __init__(self, path: Path) -> None:
        self.totals = torch.zeros(2, 3, dtype=torch.int64)
        self.recorder = expert_counts.Recorder(path, lambda: self.totals.clone(), torch.zeros(2, 3, dtype=torch.bool))

    def forward(self, layer: int, expert: int, number: int = 1) -> None:
        self.totals[layer, expert] += number
        self.recorder.after_forward()


def test_a_record_has_every_count_in_order(tmp_path: Path) -> None:
    path = tmp_path / "counts.pt"
    counting = Counting(path)
    counting.forward(0, 0, 1000)  # start-up: not in the record
    counting.recorder.write()
    assert not path.exists(), "nothing was counted yet"
    for step in range(10):
        counting.forward(0, step % 3)
    counting.recorder.write()
    counts, gpu = read_record(path)
    assert counts.sum(0).tolist() == [[4, 3, 3], [0, 0, 0]]
    assert counts.flatten(1).sum(1).tolist() == [4, 4, 2], "the last forwards are there although no snapshot is due"
    assert gpu is not None and not gpu.any()
    before = path.stat().st_mtime_ns
    counting.recorder.write()
    assert path.stat().st_mtime_ns == before, "an idle server writes nothing"
    counting.forward(1, 2, 5)
    counting.recorder.write()
    assert read_record(path)[0].sum(0).tolist() == [[4, 3, 3], [0, 0, 5]]


def test_a_snapshot_that_was_just_taken_is_written(tmp_path: Path) -> None:
    path = tmp_path / "counts.pt"
    counting = Counting(path)
    counting.forward(0, 0)
    for moved in ("monday.pt", "tuesday.pt"):
        for _ in range(expert_counts.SNAPSHOT_FORWARDS):
            counting.forward(0, 1)
        counting.recorder.write()
        assert read_record(path)[0].sum() == expert_counts.SNAPSHOT_FORWARDS
        path.rename(tmp_path / moved)
        counting.recorder.write()


def test_a_long_record_gets_coarser_and_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "counts.pt"
    counting = Counting(path)
    counting.forward(0, 0)
    number = 3000
    for step in range(number):
        counting.forward(0 if step < number // 2 else 1, 1)
    counting.recorder.write()
    counts, _ = read_record(path)
    assert 32 <= len(counts) <= expert_counts.MAX_SNAPSHOTS
    halves = read_halves([path])
    assert halves.total.tolist() == [[0, number // 2, 0], [0, number // 2, 0]]
    # a half is off by half a snapshot at most, and a snapshot is one of at least 32
    assert halves.first[1].sum() <= number / 32 and halves.second[0].sum() <= number / 32


def test_moving_the_file_away_starts_a_new_record(tmp_path: Path) -> None:
    path = tmp_path / "counts.pt"
    counting = Counting(path)
    counting.forward(0, 0)
    for _ in range(6):
        counting.forward(0, 1)
    counting.recorder.write()
    path.rename(tmp_path / "monday.pt")
    counting.recorder.write()
    assert not path.exists()
    for _ in range(5):
        counting.forward(1, 2)
    counting.recorder.write()
    assert read_record(tmp_path / "monday.pt")[0].sum(0).tolist() == [[0, 6, 0], [0, 0, 0]]
    assert read_record(path)[0].sum(0).tolist() == [[0, 0, 0], [0, 0, 5]]


def test_counts_go_on_when_the_weights_of_a_layer_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "counts.pt"
    counting = Counting(path)
    counting.forward(0, 0)
    for _ in range(6):
        counting.forward(0, 1)
        counting.forward(1, 2)
    counting.recorder.write()
    counting.totals[0] = 0  # the layer counts from 0 again
    for _ in range(5):
        counting.forward(0, 2)
    counting.recorder.write()
    counts = read_record(path)[0]
    assert counts.sum(0).tolist() == [[0, 6, 5], [0, 0, 6]] and (counts >= 0).all()


def test_a_disk_that_fails_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counting = Counting(tmp_path / "no/counts.pt")
    for _ in range(3):
        counting.forward(0, 1)
        counting.recorder.write()
    assert caplog.text.count("expert counts are not recorded") == 1
    (tmp_path / "no").mkdir()
    counting.recorder.write()
    assert read_record(tmp_path / "no/counts.pt")[0].sum() == 2


def wrapped(layer_idx: int, counts: list[int], on_gpu: int) -> Any:
    moe = SimpleNamespace(counters=lambda: {"expert_counts": torch.tensor(counts)})
    mask = torch.arange(len(counts)) < on_gpu
    return SimpleNamespace(
        kt_config=SimpleNamespace(layer_idx=layer_idx),
        global_num_experts=len(counts),
        wrapper=SimpleNamespace(moe=moe, gpu_experts_mask=mask),
    )


@pytest.mark.usefixtures("sglang_with_map")
def test_counts_of_slots_become_counts_of_experts() -> None:
    dispatch = sys.modules["sglang.srt.eplb.expert_location_dispatch"]
    dispatch.get_global_expert_location_metadata = lambda: placement_modules().current  # type: ignore[attr-defined]
    methods = [wrapped(1, [10, 11, 12, 13, 14, 15], 2)]
    counts = expert_counts.logical_counts(methods, NUM_LAYERS)
    # slots of layer 1 hold experts 2 0 1 4 5 3
    assert counts.tolist() == [[0] * 6, [11, 12, 10, 15, 13, 14], [0] * 6]
    replaced = SimpleNamespace(global_num_experts=6, wrapper=SimpleNamespace(moe=None))
    assert expert_counts.logical_counts([*methods, replaced], NUM_LAYERS).equal(counts)
    assert expert_counts.gpu_experts(methods, NUM_LAYERS)[1].nonzero().flatten().tolist() == [0, 2]


@pytest.mark.usefixtures("sglang_with_map")
def test_a_map_without_a_row_for_a_layer_is_named() -> None:
    dispatch = sys.modules["sglang.srt.eplb.expert_location_dispatch"]
    dispatch.get_global_expert_location_metadata = lambda: placement_modules().current  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"--init-expert-location has 3 layers but the model has a layer 3; make it"):
        layers.physical_to_logical_map(wrapped(NUM_LAYERS, [0] * 6, 0))


def test_other_processes_have_files_of_their_own() -> None:
    path = Path("/x/counts.pt")
    assert expert_counts.record_path(path, SimpleNamespace(pp_rank=0, dp_rank=None)) == path
    assert expert_counts.record_path(path, SimpleNamespace(ps=SimpleNamespace(pp_rank=2, dp_rank=1))) == Path(
        "/x/counts-pp2-dp1.pt"
    )

"""Masks of experts on the GPU, records of expert counts, and the location file made from them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kt_kernel import generate_gpu_experts_masks
from kt_kernel.placement import STRATEGIES, strategy_masks
from kt_kernel.placement.__main__ import main
from kt_kernel.placement.location import check_location, hit_rate, hottest_first, write_location
from kt_kernel.placement.record import cut_in_time, read_halves

# Masks.


def test_the_most_used_experts_of_all_layers_are_chosen() -> None:
    freq = torch.tensor([[1.0, 9.0, 2.0], [8.0, 7.0, 0.5]])
    mask = generate_gpu_experts_masks(freq, 3)
    assert mask.dtype == torch.bool and mask.device.type == "cpu"
    assert mask.tolist() == [[False, True, False], [True, True, False]]


def test_ties_go_to_the_lower_layer_and_expert() -> None:
    mask = generate_gpu_experts_masks(torch.ones(3, 4, dtype=torch.int32), 6)
    assert mask.flatten().tolist() == [True] * 6 + [False] * 6


def test_large_counts_are_not_rounded() -> None:
    freq = torch.tensor([[2**60, 2**60 + 1]])
    assert generate_gpu_experts_masks(freq, 1).tolist() == [[False, True]]


@given(
    layers=st.integers(1, 5),
    experts=st.integers(1, 9),
    total=st.integers(0, 60),
    seed=st.integers(0, 100),
)
def test_the_chosen_are_never_less_used_than_the_others(layers: int, experts: int, total: int, seed: int) -> None:
    freq = torch.randint(0, 6, (layers, experts), generator=torch.Generator().manual_seed(seed))
    mask = generate_gpu_experts_masks(freq, total)
    assert mask.shape == freq.shape and mask.sum() == min(total, freq.numel())
    if mask.any() and not mask.all():
        assert freq[mask].min() >= freq[~mask].max()


@pytest.mark.parametrize(
    ("freq", "number", "words"),
    [
        (torch.ones(4), 1, r"shape \[4\].*num_layers, num_experts"),
        (torch.tensor([[0.5, float("nan")]]), 1, r"activation_freq\[0, 1\] is NaN"),
        (torch.ones(2, 2), -1, "num_gpu_experts is -1"),
        (torch.ones(2, 2), 1.5, "num_gpu_experts is 1.5"),
    ],
)
def test_bad_arguments_are_named(freq: torch.Tensor, number, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate_gpu_experts_masks(freq, number)


# The fork's strategies.


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("front-loading", [[1, 1, 1], [1, 1, 1], [1, 1, 0]]),
        ("uniform", [[1, 1, 1], [1, 1, 1], [1, 1, 0]]),
        ("frequency", [[1, 1, 1], [0, 1, 1], [1, 1, 1]]),
    ],
)
def test_strategies_by_hand(strategy: str, expected: list[list[int]]) -> None:
    freq = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    masks = strategy_masks(
        strategy,
        is_moe_layer=[False, True, True],
        num_experts=3,
        num_gpu_experts=5,
        activation_freq=freq,
    )
    assert masks.int().tolist() == expected


def test_strategies_differ_where_they_should() -> None:
    arguments: dict[str, Any] = {"is_moe_layer": [True] * 4, "num_experts": 8, "num_gpu_experts": 10}
    front = strategy_masks("front-loading", **arguments)
    uniform = strategy_masks("uniform", **arguments)
    random = strategy_masks("random", **arguments)
    assert front.sum(1).tolist() == [8, 2, 0, 0]
    assert uniform.sum(1).tolist() == [3, 3, 2, 2]
    # the fork's draw: a permutation of all positions under seed 42
    drawn = torch.randperm(32, generator=torch.Generator().manual_seed(42))[:10]
    assert random.flatten().nonzero().flatten().tolist() == sorted(drawn.tolist())


@given(
    strategy=st.sampled_from(sorted(STRATEGIES)),
    moe=st.lists(st.booleans(), min_size=1, max_size=6),
    experts=st.integers(1, 9),
    total=st.integers(0, 70),
)
def test_strategies_place_as_many_as_asked(strategy: str, moe: list[bool], experts: int, total: int) -> None:
    freq = torch.rand(len(moe), experts, generator=torch.Generator().manual_seed(total))
    masks = strategy_masks(
        strategy, is_moe_layer=moe, num_experts=experts, num_gpu_experts=total, activation_freq=freq
    )
    is_moe = torch.tensor(moe)
    assert masks[~is_moe].all(), "a layer without experts is the GPU's"
    assert masks[is_moe].sum() == min(total, sum(moe) * experts)


def test_bad_strategies_are_named() -> None:
    arguments: dict[str, Any] = {"is_moe_layer": [True], "num_experts": 2, "num_gpu_experts": 1}
    with pytest.raises(ValueError, match="strategy is 'hot'; it must be one of frequency, front-loading"):
        strategy_masks("hot", **arguments)
    with pytest.raises(ValueError, match="'frequency' needs activation_freq"):
        strategy_masks("frequency", **arguments)
    with pytest.raises(ValueError, match=r"shape \[3, 2\]; it must be \[1, 2\]"):
        strategy_masks("frequency", activation_freq=torch.ones(3, 2), **arguments)


# Records.


def write_record(path: Path, counts: Any, **more: Any) -> Path:
    torch.save({"logical_count": counts, **more}, path)
    return path


def test_halves_have_equal_shares_of_the_traffic(tmp_path: Path) -> None:
    counts = torch.zeros(5, 2, 3, dtype=torch.int64)
    counts[0, 0, 0], counts[2, 0, 1], counts[3, 1, 2], counts[4, 0, 0] = 5, 1, 4, 4
    halves = read_halves([write_record(tmp_path / "a.pt", counts)])  # the second snapshot is empty
    assert halves.num_snapshots == 4
    assert halves.first.tolist() == [[5, 1, 0], [0, 0, 0]]
    assert halves.second.tolist() == [[4, 0, 0], [0, 0, 4]]


@given(sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=30))
def test_no_other_cut_is_nearer_to_the_middle(sizes: list[int]) -> None:
    counts = torch.tensor(sizes, dtype=torch.float64).view(-1, 1, 1)
    cut = cut_in_time(counts)
    assert 1 <= cut < len(sizes)
    off = [abs(sum(sizes[:i]) - sum(sizes) / 2) for i in range(1, len(sizes))]
    assert off[cut - 1] == min(off)


def test_several_records_add_up(tmp_path: Path) -> None:
    """Pipeline stages record their own layers; each file is cut by itself."""
    stage = torch.zeros(2, 2, 2, dtype=torch.int64)
    stage[:, 0] = torch.tensor([[1, 2], [3, 4]])
    other = stage.flip(1)
    paths = [write_record(tmp_path / "a.pt", stage), write_record(tmp_path / "b.pt", other)]
    halves = read_halves(paths)
    assert halves.first.tolist() == [[1, 2], [1, 2]] and halves.second.tolist() == [[3, 4], [3, 4]]


GOOD = torch.ones(2, 2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (torch.ones(2, 3), r"shape \[2, 3\]; it must be numbers of shape \[num_snapshots, num_layers, num_experts\]"),
        (torch.zeros(2, 2, 3), "holds no count; send requests"),
        (torch.ones(1, 2, 3), "holds one snapshot with counts"),
        (torch.cat([GOOD, 0 * GOOD])[1:], "holds one snapshot with counts"),
        (torch.tensor([[[1.0, float("nan")]], [[1.0, 1.0]]]), r"logical_count\[0, 0, 1\] of .* is nan"),
        (torch.tensor([[[1.0, float("inf")]], [[1.0, 1.0]]]), r"logical_count\[0, 0, 1\] of .* is inf"),
        (-GOOD, r"logical_count\[0, 0, 0\] of .* is -1"),
        ("text", "has no logical_count; record with KT_EXPERT_COUNTS"),
    ],
)
def test_bad_records_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counts: Any, words: str
) -> None:
    path = write_record(tmp_path / "counts.pt", counts)
    with pytest.raises(ValueError, match=words):
        read_halves([path])
    assert main(["--counts", str(path), "--output", str(tmp_path / "map.pt")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kt_kernel.placement: ") and error.count("\n") == 1
    assert not (tmp_path / "map.pt").exists()


def zip_of(text: str) -> bytes:
    """An archive that torch did not write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", text)
    return buffer.getvalue()


# What torch.load answers with a KeyError, an IndexError, advice on weights_only, ...
NO_TORCH_FILES = (
    b"", b"no tensor", b"hello world", b"[1, 2]", b'{"logical_count": 1}', b"id,count\n1,2\n", b"\x00" * 64,
    bytes(range(256)), zip_of("text"), pickle.dumps(Path("x")), pickle.dumps({"logical_count": [1]})[:-1],
)  # fmt: skip


@pytest.mark.parametrize("content", NO_TORCH_FILES, ids=range(len(NO_TORCH_FILES)))
def test_a_record_that_is_no_torch_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "counts.csv"
    path.write_bytes(content)
    assert main(["--counts", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"kt_kernel.placement: {path} cannot be read (it is no file of torch.save that holds only tensors and plain "
        "values); give a file that KT_EXPERT_COUNTS or SGLang's recorder wrote.\n"
    )


def test_files_that_are_no_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing.pt is missing"):
        read_halves([tmp_path / "nothing.pt"])
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); give a file that KT_EXPERT_COUNTS"):
        read_halves([tmp_path])
    paths = [write_record(tmp_path / "a.pt", GOOD), write_record(tmp_path / "b.pt", torch.ones(2, 2, 4))]
    with pytest.raises(ValueError, match=r"b.pt has \[num_layers, num_experts\] = \[2, 4\], but .*a.pt has \[2, 3\]"):
        read_halves(paths)


# The location map.


@given(layers=st.integers(1, 5), experts=st.integers(1, 12), seed=st.integers(0, 1000))
def test_no_other_choice_catches_more(layers: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (layers, experts), generator=generator).double()
    counts[0, 0] += 1
    location = hottest_first(counts)
    check_location(location, experts)
    for size in range(experts + 1):
        best = counts.topk(size, dim=1).values.sum() / counts.sum()
        assert hit_rate(location, counts, size) == pytest.approx(float(best))


def test_layers_without_counts_stay_as_they_are() -> None:
    location = hottest_first(torch.tensor([[0.0, 0.0, 0.0], [1.0, 3.0, 1.0]]))
    assert location.tolist() == [[0, 1, 2], [1, 0, 2]]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        (torch.tensor([[0, 1, 1]]), r"physical_to_logical_map\[0\] is no permutation of 0-2: expert 2 is in no slot"),
        (torch.tensor([[0, 1]]), r"shape \[1, 2\]; it must be integers of shape \[num_hidden_layers, 3\]"),
        (torch.tensor([[0.0, 1.0, 2.0]]), "is torch.float32"),
    ],
)
def test_wrong_maps_are_named(location: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_location(location, 3)


@pytest.mark.parametrize("ending", ["pt", "json"])
def test_the_file_holds_what_sglang_takes_and_nothing_else(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"map.{ending}"
    location = torch.tensor([[2, 0, 1], [0, 1, 2]])
    write_location(path, location)
    content = torch.load(path, weights_only=True) if ending == "pt" else json.loads(path.read_text())
    assert list(content) == ["physical_to_logical_map"], "SGLang passes each key on as an argument"
    assert torch.equal(torch.as_tensor(content["physical_to_logical_map"]), location)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"must end in .pt or .json"):
        write_location(tmp_path / "map.bin", location)


def test_the_command_tells_held_out_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chosen on the first half (expert 2, then 0), told for the second, written from both (expert 1 is third)."""
    counts = torch.tensor([[[2, 0, 5, 0]], [[3, 4, 1, 0]]])
    gpu = torch.tensor([[True, False, False, False]])
    path = write_record(tmp_path / "counts.pt", counts, gpu_experts=gpu)
    output = tmp_path / "map.pt"
    arguments = ["--counts", str(path), "--num-gpu-experts", "1", "2", "4"]
    assert main([*arguments, "--output", str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hit_rates"] == [
        {"num_gpu_experts": 1, "hottest_first": 1 / 8, "identity": 3 / 8, "uniform": 1 / 4},
        {"num_gpu_experts": 2, "hottest_first": 4 / 8, "identity": 7 / 8, "uniform": 2 / 4},
        {"num_gpu_experts": 4, "hottest_first": 1.0, "identity": 1.0, "uniform": 1.0},
    ]
    assert report["num_pairs"] == 15 and report["achieved"] == 5 / 15
    assert torch.load(output, weights_only=True)["physical_to_logical_map"].tolist() == [[2, 0, 1, 3]]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "12.5%" in text and "37.5%" in text and "33.3% of the pairs on its GPU" in text


def test_the_command_refuses_more_experts_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(tmp_path / "counts.pt", GOOD)
    assert main(["--counts", str(path), "--num-gpu-experts", "4"]) == 1
    assert "--num-gpu-experts is 4 but the record has 3 experts in a layer; give 0 to 3" in capsys.readouterr().err


def test_the_command_names_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(tmp_path / "counts.pt", GOOD)
    assert main(["--counts", str(path), "--output", str(tmp_path / "no/map.pt")]) == 1
    assert "no/map.pt failed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["counts.pt", "./counts.pt", "link.pt"])
def test_the_record_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = write_record(tmp_path / "counts.pt", GOOD)
    (tmp_path / "link.pt").symlink_to(path)
    before = path.read_bytes()
    other = write_record(tmp_path / "b.pt", GOOD)
    assert main(["--counts", str(other), str(path), "--output", f"{tmp_path}/{name}"]) == 1
    assert f"--output {tmp_path}/{name.removeprefix('./')} is one of --counts" in capsys.readouterr().err
    assert path.read_bytes() == before

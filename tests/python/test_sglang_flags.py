"""The flags of a launch: what is handed on, adjusted or refused before weights are read."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kt_kernel.integrations.sglang import flags

# --- flags of our own ---


def parsed(*words: str, **values: Any) -> Any:
    """What SGLang's parser gives, with our flags added."""
    parser = ArgumentParser()
    parser.add_argument("--kt-weight-path", default="W")
    parser.add_argument("--kt-method", default="BF16")
    parser.add_argument("--kt-threadpool-count", type=int, default=2)
    parser.add_argument("--kt-num-gpu-experts", type=int)
    parser.add_argument("--init-expert-location", default="trivial")
    flags.add_cli_args(None, parser)
    flags.add_cli_args(None, parser)  # a release that has them itself
    parser.format_help()
    return SimpleNamespace(**{**vars(parser.parse_args(words)), **values})


@pytest.fixture()
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what hand_on sets."""
    for name in ("KT_NUMA_NODES", "KT_EXPERT_COUNTS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def open_source(_path: str, _method: str) -> Any:
    return SimpleNamespace(num_experts=40)


@pytest.mark.usefixtures("environment")
def test_flags_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    args = parsed(
        "--kt-numa-nodes", "2", "--kt-gpu-experts-ratio", "0.3", "--kt-record-expert-counts", "counts.pt",
        "--kt-expert-placement-strategy", "uniform",
    )  # fmt: skip
    assert flags.given(args)
    flags.hand_on(args, open_source)
    assert os.environ["KT_NUMA_NODES"] == "2" and args.kt_threadpool_count == 1
    assert args.kt_num_gpu_experts == 12
    assert os.environ["KT_EXPERT_COUNTS"] == str(tmp_path / "counts.pt")


@pytest.mark.usefixtures("environment")
def test_the_wrapper_gets_the_nodes() -> None:
    from kt_kernel.config import EngineConfig

    args = parsed("--kt-numa-nodes", "0", "3")
    flags.hand_on(args, open_source)
    # what KTMoEWrapper does with the arguments of stock SGLang, which passes no numa_nodes
    config = EngineConfig.resolve(None, args.kt_threadpool_count, None)
    assert config.node_ids == (0, 3) and config.num_nodes == 2


def test_no_flag_changes_nothing() -> None:
    args = parsed()
    before = vars(args).copy()
    flags.hand_on(args, open_source)
    assert vars(args) == before and not flags.given(args) and not flags.given(SimpleNamespace())


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kt-numa-nodes", "0", "0"], "--kt-numa-nodes is 0 0; give each node once"),
        (["--kt-numa-nodes", "-1"], "--kt-numa-nodes is -1; give each node once"),
        (["--kt-numa-nodes", "0", "--kt-threadpool-count", "3"], "names 1 nodes but --kt-threadpool-count is 3"),
        (["--kt-gpu-experts-ratio", "1.5"], "--kt-gpu-experts-ratio is 1.5; give a share from 0 to 1"),
        (["--kt-gpu-experts-ratio", "nan"], "--kt-gpu-experts-ratio is nan; give a share from 0 to 1"),
        (["--kt-record-expert-counts", "/no/where/counts.pt"], "is no file in a folder that exists; make /no/where"),
        (["--kt-expert-placement-strategy", "hot"], "is 'hot'; give one of frequency, front-loading, uniform, random"),
        (["--kt-expert-placement-strategy", "random"], "random needs another number of experts on the GPU in each"),
        (["--kt-expert-placement-strategy", "front-loading"], "give uniform, or frequency with --init-expert-location"),
        (["--kt-expert-placement-strategy", "frequency"], "make the file with python -m kt_kernel.placement"),
    ],
)
def test_values_that_cannot_work_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        flags.hand_on(parsed(*words), open_source)
    assert message in str(error.value) and str(error.value).count(". ") == 0


@pytest.mark.usefixtures("environment")
def test_frequency_takes_a_location_file() -> None:
    flags.hand_on(
        parsed("--kt-expert-placement-strategy", "frequency", "--init-expert-location", "map.pt"), open_source
    )


@given(ratio=st.floats(0, 1), experts=st.integers(1, 400))
def test_a_ratio_is_rounded_down(ratio: float, experts: int) -> None:
    chosen = flags.experts_of_ratio(ratio, experts)
    assert 0 <= chosen <= experts and chosen <= ratio * experts + 1e-6 < chosen + 1 + 2e-6


@pytest.mark.parametrize("value", [0.1, 0.2, 0.3, 0.7])
def test_a_ratio_of_whole_experts_is_exact(value: float) -> None:
    assert flags.experts_of_ratio(value, 40) == round(value * 40)


def test_location_files_are_checked_before_weights_are_read(tmp_path: Path) -> None:
    source = SimpleNamespace(num_experts=3)
    good = json.dumps({"physical_to_logical_map": [[2, 0, 1]]})
    (tmp_path / "good.json").write_text(good)
    torch.save({"logical_count": torch.ones(2, 1, 3)}, tmp_path / "counts.pt")
    torch.save({"physical_to_logical_map": torch.tensor([[0, 0, 1]])}, tmp_path / "wrong.pt")
    for value in ("trivial", good, str(tmp_path / "good.json")):
        flags.check_location(SimpleNamespace(init_expert_location=value), source)
    for value, words in (
        (str(tmp_path / "none.pt"), "cannot be read (No such file"),
        ("{", "cannot be read"),
        ("{}", "has no physical_to_logical_map"),
        (str(tmp_path / "counts.pt"), "python -m kt_kernel.placement --counts"),
        (str(tmp_path / "wrong.pt"), "expert 2 is in no slot"),
    ):
        with pytest.raises(ValueError) as error:
            flags.check_location(SimpleNamespace(init_expert_location=value), source)
        assert words in str(error.value)

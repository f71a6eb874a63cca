"""The flags of a launch: what is handed on, adjusted or refused before weights are read."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_placement import NO_TORCH_FILES

from kt_kernel import _ext
from kt_kernel.integrations.sglang import checks, flags

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


@pytest.fixture()
def four_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the NUMA nodes 0 to 3."""
    monkeypatch.setattr(_ext, "topology", lambda: {"nodes": [{"id": node} for node in range(4)]})


def open_source(_path: str, _method: str) -> Any:
    return SimpleNamespace(num_experts=40)


@pytest.mark.usefixtures("environment", "four_nodes")
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


@pytest.mark.usefixtures("environment", "four_nodes")
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


@pytest.mark.usefixtures("environment", "four_nodes")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kt-numa-nodes", "1", "4"], "--kt-numa-nodes names node 4, but this process may use 0, 1, 2, 3"),
        (["--kt-numa-nodes", "0", "0"], "--kt-numa-nodes is 0 0; give each node once"),
        (["--kt-numa-nodes", "-1"], "--kt-numa-nodes is -1; give each node once"),
        (["--kt-numa-nodes", "0", "--kt-threadpool-count", "3"], "names 1 nodes but --kt-threadpool-count is 3"),
        (["--kt-gpu-experts-ratio", "1.5"], "--kt-gpu-experts-ratio is 1.5; give a share from 0 to 1"),
        (["--kt-gpu-experts-ratio", "nan"], "--kt-gpu-experts-ratio is nan; give a share from 0 to 1"),
        (["--kt-record-expert-counts", "/no/where/c.pt"], "/no/where/c.pt is in a folder that does not exist; make it"),
        (["--kt-record-expert-counts", "/tmp"], "--kt-record-expert-counts /tmp is a folder; give a file in it"),
        (["--kt-record-expert-counts", ""], "--kt-record-expert-counts is empty; give a file"),
        (["--kt-expert-placement-strategy", "hot"], "is 'hot'; give uniform, or frequency with --init-expert-location"),
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
    good = json.dumps({"physical_to_logical_map": [[2, 0, 1], [0, 1, 2]]})
    (tmp_path / "good.json").write_text(good)
    (tmp_path / "good.txt").write_text(good)
    torch.save({"logical_count": torch.ones(2, 1, 3)}, tmp_path / "counts.pt")
    torch.save({"physical_to_logical_map": torch.tensor([[0, 0, 1]] * 2)}, tmp_path / "wrong.pt")
    torch.save({"physical_to_logical_map": torch.tensor([[0, 1, 2]])}, tmp_path / "short.pt")
    torch.save({"physical_to_logical_map": torch.tensor([[0, 1, 2, 3]] * 2)}, tmp_path / "wide.pt")
    torch.save({"physical_to_logical_map": torch.tensor([[0, 1, 2]] * 2), "seed": 1}, tmp_path / "more.pt")
    for value in ("trivial", good, str(tmp_path / "good.json")):
        flags.check_location(SimpleNamespace(init_expert_location=value), 2, 3)
    for value, words in (
        (str(tmp_path / "none.pt"), "cannot be read (No such file"),
        ("{", "cannot be read"),
        ("{}", "has no physical_to_logical_map"),
        (json.dumps({"physical_to_logical_map": [[10**30]]}), "--init-expert-location: "),
        (str(tmp_path / "good.txt"), "good.txt must end in .pt or .json, by which SGLang tells the kind of file"),
        (str(tmp_path / "counts.pt"), "python -m kt_kernel.placement --counts"),
        (str(tmp_path / "wrong.pt"), "expert 2 is in no slot"),
        (str(tmp_path / "short.pt"), "is torch.int64 of shape [1, 3]; it must be integers of shape [2, 3]"),
        (str(tmp_path / "wide.pt"), "is torch.int64 of shape [2, 4]; it must be integers of shape [2, 3]"),
        (str(tmp_path / "more.pt"), "has seed beside physical_to_logical_map"),
    ):
        with pytest.raises(ValueError) as error:
            flags.check_location(SimpleNamespace(init_expert_location=value), 2, 3)
        assert words in str(error.value) and "\n" not in str(error.value)
    # a model whose number of layers is not known
    flags.check_location(SimpleNamespace(init_expert_location=str(tmp_path / "short.pt")), None, 3)


@pytest.mark.parametrize("content", NO_TORCH_FILES, ids=range(len(NO_TORCH_FILES)))
def test_a_location_that_is_no_torch_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "map.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        flags.check_location(SimpleNamespace(init_expert_location=str(path)), 2, 3)
    assert str(error.value) == (
        f"--init-expert-location {path} cannot be read (it is no file of torch.save that holds only tensors and plain "
        "values); give a .pt or .json file."
    )


@pytest.fixture()
def model(tmp_path: Path) -> Path:
    """A tiny model with 3 layers, 8 experts and 2 of them a token."""
    return models.write_model(tmp_path / "model", models.QWEN3_MOE)


def served(model: Path, **changes: Any) -> SimpleNamespace:
    """Flags of a launch that :func:`checks.check_flags` accepts."""
    plain = {
        **checks.FLAG_DEFAULTS, "model_path": str(model), "kt_weight_path": str(model), "kt_method": "BF16",
        "init_expert_location": "trivial", "mem_fraction_static": 0.9, "watchdog_timeout": 1, "sleep_on_idle": True,
        "disable_shared_experts_fusion": True, **vars(split()),
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


def test_a_location_has_a_row_for_each_layer_of_the_model(model: Path) -> None:
    for num_layers, accepted in ((2, False), (3, True), (4, False)):
        value = json.dumps({"physical_to_logical_map": [list(range(8))] * num_layers})
        if accepted:
            checks.check_flags(served(model, init_expert_location=value))
            continue
        with pytest.raises(ValueError, match=rf"shape \[{num_layers}, 8\]; it must be integers of shape \[3, 8\]"):
            checks.check_flags(served(model, init_expert_location=value))
        # SGLang changes config.json by this flag
        checks.check_flags(
            served(model, init_expert_location=value, json_model_override_args='{"num_hidden_layers": 9}')
        )


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, 2.0, float("nan")])
def test_a_share_of_memory_is_a_share(model: Path, value: float) -> None:
    checks.check_flags(served(model, mem_fraction_static=None))
    checks.check_flags(served(model, mem_fraction_static=1.0))
    with pytest.raises(ValueError, match=f"--mem-fraction-static is {value:g}; give a share above 0, of at most 1"):
        checks.check_flags(served(model, mem_fraction_static=value))


@pytest.mark.parametrize(("value", "used"), [(None, None), (0, 0), (1, 1), (2, 2), (3, 2)])
def test_no_more_experts_are_deferred_than_a_token_has(
    model: Path, caplog: pytest.LogCaptureFixture, value: int | None, used: int | None
) -> None:
    """A pasted line works on any model; what cannot be had is said once."""
    args = served(model, kt_max_deferred_experts_per_token=value)
    with caplog.at_level("WARNING", logger="kt_kernel"):
        for _ in range(2):
            checks.check_flags(args)
            checks.adjust(args)
    assert args.kt_max_deferred_experts_per_token == used
    said = [line for line in caplog.messages if "--kt-max-deferred-experts-per-token" in line]
    assert said == (
        ["kt_kernel: --kt-max-deferred-experts-per-token 3 set to 2: a token of this model has 2 experts"]
        if value == 3
        else []
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("KT_NUM_THREADS", "many"), ("KT_NUMA_NODES", "77"), ("KT_HOST_ALL_EXPERTS", "2"), ("KT_SYNC_TIMEOUT", "soon")],
)
def test_variables_are_checked_before_weights_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("KT_METHOD", "FP9")  # of another integration
    checks.check_flags(served(model))
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        checks.check_flags(served(model))


# --- flags of SGLang ---


def split(**changes: Any) -> SimpleNamespace:
    """Return the flags that divide a launch, resolved."""
    plain = {
        "ep_size": 1, "pp_size": 1, "dp_size": 1, "nnodes": 1, "enable_dp_attention": False, "moe_a2a_backend": "none",
        "moe_runner_backend": "triton",
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})

"""The flags of a launch: what is handed on, adjusted or refused before weights are read."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import hub
import models
import pytest
import server
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_placement import NO_TORCH_FILES

from kt_kernel import _ext
from kt_kernel.integrations.sglang import checks, cuda_flags, flags

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


@pytest.mark.parametrize(("value", "used"), [(None, None), (0, 0), (1, 1), (2, 1), (3, 1)])
def test_one_expert_of_a_token_is_never_deferred(
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
        [
            f"kt_kernel: --kt-max-deferred-experts-per-token {value} set to 1: a token of this model has 2 experts, "
            "and one must be on time"
        ]
        if value in (2, 3)
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


def test_kernels_that_the_method_cannot_have_are_refused_before_weights_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explain(layout: str) -> str:
        if layout.startswith("bf16"):
            raise RuntimeError('KT_GEMM="onednn" asks for what is not here.')
        return ""

    monkeypatch.setattr(_ext, "explain_kernels", explain)
    with pytest.raises(ValueError, match="asks for what is not here"):
        checks.check_flags(served(model))


@pytest.mark.parametrize(
    ("name", "features", "has_gpu", "refused"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "avx2 avx512", False, True),
        ("model.layers.0.self_attn.q_proj.weight", "avx2 avx512 amxint8 amxbf16", False, False),
        ("model.layers.0.self_attn.q_proj.weight", "avx2 avx512", True, False),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "avx2 avx512", False, False),
    ],
)
def test_dense_fp8_is_refused_where_sglang_cannot_compute_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, features: str, has_gpu: bool, refused: bool
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(16, 16, dtype=torch.float8_e4m3fn)}, model / "model-00009.safetensors")
    monkeypatch.setattr(_ext, "cpu_features", lambda: {"found": features})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    if not refused:
        checks.check_flags(served(model))
        return
    with pytest.raises(ValueError, match=rf"^--model-path \S+: {name} is fp8, .* give a bf16 copy of the model there"):
        checks.check_flags(served(model))


# --- flags of SGLang ---


def launch(**changes: Any) -> SimpleNamespace:
    """Return flags of SGLang as they are before its resolution."""
    plain = {
        "model_path": "/nowhere", "quantization": None, "moe_runner_backend": "auto",
        "cuda_graph_backend_prefill": None, "cuda_graph_config": None, "disable_cuda_graph": False,
        "disable_prefill_cuda_graph": False,
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


@pytest.mark.parametrize(
    ("config", "changes", "runner"),
    [
        ({}, {}, "triton"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "triton"),
        ({"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}, {}, "auto"),
        ({"quantization_config": {"quant_method": "awq"}}, {}, "auto"),  # SGLang asserts auto for it
        ({}, {"quantization": "fp8"}, "triton"),
        ({}, {"moe_runner_backend": "marlin"}, "marlin"),
        (None, {}, "auto"),  # neither a model's folder nor a hub id
    ],
)
def test_runner_is_one_that_skips(
    tmp_path: Path, config: dict[str, Any] | None, changes: dict[str, Any], runner: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    args = launch(model_path=str(tmp_path), **changes)
    cuda_flags.adjust(args)
    assert args.moe_runner_backend == runner


ADJUST_HUB_IDS = """
import json, sys
from types import ModuleType, SimpleNamespace
from kt_kernel.integrations.sglang import cuda_flags
for name in sys.argv[1:]:
    args = SimpleNamespace(model_path=name, revision=None, quantization=None, moe_runner_backend="auto")
    cuda_flags.adjust(args)
    cuda_flags.adjust(args)
    print(name, args.moe_runner_backend)
"""


@pytest.mark.parametrize(("quantization", "runner"), [(None, "triton"), ("fp8", "triton"), ("awq", "auto")])
def test_runner_of_a_hub_id_is_chosen_as_that_of_a_folder(
    tmp_path: Path, quantization: str | None, runner: str
) -> None:
    (tmp_path / "model").mkdir()
    config = {"quantization_config": {"quant_method": quantization}} if quantization else {}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with hub.serve_hub("someone/tiny-moe", tmp_path / "model") as address:
        done = subprocess.run(
            [sys.executable, "-c", ADJUST_HUB_IDS, "someone/tiny-moe", "someone/else"], capture_output=True, text=True,
            env=server.server_environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="0"),
            timeout=300, check=True,
        )  # fmt: skip
    assert done.stdout.splitlines() == [f"someone/tiny-moe {runner}", "someone/else auto"]
    assert done.stderr.count("--moe-runner-backend stays auto: config.json of someone/else cannot be read") == 1


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "disabled"),
        ({"cuda_graph_backend_prefill": "breakable"}, "breakable"),
        ({"cuda_graph_config": {"prefill": {"backend": "full"}}}, None),
        ({"cuda_graph_config": {"decode": {"max_bs": 4}}}, "disabled"),
        ({"disable_cuda_graph": True}, None),
    ],
)
def test_prefill_is_captured_on_request_only(
    caplog: pytest.LogCaptureFixture, changes: dict[str, Any], chosen: str | None
) -> None:
    args = launch(**changes)
    with caplog.at_level(logging.INFO, logger="kt_kernel"):
        cuda_flags.adjust(args)
        cuda_flags.adjust(args)
    assert args.cuda_graph_backend_prefill == chosen
    said = [line for line in caplog.messages if "--cuda-graph-backend-prefill set to disabled" in line]
    assert len(said) == (chosen == "disabled")


def test_release_without_the_flag_is_left_alone() -> None:
    args = launch()
    del args.cuda_graph_backend_prefill
    cuda_flags.adjust(args)
    assert not hasattr(args, "cuda_graph_backend_prefill")


def test_captured_prefill_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    prefill = SimpleNamespace(backend="breakable", bs=[512, 1024, 8192])
    cuda_flags.warn_of_prefill_graphs(SimpleNamespace(prefill=prefill))
    (line,) = caplog.messages
    assert "breakable captures 3 buckets of up to 8192 tokens, so 19456 tokens go through" in line
    assert "38 s at 500 tokens/s" in line
    for quiet in (None, SimpleNamespace(prefill=SimpleNamespace(backend="disabled", bs=[1]))):
        cuda_flags.warn_of_prefill_graphs(quiet)
    assert len(caplog.messages) == 1


def split(**changes: Any) -> SimpleNamespace:
    """Return the flags that divide a launch, resolved."""
    plain = {
        "ep_size": 1, "pp_size": 1, "dp_size": 1, "nnodes": 1, "enable_dp_attention": False, "moe_a2a_backend": "none",
        "moe_runner_backend": "triton",
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ep_size": 2}, "--ep-size is 2"),
        ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend deepep does not work"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap does not work"),
        ({"enable_pdmux": True}, "--enable-pdmux does not work"),
        ({"enable_eplb": True}, "--enable-eplb does not work"),
        ({"ep_num_redundant_experts": 16}, "--ep-num-redundant-experts 16 does not work"),
        ({"enable_paged_experts": True}, "--enable-paged-experts does not work"),
        ({"moe_dp_size": 2}, "--moe-dp-size 2 does not work"),
        ({"dwdp_size": 4}, "--dwdp-size 4 does not work"),
        ({"moe_dp_size": 1, "dwdp_size": 1}, None),
        ({"dp_size": 2}, "--dp-size makes 2 processes on this host"),
        ({"pp_size": 4, "nnodes": 2}, "--pp-size makes 2 processes on this host"),
        ({"moe_runner_backend": "flashinfer_trtllm"}, "--moe-runner-backend flashinfer_trtllm keeps to itself"),
        ({"moe_runner_backend": "triton_kernel"}, "give triton or marlin"),
        ({}, None),
        ({"dp_size": 2, "enable_dp_attention": True}, None),
        ({"pp_size": 2, "nnodes": 2}, None),
    ],
)
def test_split_launches(changes: dict[str, Any], words: str | None) -> None:
    if words is None:
        checks.check_split(split(**changes))
        return
    with pytest.raises(ValueError, match=words) as error:
        checks.check_split(split(**changes))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(("by_command_line", "error"), [(True, SystemExit), (False, ValueError)])
def test_what_sglang_resolves_to_is_refused_as_well(
    monkeypatch: pytest.MonkeyPatch, by_command_line: bool, error: type[BaseException]
) -> None:
    """A runner that SGLang chose for the model; a command line ends with the sentence alone."""
    for name in ("sglang", "sglang.srt", "sglang.srt.arg_groups"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("sglang.srt.arg_groups.overrides")
    module.resolved_view = lambda _args: split(moe_runner_backend="flashinfer_trtllm")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(checks, "_checked", by_command_line)
    monkeypatch.setattr(checks, "check_flags", lambda _args: None)
    monkeypatch.setattr(checks, "check_resolved", lambda _args, _source: None)
    args = SimpleNamespace(**{**checks.FLAG_DEFAULTS, "kt_weight_path": "/experts"})
    with pytest.raises(error, match="--moe-runner-backend flashinfer_trtllm keeps to itself.*; give triton or marlin"):
        checks.check_server_args(None, args)


def test_dp_attention_makes_larger_batches() -> None:
    args = SimpleNamespace(chunked_prefill_size=2048, max_prefill_tokens=1, dp_size=4, enable_dp_attention=True)
    assert checks.batch_tokens(args) == 8192
    args.enable_dp_attention = False
    assert checks.batch_tokens(args) == 2048

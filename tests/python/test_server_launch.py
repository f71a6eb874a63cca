"""Launch lines: what is refused before weights are read, what people paste, a proxy, requests that share batches."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import deferring_model
import hub
import models
import pytest
import server
from test_server import (
    TEXTS,
    TOLERANCE,
    WITHOUT_CACHE,
    Oracle,
    ask_oracle,
    check_concurrent_tokens,
    check_same,
    teacher_forced,
)

from kt_kernel.methods import METHODS

pytestmark = pytest.mark.server

MODEL = models.QWEN3_MOE_40


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    tensors = models.random_tensors(MODEL)
    variants = {"BF16": tensors, "AMXINT8": models.dequantized(MODEL, tensors, "AMXINT8")}
    return ask_oracle(MODEL, tmp_path_factory.mktemp(MODEL.name), variants)


# Each row: flags, and the words its one sentence must have. MODEL and WEIGHTS stand for the tiny checkpoint.
REFUSALS = {
    "no_weight_path": (["--kt-cpuinfer", "2"], ["--kt-weight-path", "no expert would run on the CPU"]),
    "no_weight_path_default_method": (["--kt-method", "AMXINT4"], ["--kt-weight-path"]),
    "unknown_method": (["--kt-weight-path", "WEIGHTS", "--kt-method", "INT9"], ["--kt-method", "'INT9'", *METHODS]),
    "other_files": (["--kt-weight-path", "WEIGHTS", "--kt-method", "FP8"], ["unquantized weights", "FP8", "BF16"]),
    "missing_folder": (["--kt-weight-path", "/nowhere/at/all"], ["--kt-weight-path", "/nowhere/at/all"]),
    "empty_folder": (["--kt-weight-path", "EMPTY"], ["--kt-weight-path", "config.json"]),
    "too_many_gpu_experts": (
        ["--kt-weight-path", "WEIGHTS", "--kt-num-gpu-experts", "41"],
        ["--kt-num-gpu-experts is 41", "40 experts"],
    ),
    "negative_gpu_experts": (["--kt-weight-path", "WEIGHTS", "--kt-num-gpu-experts", "-1"], ["--kt-num-gpu-experts"]),
    "negative_deferral": (
        ["--kt-weight-path", "WEIGHTS", "--kt-max-deferred-experts-per-token", "-1"],
        ["--kt-max-deferred-experts-per-token is -1"],
    ),
    "no_such_node": (["--kt-weight-path", "WEIGHTS", "--kt-numa-nodes", "77"], ["--kt-numa-nodes names node 77"]),
    "share_above_one": (
        ["--kt-weight-path", "WEIGHTS", "--mem-fraction-static", "2"],
        ["--mem-fraction-static is 2; give a share above 0, of at most 1"],
    ),
    "location_of_another_model": (
        ["--kt-weight-path", "WEIGHTS", "--init-expert-location", '{"physical_to_logical_map": [[0, 1]]}'],
        ["--init-expert-location", "shape [1, 2]", "shape [2, 40]"],
    ),
    "no_threads": (["--kt-weight-path", "WEIGHTS", "--kt-cpuinfer", "0"], ["--kt-cpuinfer is 0"]),
    "other_model": (["--kt-weight-path", "OTHER"], ["num_experts 8", "40"]),
    "dense_model": (
        ["--kt-weight-path", "WEIGHTS", "--model-path", "DENSE"],
        ["--kt-weight-path is given, but the model being served has no experts"],
    ),
    "no_such_model": (
        ["--kt-weight-path", "WEIGHTS", "--model-path", "/no/where"],
        ["--model-path /no/where does not exist; give a checkpoint's folder, or a hub id"],
    ),
    "expert_parallel": (["--kt-weight-path", "WEIGHTS", "--ep-size", "2", "--tp-size", "2"], ["--ep-size is 2"]),
    "all_to_all": (
        ["--kt-weight-path", "WEIGHTS", "--moe-a2a-backend", "deepep", "--tp-size", "2"],
        ["--moe-a2a-backend deepep does not work with experts on the CPU"],
    ),
    "two_batch_overlap": (
        ["--kt-weight-path", "WEIGHTS", "--enable-two-batch-overlap"],
        ["--enable-two-batch-overlap does not work"],
    ),
    "pdmux": (["--kt-weight-path", "WEIGHTS", "--enable-pdmux"], ["--enable-pdmux does not work"]),
    "eplb": (["--kt-weight-path", "WEIGHTS", "--enable-eplb"], ["--enable-eplb does not work"]),
    "redundant_experts": (
        ["--kt-weight-path", "WEIGHTS", "--ep-num-redundant-experts", "4"],
        ["--ep-num-redundant-experts 4 does not work"],
    ),
    "replicas": (["--kt-weight-path", "WEIGHTS", "--dp-size", "2"], ["--dp-size makes 2 processes on this host"]),
    "pipeline": (["--kt-weight-path", "WEIGHTS", "--pp-size", "2"], ["--pp-size makes 2 processes on this host"]),
    "runner_without_ids": (
        ["--kt-weight-path", "WEIGHTS", "--moe-runner-backend", "triton_kernel"],
        ["--moe-runner-backend triton_kernel", "give triton or marlin"],
    ),
    "runner_that_routes": (
        ["--kt-weight-path", "WEIGHTS", "--moe-runner-backend", "flashinfer_trtllm"],
        ["--moe-runner-backend flashinfer_trtllm", "give triton or marlin"],
    ),
    "too_little_memory": (
        ["--kt-weight-path", "HUGE", "--model-path", "HUGE"],
        ["GB of host memory", "usable", "experts"],
    ),
}

# The same for sglang.Engine, which has no command line: changes of ServerArgs, and the words.
ENGINE_REFUSALS = {
    "unknown_method": ({"kt_method": "INT9"}, ["--kt-method", "'INT9'"]),
    "too_many_gpu_experts": ({"kt_num_gpu_experts": 41}, ["--kt-num-gpu-experts is 41"]),
    "expert_parallel": ({"ep_size": 2, "tp_size": 2}, ["--ep-size is 2"]),
    "replicas": ({"dp_size": 2}, ["--dp-size makes 2 processes"]),
    "runner_without_ids": ({"moe_runner_backend": "triton_kernel"}, ["--moe-runner-backend triton_kernel"]),
}
# What the plug-in fills in for an engine: SGLang's field, its value.
ENGINE_VALUES = {
    "watchdog_timeout": 3000, "disable_shared_experts_fusion": True, "kt_num_gpu_experts": 0, "sleep_on_idle": True,
}  # fmt: skip

# Runs every launch line up to the point where SGLang would start its processes, and makes every engine's arguments.
PARSE_ALL = """
import json, sys
import kt_kernel.launch_server as launch_server
launch_server.prepare_environment()
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args
load_plugins()
found = {}
given = json.load(sys.stdin)
sys.argv = ["engine"]
for name, changes in given["engines"].items():
    try:
        args = ServerArgs(**changes)
        if hasattr(args, "resolve_once"):
            args.resolve_once()
        args.check_server_args()
        from sglang.srt.arg_groups.overrides import resolved_view
        found[name] = {field: getattr(resolved_view(args), field) for field in given["fields"]}
    except ValueError as error:
        found[name] = str(error)
for name, argv in given["lines"].items():
    sys.argv = ["launch_server", *argv]
    try:
        prepare_server_args(argv)
        found[name] = None
    except SystemExit as error:
        found[name] = str(error.code)
print("FOUND" + json.dumps(found))
"""


def write_huge_model(folder: Path) -> None:
    """Write config and headers of a model whose experts need twice this machine's memory in 4 bits, in sparse files."""
    hidden, intermediate, experts = 8192, 4096, 16
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    layers = 2 * total // (experts * 3 * hidden * intermediate // 2) + 1
    model = models.TinyModel(
        name="huge", architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe", num_experts=experts, num_layers=layers,
        hidden_size=hidden, intermediate_size=intermediate,
        extra={"num_experts": experts, "decoder_sparse_step": 1, "mlp_only_layers": []},
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config()))
    models.write_tokenizer(folder)
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    num_bytes = 2 * hidden * intermediate
    weight_map = {}
    for layer in model.moe_layers:
        names = [name for expert in range(experts) for name in model.expert_names(layer, expert)]
        header = {
            name: {"dtype": "BF16", "shape": shapes[i % 3], "data_offsets": [i * num_bytes, (i + 1) * num_bytes]}
            for i, name in enumerate(names)
        }
        text = json.dumps(header).encode()
        file = f"model-{layer:05d}.safetensors"
        with (folder / file).open("wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + len(names) * num_bytes)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("refusals")
    places = {name: folder / name for name in ("WEIGHTS", "OTHER", "EMPTY", "HUGE", "DENSE")}
    models.write_model(places["WEIGHTS"], MODEL)
    models.write_model(places["OTHER"], models.QWEN3_MOE)
    places["EMPTY"].mkdir()
    models.write_model(places["DENSE"], MODEL)
    config = {key: value for key, value in MODEL.config().items() if "expert" not in key}
    (places["DENSE"] / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    write_huge_model(places["HUGE"])
    lines = {}
    weights = ["--kt-weight-path", "WEIGHTS"]
    accepted = {"accepted": weights, "more deferred": [*weights, "--kt-max-deferred-experts-per-token", "9"]}
    for name, flags in {**{name: flags for name, (flags, _) in REFUSALS.items()}, **accepted}.items():
        filled = [str(places.get(flag, flag)) for flag in flags]
        lines[name] = ["--model-path", str(places["WEIGHTS"]), *filled]
    plain = {"model_path": str(places["WEIGHTS"]), "kt_weight_path": str(places["WEIGHTS"]), "kt_method": "AMXINT8"}
    engines = {f"engine {name}": {**plain, **changes} for name, (changes, _) in ENGINE_REFUSALS.items()}
    engines["engine accepted"] = plain
    result = subprocess.run(
        [sys.executable, "-c", PARSE_ALL],
        input=json.dumps({"lines": lines, "engines": engines, "fields": list(ENGINE_VALUES)}),
        capture_output=True,
        text=True,
        env=server.server_environment(),
        cwd=folder,
        timeout=240,
    )
    match = re.search(r"FOUND(\{.*\})", result.stdout)
    assert match, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(match[1])


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_one_sentence(refusals: dict[str, Any], name: str) -> None:
    message = refusals[name]
    assert message is not None, "the launch was accepted"
    assert message.startswith("kt_kernel: ")
    assert "\n" not in message and message.endswith(".")
    for words in REFUSALS[name][1]:
        assert words in message


@pytest.mark.parametrize("name", ["accepted", "more deferred"])
def test_good_line_is_accepted(refusals: dict[str, Any], name: str) -> None:
    assert refusals[name] is None


@pytest.mark.parametrize("name", ENGINE_REFUSALS)
def test_engine_is_refused_with_one_sentence(refusals: dict[str, Any], name: str) -> None:
    message = refusals[f"engine {name}"]
    assert isinstance(message, str), "the engine was accepted"
    assert "\n" not in message and message.endswith(".")
    for words in ENGINE_REFUSALS[name][1]:
        assert words in message


def test_open_values_of_an_engine_are_filled_in(refusals: dict[str, Any]) -> None:
    assert refusals["engine accepted"] == ENGINE_VALUES


def test_refusal_ends_the_launch(tmp_path: Path) -> None:
    folder = models.write_model(tmp_path / "model", models.QWEN3_MOE)
    code, output = server.run_to_exit(folder, ["--kt-method", "AMXINT8"])
    assert code == 1
    assert output.strip().splitlines()[-1].startswith("kt_kernel: --kt-* flags are given without --kt-weight-path")
    assert "Traceback" not in output


def test_pasted_line(oracle: Oracle) -> None:
    folder = oracle.folder / "BF16"
    flags = (
        "--chunked-prefill-size 4096 --enable-mixed-chunk --mem-fraction-static 0.92 --served-model-name X "
        f"--kt-method AMXINT8 --kt-weight-path {folder} --kt-cpuinfer 8 --kt-threadpool-count 2 "
        "--kt-num-gpu-experts 32 --kt-max-deferred-experts-per-token 2"
    ).split()
    log_path = oracle.folder / "pasted.log"
    with server.serve(folder, flags, log_path=log_path, max_total_tokens=None) as running:
        log = running.log
        assert "2/2 MoE layers, 16 experts on CPU + 64 on GPU (no GPU here: computed on the CPU in bf16)" in log
        pool = re.search(r"KV pool of (\d+) tokens, set by context length (\d+) x (\d+) running requests", log)
        assert pool and int(pool[1]) == int(pool[2]) * int(pool[3])
        assert "--mem-fraction-static 0.92 of a quarter of" in log
        found = teacher_forced(running)
        assert "deferral: of 4 experts a token, up to 2 are added one MoE layer later" in running.log
    # four fifths of the experts are bf16, the rest int8 and, where a text leaves any, deferred
    deferring = deferring_model.load(folder, method="AMXINT8", on_gpu=32, deferred=2)
    expected = [value for text in TEXTS for value in deferring_model.logprobs(deferring, text)]
    check_same(found, expected, TOLERANCE["AMXINT8"])


class _BrokenProxy(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_error(502)

    do_POST = do_CONNECT = do_GET

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture()
def proxy() -> Iterator[str]:
    """Address of an HTTP proxy that answers 502 to everything."""
    _BrokenProxy.requests = 0
    listener = HTTPServer(("127.0.0.1", 0), _BrokenProxy)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}"
    listener.shutdown()


def test_behind_a_proxy_and_bit_for_bit_in_any_batch(oracle: Oracle, proxy: str) -> None:
    """A proxy in the environment does not reach SGLang's own traffic; INT8 answers do not depend on the batch.

    The model has 40 experts because torch's own bf16 product is not the same for every batch below 24 output columns,
    which a router with fewer experts has.
    """
    folder = oracle.folder / "BF16"
    proxies = {"http_proxy": proxy, "HTTP_PROXY": proxy, "https_proxy": proxy, "no_proxy": "example.org"}
    environment = server.server_environment(**proxies)
    flags = ["--kt-weight-path", str(folder), "--kt-method", "AMXINT8", *WITHOUT_CACHE]
    log_path = oracle.folder / "proxy.log"
    with server.serve(folder, flags, log_path=log_path, environment=environment, timeout=120) as running:
        assert _BrokenProxy.requests == 0
        check_same(teacher_forced(running), oracle.logprobs["AMXINT8"], TOLERANCE["AMXINT8"])
        check_concurrent_tokens(running, exact=True)


def test_model_ids_of_the_hub(oracle: Oracle, tmp_path: Path) -> None:
    """Model and experts are downloaded by their id, by SGLang and by us, where nothing is cached."""
    name = "someone/tiny-moe"
    flags = ["--kt-weight-path", name, "--kt-method", "AMXINT8", *WITHOUT_CACHE]
    with hub.serve_hub(name, oracle.folder / "BF16") as address:
        environment = server.server_environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="0")
        with server.serve(name, flags, log_path=tmp_path / "server.log", environment=environment) as running:
            check_same(teacher_forced(running), oracle.logprobs["AMXINT8"], TOLERANCE["AMXINT8"])

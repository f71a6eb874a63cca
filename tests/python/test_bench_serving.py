"""The serving bench: what it refuses, what it calls wrong, its arithmetic, and one run on a real server."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import models
import pytest
import server

from kt_kernel.bench import serving

RANDOM = serving.Workload("random prompts", 0, 32, 5)
SHARED = serving.Workload("shared prefix", 100, 32, 5)
# what the stand-in of bench_serving writes into each --output-file
CLIENT = """
import json, sys
for flags in json.load(open(sys.argv[1])):
    value = {a: b for a, b in zip(flags, flags[1:])}
    n = int(value.get("--num-prompts") or value["--gsp-prompts-per-group"])
    tokens = int(value.get("--random-output-len") or value["--gsp-output-len"])
    record = {
        "errors": [""] * n, "output_lens": [tokens] * n, "ttfts": [0.5] * n, "itls": [[0.1] * (tokens - 1)] * n,
        "input_lens": [10] * n, "cached_tokens": [8] * n, "output_throughput": 10.0 * n, "flags": flags,
    }
    open(value["--output-file"], "w").write(json.dumps(record) + "\\n")
"""


def record(**changes: Any) -> dict[str, Any]:
    """What bench_serving writes of three requests with five tokens each."""
    return {
        "errors": ["", "", ""],
        "output_lens": [5, 5, 5],
        "ttfts": [0.3, 0.1, 0.2],
        "itls": [[0.1] * 4, [0.2] * 4, [0.1, 0.1, 0.2, 0.4]],
        "input_lens": [132, 134, 136],
        "cached_tokens": [131, 100, 89],
        "output_throughput": 7.5,
    } | changes


def test_figures_of_a_run() -> None:
    row = serving.summarize(record(), RANDOM, users=3)
    assert (row.users, row.requests, row.prompt_tokens) == (3, 3, 134)
    assert (row.first_token_ms, row.slowest_first_token_ms) == pytest.approx((200, 300))
    assert (row.user_tokens_per_s, row.slowest_user_tokens_per_s) == pytest.approx((5, 5))
    assert row.total_tokens_per_s == 7.5


def test_the_request_of_the_warm_up_is_not_counted_behind_a_shared_prefix() -> None:
    row = serving.summarize(record(), SHARED, users=3)
    assert (row.requests, row.prompt_tokens) == (2, 135)
    assert row.cached_share == pytest.approx(189 / 270)
    assert (row.first_token_ms, row.slowest_first_token_ms) == pytest.approx((150, 200))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_lens": [5, 4, 5]}, "random prompts, users 3: request 1 returned 4 tokens instead of 5."),
        ({"ttfts": [0.1, 0.1, 0.0]}, "random prompts, users 3: request 2 returned 0 tokens instead of 5."),
        ({"errors": ["", "", "Traceback\n  here\nConnectionError: gone\n"]}, "request 2 failed: ConnectionError: gone"),
        ({"itls": [[], [0.1], [0.1]]}, "request 0 came in one piece, so it has no speed; raise --output-tokens."),
    ],
)
def test_wrong_answers_are_found(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(serving.WrongAnswerError) as error:
        serving.summarize(record(**changes), RANDOM, users=3)
    assert str(error.value).endswith(message)


class _StandIn(BaseHTTPRequestHandler):
    """Answers /server_info as a class variable says."""

    status = 200
    body = b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an HTTP server that is no SGLang until its body says so; proxy variables that lead nowhere."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    with HTTPServer(("127.0.0.1", 0), _StandIn) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()


def run_bench(*flags: str) -> int:
    """Run the bench in this process; return its exit code."""
    parser = argparse.ArgumentParser()
    serving.add_arguments(parser)
    return serving.main(parser.parse_args(flags))


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return the one sentence with which a command line is refused."""
    assert run_bench(*flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.strip()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--users", "1,0"), "--users 1,0 must be positive numbers, comma separated."),
        (("--users", "two"), "--users two must be positive numbers, comma separated."),
        (("--requests", "0"), "--requests is 0; it must be above 0."),
        (("--timeout", "nan"), "--timeout is nan; it must be above 0."),
        (("--output-tokens", "1"), "--output-tokens is 1; a speed needs at least 2."),
        (("--shared-tokens", "-1"), "--shared-tokens is -1; it must be 0 (no shared prefix) or more."),
        (("--requests", "1"), "--requests is 1 and the first of it is not counted behind a shared prefix"),
        (("--url", "localhost:30000"), "--url is localhost:30000; it must be like http://127.0.0.1:30000."),
        (("--plot", "/nowhere/a.png"), "--plot is /nowhere/a.png, but there is no folder /nowhere."),
        (("--plot", "a.gif"), "--plot is a.gif; it must end in one of .png, .svg, .pdf."),
    ],
)
def test_impossible_flags_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(serving, "fetch", lambda _url: pytest.fail("the server was asked"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: "matplotlib is there")
    assert refusal(capsys, *flags).startswith(message)


def test_a_plot_without_matplotlib_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    found = refusal(capsys, "--plot", str(tmp_path / "a.png"))
    assert found == "--plot needs matplotlib, which is not installed: pip install matplotlib."


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{server.free_port()}"
    expected = f"no server answers at {url} ([Errno 111] Connection refused); start one, or give its --url."
    assert refusal(capsys, "--url", url) == expected


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"", "is not SGLang: its /server_info is status 404; give the --url of an SGLang server."),
        (200, b"<html>", "is not SGLang: its /server_info is no JSON; give the --url of an SGLang server."),
        (200, b"[1]", "is not SGLang: its /server_info is other JSON; give the --url of an SGLang server."),
        (401, b"", "asks for a key; set OPENAI_API_KEY to it."),
        (
            200,
            b'{"internal_states": [], "max_req_input_len": 1000}',
            "--shared-tokens, --input-tokens and --output-tokens are 1344 together, more than the 1000 of this server; "
            "ask for fewer, or start it with a longer --context-length or more --max-total-tokens.",
        ),
        (
            200,
            b'{"internal_states": [], "tokenizer_path": "/nowhere/model"}',
            "the tokenizer /nowhere/model is not on this machine; give a copy of its folder with --tokenizer.",
        ),
    ],
)
def test_servers_that_cannot_be_measured(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stand_in: str,
    status: int,
    body: bytes,
    message: str,
) -> None:
    monkeypatch.setattr(_StandIn, "status", status)
    monkeypatch.setattr(_StandIn, "body", body)
    assert refusal(capsys, "--url", stand_in).removeprefix(f"the server at {stand_in} ") == message


@pytest.fixture
def sglang(stand_in: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Address of a stand-in that says it is SGLang, with a stand-in of bench_serving beside it."""
    info = {"internal_states": [], "version": "0", "max_running_requests": 2, "model_path": str(tmp_path)}
    monkeypatch.setattr(_StandIn, "body", json.dumps(info | {"api_key": "secret"}).encode())
    (tmp_path / "stand_in_client.py").write_text(CLIENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(serving, "CLIENT", "stand_in_client")
    return stand_in


def test_table_and_json(capsys: pytest.CaptureFixture[str], sglang: str) -> None:
    flags = ("--url", sglang, "--users", "4,1,4", "--requests", "2", "--output-tokens", "6")
    assert run_bench(*flags) == 0
    table = capsys.readouterr().out
    assert "| 4 | 10 | 80 % | 500 | 500 | 10.0 | 10.0 | 80.0 |" in table
    assert table.rstrip().endswith("computes at most 2 requests at a time (--max-running-requests): more users wait.")
    assert run_bench(*flags, "--json") == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    result = json.loads(text)
    assert result["command"].endswith("--requests 2 --input-tokens 256 --output-tokens 6 --shared-tokens 1024")
    assert [workload["name"] for workload in result["workloads"]] == ["random prompts", "shared prefix"]
    assert [row["users"] for row in result["workloads"][1]["rows"]] == [1, 4]
    assert [row["requests"] for row in result["workloads"][1]["rows"]] == [1, 7]


def test_no_shared_prefix(capsys: pytest.CaptureFixture[str], sglang: str) -> None:
    assert run_bench("--url", sglang, "--users", "1", "--requests", "1", "--shared-tokens", "0") == 0
    assert "shared prefix" not in capsys.readouterr().out


def test_a_client_without_a_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sglang: str
) -> None:
    (tmp_path / "stand_in_client.py").write_text("raise SystemExit('Warmup failed: why')")
    monkeypatch.setattr(serving.tempfile, "tempdir", str(tmp_path))
    assert run_bench("--url", sglang) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (log,) = tmp_path.glob("*.log")
    message = "bench_serving ended with code 1 and without a result: Warmup failed: why"
    assert captured.err == f"{message} (log of bench_serving: {log})\n"
    (tmp_path / "stand_in_client.py").write_text("import time; time.sleep(60)")
    assert run_bench("--url", sglang, "--timeout", "0.3") == 1
    assert capsys.readouterr().err.startswith("bench_serving had no result after 0.3 s; raise --timeout.")


def test_plot_has_a_line_for_each_workload(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sglang: str
) -> None:
    drawn: list[tuple[Any, ...]] = []

    class Axes:
        def plot(self, users: list[int], values: list[float], marker: str, label: str) -> None:
            drawn.append((label, users, values))

        def set(self, **_: Any) -> None: ...
        def grid(self, **_: Any) -> None: ...
        def legend(self) -> None: ...

    class Figure:
        def __init__(self, **_: Any) -> None: ...
        def subplots(self, rows: int, columns: int) -> list[Axes]:
            return [Axes() for _ in range(rows * columns)]

        def savefig(self, file: Path, dpi: int) -> None:
            file.write_text("picture")

    for name, content in (("matplotlib", {}), ("matplotlib.figure", {"Figure": Figure})):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    file = tmp_path / "serving.png"
    assert run_bench("--url", sglang, "--users", "1,2", "--requests", "2", "--plot", str(file)) == 0
    assert file.read_text() == "picture"
    assert drawn[0] == ("random prompts", [1, 2], [20.0, 40.0])
    assert [line[0] for line in drawn] == ["random prompts", "shared prefix"] * 3


@pytest.mark.server
def test_real_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SGLang's own client on a real server: exact prompts, exact answers, and a prefix that the cache serves."""
    model = models.write_model(tmp_path / "model", models.QWEN3_MOE)
    # the client's own process is to bypass it, too
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    flags = ["--kt-weight-path", str(model), "--kt-method", "AMXINT8"]
    with server.serve(model, flags, log_path=tmp_path / "server.log") as running:
        lengths = ("--input-tokens", "40", "--output-tokens", "6", "--shared-tokens", "300")
        assert run_bench("--url", running.url, "--users", "1,3", "--requests", "2", *lengths, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["server"]["model_path"] == str(model)
    assert (result["server"]["kt_method"], result["server"]["max_total_num_tokens"]) == ("AMXINT8", 4096)

    alone, shared = (workload["rows"] for workload in result["workloads"])
    assert [row["requests"] for row in alone + shared] == [2, 6, 1, 5]
    for row in alone:
        assert row["prompt_tokens"] == 40
        assert row["cached_share"] == 0
    for row in shared:
        # decoded and encoded again, random tokens of this tokenizer become a few times as many
        assert 300 < row["prompt_tokens"] < 1400
        assert 0.5 < row["cached_share"] < 1
    for row in alone + shared:
        assert 0 < row["first_token_ms"] <= row["slowest_first_token_ms"]
        assert 0 < row["slowest_user_tokens_per_s"] <= row["user_tokens_per_s"]
        assert row["total_tokens_per_s"] > 0

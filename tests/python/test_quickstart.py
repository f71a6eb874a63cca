"""scripts/quickstart.sh as a stranger runs it, and the demo model it makes against plain SGLang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import server

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/quickstart.sh"
DEMO = ROOT / ".demo"  # shared with the user's own runs: made once
# In each, the runner-up of every token of the answer is at least 0.6 nats behind; rounding moves it by up to 0.2.
QUESTIONS = {
    "Tell me about the capital of France in one sentence.": "The capital of France is Paris.",
    "What is the capital of Germany?": "The capital of Germany is Berlin.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
}


def environment() -> dict[str, str]:
    return {**server.server_environment(), "VIRTUAL_ENV": sys.prefix, "KT_DEMO_DIR": str(DEMO)}


def run_script(*options: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *options], capture_output=True, text=True, env=environment(), timeout=timeout, cwd="/"
    )


def servers_on(port: int) -> list[str]:
    """Command lines of processes that were told to listen on a port."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "kt_kernel.launch_server" in words and str(port) in words:
            found.append(" ".join(words))
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "INT9"], "--method is INT9; it must be AMXINT8, AMXINT4 or BF16"),
        (["--port", "many"], "--port is many"),
        (["--prompt"], "--prompt needs a value"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_wrong_options_are_refused(options: list[str], words: str) -> None:
    result = run_script(*options, timeout=30)
    assert result.returncode == 1
    assert words in result.stderr


def test_help_lists_every_option() -> None:
    result = run_script("--help", timeout=30)
    assert result.returncode == 0
    for option in ("--method", "--prompt", "--port", "--keep", "--skip-install"):
        assert option in result.stdout


def test_used_port_is_refused() -> None:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        result = subprocess.run(
            [sys.executable, str(ROOT / "scripts/quickstart_client.py"), "port", "--port", str(port)],
            capture_output=True,
            text=True,
        )
    assert result.returncode == 1
    assert f"port {port} is in use" in result.stderr


@pytest.mark.server
def test_answers_a_question_and_cleans_up() -> None:
    result = run_script("--skip-install")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "The capital of France is Paris." in result.stdout
    assert re.search(r"\d+ tokens: time to first token \d+ ms, then [\d.]+ tokens/s", result.stdout)
    proof = r"kt_kernel active: 30/30 MoE layers, 240 experts on CPU \+ 0 on GPU, AMXINT8, .*computed [1-9]\d* rows"
    assert re.search(proof, result.stdout)
    port = int(re.search(r"starting on port (\d+)", result.stdout)[1])  # type: ignore[index]
    assert f"curl -s http://127.0.0.1:{port}/v1/chat/completions" in result.stdout
    assert servers_on(port) == []


@pytest.mark.server
def test_ctrl_c_stops_the_server() -> None:
    port = server.free_port()
    process = subprocess.Popen(
        [str(SCRIPT), "--skip-install", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
        # a test run started in the background ignores SIGINT, and bash cannot trap what it was born ignoring
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout
    for line in process.stdout:
        if "server: starting on port" in line:
            break
    time.sleep(3)
    assert servers_on(port)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert servers_on(port) == []


@pytest.mark.server
def test_demo_answers_as_plain_sglang_does(tmp_path: Path) -> None:
    model = DEMO / "model"
    if not (model / "config.json").is_file():
        make = [sys.executable, "-m", "kt_kernel.demo", "--output", str(model)]
        subprocess.run(make, check=True, timeout=600, cwd="/")
    for name, flags in (("plain", []), ("kt", ["--kt-method", "BF16", "--kt-weight-path", str(model)])):
        with server.serve(model, flags, log_path=tmp_path / f"{name}.log") as running:
            assert {question: running.chat(question) for question in QUESTIONS} == QUESTIONS
            assert ("kt_kernel active: 30/30" in running.log) == (name == "kt")

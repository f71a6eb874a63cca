"""Start and stop a real SGLang server, and ask it for log-probabilities."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 240
# SGLang's own traffic and ours go to 127.0.0.1 and never through a proxy of the machine the tests run on
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """Return a TCP port nobody listens on now.

    A server binds it some 20 s later, so it is none of those (from 32768 on) that the kernel hands to outgoing
    connections and to whoever asks for any port.
    """
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("a hundred ports from 20000 to 30000 are in use.")


def server_environment(**changes: str) -> dict[str, str]:
    """Return the environment of a test server: no hub, no proxy, no CUDA, then `changes`."""
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    return environment | changes


@dataclass
class Server:
    """A running server; `log` is what it has printed so far."""

    port: int
    process: subprocess.Popen
    log_path: Path

    @property
    def url(self) -> str:
        """Base address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Standard output and error of all its processes."""
        return self.log_path.read_text(errors="replace")

    def post(self, path: str, body: dict[str, Any], *, timeout: float = 180) -> Any:
        """POST JSON and return the JSON answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _opener.open(request, timeout=timeout) as response:
            return json.load(response)

    def is_up(self) -> bool:
        """Whether the server answers and its start-up check has passed."""
        try:
            with _opener.open(self.url + "/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def metrics(self) -> dict[str, float]:
        """Return kt_kernel's counters on the page that ``--enable-metrics`` opens, by their names without prefix."""
        with _opener.open(self.url + "/metrics", timeout=30) as response:
            text = response.read().decode()
        found = re.findall(r'^kt_kernel_(\w+)_total\{method="\w+"\} (\S+)$', text, re.MULTILINE)
        assert found, "none of our figures is on the page"
        return {name: float(number) for name, number in found}

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each id but the first, given the ids before it."""
        answer = self.post(
            "/generate",
            {
                "input_ids": list(ids),
                "sampling_params": {"temperature": 0, "max_new_tokens": 1},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

    def generate(self, ids: Sequence[int], num_tokens: int) -> dict[str, Any]:
        """Return ids and log-probabilities of a greedy continuation of exactly `num_tokens` tokens."""
        answer = self.post(
            "/generate",
            {
                "input_ids": list(ids),
                "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
                "return_logprob": True,
            },
        )
        pairs = answer["meta_info"]["output_token_logprobs"]
        return {"ids": [pair[1] for pair in pairs], "logprobs": [pair[0] for pair in pairs]}

    def load_weights_of(self, model: Path) -> None:
        """Put the weights of another checkpoint of the same shapes into the running server (not under ``--kt-*``)."""
        # SGLang's scheduler dies if a request, its own health check included, still runs when the weights are there:
        # flushing the cache waits for all of them
        with _opener.open(self.url + "/flush_cache?timeout=60", data=b"", timeout=90):
            pass
        answer = self.post("/update_weights_from_disk", {"model_path": str(model)})
        assert answer["success"], answer

    def chat(self, prompt: str, *, max_tokens: int = 32) -> str:
        """Return the greedy answer to one user message."""
        answer = self.post(
            "/v1/chat/completions",
            {
                "model": "default",
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": max_tokens,
            },
        )
        return answer["choices"][0]["message"]["content"]


LAUNCHER = ("-m", "kt_kernel.launch_server")


def command(model: Path | str, port: int, flags: Sequence[str], module: Sequence[str] = LAUNCHER) -> list[str]:
    """Return the command line of a test server."""
    base = [sys.executable, *module, "--model-path", str(model)]
    return [*base, "--host", "127.0.0.1", "--port", str(port), *flags]


@contextmanager
def serve(
    model: Path | str,
    flags: Sequence[str] = (),
    *,
    log_path: Path,
    environment: dict[str, str] | None = None,
    timeout: float = START_SECONDS,
    max_total_tokens: int | None = 4096,
    module: Sequence[str] = LAUNCHER,
) -> Iterator[Server]:
    """Run a server for the duration of the block; `max_total_tokens` None leaves the KV pool to the platform.

    Raises
    ------
    RuntimeError
        It ended or was not ready in `timeout` seconds; the message has the end of its log.
    """
    port = free_port()
    if max_total_tokens is not None:
        flags = ["--max-total-tokens", str(max_total_tokens), *flags]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command(model, port, flags, module),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment or server_environment(),
            cwd=log_path.parent,
            start_new_session=True,
        )
    server = Server(port=port, process=process, log_path=log_path)
    try:
        _wait_until_up(server, timeout)
        yield server
    finally:
        stop(process)


def _wait_until_up(server: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.process.returncode}:\n{server.log[-4000:]}")
        if "The server is fired up" in server.log and server.is_up():
            return
        time.sleep(0.3)
    raise RuntimeError(f"the server was not ready in {timeout:.0f} s:\n{server.log[-4000:]}")


def stop(process: subprocess.Popen) -> None:
    """Kill the server and every process it started (an orderly end takes SGLang five seconds)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(timeout=30)


def wait_until(reached: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait until a condition holds, which is asked for every 50 ms.

    Raises
    ------
    TimeoutError
        It does not hold after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"what a test waits for has not happened in {seconds:.0f} s.")
        time.sleep(0.05)


def run_to_exit(
    model: Path, flags: Sequence[str], *, environment: dict[str, str] | None = None, timeout: float = 120
) -> tuple[int, str]:
    """Run a launch that is expected to end by itself; return its exit code and output."""
    process = subprocess.Popen(
        command(model, free_port(), flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment or server_environment(),
        start_new_session=True,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        stop(process)
    return process.returncode, output

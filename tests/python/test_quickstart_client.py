"""scripts/quickstart_client.py: the port it takes, or the sentence why not; what it shows while a server starts."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_tree import ROOT


def ask_port(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command ``port``."""
    command = [sys.executable, ROOT / "scripts/quickstart_client.py", "port", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout.strip(), result.stderr.strip()


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999"])
def test_a_number_that_is_no_port_is_refused(port: str) -> None:
    message = f"quickstart: error: port {port} does not exist; give a --port from 1 to 65535."
    assert ask_port(f"--port={port}") == (1, "", message)


def test_a_port_in_use_is_refused_and_a_free_one_taken() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        code, output, error = ask_port(f"--port={port}")
        assert (code, output) == (1, "") and f"port {port} is in use" in error
    assert ask_port(f"--port={port}") == (0, str(port), "")


@pytest.fixture()
def client(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module that gives a server two seconds, and repeats itself in a quarter of one."""
    spec = importlib.util.spec_from_file_location("quickstart_client", ROOT / "scripts/quickstart_client.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "START_SECONDS", 2)
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.25)
    return module


class _Output(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(("terminal", "between"), [(True, "\r"), (False, "\n")])
def test_a_server_that_says_nothing_is_shown_to_be_awaited(
    client: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: bool, between: str
) -> None:
    log = tmp_path / "server.log"
    log.touch()
    output = _Output(terminal)
    monkeypatch.setattr(sys, "stdout", output)
    assert not client.wait_for_server(1, os.getpid(), log)
    told = [line.strip() for line in output.getvalue().split(between) if line.strip()]
    assert told[0] == "server: importing (0 s)" and len(told) >= 3
    assert all(re.fullmatch(r"server: importing \([0-2] s\)", line) for line in told)

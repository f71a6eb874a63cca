"""scripts/quickstart_client.py: the port it takes, or the sentence why not."""

from __future__ import annotations

import socket
import subprocess
import sys

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

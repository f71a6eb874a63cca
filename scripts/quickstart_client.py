#!/usr/bin/env python3
"""The client of ``scripts/quickstart.sh``: finds a port, waits for the server, asks a question and measures the answer.

Needs only the standard library, so that it starts at once.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

DEFAULT_PORT = 30000
PORTS_TRIED = 50
START_SECONDS = 600
REPEAT_SECONDS = 15  # where the output is no terminal, a stage is told again so often
# what the log shows on the way, in order
STAGES = (
    ("Init torch distributed", "starting its processes"),
    ("Load weight begin", "loading the model"),
    ("Load weight end", "preparing memory"),
    ("Uvicorn running", "answering its own first request"),
)
# the server is on this machine: a proxy must not see the traffic
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def is_free(port: int) -> bool:
    """Whether this machine can listen on a port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def choose_port(wanted: int | None) -> int:
    """Return the wanted port, or the first free one from 30000 on.

    Raises
    ------
    RuntimeError
        The wanted port is taken or no port number, or all that were tried are taken.
    """
    if wanted is not None:
        if not 0 < wanted < 1 << 16:
            raise RuntimeError(f"port {wanted} does not exist; give a --port from 1 to 65535.")
        if not is_free(wanted):
            raise RuntimeError(f"port {wanted} is in use; give another --port, or stop what listens there.")
        return wanted
    for port in range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED):
        if is_free(port):
            return port
    last = DEFAULT_PORT + PORTS_TRIED - 1
    raise RuntimeError(f"ports {DEFAULT_PORT} to {last} are in use; give a free one with --port.")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def is_up(port: int) -> bool:
    """Whether the server answers and has passed its own start-up check."""
    try:
        with _opener.open(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def stage_of(log: str) -> str:
    """Return what the server is doing, from its log."""
    current = "importing"
    for sign, stage in STAGES:
        if sign in log:
            current = stage
    return current


def wait_for_server(port: int, pid: int, log: Path) -> bool:
    """Wait until the server is up, showing what it does; on failure show the end of its log and return False."""
    started = time.monotonic()
    terminal = sys.stdout.isatty()
    shown, shown_at = "", 0.0
    while time.monotonic() - started < START_SECONDS:
        text = log.read_text(errors="replace")
        seconds = time.monotonic() - started
        if not is_alive(pid):
            print("\n".join(text.splitlines()[-25:]), file=sys.stderr)
            return False
        if "fired up" in text and is_up(port):
            print(f"{chr(13) if terminal else ''}server: ready after {seconds:.0f} s{' ' * 40}".rstrip())
            return True
        stage = stage_of(text)
        if terminal:
            print(f"\rserver: {stage} ({seconds:.0f} s){' ' * 20}", end="", flush=True)
        elif stage != shown or seconds - shown_at >= REPEAT_SECONDS:
            print(f"server: {stage} ({seconds:.0f} s)", flush=True)
            shown, shown_at = stage, seconds
        time.sleep(0.3)
    print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), file=sys.stderr)
    return False


def stream_answer(port: int, model: str, prompt: str, max_tokens: int) -> Iterator[tuple[str, int]]:
    """Yield text and the number of tokens so far, as they arrive from ``/v1/chat/completions``."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with _opener.open(request, timeout=START_SECONDS) as response:
        for line in response:
            match = re.match(rb"data: (\{.*\})", line)
            if not match:
                continue
            event = json.loads(match[1])
            text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            yield text, (event.get("usage") or {}).get("completion_tokens", 0)


def ask(port: int, model: str, prompt: str, max_tokens: int) -> bool:
    """Print the question, the answer as it comes, and its speed; return whether there was an answer."""
    print(f"\nQ: {prompt}\nA: ", end="", flush=True)
    started = time.monotonic()
    first = last = None
    tokens = 0
    for text, count in stream_answer(port, model, prompt, max_tokens):
        tokens = max(tokens, count)
        if text:
            last = time.monotonic()
            first = first or last
            print(text, end="", flush=True)
    print()
    if first is None or last is None:
        print("the answer is empty", file=sys.stderr)
        return False
    rate = f"{(tokens - 1) / (last - first):.1f} tokens/s" if tokens > 1 and last > first else "one token"
    print(f"\n{tokens} tokens: time to first token {1000 * (first - started):.0f} ms, then {rate}")
    return True


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    port = commands.add_parser("port", help="print a port that is free")
    port.add_argument("--port", type=int)
    wait = commands.add_parser("wait", help="wait until the server is up")
    wait.add_argument("--port", type=int, required=True)
    wait.add_argument("--pid", type=int, required=True)
    wait.add_argument("--log", type=Path, required=True)
    question = commands.add_parser("ask", help="ask one question")
    question.add_argument("--port", type=int, required=True)
    question.add_argument("--model", required=True)
    question.add_argument("--prompt", required=True)
    question.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    try:
        if args.command == "port":
            print(choose_port(args.port))
            return 0
        if args.command == "wait":
            return 0 if wait_for_server(args.port, args.pid, args.log) else 1
        return 0 if ask(args.port, args.model, args.prompt, args.max_tokens) else 1
    except (RuntimeError, urllib.error.URLError, OSError) as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""The parent's side of `worker.py`: one process a system, stopped by a signal while another one measures.

A stopped process has no thread that runs, so a pool that spins between its jobs cannot take a core from the system
that is measured.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import kt_kernel

from .catalog import System

ANSWER_SECONDS = 900
STOP_SECONDS = 10


class PeerError(RuntimeError):
    """A system answered with an error, ended, or does not answer; the text says which."""


class WorkerProcess:
    """A process that measures one system. It runs only inside :meth:`ask`.

    Parameters
    ----------
    system : System
        What it measures.
    interpreter : Path
        Python of the system's environment.
    folder : Path
        Files of the layer; the worker's standard error goes to a file there.
    threads : int
        Threads of the system.

    Raises
    ------
    PeerError
        It does not start.
    """

    def __init__(self, system: System, interpreter: Path, *, folder: Path, threads: int) -> None:
        self.system = system
        self._log = folder / f"{system.name}.log"
        paths = [str(Path(__file__).parents[1])]
        if not system.release:  # our interpreter, and a package that may run from its source tree
            paths += [str(Path(kt_kernel.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": str(threads),
            "GGML_NO_BACKTRACE": "1",  # a failed assertion would start a debugger
        }
        if system.tier and not system.release:
            environment["KT_FORCE_ISA"] = system.tier
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [str(interpreter), "-P", "-m", "peers.worker", system.adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        self._read = b""
        try:
            self.version: str = self.ask({"do": "start", "folder": str(folder), "threads": threads})["version"]
        except PeerError:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Let the process run until it has answered one request.

        Raises
        ------
        PeerError
            It answered with an error, ended, or took longer than ANSWER_SECONDS.
        """
        self._process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + ANSWER_SECONDS
        self._write(json.dumps(request).encode() + b"\n", deadline)
        answer = json.loads(self._line(deadline))
        self._pause()
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _write(self, text: bytes, deadline: float) -> None:
        """Write a request, which may be longer than a pipe holds."""
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        while text:
            if not select.select([], [pipe], [], max(deadline - time.monotonic(), 0))[1]:
                raise PeerError(f"no answer in {ANSWER_SECONDS} s.")
            try:
                text = text[os.write(pipe, text) :]
            except BrokenPipeError:
                raise PeerError(self._ending()) from None

    def _line(self, deadline: float) -> bytes:
        """Read up to the end of a line."""
        assert self._process.stdout is not None
        while b"\n" not in self._read:
            if not select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise PeerError(f"no answer in {ANSWER_SECONDS} s.")
            found = os.read(self._process.stdout.fileno(), 1 << 16)
            if not found:
                raise PeerError(self._ending())
            self._read += found
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _pause(self) -> None:
        """Stop the process and wait until every thread of it has stopped."""
        self._process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_SECONDS
        while not all(state == "T" for state in self._thread_states()):
            if time.monotonic() > deadline:
                raise PeerError(f"it has not stopped {STOP_SECONDS} s after SIGSTOP.")
            time.sleep(0.0005)

    def _thread_states(self) -> list[str]:
        states = []
        for file in Path(f"/proc/{self._process.pid}/task").glob("*/stat"):
            try:
                text = file.read_text()
            except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
                continue
            states.append(text.rpartition(")")[2].split()[0])
        return states

    def _ending(self) -> str:
        """How the process ended, with the last line it wrote to standard error."""
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its standard output."
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"it ended with {how}{': ' + lines[-1] if lines else ''}"

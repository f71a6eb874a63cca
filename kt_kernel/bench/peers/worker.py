"""The process of one system: reads requests, answers with what was measured. ``python -m peers.worker MODULE``.

One JSON object a line on stdin, one on stdout; the answer to what failed is ``{"error": text}``.

| request | answer |
|---|---|
| ``{"do": "start", "folder": F, "threads": n}`` | ``{"version": text}``; F has the files of `layer_data` |
| ``{"do": "load", "format": f}`` | ``{"expert_bytes": b}``: bytes of weights that one expert reads |
| ``{"do": "check", "format": f, "ids": [[...]]}`` | ``{"output": file, "weights": file}``, fp32, in F |
| ``{"do": "run", "format": f, "ids": [[[...]], ...]}`` | ``{"seconds": [s, ...]}``, one per forward |
| ``{"do": "calibrate", "format": f}`` | ``{"read": bytes/s, "peak": operations/s}``, of our own worker only |

An adapter is a module of this folder with a class ``System`` (see `SystemProtocol`). Libraries print to stdout; so the
answers go through a copy of it, and stdout becomes stderr.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .layer_data import Batch, LayerData

# Forwards of one token before each measurement: the process was stopped, its threads must be running again.
WAKING_FORWARDS = 2


class SystemProtocol(Protocol):
    """What an adapter's ``System`` has."""

    version: str

    def __init__(self, data: LayerData, threads: int) -> None: ...

    def load(self, name: str) -> float:
        """Store the layer in a format; return the bytes of one expert."""

    def dequantized(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """gate, up and down of the different experts as the format holds them, fp32."""

    def prepare(self, name: str, batch: Batch) -> tuple[Callable[[], object], Callable[[], np.ndarray]]:
        """The forward to be timed, and what gives its output ``[T, H]`` fp32 afterwards."""


def answer(system: SystemProtocol, data: LayerData, request: dict[str, Any]) -> dict[str, Any]:
    """Do one request other than "start"."""
    name = request["format"]
    if request["do"] == "load":
        return {"expert_bytes": system.load(name)}
    if request["do"] == "check":
        forward, output = system.prepare(name, data.batch(request["ids"]))
        forward()
        files = {"output": data.folder / f"out_{os.getpid()}.npy", "weights": data.folder / f"w_{os.getpid()}.npz"}
        np.save(files["output"], output())
        np.savez(files["weights"], *system.dequantized(name))
        return {key: str(path) for key, path in files.items()}
    if request["do"] == "run":
        waking, _ = system.prepare(name, data.batch(request["ids"][0][:1]))
        forwards = [system.prepare(name, data.batch(ids))[0] for ids in request["ids"]]
        for _ in range(WAKING_FORWARDS):
            waking()
        seconds = []
        for forward in forwards:
            start = time.perf_counter()
            forward()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}
    if request["do"] == "calibrate" and hasattr(system, "calibrate"):
        return system.calibrate(name)
    raise ValueError(f"request {request['do']!r} is unknown to this worker.")


def serve(adapter: str) -> None:
    """Answer requests until stdin ends; `adapter` is a module, e.g. "peers.torch_mm"."""
    # A parent that was killed must not leave a stopped process behind.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system: SystemProtocol | None = None
    data: LayerData | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "start":
                data = LayerData(Path(request["folder"]))
                module = importlib.import_module(adapter)
                system = module.System(data, request["threads"])
                result = {"version": system.version}
            elif system is None or data is None:
                raise ValueError("the first request must be start.")
            else:
                result = answer(system, data, request)
        except Exception as error:  # whatever a peer raises is the parent's to report
            result = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])

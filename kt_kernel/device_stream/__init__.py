"""Streams of a device: which tensors belong to one, and how its stream signals to the CPU.

Two ways: *doorbells*, memory words that the stream writes and waits for (cheap, but not every driver or virtual GPU
can), and *host functions*, which the driver calls. ``python -m kt_kernel.device_stream [ORDINAL]`` tries doorbells and
prints what it found; :func:`choose_signal` does that in a process of its own, because a wait that does not end cannot
be undone.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from functools import cache

import torch

from kt_kernel import _ext

logger = logging.getLogger("kt_kernel")

_CHOSEN = "KT_CUDA_SIGNAL"
_FOUND = "KT_CUDA_SIGNAL_FOUND"
# Importing torch on a busy host takes most of it; the probe itself gives up after 5 s.
_PROBE_SECONDS = 120
_choosing = threading.Lock()


@cache
def driver() -> dict:
    """``reason``: why there is no CUDA driver, empty if there is one; ``is_double``: it is the tests' stand-in."""
    return _ext.device_driver()


def is_on_device(tensor: torch.Tensor, stream: int | None) -> bool:
    """Whether a tensor's memory belongs to a device. With the tests' double, a stream handle says so."""
    return tensor.device.type != "cpu" or (bool(stream) and driver()["is_double"])


def current_stream(tensor: torch.Tensor, given: int) -> int:
    """Handle of the stream that torch uses now on the tensor's device: it made the inputs and uses the result."""
    if tensor.device.type == "cpu":
        return given  # the double's tensors: torch knows no stream of theirs
    return torch.cuda.current_stream(tensor.device).cuda_stream


def choose_signal(ordinal: int) -> None:
    """Find out, once in a tree of processes, whether doorbells work on a device; adds it to ``KT_CUDA_SIGNAL_FOUND``.

    ``KT_CUDA_SIGNAL`` overrides. Whatever goes wrong in the probe means host functions, which always work.
    """
    if os.environ.get(_CHOSEN) or driver()["reason"]:
        return
    with _choosing:
        known = [entry for entry in os.environ.get(_FOUND, "").split(",") if entry]
        if not any(entry.startswith(f"{ordinal}=") for entry in known):
            os.environ[_FOUND] = ",".join([*known, f"{ordinal}={_probe(ordinal)}"])


def _probe(ordinal: int) -> str:
    """``doorbell`` or ``hostfunc``, with a line in the log."""
    command = [sys.executable, "-m", "kt_kernel.device_stream", str(ordinal)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
        lines = (done.stdout.strip() or done.stderr.strip() or "no answer").splitlines()
        found, reason = ("doorbell", "") if lines[-1] == "doorbell" else ("hostfunc", lines[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        found, reason = "hostfunc", str(error)
    if found == "doorbell":
        logger.info("the streams of GPU %d ring for the CPU experts through memory words (doorbell).", ordinal)
    else:
        logger.warning(
            "the streams of GPU %d call host functions for the CPU experts; doorbells do not work: %s", ordinal, reason
        )
    return found

"""Memory of this process that no file backs, for the tests that bound it (pages of mapped files are cache)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


def anonymous_kib() -> int:
    """Resident anonymous memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def anonymous_peak_kib(work: Callable[[], object]) -> int:
    """Most that `work` had resident above what there was before it, looked at every millisecond."""
    before = anonymous_kib()
    peak = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_kib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(peak[0], anonymous_kib()) - before

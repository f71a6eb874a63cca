"""Progress of long work over layers: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time

# A log line per layer would be 90 lines for a large model; the first, the last and one every few seconds are enough.
_LOG_INTERVAL_S = 5.0


def format_seconds(seconds: float) -> str:
    """Time in words: ``"8 s"``, ``"3 min 20 s"``, ``"2 h 05 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Bytes and layers done of a known total.

    ``ETA = elapsed / bytes done * bytes left``

    Thread-safe. On a terminal (stderr) a tqdm bar shows bytes, GB/s and ETA; elsewhere log lines at INFO do.

    Parameters
    ----------
    what : str
        What is being done, e.g. ``"loading experts"``.
    total_bytes : int
        Bytes to go in all; 0 if unknown.
    total_layers : int
        Layers to go in all.
    logger : Logger
        Where log lines go.
    unit : str
        What is counted if not layers, e.g. ``"file"``.
    """

    def __init__(
        self, what: str, *, total_bytes: int, total_layers: int, logger: logging.Logger, unit: str = "layer"
    ) -> None:
        self.unit = unit
        self.what = what
        self.total_bytes = total_bytes
        self.total_layers = total_layers
        self.done_bytes = 0
        self.done_layers = 0
        self._logger = logger
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._last_line = 0.0
        self._bar = self._make_bar() if sys.stderr is not None and sys.stderr.isatty() else None

    def _make_bar(self):
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(
            total=self.total_bytes or None,
            desc=self.what,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            file=sys.stderr,
            leave=True,
        )

    @property
    def elapsed_s(self) -> float:
        """Seconds since construction."""
        return time.monotonic() - self._start

    def add(self, num_bytes: int) -> None:
        """Count bytes as done."""
        with self._lock:
            self.done_bytes += num_bytes
            if self._bar is not None:
                self._bar.update(num_bytes)

    def finish_layer(self, layer: int | str) -> None:
        """Count a layer (or file, by name) as done and tell about it."""
        with self._lock:
            self.done_layers += 1
            now = time.monotonic()
            last = self.done_layers == self.total_layers
            if self._bar is not None:
                self._bar.set_postfix_str(f"{self.unit} {self.done_layers}/{self.total_layers}")
                return
            if not last and self.done_layers > 1 and now - self._last_line < _LOG_INTERVAL_S:
                return
            self._last_line = now
            self._logger.info("%s", self._line(layer, now - self._start))

    def _line(self, layer: int | str, elapsed: float) -> str:
        rate = self.done_bytes / elapsed if elapsed > 0 else 0.0
        line = (
            f"{self.what}: {self.unit} {layer} ({self.done_layers}/{self.total_layers}), "
            f"{self.done_bytes / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"
        )
        if self.done_layers == self.total_layers:
            return f"{line}, done in {format_seconds(elapsed)}"
        left = self.total_bytes - self.done_bytes
        if left > 0 and rate > 0:
            return f"{line}, ETA {format_seconds(left / rate)}"
        return line

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

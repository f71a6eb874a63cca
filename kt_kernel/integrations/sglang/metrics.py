"""Figures of the experts on the CPU on SGLang's own ``/metrics`` page, which ``--enable-metrics`` opens.

SGLang collects ``prometheus_client`` objects of all its processes through the folder ``PROMETHEUS_MULTIPROC_DIR``.
A thread of the scheduler brings them up to date once a second, from totals that the library keeps itself.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_UPDATES = 1.0
NANOSECONDS = 1e-9

# name, help text, key of the totals, factor
COUNTERS = (
    ("kt_kernel_cpu_seconds", "Time the CPU computed experts.", "busy_ns", NANOSECONDS),
    (
        "kt_kernel_measured_seconds",
        "Part of it whose overlap with the GPU was measured.",
        "device_measured_ns",
        NANOSECONDS,
    ),
    (
        "kt_kernel_hidden_seconds",
        "Part of the measured time the GPU did not wait for.",
        "device_hidden_ns",
        NANOSECONDS,
    ),
    ("kt_kernel_tokens", "Tokens that went through a layer with experts on the CPU, once per layer.", "tokens", 1.0),
    ("kt_kernel_rows", "Pairs of token and expert computed on the CPU.", "rows", 1.0),
)
OVERLAP = ("kt_kernel_overlap_ratio", "kt_kernel_hidden_seconds / kt_kernel_measured_seconds since start.")


class Metrics:
    """The objects of one scheduler process.

    Parameters
    ----------
    method : str
        Value of the label ``method``.
    read_totals : Callable
        Returns ``{"busy_ns", "device_measured_ns", "device_hidden_ns", "tokens", "rows"}``, totals since start.
    registry : CollectorRegistry, optional
        Of a test; None: prometheus_client's own.
    """

    def __init__(self, method: str, read_totals: Callable[[], dict[str, int]], registry: Any = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge

        registry = REGISTRY if registry is None else registry
        self._read_totals = read_totals
        self._counters = [
            (Counter(name, text, ["method"], registry=registry).labels(method), key, factor)
            for name, text, key, factor in COUNTERS
        ]
        gauge = Gauge(*OVERLAP, ["method"], registry=registry, multiprocess_mode="mostrecent")
        self._overlap = gauge.labels(method)
        self._last = dict.fromkeys((key for _, _, key, _ in COUNTERS), 0)

    def update(self) -> None:
        """Add what has happened since the last update."""
        totals = self._read_totals()
        for counter, key, factor in self._counters:
            counter.inc(max(0, totals[key] - self._last[key]) * factor)
            self._last[key] = totals[key]
        if totals["device_measured_ns"]:
            self._overlap.set(totals["device_hidden_ns"] / totals["device_measured_ns"])

    def run(self) -> None:
        """Update for as long as the process lives; an update that fails is told once, and the next one tries again."""
        pause = threading.Event()
        told = False
        while not pause.wait(SECONDS_BETWEEN_UPDATES):
            try:
                self.update()
            except Exception:
                if not told:
                    logger.exception("kt_kernel: the figures on /metrics are late; said once, tried again each second")
                told = True


_metrics: Metrics | None = None


def after_load_model(_result: None, model_runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """Make the objects in the scheduler that holds the experts, if SGLang collects metrics."""
    global _metrics
    from kt_kernel.integrations.sglang import report

    methods = report.methods_with_experts()
    if _metrics is not None or model_runner.is_draft_worker or not methods:
        return
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return
    try:
        _metrics = Metrics(methods[0].wrapper.method, lambda: totals(report.methods_with_experts()))
    except ImportError:  # the variable is set for another reason, or SGLang would have said so
        logger.info("kt_kernel: no figures on /metrics without the package prometheus_client")
        return
    threading.Thread(target=_metrics.run, name="kt-metrics", daemon=True).start()


def totals(methods: list[Any]) -> dict[str, int]:
    """Return the sums of the layers' counters; nothing is measured or hidden where the GPU has no part in it.

    Parameters
    ----------
    methods : list of KTEPWrapperMethod
        Those with experts.
    """
    from kt_kernel.integrations.sglang import report

    summed = ("rows", "busy_ns", "device_measured_ns", "device_hidden_ns")
    result = dict.fromkeys((*summed, "tokens"), 0)
    for method in methods:
        if method.wrapper.moe is None:  # its weights are being replaced
            continue
        result["tokens"] += method.wrapper.moe.counters()["tokens"]
        for experts in report.all_experts(method):
            counters = experts.counters()
            for key in summed:
                result[key] += counters[key]
    return result

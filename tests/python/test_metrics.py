"""Figures of the experts on SGLang's /metrics page; a real page is read in test_server_placement.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest

from kt_kernel.integrations.sglang import metrics

SECOND = 10**9


def value(registry: prometheus_client.CollectorRegistry, name: str) -> float | None:
    return registry.get_sample_value(name, {"method": "AMXINT8"})


def test_counters_follow_the_totals() -> None:
    totals = {"busy_ns": 3 * SECOND, "device_measured_ns": 0, "device_hidden_ns": 0, "tokens": 10, "rows": 80}
    registry = prometheus_client.CollectorRegistry()
    figures = metrics.Metrics("AMXINT8", lambda: dict(totals), registry)
    figures.update()
    assert value(registry, "kt_kernel_cpu_seconds_total") == 3.0
    assert value(registry, "kt_kernel_overlap_ratio") == 0.0, "nothing was measured"
    totals |= {
        "busy_ns": 5 * SECOND,
        "device_measured_ns": 2 * SECOND,
        "device_hidden_ns": SECOND,
        "tokens": 11,
        "rows": 88,
    }
    figures.update()
    figures.update()
    found = [value(registry, name + "_total") for name, *_ in metrics.COUNTERS]
    assert found == [5.0, 2.0, 1.0, 11.0, 88.0]
    assert value(registry, "kt_kernel_overlap_ratio") == 0.5


def test_counters_never_fall() -> None:
    """The totals of a layer start again when its weights are replaced."""
    totals = dict.fromkeys(("busy_ns", "device_measured_ns", "device_hidden_ns", "tokens"), 0) | {"rows": 50}
    registry = prometheus_client.CollectorRegistry()
    figures = metrics.Metrics("AMXINT8", lambda: dict(totals), registry)
    for rows in (50, 0, 7):
        totals["rows"] = rows
        figures.update()
    assert value(registry, "kt_kernel_rows_total") == 57.0


def test_totals_are_sums_over_layers() -> None:
    def experts(**counters: int) -> Any:
        plain = {"tokens": 2, "rows": 8, "busy_ns": 100, "device_measured_ns": 0, "device_hidden_ns": 0}
        return SimpleNamespace(counters=lambda: {**plain, **counters})

    def layer(device: Any = None, **counters: int) -> Any:
        return SimpleNamespace(wrapper=SimpleNamespace(moe=experts(**counters)), kt_device_experts=device)

    replaced = SimpleNamespace(wrapper=SimpleNamespace(moe=None))
    measured = layer(device_measured_ns=50, device_hidden_ns=40)
    found = metrics.totals([layer(), layer(experts(rows=1, busy_ns=10)), measured, replaced])
    assert found == {"busy_ns": 310, "device_measured_ns": 50, "device_hidden_ns": 40, "tokens": 6, "rows": 25}


def test_a_failure_is_told_once_and_does_not_end_the_updates(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = iter(["fails", "fails", "works", "fails", "works"])
    updated = 0

    class End(BaseException):
        """Ends the endless loop."""

    def read() -> dict[str, int]:
        nonlocal updated
        what = next(rounds, None)
        if what is None:
            raise End
        if what == "fails":
            raise RuntimeError("a layer is gone")
        updated += 1
        return dict.fromkeys(("busy_ns", "device_measured_ns", "device_hidden_ns", "tokens"), 0) | {"rows": updated}

    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_UPDATES", 0.0)
    registry = prometheus_client.CollectorRegistry()
    with pytest.raises(End):
        metrics.Metrics("AMXINT8", read, registry).run()
    assert value(registry, "kt_kernel_rows_total") == 2.0
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "a layer is gone" in caplog.text


def test_nothing_is_made_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_kernel.integrations.sglang import report

    monkeypatch.setattr(metrics, "_metrics", None)
    monkeypatch.setattr(metrics, "Metrics", lambda *_: pytest.fail("SGLang collects no metrics"))
    monkeypatch.setattr(report, "methods_with_experts", lambda: [SimpleNamespace()])
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    metrics.after_load_model(None, SimpleNamespace(is_draft_worker=False))

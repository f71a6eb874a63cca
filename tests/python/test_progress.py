"""Progress of loading and converting: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
import torch
from checkpoints import random_experts, write_checkpoint

from kt_kernel import KTMoEWrapper
from kt_kernel.progress import Progress, format_seconds

logger = logging.getLogger("kt_kernel.test")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_bytes_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO):
        progress = Progress("loading", total_bytes=4 * 10**9, total_layers=2, logger=logger)
        progress.add(10**9)
        progress.finish_layer(0)
        progress._bar.refresh()
        progress.close()
    text = stream.getvalue()
    assert "loading:  25%" in text and "1.00G/4.00G" in text and "B/s" in text and "layer 1/2" in text
    assert not caplog.records


def test_elsewhere_log_lines_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        progress = Progress("loading", total_bytes=3 * 10**9, total_layers=3, logger=logger)
        progress._start -= 10  # ten seconds ago
        for layer in (4, 5, 6):
            progress.add(10**9)
            progress.finish_layer(layer)
        progress.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "loading: layer 4 (1/3), 1.00 GB, 0.10 GB/s, ETA 20 s",
        "loading: layer 6 (3/3), 3.00 GB, 0.30 GB/s, done in 10 s",
    ], "the first and the last; those between at most every few seconds"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_times_in_words(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def progress_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of progress; the recognition of the folder comes before it."""
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("loading CPU experts")]


def test_loading_a_model_counts_all_its_layers(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, {layer: random_experts(4, 64, 48) for layer in range(3)})
    wrappers = [
        KTMoEWrapper(layer, 4, 2, 64, 48, None, 2, None, str(tmp_path), 512, method="BF16") for layer in range(3)
    ]
    with caplog.at_level(logging.INFO, "kt_kernel"):
        for wrapper in wrappers:
            wrapper.load_weights(torch.arange(4))
    lines = progress_lines(caplog)
    assert re.match(r"loading CPU experts: layer 0 \(1/3\), .* GB/s, ETA", lines[0])
    assert re.match(r"loading CPU experts: layer 2 \(3/3\), .* GB/s, done in", lines[-1])


def test_layers_that_get_tensors_are_not_waited_for(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    experts = random_experts(4, 64, 48)
    write_checkpoint(tmp_path, {0: experts})
    wrappers = [KTMoEWrapper(0, 4, 2, 64, 48, None, 2, None, path, 512) for path in (str(tmp_path), "", str(tmp_path))]
    with caplog.at_level(logging.INFO, "kt_kernel"):
        wrappers[0].load_weights_from_tensors(*experts)
        wrappers[1].load_weights_from_tensors(*experts)
        wrappers[2].load_weights(torch.arange(4))
    lines = progress_lines(caplog)
    assert len(lines) == 1 and "layer 0 (1/1)" in lines[0] and "done in" in lines[0]

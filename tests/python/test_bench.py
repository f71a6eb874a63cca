"""The benches: their arithmetic, and one short real run of each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kt_kernel.bench import conditions, layer
from kt_kernel.bench.shapes import SHAPES, Shape


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kt_kernel.bench", "layer", *arguments], capture_output=True, text=True, timeout=300
    )


def test_summarize_takes_medians_of_ratios_within_a_round():
    shape = Shape(100, 10, 4, 2)
    # (seconds, weight bytes, operations, round); reads differ by round, so the ratio must use its own round's
    samples = [(1.0, 50.0, 30.0, 0), (2.0, 50.0, 30.0, 1), (4.0, 50.0, 30.0, 2)]
    row = layer.summarize(8, samples, shape, reads=[100.0, 50.0, 25.0], peak=60.0)
    assert row.share_of_read == pytest.approx(0.5)
    assert row.spread == pytest.approx(0.0)
    assert row.share_of_peak == pytest.approx(0.25)
    assert row.us == pytest.approx(2e6)
    assert row.rows_per_expert == pytest.approx(4.0)


def test_shapes_are_cut_to_memory_but_not_below_top_k():
    assert SHAPES["kimi-k2"].cut_to(16).num_experts == 16
    assert SHAPES["kimi-k2"].cut_to(1).num_experts == 8
    assert SHAPES["qwen3-30b"].cut_to(1000).num_experts == 128


@pytest.mark.parametrize("method", ["AMXINT8", "AMXINT4", "BF16"])
def test_short_run_checks_its_result_and_prints_json(method):
    done = run_bench("--method", method, "--shape", "demo", "--tokens", "1,5", "--rounds", "2", "--json")
    # 3: the shared machine moved during the run; the figures are thrown away but still printed
    assert done.returncode in (0, 3), done.stderr
    result = json.loads(done.stdout)
    assert [row["tokens"] for row in result["rows"]] == [1, 5]
    assert all(row["us"] > 0 and row["share_of_read"] > 0 for row in result["rows"])
    dtype = {"AMXINT8": "int8", "AMXINT4": "int4", "BF16": "bf16"}[method]
    assert 0 < result["relative_error"] < layer.CHECK_BOUND[dtype]
    assert result["command"].startswith(f"python -m kt_kernel.bench layer --method {method}")


def test_bad_arguments_are_one_sentence():
    done = run_bench("--tokens", "1,zero")
    assert done.returncode == 2
    assert done.stderr.strip() == "--tokens 1,zero and --rounds 40 must be positive numbers."
    done = run_bench("--threads", "-1")
    assert done.returncode == 2
    assert done.stderr.startswith("cpuinfer_threads is -1; it must be") and done.stderr.count("\n") == 1


def test_the_commit_is_empty_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert conditions.commit() == ""


def test_a_run_is_thrown_away_when_its_calibration_moved():
    assert conditions.refuse_drift(conditions.drift([10.0, 11.0, 9.0, 20.0, 10.0, 10.0, 10.0, 10.5])) is None
    moved = conditions.drift([10.0] * 6 + [9.0, 9.0])
    assert moved == pytest.approx(1 / 9)
    assert conditions.refuse_drift(moved).startswith("thrown away: the calibration moved by 11 % during the run")


@pytest.mark.parametrize("text", ["", "1,", "1,zero", "0,1", "-3"])
def test_lists_of_numbers_are_refused_in_one_sentence(text):
    assert conditions.positive_numbers("--m", "1,16") == [1, 16]
    with pytest.raises(ValueError, match=f"^--m {text} must be positive numbers, comma separated.$"):
        conditions.positive_numbers("--m", text)

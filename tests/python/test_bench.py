"""The benches: their arithmetic, and one short real run of each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from kt_kernel.bench import conditions, kernels, layer
from kt_kernel.bench.shapes import SHAPES, Shape


def run_kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    buffer_mb = max(64, kernels.CACHES_OF_A_BUFFER * conditions.last_level_cache_bytes() >> 20)
    command = [sys.executable, "-m", "kt_kernel.bench", "kernels", "--buffer-mb", str(buffer_mb), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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


def test_kernels_are_summarized_by_medians_of_ratios_within_a_round():
    taken = kernels.Samples(read=[100.0, 50.0, 25.0], peak=[80.0] * 3, stream=[50.0, 25.0, 12.5], hot=[40.0] * 3)
    row = kernels.summarize("int8", "gemm", 2, taken, panel_bytes=256, k=1)
    assert row.share_of_read == pytest.approx(0.5)
    # 2 * m * 64 * k operations a panel of 256 bytes are one operation a byte
    assert row.gops == pytest.approx(25e-9)
    assert row.share_of_peak == pytest.approx(25 / 80)
    assert row.hot_share_of_peak == pytest.approx(0.5)
    assert row.spread == pytest.approx(0.0)


def test_the_drift_of_the_kernels_limits_is_that_of_most_samples():
    steady, other = [10.0] * 8, [300.0] * 8
    outlier = [10.0] * 7 + [1.0]
    samples = {("a", 1): kernels.Samples(steady, steady), ("b", 1): kernels.Samples(other, steady)}
    samples["c", 1] = kernels.Samples(outlier, steady)
    assert kernels.drift_of(samples, 8) == pytest.approx(0.0)
    slower = [10.0] * 4 + [8.0] * 4
    samples = {("a", 1): kernels.Samples(steady, slower), ("b", 1): kernels.Samples(steady, slower)}
    assert kernels.drift_of(samples, 8) == pytest.approx(0.25)


@pytest.mark.parametrize("format_name", ["int8", "int4g128", "int4", "bf16"])
def test_short_run_of_the_kernels_checks_results_and_prints_json(format_name):
    done = run_kernels("--filter", f"{format_name} ", "--m", "1,7", "--k", "192", "--rounds", "1", "--json")
    assert done.returncode in (0, 3), done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["m"] for row in rows} == {1, 7} and {row["format"] for row in rows} == {format_name}
    assert {row["kernel"] for row in rows} == set(kernels.kernels_of(format_name))
    assert all(row["gb_per_s"] > 0 and row["share_of_peak"] > 0 for row in rows)


def test_a_wrong_kernel_ends_the_bench_before_it_measures(monkeypatch, capsys):
    class WrongAtTwo(kernels._ext.KernelBench):
        def matches(self, kernel, m):
            return m != 2

    monkeypatch.setattr(kernels._ext, "KernelBench", WrongAtTwo)
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("measured"))
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    flags = ["--filter", "bf16 gemm_bf16_bf16_fp32_1x64x2_reference", "--m", "1,2", "--k", "64"]
    assert kernels.main(parser.parse_args(flags)) == 1
    assert capsys.readouterr().err == (
        "wrong result: bf16 gemm_bf16_bf16_fp32_1x64x2_reference at m = 2 differs from the reference row.\n"
    )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--m", "1,x"], "--m 1,x must be positive numbers, comma separated."),
        (["--rounds", "0"], "--rounds 0 must be positive numbers, comma separated."),
        (["--filter", "int5"], "--filter int5 leaves no kernel that may run here; python -m kt_kernel.collect_env"),
        (["--k", "100"], "k is 100; it must be a multiple of 64 up to 65536."),
    ],
)
def test_bad_flags_of_the_kernel_bench_are_one_sentence(flags, sentence):
    done = run_kernels(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1


def test_a_buffer_that_a_cache_could_hold_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(conditions, "last_level_cache_bytes", lambda: 40 << 20)
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    assert kernels.main(parser.parse_args(["--buffer-mb", "79"])) == 2
    assert capsys.readouterr().err == (
        "--buffer-mb 79 would be read from the last-level cache of 40 MB; give at least 80.\n"
    )

"""Predictions for machines that were not measured: the formula, where its figures come from, and the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kt_kernel.bench import predict
from kt_kernel.bench.shapes import SHAPES
from kt_kernel.methods import FLOAT_METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs"
INT8, BF16 = FLOAT_METHODS["AMXINT8"], FLOAT_METHODS["BF16"]
# reads 100 GB/s and multiplies 20 TOPS with int8
MACHINE = predict.Machine("test", 1, 200.0, 0.5, 100, 2.0, 100)


def run_command(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kt_kernel.bench", "predict", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_page_has_the_commands_tables() -> None:
    done = run_command()
    assert done.returncode == 0, done.stderr
    page = (DOCS / "predictions.md").read_text()
    written = page.partition(predict.BEGIN)[2].partition(predict.END)[0]
    assert written == done.stdout, "run: python -m kt_kernel.bench predict --page docs/predictions.md"


def test_shares_are_the_measured_ones() -> None:
    """Of read: the smallest of 1 to 4 tokens, at most 1; of peak: at 64 rows an expert."""
    rows = re.findall(r"^\|(?: *[\d.]+ *\|){8}$", (DOCS / "measurements.md").read_text(), re.MULTILINE)
    figures = {int(row.split("|")[1]): [float(cell) for cell in row.split("|")[3:9]] for row in rows}
    assert list(figures) == [1, 2, 4, 1024], "the table One layer"
    page = (DOCS / "predictions.md").read_text()
    for i, name in enumerate(("AMXINT8", "AMXINT4", "BF16")):
        read = min(1.0, *(figures[tokens][2 * i] for tokens in (1, 2, 4)))
        expected = predict.Efficiency(read=read, peak=figures[1024][2 * i + 1])
        assert predict.EFFICIENCY[name] == expected
        assert re.search(rf"share of read, decoding \| .*\b{name} {expected.read:.2f}", page)
        assert re.search(rf"share of peak, prefill \| .*\b{name} {expected.peak:.2f}", page)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3-30b", [8, 16, 29, 52, 82, 112]),
        ("qwen3-next-80b", [10, 20, 39, 75, 139, 240]),
        ("dsv4-flash", [6, 12, 23, 44, 81, 136]),
    ],
)
def test_experts_that_a_batch_reads(name: str, expected: list[int]) -> None:
    found = [predict.experts_read(SHAPES[name], tokens) for tokens in (1, 2, 4, 8, 16, 32)]
    assert found == pytest.approx(expected, abs=0.6)


def test_decoding_is_bound_by_reading() -> None:
    shape = SHAPES["dsv3"]  # 8 x 44,040,192 weights a layer, 2 bytes each, all of the read bandwidth
    seconds = 8 * 44_040_192 * 2 / 100e9
    assert predict.layer_seconds(MACHINE, shape, BF16, 1) == pytest.approx(seconds + 5e-6)
    alone = predict.tokens_per_s(MACHINE, shape, BF16, 1)
    assert alone == pytest.approx(1 / (58 * (seconds + 5e-6)))
    assert predict.tokens_per_s(MACHINE, shape, BF16, 1, 1e-3) == pytest.approx(1 / (58 * (seconds + 5e-6 + 1e-3)))


def test_a_long_prefill_is_bound_by_multiplying() -> None:
    shape = SHAPES["qwen3-30b"]
    operations = 2 * 8192 * 8 * 3 * 2048 * 768
    expected = operations / (20e12 * predict.EFFICIENCY["AMXINT8"].peak) + 5e-6
    assert predict.layer_seconds(MACHINE, shape, INT8, 8192) == pytest.approx(expected)


@pytest.mark.parametrize("method", FLOAT_METHODS.values(), ids=FLOAT_METHODS)
def test_reading_and_multiplying_meet_at_the_crossover(method: predict.Method) -> None:
    shape = SHAPES["kimi-k2"]
    tokens = predict.crossover_rows(MACHINE, shape, method) * shape.num_experts / shape.top_k
    below, above = (predict.layer_seconds(MACHINE, shape, method, int(tokens * f)) for f in (0.8, 1.25))
    at = predict.layer_seconds(MACHINE, shape, method, int(tokens))
    assert below == pytest.approx(at, rel=0.02), "a sweep over all weights, whatever the batch"
    assert above == pytest.approx(1.25 * at, rel=0.02)


def test_a_second_socket_counts_less_than_the_first() -> None:
    two = predict.Machine("test", 2, 200.0, 0.5, 100, 2.0, 100)
    assert two.read_bytes_per_s == pytest.approx(1.85 * MACHINE.read_bytes_per_s)
    assert two.peak_ops_per_s(INT8) == pytest.approx(1.85 * 20e12)
    assert two.peak_ops_per_s(BF16) == pytest.approx(1.85 * 10e12)


def test_json_and_another_gpu() -> None:
    done = run_command("--json", "--gpu-us", "0", "--gpu-prefill-us", "0")
    result = json.loads(done.stdout)
    assert result["prediction"] is True
    assert [machine["name"] for machine in result["machines"]] == [machine.name for machine in predict.MACHINES]
    for machine in result["machines"]:
        assert set(machine["models"]) == set(SHAPES) - {"demo"}
        for model in machine["models"].values():
            for cell in model["decode"] + model["prefill"]:
                assert cell["with_gpu_part"] == cell["experts_alone"] > 0


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(value: str) -> None:
    done = run_command("--gpu-us", value)
    assert done.returncode == 2
    assert done.stderr == f"--gpu-us is {float(value)}; it must be 0 or more microseconds.\n"


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text("# Page\n")
    done = run_command("--page", str(page))
    assert done.returncode == 2
    assert done.stderr.startswith(f"{page} has no lines <!-- predict:begin --> and") and done.stderr.count("\n") == 1
    assert page.read_text() == "# Page\n"

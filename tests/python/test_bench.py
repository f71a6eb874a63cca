"""The benches: their arithmetic, and one short real run of each."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kt_kernel.bench import conditions, kernels, layer, mixed
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
    # reads differ by sample, so the ratio must use its own; of the peaks it must use the median
    limits = ((1.0, 100.0, 60.0), (2.0, 50.0, 10.0), (4.0, 25.0, 90.0))
    samples = [layer.Sample(seconds, 50.0, 30.0, read, peak) for seconds, read, peak in limits]
    row = layer.summarize(8, samples, shape, drift=0.02)
    assert (row.drift, row.thrown_away) == (0.02, False)
    assert row.share_of_read == pytest.approx(0.5)
    assert row.share_of_peak == pytest.approx(0.25)
    assert row.share_of_limit == pytest.approx(0.5)
    assert row.spread == pytest.approx(0.0)
    assert row.us == pytest.approx(2e6)
    assert row.rows_per_expert == pytest.approx(4.0)


def test_the_speed_up_stands_beside_that_of_the_limit_that_binds():
    lines = {
        1: ([[layer.Sample(4.0, 100.0, 1.0, 50.0, 10.0)], [layer.Sample(3.0, 100.0, 1.0, 60.0, 20.0)]], 0.01),
        64: ([[layer.Sample(8.0, 100.0, 80.0, 50.0, 10.0)], [layer.Sample(4.0, 100.0, 80.0, 60.0, 20.0)]], 0.08),
    }
    found = layer.speedups([1, 2], lines)
    assert [(row.drift, row.thrown_away) for row in found] == [(0.01, False), (0.08, True)]
    assert [(row.tokens, row.beside, row.threads) for row in found] == [(1, 1, 2), (64, 1, 2)]
    assert [row.speedup for row in found] == pytest.approx([4 / 3, 2.0])
    assert [row.of_the_limit for row in found] == pytest.approx([60 / 50, 2.0])


def test_the_limit_that_binds_decides_over_a_line_of_the_layer():
    steady, slower = [10.0] * 8, [10.0] * 4 + [8.0] * 4

    def samples(read: list[float], peak: list[float], operations: float) -> list[layer.Sample]:
        return [layer.Sample(1.0, 5.0, operations, one, other) for one, other in zip(read, peak, strict=True)]

    assert layer.drift_of(1, [samples(slower, steady, operations=1.0)]) == pytest.approx(0.25)
    assert layer.drift_of(1, [samples(steady, slower, operations=1.0)]) == 0
    assert layer.drift_of(1, [samples(steady, slower, operations=9.0)]) == pytest.approx(0.25)
    assert layer.drift_of(1, [samples(slower, steady, operations=9.0)]) == 0
    # of several thread counts the largest
    both = [samples(steady, steady, operations=1.0), samples(slower, steady, operations=1.0)]
    assert layer.drift_of(1, both) == pytest.approx(0.25)


class FakeExperts:
    """A layer of one thread that notes what is called."""

    def __init__(self, calls: list[str]):
        self.engine = SimpleNamespace(num_threads=1, num_nodes=1, probe_dispatch=lambda: calls.append("wake") or 500.0)
        self.layer = SimpleNamespace(
            handle=0,
            probe_read=lambda: calls.append("read") or 10.0,
            probe_peak=lambda milliseconds: calls.append("peak") or 20.0,
            counters=lambda: {"busy_ns": 1000 * len(calls), "weight_bytes": len(calls), "rows": 0},
            pages=lambda: {"huge_bytes": 1, "resident_bytes": 2},
        )


def test_each_forward_has_limits_of_its_own_and_finds_the_workers_awake(monkeypatch):
    calls = []
    monkeypatch.setattr(layer.ops, "moe_forward", lambda *_: calls.append("forward"))
    shape, tokens = Shape(64, 32, 4, 2), layer.SHORT_TOKENS
    found = layer.measure([FakeExperts(calls)], shape, [tokens, tokens + 1], "uniform", rounds=2)
    each = ["wake", "read", "wake", "peak", "wake", "forward"]
    warm_up = ["read", "peak"]
    assert calls == warm_up + 2 * (layer.SHORT_SAMPLES + 1) * each
    assert {key: len(taken) for key, (taken,) in found.items()} == {tokens: 2 * layer.SHORT_SAMPLES, tokens + 1: 2}
    assert found[tokens + 1][0][0].read == 10.0 and found[tokens + 1][0][0].peak == 20.0


def test_lines_of_the_layer_that_stay_thrown_away_are_marked(monkeypatch, capsys):
    quiet, moved = [[layer.Sample(1.0, 5.0, 1.0, read, 10.0) for read in reads] for reads in ((9, 9), (9, 8))]
    samples = {1: [quiet, quiet], 64: [quiet, moved]}
    asked = []

    def measure(layers, shape, keys, *_):
        asked.append(list(keys))
        return {key: samples[key] for key in keys}

    monkeypatch.setattr(layer, "measure", measure)
    layers = [FakeExperts([]), FakeExperts([])]
    monkeypatch.setattr(layer, "prepare", lambda *_: (Shape(64, 32, 4, 2), layers, 0.01))
    parser = argparse.ArgumentParser()
    layer.add_arguments(parser)
    described = dict.fromkeys(("machine", "commit", "command", "method", "shape", "routing", "kernels"), "")
    described |= {"hidden_size": 1, "intermediate_size": 1, "num_experts": 4, "top_k": 2}
    monkeypatch.setattr(layer, "describe", lambda *_: described | {"environment": "", "relative_error": 0.0})
    flags = ["--tokens", "1,64", "--threads", "1,2", "--attempts", "2"]
    assert layer.main(parser.parse_args([*flags, "--json"])) == 3
    out, err = capsys.readouterr()
    assert asked == [[1, 64], [64]]
    result = json.loads(out)
    for rows in (result["tables"][0]["rows"], result["tables"][1]["rows"], result["speedups"]):
        assert [(row["tokens"], row["thrown_away"]) for row in rows] == [(1, False), (64, True)]
        assert [row["drift"] for row in rows] == pytest.approx([0, 1 / 8])
    assert result["drift"] == pytest.approx(1 / 8)
    assert err == (
        "1 of 2 lines are thrown away, their calibration moved by more than 7 %; attempt 2 of 2 begins.\n"
        "thrown away: the calibration of 1 of 2 lines moved by up to 12 % during the run, more than 7 %; run it again "
        "on a quieter machine.\n"
    )
    assert layer.main(parser.parse_args(flags)) == 3
    out = capsys.readouterr().out
    assert len(re.findall(r"^\|.*\| 12\.5 %, thrown away \|$", out, re.MULTILINE)) == 3
    assert len(re.findall(r"^\|.*\| 0\.0 % \|$", out, re.MULTILINE)) == 3
    samples[64] = samples[1]
    assert layer.main(parser.parse_args(flags)) == 0
    assert "thrown away" not in "".join(capsys.readouterr())


def test_experts_are_drawn_once_a_token_and_as_often_as_their_rank_says():
    shape = Shape(64, 64, 32, 4)
    counts = {}
    for routing in layer.ROUTINGS:
        ids = layer.draw_experts(shape, 4000, routing, torch.Generator().manual_seed(0))
        assert ids.shape == (4000, 4) and all(len(set(row)) == 4 for row in ids[:200].tolist())
        counts[routing] = ids.flatten().bincount(minlength=32).sort(descending=True).values.float()
    # 500 times each; the standard deviation of a count is about 21
    assert counts["uniform"].max() < 600 and counts["uniform"].min() > 400
    # the first of a token: 1 / (1 + 1/2 + ... + 1/32) = 0.246 for the most likely; four draws make it more
    assert 2000 < counts["zipf"][0] < 3400 and counts["zipf"][0] > 6 * counts["zipf"][-1]
    one = Shape(64, 64, 32, 1)
    ids = layer.draw_experts(one, 20000, "zipf", torch.Generator().manual_seed(0)).flatten().bincount(minlength=32)
    shares = ids.sort(descending=True).values / 20000
    assert shares[:3].tolist() == pytest.approx([0.246, 0.123, 0.082], abs=0.012)


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
    (table,) = result["tables"]
    assert [row["tokens"] for row in table["rows"]] == [1, 5] and not result["speedups"]
    assert all(row["us"] > 0 and row["share_of_read"] > 0 for row in table["rows"])
    assert result["drift"] == max(row["drift"] for row in table["rows"])
    assert (done.returncode == 3) == any(row["thrown_away"] for row in table["rows"])
    dtype = {"AMXINT8": "int8", "AMXINT4": "int4", "BF16": "bf16"}[method]
    assert 0 < result["relative_error"] < layer.CHECK_BOUND[dtype]
    assert result["command"].startswith(f"python -m kt_kernel.bench layer --method {method}")


def test_a_run_of_several_thread_counts_prints_a_table_each_and_the_forced_isa(monkeypatch):
    monkeypatch.setenv("KT_FORCE_ISA", "avx2")
    flags = ["--method", "AMXINT4", "--group-size", "64", "--routing", "zipf", "--shape", "demo"]
    done = run_bench(*flags, "--tokens", "1,9", "--threads", "1,2", "--rounds", "2", "--attempts", "1")
    assert done.returncode in (0, 3), done.stderr
    assert "; KT_FORCE_ISA=avx2; " in done.stdout and "zipf routing; int4 on avx2:" in done.stdout
    assert "`KT_FORCE_ISA=avx2 python -m kt_kernel.bench layer --method AMXINT4 --shape demo " in done.stdout
    assert "--threads 1,2 --group-size 64 --routing zipf --rounds 2 --attempts 1`" in done.stdout
    assert re.findall(r"^(\d) threads on 1 nodes; limits", done.stdout, re.MULTILINE) == ["1", "2"]
    assert re.findall(r"^\| 2 beside 1 \| (\d) \|", done.stdout, re.MULTILINE) == ["1", "9"]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--tokens", "1,zero"], "--tokens 1,zero must be positive numbers, comma separated."),
        (["--rounds", "0"], "--rounds 0 must be positive numbers, comma separated."),
        (["--threads", "1,-1"], "--threads 1,-1 must be positive numbers, comma separated."),
        (["--attempts", "0"], "--attempts 0 must be positive numbers, comma separated."),
        (
            ["--group-size", "32"],
            "group size 32 was given, but AMXINT8 has no groups; only AMXINT4 takes a group size.",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(flags, sentence):
    done = run_bench(*flags)
    assert done.returncode == 2
    assert done.stderr == f"{sentence}\n"


@pytest.mark.parametrize("bench", [layer, mixed])
def test_no_threads_are_refused_before_anything_is_built(monkeypatch, capsys, bench):
    monkeypatch.setattr(layer, "prepare", lambda *_: pytest.fail("a layer was built"))
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.main(parser.parse_args(["--threads", "0"])) == 2
    assert capsys.readouterr().err == "--threads 0 must be positive numbers, comma separated.\n"


@pytest.mark.parametrize("bench", ["layer", "mixed"])
def test_kernels_that_cannot_be_had_are_one_sentence(monkeypatch, bench):
    monkeypatch.setenv("KT_GEMM", "onednn")
    monkeypatch.setenv("KT_FORCE_ISA", "avx2")
    command = [sys.executable, "-m", "kt_kernel.bench", bench, "--shape", "demo", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert re.fullmatch('KT_GEMM="onednn" asks for .*\n', done.stderr)


def test_a_layer_that_differs_between_thread_counts_is_a_wrong_result(monkeypatch):
    shape = Shape(64, 32, 4, 2)
    engines = [SimpleNamespace(num_threads=1), SimpleNamespace(num_threads=2)]
    outputs = iter([torch.zeros(4, 64), torch.ones(4, 64)])
    monkeypatch.setattr(layer, "load_layer", lambda *_: SimpleNamespace(layer=SimpleNamespace(handle=0)))
    monkeypatch.setattr(layer.ops, "moe_forward", lambda *_: next(outputs))
    with pytest.raises(layer.WrongResultError, match="^wrong result: 2 threads give other bits than 1.$"):
        layer.build_layers(shape, "int8_n64k4_v1", engines)
    monkeypatch.setattr(layer.ops, "moe_forward", lambda *_: torch.zeros(4, 64))
    with pytest.raises(layer.WrongResultError, match="^wrong result: relative error 1.000 is above 0.04.$"):
        layer.build_layers(shape, "int8_n64k4_v1", engines)


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    layer.add_arguments(parser)
    for installed, name, sentence in (
        (None, "a.png", "--plot needs matplotlib, which is not installed: pip install matplotlib."),
        ("yes", "a.gif", f"--plot is {tmp_path}/a.gif; it must end in one of .png, .svg, .pdf."),
        ("yes", "b/a.png", f"--plot is {tmp_path}/b/a.png, but there is no folder {tmp_path}/b."),
    ):
        monkeypatch.setattr(conditions.importlib.util, "find_spec", lambda _, installed=installed: installed)
        monkeypatch.setattr(layer, "build_layers", lambda *_: pytest.fail("a layer was built"))
        assert layer.main(parser.parse_args(["--plot", str(tmp_path / name)])) == 2
        assert capsys.readouterr().err == f"{sentence}\n"


def test_the_picture_has_a_line_for_each_thread_count(monkeypatch, tmp_path):
    drawn = []

    class Axes:
        def plot(self, rows, shares, marker, label):
            drawn.append((label, rows, shares))

        def __getattr__(self, name):
            return lambda *_, **__: None

    class Figure:
        def __init__(self, **_): ...

        def subplots(self, *_):
            return Axes()

        def savefig(self, file, dpi):
            file.write_text("picture")

    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    figures = ModuleType("matplotlib.figure")
    figures.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figures)
    rows = [
        {"rows_per_expert": 0.5, "share_of_limit": 0.9, "thrown_away": False},
        {"rows_per_expert": 64, "share_of_limit": 0.8, "thrown_away": False},
    ]
    thrown_away = {"rows_per_expert": 128, "share_of_limit": 0.1, "thrown_away": True}
    tables = [{"threads": 1, "rows": rows}, {"threads": 2, "rows": [rows[0], thrown_away]}]
    result = {"tables": tables, "method": "BF16", "shape": "demo", "routing": "zipf"}
    layer.plot(result, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == "picture"
    assert drawn == [("1 threads", [0.5, 64], [0.9, 0.8]), ("2 threads", [0.5], [0.9])]


def test_short_run_of_a_token_beside_a_prompt():
    command = [sys.executable, "-m", "kt_kernel.bench", "mixed", "--shape", "demo", "--chunks", "8,64", "--rounds", "2"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 3), done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["chunk"] for row in rows] == [8, 64]
    assert all(row[name] > 0 for row in rows for name in ("alone_us", "chunk_us", "batched_us", "behind_us"))


def test_a_token_behind_a_prompt_is_timed_until_its_own_result(monkeypatch):
    calls, clock = [], itertools.count()
    monkeypatch.setattr(mixed.ops, "submit", lambda hidden, ids, *_: calls.append(("submit", hidden)) or hidden)
    monkeypatch.setattr(mixed.ops, "sync", lambda ticket, hidden: calls.append(("sync", ticket)))
    monkeypatch.setattr(mixed.time, "perf_counter", lambda: calls.append("clock") or float(next(clock)))
    experts = SimpleNamespace(layer=SimpleNamespace(handle=1))
    ids = torch.zeros(1, 2)
    assert mixed.seconds_behind(experts, ("chunk", ids), ("token", ids)) == 1.0
    assert calls == [
        ("submit", "chunk"),
        "clock",
        ("submit", "token"),
        ("sync", "token"),
        "clock",
        ("sync", "chunk"),
    ]
    row = mixed.summarize(4, [(1e-6, 8e-6, 9e-6, 10e-6)] * 3)
    assert (row.alone_us, row.chunk_us_per_token, row.batched_us, row.behind_us) == pytest.approx((1, 2, 9, 10))


def test_the_commit_is_empty_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert conditions.commit() == ""


def test_the_commit_is_empty_for_an_installed_package_inside_a_clone(monkeypatch, tmp_path):
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    for folder in ("clone", ".venv"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "conditions.py").touch()
    git("init")
    git("add", "clone")
    git("commit", "-m", "a clone with an environment in it")
    monkeypatch.setattr(conditions, "__file__", str(tmp_path / "clone" / "conditions.py"))
    assert conditions.commit()
    monkeypatch.setattr(conditions, "__file__", str(tmp_path / ".venv" / "conditions.py"))
    assert conditions.commit() == ""


def test_a_run_is_thrown_away_when_its_calibration_moved():
    assert conditions.refuse_drift(conditions.drift([10.0, 11.0, 9.0, 20.0, 10.0, 10.0, 10.0, 10.5])) is None
    moved = conditions.drift([10.0] * 6 + [9.0, 9.0])
    assert moved == pytest.approx(1 / 9)
    assert conditions.refuse_drift(moved).startswith("thrown away: the calibration moved by 11 % during the run")


def test_only_lines_that_moved_are_measured_again(capsys):
    drifts = {"a": iter([0.01]), "b": iter([0.2, 0.08, 0.07]), "c": iter([0.5, 0.02])}
    asked = []

    def measure(keys: list[str]) -> dict[str, tuple[str, int]]:
        asked.append(list(keys))
        return {key: (key, len(asked)) for key in keys}

    found = conditions.until_quiet("abc", 5, measure, lambda key, _: next(drifts[key]))
    assert asked == [["a", "b", "c"], ["b", "c"], ["b"]]
    assert found == {"a": (("a", 1), 0.01), "b": (("b", 3), 0.07), "c": (("c", 2), 0.02)}
    assert capsys.readouterr().err == (
        "2 of 3 lines are thrown away, their calibration moved by more than 7 %; attempt 2 of 5 begins.\n"
        "1 of 3 lines are thrown away, their calibration moved by more than 7 %; attempt 3 of 5 begins.\n"
    )


def test_the_last_attempt_stays_however_it_moved(capsys):
    attempts = itertools.count(1)
    found = conditions.until_quiet(
        [4, 4], 2, lambda keys: dict.fromkeys(keys, next(attempts)), lambda _, samples: samples / 10
    )
    assert found == {4: (2, 0.2)} and next(attempts) == 3
    assert "1 of 1 lines" in capsys.readouterr().err
    assert conditions.end_of_lines([0.07, 0.0]) == 0
    assert conditions.end_of_lines([0.07, 0.2, 0.1]) == 3
    assert capsys.readouterr().err == (
        "thrown away: the calibration of 2 of 3 lines moved by up to 20 % during the run, more than 7 %; run it again "
        "on a quieter machine.\n"
    )


@pytest.mark.parametrize("text", ["", "1,", "1,zero", "0,1", "-3"])
def test_lists_of_numbers_are_refused_in_one_sentence(text):
    assert conditions.positive_numbers("--m", "1,16") == [1, 16]
    with pytest.raises(ValueError, match=f"^--m {text} must be positive numbers, comma separated.$"):
        conditions.positive_numbers("--m", text)


def test_kernels_are_summarized_by_medians_of_ratios_within_a_round():
    taken = kernels.Samples(read=[100.0, 50.0, 25.0], peak=[80.0] * 3, stream=[50.0, 25.0, 12.5], hot=[40.0] * 3)
    # 2 * m * 64 * k operations a panel of 256 bytes are one operation a byte
    assert kernels.operations_a_byte(2, panel_bytes=256, k=1) == 1
    row = kernels.summarize("int8", "gemm", 2, taken, 1.0, drift=0.2)
    assert (row.drift, row.thrown_away) == (0.2, True)
    assert row.share_of_read == pytest.approx(0.5)
    assert row.gops == pytest.approx(25e-9)
    assert row.share_of_peak == pytest.approx(25 / 80)
    assert row.hot_share_of_peak == pytest.approx(0.5)
    assert row.spread == pytest.approx(0.0)


def test_the_limit_that_binds_decides_over_a_line_of_the_kernels():
    steady, slower = [10.0] * 8, [10.0] * 4 + [8.0] * 4
    for read, peak, operations, drift in (
        (slower, steady, 0.1, 0.25),
        (steady, slower, 0.1, 0),
        (steady, slower, 9.0, 0.25),
        (slower, steady, 9.0, 0),
    ):
        taken = kernels.Samples(read=read, peak=peak, stream=[5.0] * 8, hot=steady)
        assert kernels.drift_of(taken, operations) == pytest.approx(drift)


def test_lines_of_the_kernels_that_stay_thrown_away_are_marked(monkeypatch, capsys):
    reads = {1: (9.0, 9.0), 2: (9.0, 8.0)}
    asked = []

    def measure(bench, keys, rounds):
        asked.append([m for _, m in keys])
        return {key: kernels.Samples([*reads[key[1]]], [1e9, 1e9], [5.0, 5.0], [5.0, 5.0]) for key in keys}

    monkeypatch.setattr(kernels, "measure", measure)
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    flags = ["--filter", "bf16 gemm_bf16_bf16_fp32_1x64x2_reference", "--m", "1,2", "--k", "64", "--attempts", "2"]
    assert kernels.main(parser.parse_args([*flags, "--json"])) == 3
    out, err = capsys.readouterr()
    assert asked == [[1, 2], [2]]
    result = json.loads(out)
    assert [(row["m"], row["thrown_away"]) for row in result["rows"]] == [(1, False), (2, True)]
    assert [row["drift"] for row in result["rows"]] == pytest.approx([0, 1 / 8])
    assert result["drift"] == pytest.approx(1 / 8) and result["command"].endswith(" --attempts 2")
    assert err.count("\n") == 2 and "thrown away: the calibration of 1 of 2 lines moved by up to 12 %" in err
    assert kernels.main(parser.parse_args(flags[:-2])) == 3
    out = capsys.readouterr().out
    assert asked[2:] == [[1, 2], [2], [2]] and "--attempts" not in out
    assert re.findall(r"\| (\d+\.\d %.*) \|$", out, re.MULTILINE) == ["0.0 %", "12.5 %, thrown away"]


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
        (["--attempts", "-1"], "--attempts -1 must be positive numbers, comma separated."),
        (["--layouts", "int8,int7"], "--layouts int7 cannot be measured; give all or some of int8, int4g32,"),
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

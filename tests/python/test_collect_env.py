"""The machine report."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kt_kernel import __version__, _ext, device_stream
from kt_kernel.collect_env import collect, explain, format_report, load_readings, main
from kt_kernel.config import ENVIRONMENT, environment_table
from kt_kernel.environment import CHECKS
from kt_kernel.methods import FLOAT_METHODS, METHODS

ROOT = Path(__file__).resolve().parents[2]
MACHINES = sorted((ROOT / "tests/data/cpus").glob("*.json"))


def test_json_is_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["kt_kernel"] == __version__
    assert report["isa"] == {key: value for key, value in _ext.cpu_features().items() if key != "cpu_name"}
    assert len(report["kernels"]["table"]) == len(_ext.list_kernels())
    assert set(report["kernels"]["choice"]) == {method.weight_dtype for method in FLOAT_METHODS.values()}
    assert set(report["methods"]) == set(METHODS)
    assert report["topology"]["num_cores"] >= 1
    assert set(report["readings"]) == set(_ext.cpu_readings()) and report["readings"]["brand"]


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_the_choice_on_a_recorded_machine_is_explained(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = json.loads(path.read_text())
    assert re.match(r"CPUID (recorded|as in)|Composed|Recorded", machine["about"])
    assert main(["--readings", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    isa = report["isa"]
    assert {name: isa[name] for name in ("found", "tier", "reason")} == machine["expected"]
    assert isa["chosen"] == isa["found"] and report["readings"] == machine["readings"]
    assert main(["--readings", str(path)]) == 0
    text = capsys.readouterr().out
    assert isa["reason"] in text and machine["readings"]["brand"] in text
    for choice in report["kernels"]["choice"].values():
        assert choice in text and f" on {isa['tier']}: m>=1 gemm_" in choice


# A word of the kernel that serves one row of an expert, by weights: features below the CPU's would be too slow, above
# them a crash.
CHOSEN = {
    "ivy_bridge": ("_reference", "_reference", "_reference"),
    "no_osxsave": ("_reference", "_reference", "_reference"),
    "haswell": ("_avx2", "_avx2", "_avx2"),
    "alder_lake": ("_avxvnni", "_avxvnni", "_avx2"),
    "cascade_lake": ("_avx512vnni", "_avx512vnni", "_avx512"),
    "zen4": ("_avx512vnni", "_avx512vnni", "_avx512bf16"),
    "sapphire_rapids_guest": ("_avx512vnni", "_avx512vnni", "_avx512bf16"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_kernels_of_a_recorded_machine_are_its_own(name: str) -> None:
    choice = explain(load_readings(str(ROOT / f"tests/data/cpus/{name}.json")))["kernels"]["choice"]
    for weight, kernel in zip(("int8", "int4", "bf16"), CHOSEN[name], strict=True):
        assert re.search(rf"m>=1 gemm_\w+{kernel}, ", choice[weight]), choice[weight]


def test_every_kind_of_machine_is_recorded() -> None:
    tiers = [json.loads(path.read_text())["expected"]["tier"] for path in MACHINES]
    assert len(MACHINES) >= 12 and set(tiers) == {"reference", "avx2", "avx512", "amx"}


def test_this_machine_reads_itself_from_its_own_report(tmp_path: Path) -> None:
    report = collect()
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    explained = explain(load_readings(str(file)))
    assert explained["readings"] == report["readings"] and explained["isa"]["found"] == report["isa"]["found"]
    assert explained["machine"]["cpu"] == report["machine"]["cpu"]
    file.write_text(json.dumps(report["readings"]))
    assert explain(load_readings(str(file))) == explained


READINGS = json.loads((ROOT / "tests/data/cpus/haswell.json").read_text())["readings"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is no JSON file"),
        ("[]", 'must have what --json prints under "readings": vendor, brand'),
        (json.dumps({**READINGS, "leaf9": 1}), "must have what --json prints"),
        (json.dumps({**READINGS, "xcr0": "0x1ffffffffffffffff"}), "xcr0 is '0x1ffffffffffffffff'; it must be a number"),
        (json.dumps({**READINGS, "leaf1_ecx": 2**32}), "leaf1_ecx is 4294967296; it must be a number of 32 bits"),
        (json.dumps({**READINGS, "leaf7_ebx": "27ab"}), "leaf7_ebx is '27ab'; it must be a number of 32 bits"),
        (json.dumps({**READINGS, "leaf7_ebx": None}), "leaf7_ebx is None; it must be a number"),
        (json.dumps({**READINGS, "tile_errno": -1}), "tile_errno is -1; it must be a number"),
        (json.dumps({**READINGS, "brand": 7}), "brand is 7; it must be printable text"),
        (json.dumps({**READINGS, "brand": "a\n\x1b[31mred"}), "brand is 'a\\n\\x1b[31mred'; it must be printable text"),
        (json.dumps({**READINGS, "brand": "\ud800"}), "it must be printable text of at most 48 characters"),
        (json.dumps({**READINGS, "brand": "x" * 49}), "it must be printable text of at most 48 characters"),
        ("[" * 200_000, "is no JSON file"),
    ],
)
def test_a_file_without_readings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text, words) -> None:
    file = tmp_path / "readings.json"
    file.write_text(text)
    assert main(["--readings", str(file)]) == 1
    error = capsys.readouterr().err
    assert words in error and str(file) in error and error.count("\n") == 1
    assert main(["--readings", str(tmp_path / "missing.json")]) == 1
    assert "missing.json cannot be read: No such file or directory." in capsys.readouterr().err


def test_the_text_names_every_kernel_and_node(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [variable.name for variable in ENVIRONMENT if variable.is_path]
    assert "KT_GPU_CHECK_FOLDER" in paths and "KT_EXPERT_COUNTS" in paths
    for name in paths:
        monkeypatch.setenv(name, str(Path.home() / "work"))
    report = collect()
    text = format_report(report)
    for kernel in report["kernels"]["table"]:
        assert kernel["name"] in text
    for node in report["topology"]["nodes"]:
        assert f"NUMA node {node['id']}:" in text
    assert report["isa"]["reason"] in text
    assert str(Path.home()) not in text
    for name in paths:
        assert re.search(rf"{name}: +a path", text) and f"{name} is set, but" not in text


def test_a_forced_tier_and_unknown_variables_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "KT_FORCE_ISA": "reference", "KT_NUM_TREADS": "4", "KT_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kt_kernel.collect_env"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"tier: +reference", text) and re.search(r"KT_NUM_THREADS: +1", text)
    assert "KT_NUM_TREADS is set, but kt_kernel has no such variable" in text
    environment["KT_FORCE_ISA"] = "sse9"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "sse9" in result.stderr and "Traceback" not in result.stderr


# A value that cannot be used, and what is said of it.
WRONG_VALUES = {
    "KT_NUM_THREADS": ("-3", "KT_NUM_THREADS='-3' is no positive number of threads"),
    "KT_NUMA_NODES": ("77", "KT_NUMA_NODES='77' names node 77, but this process may use 0"),
    "KT_HOST_ALL_EXPERTS": ("yes", "KT_HOST_ALL_EXPERTS='yes' is neither 0 nor 1"),
    "KT_METHOD": ("INT9", "KT_METHOD: method 'INT9' is unknown; kt_kernel supports AMXINT8"),
    "KT_EXPERT_COUNTS": ("/tmp", "KT_EXPERT_COUNTS is a folder; give a file in it."),
    "KT_LOG_LEVEL": ("LOUD", "KT_LOG_LEVEL='LOUD' is no level"),
    "KT_SPIN_US": ("1000001", "KT_SPIN_US='1000001' is no number of microseconds from 0 to 1000000"),
    "KT_CUDA_DRIVER": ("/no/where", "KT_CUDA_DRIVER names no file"),
    "KT_CUDA_SIGNAL": ("horn", "KT_CUDA_SIGNAL='horn' is no way to signal"),
    "KT_CUDA_SIGNAL_FOUND": ("horn", "KT_CUDA_SIGNAL_FOUND='horn' was not set by kt_kernel"),
    "KT_CUDA_SPIN_MS": ("nan", "KT_CUDA_SPIN_MS='nan' is no number of milliseconds from 0 to"),
    "KT_SYNC_TIMEOUT": ("-1", "KT_SYNC_TIMEOUT='-1' is no number of seconds from 0 to"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_values_that_cannot_be_used_are_commented_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    value, words = WRONG_VALUES[name]
    monkeypatch.setenv(name, value)
    report = collect()
    assert words in report["environment"]["warnings"][0] and len(report["environment"]["warnings"]) == 1
    assert f"  warning: {words}" in format_report(report)


@pytest.mark.parametrize("name", ["KT_SPIN_US", "KT_CUDA_SPIN_MS", "KT_SYNC_TIMEOUT"])
@pytest.mark.parametrize("value", ["1_0", "10 ", "\u0663"])
def test_numbers_only_python_reads_are_commented_on(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert f"{name}={value!r} is no number of " in format_report(collect())
    monkeypatch.setenv(name, "10")
    assert collect()["environment"]["warnings"] == []


def test_what_the_probe_leaves_for_other_processes_is_a_value_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_stream, "driver", lambda: {"reason": ""})
    monkeypatch.setattr(device_stream, "_probe", lambda ordinal: ("doorbell", "hostfunc")[ordinal])
    monkeypatch.setenv("KT_CUDA_SIGNAL_FOUND", "")
    for ordinal in (0, 1):
        device_stream.choose_signal(ordinal)
        assert os.environ["KT_CUDA_SIGNAL_FOUND"] and collect()["environment"]["warnings"] == []


def test_more_threads_than_cpus_are_commented_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_NUM_THREADS", "5000")
    assert "KT_NUM_THREADS=5000 is above the" in format_report(collect())
    monkeypatch.setenv("KT_NUM_THREADS", "1")
    assert collect()["environment"]["warnings"] == []


def test_every_value_is_checked() -> None:
    free = {variable.name for variable in ENVIRONMENT if variable.is_path or "build time only" in variable.effect}
    assert {variable.name for variable in ENVIRONMENT} - free <= set(CHECKS)


def test_every_variable_of_the_table_is_read_where_it_says() -> None:
    for variable in ENVIRONMENT:
        for file in variable.read_in.split(", "):
            assert variable.name in (ROOT / file).read_text(), f"{variable.name} is not read in {file}"
        assert f"`{variable.name}`" in environment_table()


def test_every_variable_read_is_in_the_table() -> None:
    known = {variable.name for variable in ENVIRONMENT}
    reading = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\(|_read\()\s*["'](KT_\w+)["']""")
    folders = ((ROOT / folder).rglob("*.py") for folder in ("kt_kernel", "scripts", "tests"))
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *itertools.chain(*folders), ROOT / "setup.py"]:
        assert set(reading.findall(path.read_text())) <= known, path

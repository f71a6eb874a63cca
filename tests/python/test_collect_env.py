"""The machine report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kt_kernel import __version__, _ext
from kt_kernel.collect_env import collect, format_report, main
from kt_kernel.config import ENVIRONMENT, environment_table
from kt_kernel.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


def test_json_is_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["kt_kernel"] == __version__
    assert report["isa"] == {key: value for key, value in _ext.cpu_features().items() if key != "cpu_name"}
    assert len(report["kernels"]["table"]) == len(_ext.list_kernels())
    assert set(report["kernels"]["choice"]) == {method.weight_dtype for method in METHODS.values()}
    assert report["topology"]["num_cores"] >= 1


def test_the_text_names_every_kernel_and_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KT_DEMO_DIR", "KT_BUILD_DIR"):
        monkeypatch.setenv(name, str(Path.home() / "work"))
    report = collect()
    text = format_report(report)
    for kernel in report["kernels"]["table"]:
        assert kernel["name"] in text
    for node in report["topology"]["nodes"]:
        assert f"NUMA node {node['id']}:" in text
    assert report["isa"]["reason"] in text
    assert str(Path.home()) not in text


def test_a_forced_tier_and_unknown_variables_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "KT_FORCE_ISA": "reference", "KT_NUM_TREADS": "4", "KT_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kt_kernel.collect_env"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"tier: +reference", text) and re.search(r"KT_NUM_THREADS: +1", text)
    assert "KT_NUM_TREADS is set, but kt_kernel has no such variable" in text
    environment["KT_FORCE_ISA"] = "sse9"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "sse9" in result.stderr and "Traceback" not in result.stderr


def test_every_variable_of_the_table_is_read_where_it_says() -> None:
    for variable in ENVIRONMENT:
        for file in variable.read_in.split(", "):
            assert variable.name in (ROOT / file).read_text(), f"{variable.name} is not read in {file}"
        assert f"`{variable.name}`" in environment_table()


def test_every_variable_read_is_in_the_table() -> None:
    known = {variable.name for variable in ENVIRONMENT}
    reading = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\(|_read\()\s*["'](KT_\w+)["']""")
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "kt_kernel").rglob("*.py"), ROOT / "setup.py"]:
        assert set(reading.findall(path.read_text())) <= known, path

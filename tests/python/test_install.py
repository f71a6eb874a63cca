"""install.sh stops with one sentence and the fix, before it changes anything it should not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_tree import ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with install.sh only: what it needs after the checks is not there."""
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copy(ROOT / "install.sh", folder)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty virtual environment without pip."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def run_install(clone: Path, *arguments: str | Path, **variables: str) -> tuple[int, list[str]]:
    """Exit code and the lines of standard error."""
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX", "CXX")}
    command = ["bash", clone / "install.sh", *arguments]
    result = subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stderr.splitlines()


def path_without(folder: Path, *programs: str) -> str:
    """A PATH with every program of /usr/bin and /usr/sbin except these."""
    folder.mkdir()
    for source in (Path("/usr/bin"), Path("/usr/sbin")):
        for program in source.iterdir():
            link = folder / program.name
            if program.name not in programs and not link.exists() and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


def test_help_lists_every_option() -> None:
    script = (ROOT / "install.sh").read_text()
    text = subprocess.run(["bash", ROOT / "install.sh", "--help"], check=True, capture_output=True, text=True).stdout
    options = set(re.findall(r"^    (--[\w-]+)\)", script, re.MULTILINE)) | {"--help"}
    assert len(options) >= 5
    assert all(option in text for option in options)
    variables = set(re.findall(r"\$\{(KT_\w+):-", script))
    assert variables and all(variable in text for variable in variables)


def test_unknown_option(clone: Path) -> None:
    code, lines = run_install(clone, "--wrong")
    assert code == 1
    assert lines == ["install: error: unknown option --wrong; ./install.sh --help lists the options"]


def test_compiler_that_is_not_there(clone: Path, environment: Path) -> None:
    code, lines = run_install(clone, "--venv", environment, CXX="no-such-compiler")
    assert code == 1
    assert lines == ["install: error: CXX names no-such-compiler, which is not on PATH; unset CXX or install it"]


def test_other_distribution_is_refused_before_anything_is_installed(clone: Path, environment: Path) -> None:
    packages = next(environment.glob("lib/python*/site-packages"))
    planted = packages / "kt_kernel-0.7.2.dist-info"
    planted.mkdir()
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: kt-kernel\nVersion: 0.7.2\n")
    code, lines = run_install(clone, "--venv", environment)
    assert code == 1
    assert len(lines) == 1
    assert "kt-kernel 0.7.2" in lines[0]
    assert f"{environment}/bin/python -m pip uninstall -y kt-kernel" in lines[0]
    assert [path.name for path in packages.iterdir()] == [planted.name]


def test_missing_packages_are_asked_of_apt(clone: Path, environment: Path, tmp_path: Path) -> None:
    """An apt-get that does nothing: the packages are named, and what it was asked for is right."""
    path = path_without(tmp_path / "bin", "cmake", "ninja", "apt-get", "sudo")
    fake = tmp_path / "bin/apt-get"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    fake.chmod(0o755)
    code, lines = run_install(clone, "--venv", environment, PATH=path)
    assert code == 1
    if os.geteuid() == 0:
        assert lines == ["install: error: still missing after apt-get install: cmake ninja-build; install them by hand"]
        asked = (tmp_path / "asked").read_text().splitlines()
        assert asked == ["update", "install -y --no-install-recommends cmake ninja-build"]
    else:
        assert "sudo apt-get update && sudo apt-get install -y cmake ninja-build" in lines[0]
        assert not (tmp_path / "asked").exists()

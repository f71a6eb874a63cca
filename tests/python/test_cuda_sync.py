"""Forwards that a device's streams and graphs ask for: SGLang's own ``KTEPWrapperMethod`` and its fork's calls.

The CUDA driver is the test double of tests/fake_cuda, with real asynchrony. A process loads its driver once, so the
cases of CASE_FILES run in processes of their own, one for each way to signal; each is reported here by its name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = ("cases", "fork_cases", "hybrid_cases")
CASE_FILES = [ROOT / f"tests/python/cuda_sync_{subject}.py" for subject in SUBJECTS]
CASES = [name for file in CASE_FILES for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)]
SECONDS = 800


@pytest.fixture(scope="session")
def outcomes(fake_cuda: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """What each case did with a way to signal: name with parameters -> what went wrong, or empty."""
    known: dict[str, dict[str, str]] = {}

    def run(signal: str) -> dict[str, str]:
        if signal not in known:
            report = tmp_path_factory.mktemp("cases") / "report.xml"
            options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "faulthandler_timeout=120"]
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *CASE_FILES, *options],
                cwd=ROOT,
                env={
                    **os.environ,
                    "KT_CUDA_DRIVER": str(fake_cuda),
                    "KT_CUDA_SIGNAL": signal,
                    "KT_SYNC_TIMEOUT": "60",
                    "OMP_NUM_THREADS": "1",
                },
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert report.exists(), done.stdout[-4000:] + done.stderr[-4000:]
            known[signal] = {
                str(case.get("name")): "".join(f"{part.get('message')}\n{part.text}" for part in case)
                for case in ElementTree.parse(report).iter("testcase")
            }
        return known[signal]

    return run


@pytest.mark.parametrize("signal", ["doorbell", "hostfunc"])
@pytest.mark.parametrize("case", CASES)
def test_with_the_driver_double(case: str, signal: str, outcomes: Callable[[str], dict[str, str]]) -> None:
    runs = {name: text for name, text in outcomes(signal).items() if name.partition("[")[0] == case}
    assert runs, f"{case} was not run"
    failed = {name: text for name, text in runs.items() if text}
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())

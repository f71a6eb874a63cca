"""scripts/test_totals.py: what it counts, and that nothing that was not run can look like a pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_tree import ROOT

PASSED = '<testcase name="a" classname="tests.python.test_x"/>'
FAILED = '<testcase name="b" classname="tests.python.test_x"><failure message="no"/></testcase>'


def skipped(name: str, reason: str) -> str:
    return f'<testcase name="{name}" classname="tests.python.test_x"><skipped message="{reason}"/></testcase>'


def totals(folder: Path, pytest_cases: str = "", ctest_cases: str = "", stages: str = "") -> tuple[int, list[str]]:
    """Exit code and lines of the script on a results folder."""
    if pytest_cases:
        (folder / "pytest-library.xml").write_text(f"<testsuites><testsuite>{pytest_cases}</testsuite></testsuites>")
    if ctest_cases:
        (folder / "ctest-test.xml").write_text(f"<testsuite>{ctest_cases}</testsuite>")
    if stages:
        (folder / "failed_stages.tsv").write_text(stages)
    command = [sys.executable, ROOT / "scripts/test_totals.py", folder]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout.splitlines()


def test_all_passed(tmp_path: Path) -> None:
    cases = '<testcase name="t.reference" status="run"/>'
    assert totals(tmp_path, PASSED, cases) == (0, ["2 passed, 0 failed, 0 skipped"])


def test_nothing_run_is_no_success(tmp_path: Path) -> None:
    assert totals(tmp_path) == (1, ["0 passed, 0 failed, 0 skipped"])


def test_failures_are_counted_once(tmp_path: Path) -> None:
    code, lines = totals(tmp_path, PASSED + FAILED, stages='pytest (-m "not full")\texit code 1\n')
    assert (code, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")
    assert any("test_x::b" in line for line in lines)


def test_a_stage_that_died_counts(tmp_path: Path) -> None:
    code, lines = totals(tmp_path, PASSED, stages="build of asan\texit code 1\n")
    assert (code, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")


def test_a_damaged_result_counts(tmp_path: Path) -> None:
    (tmp_path / "ctest-asan.xml").write_text("<testsuite><testcase")
    code, lines = totals(tmp_path, PASSED)
    assert (code, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")


def test_a_missing_tier_is_an_allowed_skip(tmp_path: Path) -> None:
    case = (
        '<testcase name="test_kernels.avx512" status="notrun"><skipped message="SKIP_RETURN_CODE=77"/>'
        "<system-out>skipped: KT_FORCE_ISA=avx512 asks for a tier this host lacks</system-out></testcase>"
    )
    code, lines = totals(tmp_path, PASSED, case)
    assert (code, lines[-1]) == (0, "1 passed, 0 failed, 1 skipped")
    assert "this host lacks" in lines[0]


def test_a_file_of_a_missing_tier_is_an_allowed_skip(tmp_path: Path) -> None:
    case = skipped("test_a", "needs avx512vnni and avx512bf16").replace("test_x", "test_amx")
    code, lines = totals(tmp_path, PASSED + case)
    assert (code, lines[-1]) == (0, "1 passed, 0 failed, 1 skipped")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("test_a", "not today"), ("test_server_runs", "one NUMA node"), ("test_isa", "torch is missing")],
)
def test_another_skip_fails_the_run(tmp_path: Path, name: str, reason: str) -> None:
    code, lines = totals(tmp_path, PASSED + skipped(name, reason))
    assert (code, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")


def program(name: str, *lines: str, status: str = "run") -> str:
    output = "\n".join(lines)
    return f'<testcase name="{name}" status="{status}"><system-out>{output}</system-out></testcase>'


SKIP = (
    "[ RUN      ] A.b/x_avx2",
    "test.cpp:3: Skipped",
    "x_avx2 needs avx2",
    "[  SKIPPED ] A.b/x_avx2, where GetParam() = x (0 ms)",
)


def test_cases_of_a_cpp_program_are_counted(tmp_path: Path) -> None:
    lines = ("[       OK ] A.a (0 ms)", "[       OK ] A.c (12 ms)", "[  FAILED  ] A.d (0 ms)", "[  FAILED  ] A.d")
    code, lines = totals(tmp_path, PASSED, program("test_a", *lines, status="fail"))
    assert (code, lines) == (1, ["failed   ctest-test: test_a A.d", "3 passed, 1 failed, 0 skipped"])


def test_a_crash_is_a_failure(tmp_path: Path) -> None:
    code, lines = totals(tmp_path, PASSED, program("test_a", "[       OK ] A.a (0 ms)", status="fail"))
    assert (code, lines[-1]) == (1, "2 passed, 1 failed, 0 skipped")


def test_a_skip_inside_a_cpp_program_is_seen(tmp_path: Path) -> None:
    code, lines = totals(tmp_path, PASSED, program("test_a", *SKIP))
    assert (code, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")
    assert "test_a A.b/x_avx2: x_avx2 needs avx2" in lines[0]


def test_a_kernel_the_host_cannot_run_is_an_allowed_skip(tmp_path: Path) -> None:
    code, lines = totals(tmp_path, PASSED, program("test_kernels.reference", *SKIP))
    assert (code, lines[-1]) == (0, "1 passed, 0 failed, 1 skipped")


def test_a_case_that_passed_on_another_tier_is_no_skip(tmp_path: Path) -> None:
    other = program("test_a.avx2", "[       OK ] A.b/x_avx2 (3 ms)")
    code, lines = totals(tmp_path, PASSED, program("test_a.reference", *SKIP) + other)
    assert (code, lines) == (0, ["2 passed, 0 failed, 0 skipped"])

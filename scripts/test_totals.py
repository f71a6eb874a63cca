#!/usr/bin/env python3
"""Add up the results of ``scripts/test.sh``: failures, skips with their reasons, and one closing line of totals.

Reads the JUnit files ``ctest-*.xml`` and ``pytest.xml`` and the list ``failed_stages.tsv`` of a results folder. Exits 0
only if nothing failed, something passed, and every skip is one of ``ALLOWED_SKIPS``. Needs only the standard library.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class AllowedSkip:
    """A skip that does not fail the run: both patterns must be found."""

    test: str
    reason: str
    why: str


ALLOWED_SKIPS = (
    AllowedSkip(
        test=r"^ctest-\w+: \w+\.(avx2|avx512|amx)",
        reason=r"KT_FORCE_ISA",
        why="the host's CPU does not have this tier; the tiers it has are all run",
    ),
    AllowedSkip(
        test=r"^pytest: .*\b(isa|tier|avx2|avx512|amx)",
        reason=r"\b(avx2|avx512|amx)\w*\b",
        why="the host's CPU does not have this tier",
    ),
    AllowedSkip(test=r"^pytest: ", reason=r"one NUMA node", why="the check compares two NUMA nodes"),
)

# A server that does not start is a failure, whatever its test says.
NEVER_SKIPPED = re.compile(r"test_server|\bserver\b", re.IGNORECASE)


@dataclass
class Totals:
    """What was counted: numbers, and one line for each failure and skip."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skips: list[tuple[str, str]] = field(default_factory=list)

    def refused_skips(self) -> list[tuple[str, str]]:
        """Skips that no entry of ``ALLOWED_SKIPS`` covers."""
        return [skip for skip in self.skips if not is_allowed(*skip)]


def is_allowed(test: str, reason: str) -> bool:
    """Whether a skip is on the list; a server test never is."""
    if NEVER_SKIPPED.search(test):
        return False
    return any(re.search(entry.test, test) and re.search(entry.reason, reason) for entry in ALLOWED_SKIPS)


def googletest_skips(output: str) -> list[tuple[str, str]]:
    """Cases that a GoogleTest program skipped by itself, with their reasons, from what it printed."""
    skips = []
    reason: list[str] = []
    for line in output.splitlines():
        match = re.match(r"\[  SKIPPED \] (\S+) \(", line)
        if match:
            text = " ".join(part for part in reason if not re.search(r": Skipped$", part))
            skips.append((match.group(1), text.strip() or "no reason given"))
        if line.startswith("["):
            reason = []
        else:
            reason.append(line.strip())
    return skips


def add_junit(totals: Totals, path: Path) -> None:
    """Count the test cases of one JUnit file."""
    source = path.stem
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        module = case.get("classname", "")
        name = case.get("name", "?")
        test = f"{source}: {name}" if source != "pytest" else f"{source}: {module}::{name}"
        output = case.findtext("system-out") or ""
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None or case.get("status") == "fail":
            totals.failures.append(test)
        elif skipped is not None:
            reason = skipped.get("message") or skipped.text or "no reason given"
            if source != "pytest" and output.strip():
                reason = output.strip().splitlines()[-1]
            totals.skips.append((test, " ".join(reason.split())))
        else:
            totals.passed += 1
        if source != "pytest" and skipped is None:
            totals.skips += [(f"{test} {inner}", reason) for inner, reason in googletest_skips(output)]


def collect(results: Path) -> Totals:
    """Totals of a results folder."""
    totals = Totals()
    for path in sorted(results.glob("ctest-*.xml")) + sorted(results.glob("pytest.xml")):
        try:
            add_junit(totals, path)
        except ElementTree.ParseError as error:
            totals.failures.append(f"{path.name}: not readable ({error})")
    stages = results / "failed_stages.tsv"
    if stages.exists():
        for line in stages.read_text().splitlines():
            name, _, text = line.partition("\t")
            # a stage of tests fails because of tests that are already counted
            counted = any(failure.startswith(stage_source(name)) for failure in totals.failures)
            if not counted:
                totals.failures.append(f"{name}: {text}")
    return totals


def stage_source(stage: str) -> str:
    """The prefix under which the tests of a stage are counted."""
    match = re.match(r"C\+\+ tests: (\w+)", stage)
    return f"ctest-{match.group(1)}:" if match else f"{stage.split()[0]}:"


def main(results: Path) -> int:
    """Print the report and return the exit code."""
    totals = collect(results)
    refused = totals.refused_skips()
    for test, reason in totals.skips:
        print(f"skipped  {test}: {reason}" + ("" if (test, reason) not in refused else "  <- not an allowed skip"))
    for failure in totals.failures:
        print(f"failed   {failure}")
    if refused:
        print(f"{len(refused)} skips are not in ALLOWED_SKIPS of scripts/test_totals.py: they count as failures.")
    skipped = len(totals.skips) - len(refused)
    failed = len(totals.failures) + len(refused)
    print(f"{totals.passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not totals.passed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: test_totals.py RESULTS_FOLDER")
    sys.exit(main(Path(sys.argv[1])))

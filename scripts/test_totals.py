#!/usr/bin/env python3
"""Add up the results of ``scripts/test.sh``: failures, skips with their reasons, and one closing line of totals.

Reads the JUnit files ``ctest-*.xml`` and ``pytest-*.xml`` and the list ``failed_stages.tsv`` of a results folder. Exits
0 only if nothing failed, something passed, and every skip is one of ``ALLOWED_SKIPS``. Needs only the standard library.
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
        test=r"^ctest-\w+: test_(kernels|rowwise)\S* \S*_(avx|amx)\w*$",
        reason=r" needs [a-z0-9 ]*(avx|amx)",
        why="the host's CPU does not have the features of this kernel",
    ),
    AllowedSkip(
        test=r"^pytest: .*(\b|_)(isa|tier|avx2|avx512|amx)",
        reason=r"\b(avx2|avx512|amx)\w*\b",
        why="the host's CPU does not have this tier",
    ),
    AllowedSkip(
        test=r"^ctest-\w+: test_numa_arena ",
        reason=r"^the kernel refuses mbind$",
        why="a container without SYS_NICE: binding memory cannot be seen there",
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


def googletest_cases(output: str) -> list[tuple[str, str, str]]:
    """(case, ``OK``, ``FAILED`` or ``SKIPPED``, reason of a skip) of what a GoogleTest program printed."""
    cases = []
    lines: list[str] = []
    for line in output.splitlines():
        match = re.match(r"\[ +(OK|FAILED|SKIPPED) +\] (\S+?)(?:, where .*)? \(\d+ ms\)", line)
        if match:
            reason = " ".join(part for part in lines if not part.endswith(": Skipped")).strip()
            cases.append((match.group(2), match.group(1), reason or "no reason given"))
        lines = [] if line.startswith("[") else [*lines, line.strip()]
    return cases


def add_ctest(totals: Totals, path: Path) -> None:
    """Count one run of CTest: the cases of each program, or the program where it printed none.

    A program runs once a tier, and a case of a higher tier skips itself there. That is no skip as long as the case
    passed in another run of the same program.
    """
    passed: set[tuple[str, str]] = set()
    skipped: dict[tuple[str, str], tuple[str, str]] = {}
    for entry in ElementTree.parse(path).getroot().iter("testcase"):
        name = entry.get("name", "?")
        test = f"{path.stem}: {name}"
        output = entry.findtext("system-out") or ""
        cases = googletest_cases(output)
        skip = entry.find("skipped")
        if skip is not None:
            reason = output.strip().splitlines()[-1] if output.strip() else skip.get("message", "no reason given")
            totals.skips.append((test, reason))
            continue
        failures = [f"{test} {case}" for case, result, _ in cases if result == "FAILED"]
        if entry.get("status") == "fail" or entry.find("failure") is not None:
            # a crash leaves no failed case
            failures = failures or [f"{test} stopped after {len(cases)} cases"]
        totals.failures += failures
        totals.passed += sum(result == "OK" for _, result, _ in cases) if cases else not failures
        program = name.split(".")[0]
        passed |= {(program, case) for case, result, _ in cases if result == "OK"}
        skipped |= {(program, case): (f"{test} {case}", why) for case, result, why in cases if result == "SKIPPED"}
    totals.skips += [skip for key, skip in skipped.items() if key not in passed]


def add_pytest(totals: Totals, path: Path) -> None:
    """Count the test cases of pytest's JUnit file; an expected failure counts as a skip."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        test = f"pytest: {case.get('classname', '')}::{case.get('name', '?')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            totals.failures.append(test)
        elif skip is not None:
            totals.skips.append((test, " ".join((skip.get("message") or skip.text or "no reason given").split())))
        else:
            totals.passed += 1


def collect(results: Path) -> Totals:
    """Totals of a results folder."""
    totals = Totals()
    for path in sorted(results.glob("ctest-*.xml")) + sorted(results.glob("pytest-*.xml")):
        try:
            (add_pytest if path.stem.startswith("pytest-") else add_ctest)(totals, path)
        except ElementTree.ParseError as error:
            totals.failures.append(f"{path.name}: not readable ({error})")
    stages = results / "failed_stages.tsv"
    if stages.exists():
        for line in stages.read_text().splitlines():
            name, _, text = line.partition("\t")
            # a stage of tests fails because of tests that are already counted
            if not any(failure.startswith(stage_source(name)) for failure in totals.failures):
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

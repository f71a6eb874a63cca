"""What every bench says of its run: the machine, the commit, and whether the calibration held still."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from kt_kernel import _ext

# A line, or a run with one calibration, that moved by more than this between its start and its end says nothing.
MAX_DRIFT = 0.07
# How often a line that moved is measured, unless --attempts says another number.
ATTEMPTS = 3
# Exit code of a run that leaves such a line. Its result is printed anyway.
EXIT_NOT_QUIET = 3
# What a picture may be.
PICTURES = (".png", ".svg", ".pdf")

Key = TypeVar("Key")
Samples = TypeVar("Samples")


def machine() -> str:
    """Name of the CPU and of the operating system."""
    return f"{_ext.cpu_features()['cpu_name']}, {platform.system()} {platform.release()}"


def commit() -> str:
    """Commit of the source tree this package runs from, or "" (installed from a wheel, or there is no git)."""
    file = Path(__file__)
    git = ["git", "-C", str(file.parent)]
    try:
        # an environment in a clone is of no commit, although git finds one above it
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        done = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or none for this file
        return ""
    return done.stdout.strip()


def environment() -> str:
    """What chooses kernels by hand, as it stands before a command: ``"KT_FORCE_ISA=avx2 "``, or ""."""
    set_here = {name: os.environ.get(name) for name in ("KT_FORCE_ISA", "KT_GEMM", "KT_DETERMINISTIC")}
    return "".join(f"{name}={value} " for name, value in set_here.items() if value)


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache of the first CPU, or 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        kilobytes = path.read_text().strip().removesuffix("K")
        if kilobytes.isdecimal():
            sizes.append(int(kilobytes) << 10)
    return max(sizes)


def drift(calibration: Sequence[float]) -> float:
    """How far the last quarter of the calibration lies from the first, as a share: medians, by round."""
    quarter = max(len(calibration) // 4, 1)
    return abs(statistics.median(calibration[:quarter]) / statistics.median(calibration[-quarter:]) - 1)


def drift_of_limit(share_of_read: float, share_of_peak: float, reads: Sequence[float], peaks: Sequence[float]) -> float:
    """The drift of the limit that binds a line: reading where its share is the larger, else multiplying."""
    return drift(reads if share_of_read > share_of_peak else peaks)


def until_quiet(
    keys: Sequence[Key],
    attempts: int,
    measure: Callable[[list[Key]], dict[Key, Samples]],
    drift_of: Callable[[Key, Samples], float],
) -> dict[Key, tuple[Samples, float]]:
    """Measure all lines, and those that moved by more than MAX_DRIFT again, in at most so many attempts.

    Parameters
    ----------
    keys : Sequence
        The lines.
    attempts : int
        Calls of `measure`, at least 1; each after the first is told on stderr.
    measure : Callable
        Samples of these lines, measured interleaved.
    drift_of : Callable
        By how much the calibration of a line moved, as a share.

    Returns
    -------
    dict
        The last samples of each line, in the order of `keys`, and their drift.
    """
    found = {}
    moved = list(dict.fromkeys(keys))
    for attempt in range(1, attempts + 1):
        if attempt > 1:
            print(
                f"{len(moved)} of {len(found)} lines are thrown away, their calibration moved by more than "
                f"{100 * MAX_DRIFT:.0f} %; attempt {attempt} of {attempts} begins.",
                file=sys.stderr,
            )
        found |= {key: (samples, drift_of(key, samples)) for key, samples in measure(moved).items()}
        moved = [key for key, (_, drifted) in found.items() if drifted > MAX_DRIFT]
        if not moved:
            break
    return found


def refuse_drift(moved: float) -> str | None:
    """One sentence where a run must be thrown away because its calibration moved by this share, else None."""
    if moved <= MAX_DRIFT:
        return None
    return (
        f"thrown away: the calibration moved by {100 * moved:.0f} % during the run, more than "
        f"{100 * MAX_DRIFT:.0f} %; run it again on a quieter machine."
    )


def end_of_run(moved: float) -> int:
    """Exit code of a run whose calibration moved by this share; tells on stderr where it is thrown away."""
    thrown_away = refuse_drift(moved)
    if thrown_away is None:
        return 0
    print(thrown_away, file=sys.stderr)
    return EXIT_NOT_QUIET


def end_of_lines(drifts: Sequence[float]) -> int:
    """Exit code of a run whose lines moved by these shares; tells on stderr how many of them are thrown away."""
    moved = [drifted for drifted in drifts if drifted > MAX_DRIFT]
    if not moved:
        return 0
    print(
        f"thrown away: the calibration of {len(moved)} of {len(drifts)} lines moved by up to {100 * max(moved):.0f} % "
        f"during the run, more than {100 * MAX_DRIFT:.0f} %; run it again on a quieter machine.",
        file=sys.stderr,
    )
    return EXIT_NOT_QUIET


def moved_cell(row: dict) -> str:
    """What the column `moved` says of a line: ``"3.1 %"``, or ``"12.5 %, thrown away"``."""
    return f"{100 * row['drift']:.1f} %" + (", thrown away" if row["thrown_away"] else "")


def add_attempts(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--attempts``."""
    parser.add_argument(
        "--attempts",
        type=int,
        default=ATTEMPTS,
        help=f"how often a line is measured until its calibration holds still; default {ATTEMPTS}",
    )


def attempts_flag(attempts: int) -> str:
    """``" --attempts 5"`` for the command that repeats a run, or "" for the default."""
    return f" --attempts {attempts}" if attempts != ATTEMPTS else ""


def spread(values: Sequence[float]) -> float:
    """p90 - p10."""
    ordered = sorted(values)
    return ordered[int(0.9 * (len(ordered) - 1))] - ordered[int(0.1 * (len(ordered) - 1))]


def check_plot(file: Path | None) -> None:
    """ValueError with one sentence where the picture of ``--plot`` could not be written; None: no picture."""
    if file is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib.")
    if file.suffix not in PICTURES:
        raise ValueError(f"--plot is {file}; it must end in one of {', '.join(PICTURES)}.")
    if not file.resolve().parent.is_dir():
        raise ValueError(f"--plot is {file}, but there is no folder {file.resolve().parent}.")


def positive_numbers(flag: str, text: str) -> list[int]:
    """The numbers of a comma-separated flag; ValueError unless each is at least 1."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"{flag} {text} must be positive numbers, comma separated.")
    return numbers

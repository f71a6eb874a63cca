"""Machine, ISA, limits, versions, kernels, for bug reports.

``python -m kt_kernel.collect_env [--json] [--readings FILE]``; with a file, what another machine would choose.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("sglang", "transformers", "safetensors", "numpy", "triton")
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy")
_WORDS = ("vendor", "brand")  # of the readings; the others are registers, and tile_errno
# Weights and the method whose kernels are shown for them.
_SHOWN_METHODS = {"int8": "AMXINT8", "int4": "AMXINT4", "bf16": "BF16"}
_REGISTER_BITS = {"xcr0": 64}  # the others have 32


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip().splitlines()[0]
    except (OSError, IndexError):
        return None


def collect() -> dict[str, Any]:
    """Everything the report shows, as plain data.

    Returns
    -------
    dict
        Sections ``versions``, ``machine``, ``isa``, ``readings``, ``topology``, ``kernels``, ``methods``,
        ``environment``. No user names, paths or addresses.
    """
    import torch

    from kt_kernel import __version__, _ext
    from kt_kernel.config import ENVIRONMENT
    from kt_kernel.methods import METHODS

    features = _ext.cpu_features()
    topology = _ext.topology()
    return {
        "versions": {
            "kt_kernel": __version__,
            "torch": torch.__version__,
            "torch built against": _ext.built_torch_version,
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "distribution": _distribution(),
            "cpu": features["cpu_name"],
            "cpus online": os.cpu_count(),
            "cpus of this process": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
            "transparent huge pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
            "numa balancing": _first_line("/proc/sys/kernel/numa_balancing"),
            "proxy variables": [
                name for name in _PROXY_VARIABLES if os.environ.get(name) or os.environ.get(name.upper())
            ],
        },
        "isa": _isa(features),
        "readings": _shown_readings(_ext.cpu_readings()),
        "topology": topology,
        "kernels": {
            "table": _ext.list_kernels(),
            "choice": {name: _choice(METHODS[method].layout) for name, method in _SHOWN_METHODS.items()},
        },
        "methods": {
            method.name: {"layout": method.packed or "that of the files", "is": method.description}
            for method in METHODS.values()
        },
        "environment": {
            "set": {
                v.name: "a path" if v.is_path else os.environ[v.name] for v in ENVIRONMENT if os.environ.get(v.name)
            },
            "warnings": _environment_warnings(),
        },
    }


def _isa(features: dict[str, Any]) -> dict[str, str]:
    return {name: features[name] for name in ("found", "chosen", "tier", "reason")}


def _shown_readings(readings: dict[str, Any]) -> dict[str, Any]:
    """Readings with registers in hexadecimal, as ``--json`` has them."""
    plain = (*_WORDS, "tile_errno")
    return {name: value if name in plain else hex(value) for name, value in readings.items()}


def load_readings(path: str) -> dict[str, Any]:
    """The readings in a file: a report of ``--json``, or its section ``readings`` alone.

    Raises
    ------
    ValueError
        The file cannot be read, or is neither; the message names the file and the value.
    """
    from kt_kernel import _ext

    try:
        report = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    section = report.get("readings", report) if isinstance(report, dict) else {}
    names = list(_ext.cpu_readings())
    if not isinstance(section, dict) or set(section) != set(names):
        raise ValueError(f'{path} must have what --json prints under "readings": {", ".join(names)}.')
    return {name: _reading(path, name, section[name]) for name in names}


def _reading(path: str, name: str, value: Any) -> str | int | None:
    """One value of a file of readings, checked."""
    if name in _WORDS:
        # as CPUID has it: 48 bytes at most; a file may come from anywhere, and its words go to a terminal
        if isinstance(value, str) and value.isprintable() and len(value) <= 48:
            return value
        raise ValueError(f"{path}: {name} is {value!r:.60}; it must be printable text of at most 48 characters.")
    if name == "tile_errno" and value is None:
        return None
    number = value if type(value) is int else -1
    if isinstance(value, str) and re.fullmatch("0x[0-9a-fA-F]+", value):
        number = int(value, 16)
    bits = 31 if name == "tile_errno" else _REGISTER_BITS.get(name, 32)
    if 0 <= number < 2**bits:
        return number
    raise ValueError(f'{path}: {name} is {value!r}; it must be a number of {bits} bits, such as "0x2e7".')


def explain(readings: dict[str, Any]) -> dict[str, Any]:
    """What kt_kernel finds and chooses on the CPU of the readings, whatever this host is.

    ``KT_FORCE_ISA``, ``KT_GEMM`` and ``KT_DETERMINISTIC`` do not count: they are this process's.

    Returns
    -------
    dict
        Sections ``machine``, ``isa``, ``readings`` and ``kernels``, as of `collect`.
    """
    from kt_kernel import _ext

    features = _ext.detect_features(readings)
    return {
        "machine": {"cpu": features["cpu_name"]},
        "isa": _isa(features),
        "readings": _shown_readings(readings),
        "kernels": {"choice": features["kernels"]},
    }


def _choice(layout: str) -> str:
    """The kernels chosen for a layout, or why KT_GEMM cannot be had for it."""
    from kt_kernel import _ext

    try:
        return _ext.explain_kernels(layout)
    except RuntimeError as error:
        return f"{layout}: {error}"


def _environment_warnings() -> list[str]:
    """What is wrong with the KT_* variables: a sentence each."""
    from kt_kernel.config import default_num_threads, unknown_variables, usable_cpus
    from kt_kernel.environment import wrong_values

    wrong = wrong_values()
    warnings = list(wrong.values())
    if "KT_NUM_THREADS" not in wrong and (threads := default_num_threads()) > usable_cpus():
        warnings.append(
            f"KT_NUM_THREADS={threads} is above the {usable_cpus()} CPUs that this process may use; give at most those."
        )
    return warnings + [
        f"{name} is set, but kt_kernel has no such variable; see the table in README.md."
        for name in unknown_variables()
    ]


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _cpu_ranges(cpus: list[int]) -> str:
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def _section(title: str, facts: dict[str, Any]) -> list[str]:
    return [title, *(f"  {name + ':':26}{_shown(value)}" for name, value in facts.items())]


def _isa_lines(report: dict[str, Any]) -> list[str]:
    readings = dict(report["readings"])
    errno = readings.pop("tile_errno")
    answer = "not asked" if errno is None else f"errno {errno}" if errno else "granted"
    return [
        *_section("instruction sets", report["isa"]),
        *_section("readings of CPUID and XCR0", {**readings, "request for AMX tiles": answer}),
    ]


def format_explanation(report: dict[str, Any]) -> str:
    """The report of `explain` as text."""
    choices = [f"  {choice}" for choice in report["kernels"]["choice"].values()]
    return "\n".join([*_section("machine", report["machine"]), *_isa_lines(report), "kernels", *choices])


def format_report(report: dict[str, Any]) -> str:
    """The report as text, one fact a line."""
    lines = _section("versions", report["versions"])
    lines += _section("machine", report["machine"])
    lines += _isa_lines(report)
    topology = report["topology"]
    lines += _section(
        "topology and limits",
        {
            "usable physical cores": topology["num_cores"],
            "CPU limit of the cgroup": f"{topology['cpu_quota']:.1f} cores" if topology["cpu_quota"] else "none",
            "memory limit": f"{topology['memory_limit_bytes'] / 1e9:.1f} GB",
            "memory available": f"{topology['memory_available_bytes'] / 1e9:.1f} GB",
            "can bind memory": topology["can_bind"],
        },
    )
    for node in topology["nodes"]:
        lines.append(
            f"  {'NUMA node ' + str(node['id']) + ':':26}{node['num_cores']} cores, CPUs {_cpu_ranges(node['cpus'])}, "
            f"{node['memory_bytes'] / 1e9:.1f} GB{'' if node['has_memory'] else ', no memory to bind'}"
        )
    lines.extend(f"  warning: {warning}" for warning in topology["warnings"])
    lines.append("kernels")
    lines.extend(f"  {choice}" for choice in report["kernels"]["choice"].values())
    for row in report["kernels"]["table"]:
        lines.append(f"  {row['name']:46}{row['isa']:28}{'' if row['supported'] else 'not on this CPU'}".rstrip())
    lines += _section(
        "methods", {name: f"{method['layout']}: {method['is']}" for name, method in report["methods"].items()}
    )
    lines += _section("KT_* variables", report["environment"]["set"] or {"set": "none"})
    lines.extend(f"  warning: {warning}" for warning in report["environment"]["warnings"])
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report."""
    description = "machine, instruction sets, limits, versions and kernels, for bug reports"
    parser = argparse.ArgumentParser(prog="python -m kt_kernel.collect_env", description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--readings", metavar="FILE", help="explain the choice on another machine, from what --json printed there"
    )
    args = parser.parse_args(argv)
    try:
        report = collect() if args.readings is None else explain(load_readings(args.readings))
    except (ValueError, RuntimeError) as error:
        message = f"kt_kernel cannot describe this machine: {error}" if args.readings is None else str(error)
        print(message, file=sys.stderr)
        return 1
    text = format_report if args.readings is None else format_explanation
    print(json.dumps(report, indent=1) if args.json else text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

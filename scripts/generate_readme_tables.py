#!/usr/bin/env python3
"""Write the tables of README.md and docs/kernels.md from the code: methods, flags, environment variables, kernels.

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. ``--check`` changes nothing and exits 1 if a
table is not what the code says. Reads sources only: needs neither a build nor torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]

# Columns of the methods' table: a CPU that has one has those before it, but for avxvnni, which Zen 4 and Xeons before
# Sapphire Rapids lack.
FEATURES = ("reference", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "avx512vbmi", "amxint8", "amxbf16")
ACTIVATIONS = {"kInt8": "int8", "kUint8": "int8 + 128", "kBFloat16": "bf16"}


@dataclass(frozen=True)
class KernelRow:
    """One row of kernels.inc: what it computes, what it needs, and from how many rows of an expert it is chosen."""

    symbol: str
    needs: str
    weight: str = ""
    activation: str = ""
    m_from: str = ""
    groups: str = "kAny"

    @property
    def feature(self) -> str:
        """The last word of the symbol: the feature that names the object file."""
        return self.symbol.rsplit("_", 1)[1]


def load_source(path: Path) -> ModuleType:
    """A module from its file, without importing the package around it (which needs the built extension)."""
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def feature_name(constant: str) -> str:
    """``kIsaAvx512Vnni`` -> ``avx512vnni``."""
    return constant.strip().removeprefix("kIsa").lower()


def format_name(constant: str) -> str:
    """``kInt4KM`` -> ``int4km``: a weight format as layout keys name it."""
    return "bf16" if constant == "kBFloat16" else constant.removeprefix("k").lower()


def read_kernels(text: str) -> list[KernelRow]:
    """Rows of kernels.inc, in its order."""
    text = re.sub(r"//[^\n]*|(?m:^\s*#.*$)", "", text)
    rows = []
    for macro, arguments in re.findall(r"\bKT_([A-Z_]+)\(([^()]*)\)", text):
        fields = [" ".join(field.split()) for field in arguments.split(",")]
        if macro.endswith("_AS"):
            macro = macro.removesuffix("_AS")
            del fields[1]  # the kernel, which is another row's
        needs = " ".join(feature_name(constant) for constant in fields[1].split("|"))
        if macro in ("GEMM", "TILE_GEMM"):
            groups = fields[8] if macro == "TILE_GEMM" else "kAny"
            rows.append(KernelRow(fields[0], needs, format_name(fields[2]), ACTIVATIONS[fields[3]], fields[5], groups))
        else:
            rows.append(KernelRow(fields[0], needs))
    return rows


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fits(row: KernelRow, layout: str) -> bool:
    """Whether a row is for the groups of a layout, by the rule of ``Groups`` in registry.h.

    Without a layout: for codes of files, whose activations have a scale each block and so no wide groups.
    """
    group = re.match(r"int4g(\d+)_", layout)
    size = int(group.group(1)) if group else 0
    wide = bool(layout) and (size == 0 or (size >= 128 and size % 64 == 0))
    return row.groups == "kAny" or (row.groups == "kWide") == wide


def methods_table(kernels: list[KernelRow], methods: ModuleType) -> str:
    """Methods by feature: *yes* where the method has kernels of its own for the feature, for all of its formats.

    The bf16 of GGUF's floats does not count beside the codes.
    """
    features = [name for name in FEATURES if any(row.feature == name for row in kernels)]
    rows = []
    for method in methods.METHODS.values():
        formats = (method.weight_dtype,) if method.packed else method.formats
        counted = [f for f in formats if f != "bf16" or len(formats) == 1]
        own = [{row.feature for row in kernels if row.weight == f and fits(row, method.packed)} for f in counted]
        cells = ["yes" if all(feature in have for have in own) else "-" for feature in features]
        layout = f"`{method.packed}`" if method.packed else ", ".join(formats)
        others = [f"`{alias}`" for alias, name in methods.ALIASES.items() if name == method.name]
        rows.append([", ".join([f"`{method.name}`", *others]), layout, *cells, method.description])
    return markdown_table(["Method", "Layout or weight formats", *features, "Weights"], rows)


def kernels_table(kernels: list[KernelRow]) -> str:
    """Every row of kernels.inc."""
    rows = [[f"`{k.symbol}`", k.weight or "-", k.activation or "-", k.m_from or "-", k.needs] for k in kernels]
    return markdown_table(["Kernel", "Weights", "Activations", "From rows of an expert", "Needs"], rows)


def tables() -> dict[str, dict[str, str]]:
    """Every generated table by its page and the name of its markers."""
    kernels = read_kernels((ROOT / "csrc/kernels/kernels.inc").read_text())
    return {
        "README.md": {
            "methods": methods_table(kernels, load_source(ROOT / "kt_kernel/methods.py")),
            "flags": load_source(ROOT / "kt_kernel/integrations/sglang/flags.py").flags_table(),
            "environment": load_source(ROOT / "kt_kernel/config.py").environment_table(),
        },
        "docs/kernels.md": {"kernels": kernels_table(kernels)},
    }


def render(page: str, text: str) -> str:
    """A page's text with every table of it replaced by the current one.

    Raises
    ------
    ValueError
        The page has no markers for a table.
    """
    for name, table in tables()[page].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} must have {begin} and {end} once each.")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only report whether the pages are up to date")
    arguments = parser.parse_args()
    stale = 0
    for page in tables():
        path = ROOT / page
        current = path.read_text()
        wanted = render(page, current)
        if current == wanted:
            continue
        if arguments.check:
            print(f"{page} is not what the code says; run scripts/generate_readme_tables.py", file=sys.stderr)
            stale = 1
        else:
            path.write_text(wanted)
    return stale


if __name__ == "__main__":
    sys.exit(main())

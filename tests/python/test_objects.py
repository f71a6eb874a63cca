"""What the compiler made: no instruction outside an object's declared set, no symbol that could leak between sets.

Old CPUs must get a message, not a crash, so everything but the ISA objects is plain x86-64; and an ISA object may emit
no weak symbol, because the linker could keep its copy for the plain callers too. Reads the objects of the build trees
that ``scripts/test.sh`` and ``install.sh`` leave in build/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from test_tree import ROOT, include_lines, kernel_rows

ISA_FOLDER = "csrc/kernels/x86/"

# Instructions by the feature they need. Whatever is VEX or EVEX encoded begins with v.
FEATURE_INSTRUCTIONS = {
    "kIsaAvxVnni": re.compile(r"\{vex\} vpdp(bus|wss)ds?$"),
    "kIsaAvx512Vnni": re.compile(r"vpdp(bus|wss)ds?$"),
    "kIsaAvx512Bf16": re.compile(r"v(dpbf16ps|cvtne2?ps2bf16)"),
    "kIsaAvx512Vbmi": re.compile(r"v(permi2b|permt2b|permb|pmultishiftqb)$"),
    "kIsaAmxInt8": re.compile(r"tdpb(ss|su|us|uu)d$"),
    "kIsaAmxBf16": re.compile(r"tdpbf16ps$"),
}
PREFIXES = "rep|repz|repnz|lock|bnd|notrack|data16|cs"
EVEX_ONLY = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")
# Not tzcnt: it is what objdump calls the `rep bsf` that gcc emits for plain x86-64, and old CPUs run it as bsf.
ABOVE_BASELINE = re.compile(
    r"\{vex\}|v(?!err|erw|mcall|mlaunch)\w+$|tdp|tile|popcnt|lzcnt|andn$|bextr|bls|bzhi|mulx|rorx|sarx|shlx|shrx|pdep|pext"
    r"|movbe|crc32|pshufb|palignr|pmull[d]|ptest|round[ps][sd]|blendv|pblend|pextr[bdq]|pinsr[bdq]|ph(add|sub)"
)


def build_trees() -> list[Path]:
    """CMake build folders without sanitizers, newest first."""
    caches = [path for path in (ROOT / "build").glob("*/CMakeCache.txt") if "KT_SANITIZE:STRING=\n" in path.read_text()]
    return [path.parent for path in sorted(caches, key=lambda path: path.stat().st_mtime, reverse=True)]


@cache
def built_objects() -> dict[str, Path]:
    """Newest object of each source under csrc/ that still exists, by the source's path."""
    objects: dict[str, Path] = {}
    for tree in build_trees():
        for path in tree.rglob("*.cpp.o"):
            match = re.search(r"(csrc/.*\.cpp)\.o$", path.as_posix())
            if match and (ROOT / match.group(1)).exists():
                other = objects.get(match.group(1))
                if other is None or other.stat().st_mtime < path.stat().st_mtime:
                    objects[match.group(1)] = path
    return objects


@cache
def written(source: Path) -> float:
    """When a source or one of our headers that it includes was last written."""
    ours = [ROOT / "csrc" / target.strip('"') for _, target in include_lines(source.read_text()) if target[0] == '"']
    return max([source.stat().st_mtime, *(written(header) for header in ours if header.exists())])


def stale_objects(objects: dict[str, Path]) -> list[str]:
    """Sources that were written after their newest object: it tells of other code."""
    return [name for name, path in objects.items() if written(ROOT / name) > path.stat().st_mtime]


def require_objects(folder: str = "csrc/") -> dict[str, Path]:
    objects = {name: path for name, path in built_objects().items() if name.startswith(folder)}
    if not objects:
        pytest.skip("build/ holds no objects: run scripts/test.sh or scripts/dev.sh test first")
    stale = stale_objects(objects)
    assert not stale, f"build/ is older than {', '.join(stale)} or its headers: run scripts/dev.sh test first"
    return objects


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type letter, demangled name) of each defined symbol."""
    text = subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
    return [(match.group(1), match.group(2)) for match in re.finditer(r"^\S+ (\S) (.+)$", text, re.MULTILINE)]


def instructions(path: Path) -> set[tuple[str, bool]]:
    """Distinct (mnemonic, whether it names an EVEX-only register) of all code sections.

    Where an instruction has both encodings, objdump puts ``{vex}`` before the older one, and so does the mnemonic.
    """
    command = ["objdump", "-d", "--no-show-raw-insn", "--no-addresses", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = set()
    for match in re.finditer(rf"^\s+(?:(?:{PREFIXES}) )*((?:\{{vex\}} )?[a-z][a-z0-9]*)(.*)$", text, re.M):
        found.add((match.group(1), bool(EVEX_ONLY.search(match.group(2)))))
    assert found, f"objdump printed no instruction of {path}"
    return found


def symbol_findings(path: Path, declared: set[str]) -> list[str]:
    """Weak symbols, and global ones that are no row of kernels.inc."""
    findings = []
    for kind, name in symbols(path):
        plain = re.sub(r"\(.*\)$", "", name).removeprefix("kt::")
        if kind in "VvWw" or kind == "u":
            findings.append(f"{path.name}: weak symbol {name}")
        elif kind.isupper() and plain not in declared:
            findings.append(f"{path.name}: global symbol {name} is no row of kernels.inc")
    return findings


def isa_findings(path: Path, allowed: set[str]) -> list[str]:
    """Instructions of an ISA object that need a feature outside `allowed`."""
    findings = []
    for mnemonic, evex in instructions(path):
        if evex and not any(feature.startswith(("kIsaAvx512", "kIsaAmx")) for feature in allowed):
            findings.append(f"{path.name}: {mnemonic} with an AVX-512 register")
        for feature, pattern in FEATURE_INSTRUCTIONS.items():
            if feature not in allowed and pattern.match(mnemonic):
                findings.append(f"{path.name}: {mnemonic} needs {feature}")
    return findings


def baseline_findings(path: Path) -> list[str]:
    """Instructions above plain x86-64."""
    found = instructions(path)
    return [f"{path.name}: {mnemonic}" for mnemonic, evex in found if evex or ABOVE_BASELINE.match(mnemonic)]


def test_isa_objects_expose_their_kernels_only() -> None:
    declared = set(kernel_rows())
    findings = []
    for path in require_objects(ISA_FOLDER).values():
        findings += symbol_findings(path, declared)
    assert not findings, "\n".join(findings)


def test_isa_objects_stay_within_their_features() -> None:
    rows = kernel_rows()
    findings = []
    for path in require_objects(ISA_FOLDER).values():
        names = {re.sub(r"\(.*\)$", "", name).removeprefix("kt::") for kind, name in symbols(path) if kind.isupper()}
        features = [set(re.findall(r"kIsa\w+", rows[name])) for name in names if name in rows]
        assert features, f"{path} defines no kernel of kernels.inc"
        # the host is only known to have what every row of the object asks for
        findings += isa_findings(path, set.intersection(*features))
    assert not findings, "\n".join(findings)


def test_every_source_was_built() -> None:
    """Else the checks of this file would pass on objects that are not there."""
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp")}
    missing = sources - set(require_objects())
    assert not missing, f"no object in build/ for {sorted(missing)}; run install.sh and scripts/test.sh"


def test_other_objects_are_plain_x86_64() -> None:
    findings = []
    for name, path in require_objects().items():
        if not name.startswith(ISA_FOLDER):
            findings += baseline_findings(path)
    assert not findings, "\n".join(findings)


# The checks find planted faults.

PLANTED = """
#include <immintrin.h>
namespace kt {
inline int weak(int x) { return x + 1; }
int (*keep)(int) = weak;
void add(const float* a, float* b) { _mm512_storeu_ps(b, _mm512_add_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b))); }
void dot(const void* a, void* b) {
  _mm512_storeu_si512(b, _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(a), _mm512_loadu_si512(b)));
}
__m256i vex_dot(__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
}  // namespace kt
"""


@pytest.fixture(scope="module")
def planted_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    assert compiler, "g++ is missing; install.sh installs it"
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(PLANTED)
    command = [compiler, "-O1", "-mavx512f", "-mavx512vnni", "-mavxvnni", "-c", "planted.cpp", "-o", "planted.cpp.o"]
    subprocess.run(command, check=True, cwd=folder)
    return folder / "planted.cpp.o"


def test_planted_instructions_are_found(planted_object: Path) -> None:
    assert any("vaddps" in finding for finding in baseline_findings(planted_object))
    assert any("register" in finding for finding in isa_findings(planted_object, {"kIsaAvx2"}))
    assert any(re.search(r": \{vex\} vpdpbusd", finding) for finding in baseline_findings(planted_object))
    every = {"kIsaAvx2", "kIsaAvx512", "kIsaAvx512Vnni", "kIsaAvxVnni"}
    assert not isa_findings(planted_object, every)
    assert isa_findings(planted_object, every - {"kIsaAvx512Vnni"}) == ["planted.cpp.o: vpdpbusd needs kIsaAvx512Vnni"]
    vex = isa_findings(planted_object, every - {"kIsaAvxVnni"})
    assert vex == ["planted.cpp.o: {vex} vpdpbusd needs kIsaAvxVnni"]


def test_planted_symbols_are_found(planted_object: Path) -> None:
    findings = symbol_findings(planted_object, {"add"})
    assert any("weak symbol kt::weak" in finding for finding in findings)
    assert any("kt::dot" in finding for finding in findings)
    assert not any("kt::add" in finding for finding in findings)


@pytest.mark.parametrize(
    "source, symbol, instruction, times",
    [
        ("probe_avx2.cpp", "peak_probe_int8_avx2", "vpmaddubsw", 4),
        ("probe_avx2.cpp", "peak_probe_bf16_avx2", r"vfmadd\w+", 12),
        ("probe_avx512.cpp", "peak_probe_int8_avx512", "vpmaddubsw", 8),
        ("probe_avx512.cpp", "peak_probe_bf16_avx512", r"vfmadd\w+", 24),
        ("probe_avxvnni.cpp", "peak_probe_int8_avxvnni", r"\{vex\} vpdpbusd", 12),
        ("probe_avx512vnni.cpp", "peak_probe_int8_avx512vnni", "vpdpbusd", 24),
        ("probe_avx512bf16.cpp", "peak_probe_bf16_avx512bf16", "vdpbf16ps", 24),
    ],
)
def test_peak_probes_multiply_as_often_as_they_claim(source, symbol, instruction, times):
    # A compiler that sees through a probe (equal sums, one product for all) makes the machine's limit a fantasy.
    path = require_objects(ISA_FOLDER)[ISA_FOLDER + source]
    command = ["objdump", "-dC", "--no-show-raw-insn", "--no-addresses", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    body = re.search(rf"<kt::{symbol}\(long\)>:\n(.*?)(?:\n\n|\Z)", text, re.S)
    assert body, f"objdump shows no {symbol} in {path}"
    assert len(re.findall(rf"\t{instruction}\b", body.group(1))) == times


def test_an_object_older_than_its_source_is_found(tmp_path: Path) -> None:
    source = f"{ISA_FOLDER}rowwise_avx2.cpp"
    assert (ROOT / source).exists()
    built = tmp_path / "built.o"
    built.touch()
    assert not stale_objects({source: built})
    os.utime(built, (0, 0))
    assert stale_objects({source: built}) == [source]

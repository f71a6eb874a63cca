"""The gate without a clock: what a kernel's hot loops cost in instructions and spills, a forward in barriers and bytes.

Exact for every instruction set on any host: instructions are counted in the objects, in the loops that multiply, and
not by callgrind, whose valgrind (3.19 in Debian 12) does not know AVX-512. A loop runs once a k-step of a tile, so its
instructions over its products are what the machine executes. Barriers and bytes are the library's own counters.
Reads the objects that ``scripts/test.sh`` and ``install.sh`` leave in build/, as test_objects.py does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_objects import ISA_FOLDER, require_objects

from kt_kernel import ops
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.experts import CpuExperts, get_engine, packed_bytes

# --- loops of an object ---

# The instructions that multiply, and the products of a 64-byte one. A function multiplies with the first of them that
# it has: what comes later in the list adds pairs or folds groups there.
MULTIPLIERS = {
    r"tdpb(us|su)d": 16 * 16 * 64,  # of a tile
    r"tdpbf16ps": 16 * 16 * 32,
    r"vpdpbusd": 64,
    r"vdpbf16ps": 32,
    r"vpmaddubsw": 64,
    r"vpmaddwd": 32,
    r"vfmadd\d+ps": 16,
}
REGISTER_BYTES = {"x": 16, "y": 32, "z": 64, "t": 64}

# Instructions for 1,000 products that the hot loops of a source may take, by function. Counted with g++ 12.2, and a
# tenth more: a spilled tile of 6 rows takes twice as many. `<1` and `multiply_row` are decode, the largest
# number the full tile.
BOUNDS: dict[str, dict[str, float]] = {
    "gemm_int8_avx2.cpp": {r"multiply_row": 211, r"<[2-5]": 250, r"<6": 230},
    "gemm_fp4_avx2.cpp": {
        r"<CodesFp4\b.* 16>, 1>": 240,
        r"<CodesFp4\b.* 16>, 6>": 293,
        r"<CodesFp4\b.* 16>, [2-5]>": 337,
        r"<CodesFp4\b.* 32>, 1>": 206,
        r"<CodesFp4\b.* 32>, 6>": 233,
        r"<CodesFp4\b.* 32>, [2-5]>": 334,
        r"<ExpandedCodes\b.* 16>, 1>": 169,
        r"<ExpandedCodes\b.* 16>, 6>": 264,
        r"<ExpandedCodes\b.* 16>, [2-5]>": 301,
        r"<ExpandedCodes\b.* 32>, 1>": 137,
        r"<ExpandedCodes\b.* 32>, 6>": 208,
        r"<ExpandedCodes\b.* 32>, [2-5]>": 293,
    },
    "gemm_fp8_avx2.cpp": {
        r"multiply_row": 920,
        r"row_block": 379,
    },
    "gemm_int2_avx2.cpp": {
        r"<Codes2\b.* 16>, 1>": 347,
        r"<Codes2\b.* 16>, 6>": 282,
        r"<Codes2\b.* 16>, [2-5]>": 341,
    },
    "gemm_int3_avx2.cpp": {
        r"<Codes3\b.* 16>, 1>": 516,
        r"<Codes3\b.* 16>, 6>": 317,
        r"<Codes3\b.* 16>, [2-5]>": 428,
        r"<ExpandedCodes\b.* 16>, 1>": 236,
        r"<ExpandedCodes\b.* 16>, 6>": 249,
        r"<ExpandedCodes\b.* 16>, [2-5]>": 285,
    },
    "gemm_int4_avx2.cpp": {
        r"<Codes4\b.* 16>, 1>": 345,
        r"<Codes4\b.* 16>, 6>": 280,
        r"<Codes4\b.* 16>, [2-5]>": 348,
        r"<Codes4\b.* 32>, 1>": 244,
        r"<Codes4\b.* 32>, 6>": 214,
        r"<Codes4\b.* 32>, [2-5]>": 254,
        r"<ExpandedCodes\b.* 32>, 1>": 172,
        r"<ExpandedCodes\b.* 32>, 6>": 190,
        r"<ExpandedCodes\b.* 32>, [2-5]>": 217,
    },
    "gemm_int5_avx2.cpp": {
        r"<Codes5\b.* 16>, 1>": 416,
        r"<Codes5\b.* 16>, 6>": 332,
        r"<Codes5\b.* 16>, [2-5]>": 453,
        r"<ExpandedCodes\b.* 16>, 1>": 167,
        r"<ExpandedCodes\b.* 16>, 6>": 258,
        r"<ExpandedCodes\b.* 16>, [2-5]>": 290,
    },
    "gemm_int6_avx2.cpp": {
        r"<Codes6\b.* 16>, 1>": 317,
        r"<Codes6\b.* 16>, 6>": 485,
        r"<Codes6\b.* 16>, [2-5]>": 638,
        r"<ExpandedCodes\b.* 16>, 1>": 138,
        r"<ExpandedCodes\b.* 16>, 6>": 423,
        r"<ExpandedCodes\b.* 16>, [2-5]>": 458,
    },
    "gemm_int8_groups_avx2.cpp": {
        r"<Codes8\b.* 32>, 1>": 272,
        r"<Codes8\b.* 32>, 6>": 262,
        r"<Codes8\b.* 32>, [2-5]>": 285,
    },
    "gemm_iq4_avx2.cpp": {
        r"<CodesIq4\b.* 16>, 1>": 395,
        r"<CodesIq4\b.* 16>, 6>": 317,
        r"<CodesIq4\b.* 16>, [2-5]>": 360,
        r"<CodesIq4\b.* 32>, 1>": 376,
        r"<CodesIq4\b.* 32>, 6>": 293,
        r"<CodesIq4\b.* 32>, [2-5]>": 344,
        r"<ExpandedCodes\b.* 32>, 1>": 291,
        r"<ExpandedCodes\b.* 32>, 6>": 267,
        r"<ExpandedCodes\b.* 32>, [2-5]>": 286,
    },
    "gemm_bf16_avx2.cpp": {r"<1": 507, r"<[23]": 413, r"<[45]": 353, r"<6": 316},
    "gemm_int8_avxvnni.cpp": {r"<1": 73, r"<[2-5]": 97, r"<6": 77},
    "gemm_int4_avxvnni.cpp": {r"<1": 116, r"<[2-5]": 97, r"<6": 77},
    "gemm_int8_avx512.cpp": {r"<1": 155, r"<[23]": 121, r"<4": 104},
    "gemm_int4_avx512.cpp": {r"<1": 74, r"<2": 56},
    "gemm_bf16_avx512.cpp": {r"<1": 224, r"<[2-4]": 181, r"<5": 148},
    "gemm_int8_avx512vnni.cpp": {r"<1": 47, r"<[2-5]": 41, r"<6": 30},
    "gemm_int4_avx512vnni.cpp": {
        r"<Codes4, \w+, 1,": 63,
        r"<Codes4, \w+, 2,": 42,
        r"<Codes4, \w+, 3,": 36,
        r"Table>, \w+, 1,": 93,
        r"Table>, \w+, 2,": 51,
        r"Table>, \w+, 3,": 41,
    },
    "gemm_groups_avx512vnni.cpp": {
        r"<Codes8, \w+, 1,": 69,
        r"<Codes8, \w+, 2,": 45,
        r"<Codes8, \w+, 3,": 43,
        r"<Codes6, \w+, 1,": 96,
        r"<Codes6, \w+, 2,": 56,
        r"<Codes6, \w+, 3,": 44,
        r"<Codes5, \w+, 1,": 121,
        r"<Codes5, \w+, 2,": 69,
        r"<Codes5, \w+, 3,": 67,
        r"<Codes3, \w+, 1,": 116,
        r"<Codes3, \w+, 2,": 70,
        r"<Codes3, \w+, 3,": 53,
        r"<Codes2, \w+, 1,": 64,
        r"<Codes2, \w+, 2,": 48,
        r"<Codes2, \w+, 3,": 36,
    },
    "gemm_expanded_avx512vnni.cpp": {r"<\w+, 1,": 95, r"<\w+, [2-5],": 61, r"<\w+, 6,": 38},
    "gemm_fp8_avx512vbmi.cpp": {r"<\w+, 1,": 202, r"<\w+, [23],": 121, r"<\w+, [45],": 80, r"<\w+, 6,": 68},
    "gemm_int8_amxint8.cpp": {r"multiply_panel": 1.4},
    "gemm_int4_amxint8.cpp": {r"multiply_part": 0.9, r"fold_group": 894},
    "gemm_bf16_amxbf16.cpp": {r"float, 1, ": 2.8, r"float, 2, ": 1.8, r"float, 4, ": 1.2},
    "gemm_bf16_avx512bf16.cpp": {r"<1": 155, r"<[2-5]": 103, r"<6": 62},
}

# Whole vectors that a hot loop may store to or load from the stack, by function; none elsewhere. Groups on AVX2 keep
# the integer sums of a group there by design (a load and a store each, once in 8 to 32 k: 24 at 6 rows), and GCC puts
# constants that find no register beside them: read as operands from memory of their own, they took 3 to 20 % longer.
# fp8 reads a group's 8 scales. int8 on AVX2 loads one mask anew: 12 sums, weights and activations are all 16 registers.
SPILLS: dict[str, dict[str, float]] = {
    "gemm_fp4_avx2.cpp": {
        r"<CodesFp4\b.* 16>, 1>": 12,
        r"<CodesFp4\b.* 16>, 6>": 33,
        r"<CodesFp4\b.* 16>, [2-5]>": 24,
        r"<CodesFp4\b.* 32>, 1>": 8,
        r"<CodesFp4\b.* 32>, 6>": 69,
        r"<CodesFp4\b.* 32>, [2-5]>": 54,
        r"<ExpandedCodes\b.* 16>, 1>": 6,
        r"<ExpandedCodes\b.* 16>, 6>": 25,
        r"<ExpandedCodes\b.* 16>, [2-5]>": 18,
        r"<ExpandedCodes\b.* 32>, 6>": 61,
        r"<ExpandedCodes\b.* 32>, [2-5]>": 48,
    },
    "gemm_fp8_avx2.cpp": {r"multiply_row": 20},
    "gemm_int2_avx2.cpp": {
        r"<Codes2\b.* 16>, 1>": 25,
        r"<Codes2\b.* 16>, 6>": 32,
        r"<Codes2\b.* 16>, [2-5]>": 20,
    },
    "gemm_int3_avx2.cpp": {
        r"<Codes3\b.* 16>, 1>": 25,
        r"<Codes3\b.* 16>, 6>": 45,
        r"<Codes3\b.* 16>, [2-5]>": 36,
        r"<ExpandedCodes\b.* 16>, 1>": 19,
        r"<ExpandedCodes\b.* 16>, 6>": 25,
        r"<ExpandedCodes\b.* 16>, [2-5]>": 18,
    },
    "gemm_int4_avx2.cpp": {
        r"<Codes4\b.* 16>, 1>": 24,
        r"<Codes4\b.* 16>, 6>": 31,
        r"<Codes4\b.* 16>, [2-5]>": 20,
        r"<Codes4\b.* 32>, 1>": 25,
        r"<Codes4\b.* 32>, 6>": 39,
        r"<Codes4\b.* 32>, [2-5]>": 20,
        r"<ExpandedCodes\b.* 32>, 1>": 20,
        r"<ExpandedCodes\b.* 32>, 6>": 25,
        r"<ExpandedCodes\b.* 32>, [2-5]>": 20,
    },
    "gemm_int5_avx2.cpp": {
        r"<Codes5\b.* 16>, 1>": 36,
        r"<Codes5\b.* 16>, 6>": 41,
        r"<Codes5\b.* 16>, [2-5]>": 35,
        r"<ExpandedCodes\b.* 16>, 1>": 6,
        r"<ExpandedCodes\b.* 16>, 6>": 25,
        r"<ExpandedCodes\b.* 16>, [2-5]>": 18,
    },
    "gemm_int6_avx2.cpp": {
        r"<Codes6\b.* 16>, 1>": 26,
        r"<Codes6\b.* 16>, 6>": 68,
        r"<Codes6\b.* 16>, [2-5]>": 52,
        r"<ExpandedCodes\b.* 16>, 6>": 52,
        r"<ExpandedCodes\b.* 16>, [2-5]>": 39,
    },
    "gemm_int8_avx2.cpp": {r"<6": 1},
    "gemm_int8_groups_avx2.cpp": {
        r"<Codes8\b.* 32>, 1>": 12,
        r"<Codes8\b.* 32>, 6>": 44,
        r"<Codes8\b.* 32>, [2-5]>": 30,
    },
    "gemm_iq4_avx2.cpp": {
        r"<CodesIq4\b.* 16>, 1>": 54,
        r"<CodesIq4\b.* 16>, 6>": 60,
        r"<CodesIq4\b.* 16>, [2-5]>": 38,
        r"<CodesIq4\b.* 32>, 1>": 103,
        r"<CodesIq4\b.* 32>, 6>": 85,
        r"<CodesIq4\b.* 32>, [2-5]>": 52,
        r"<ExpandedCodes\b.* 32>, 1>": 80,
        r"<ExpandedCodes\b.* 32>, 6>": 60,
        r"<ExpandedCodes\b.* 32>, [2-5]>": 30,
    },
}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies."""

    function: str
    instructions: int
    products: int
    spills: int  # accesses of whole vectors to the stack

    @property
    def cost(self) -> float:
        """Instructions for 1,000 products."""
        return 1000 * self.instructions / self.products


def functions_of(path: Path) -> dict[str, list[Instruction]]:
    """The instructions of each function, by its demangled name."""
    text = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout
    functions = {}
    for match in re.finditer(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n?)+)", text, re.MULTILINE):
        lines = re.findall(r"^\s*([0-9a-f]+):\t(?:\{vex\} )?(\S+)[ ]*(.*)$", match.group(2), re.MULTILINE)
        functions[match.group(1)] = [Instruction(int(address, 16), name, rest) for address, name, rest in lines]
    return functions


def loop_ranges(body: list[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each loop: a jump back and its target. Innermost ones only."""
    found = set()
    for at in body:
        target = re.match(r"([0-9a-f]+) <", at.operands)
        if at.name.startswith("j") and target and body[0].address <= int(target.group(1), 16) <= at.address:
            found.add((int(target.group(1), 16), at.address))
    return sorted(
        (begin, end)
        for begin, end in found
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in found)
    )


def multiplier_of(body: list[Instruction]) -> tuple[str, int] | None:
    """What a function multiplies with: a pattern and the products of 64 bytes; None if with nothing."""
    for pattern, products in MULTIPLIERS.items():
        if any(re.fullmatch(pattern, at.name) for at in body):
            return pattern, products
    return None


def is_spill(at: Instruction, has_frame: bool) -> bool:
    """A whole vector stored to or loaded from the stack. Broadcasts of a scalar on it are operands, not spills."""
    stack = r"\((%rsp|%rbp)" if has_frame else r"\(%rsp"
    vector = re.search(r"%[xyz]mm", at.operands) and re.search(stack, at.operands)
    return bool(vector) and "broadcast" not in at.name and "{1to" not in at.operands


def hot_loops(path: Path) -> list[Loop]:
    """The innermost loops of an object that multiply."""
    loops = []
    for name, body in functions_of(path).items():
        multiplier = multiplier_of(body)
        if multiplier is None:
            continue
        has_frame = any(at.name == "mov" and at.operands == "%rsp,%rbp" for at in body)
        for begin, end in loop_ranges(body):
            inside = [at for at in body if begin <= at.address <= end]
            widths = [
                REGISTER_BYTES[re.findall(r"%([xyzt])mm", at.operands)[-1]]
                for at in inside
                if re.fullmatch(multiplier[0], at.name)
            ]
            if widths:
                spills = sum(is_spill(at, has_frame) for at in inside)
                plain = re.sub(r"kt::|\(anonymous namespace\)::|^void ", "", name).split("(")[0]
                loops.append(Loop(plain, len(inside), multiplier[1] * sum(widths) // 64, spills))
    return loops


def limit_of(limits: dict[str, float], function: str) -> float | None:
    """The least of the limits whose patterns are in the name of a function; None without one."""
    return min((limit for pattern, limit in limits.items() if re.search(pattern, function)), default=None)


def loop_findings(source: str, loops: list[Loop]) -> list[str]:
    """What the gate has against the hot loops of a source: spills, too many instructions, a kernel without a loop."""
    bounds = BOUNDS.get(source)
    if bounds is None:
        return [f"{source}: no bound on its instructions; add it to BOUNDS"]
    findings = []
    for pattern in bounds:
        if not any(re.search(pattern, loop.function) for loop in loops):
            findings.append(f"{source}: no hot loop in a function like {pattern}")
    for loop in loops:
        where = f"{source}: {loop.function}"
        allowed = limit_of(SPILLS.get(source, {}), loop.function) or 0
        if loop.spills > allowed:
            findings.append(f"{where}: {loop.spills} spills in a hot loop, {allowed} are allowed")
        bound = limit_of(bounds, loop.function)
        if bound is None:
            findings.append(f"{where}: a hot loop without a bound")
        elif loop.cost > bound:
            findings.append(f"{where}: {loop.cost:.3g} instructions for 1,000 products, {bound:g} are allowed")
    return findings


def test_hot_loops_neither_spill_nor_grow() -> None:
    objects = {Path(name).name: path for name, path in require_objects(ISA_FOLDER).items()}
    kernels = {name: path for name, path in objects.items() if name.startswith("gemm_")}
    assert kernels, "no kernel was built"
    findings = []
    for name, path in kernels.items():
        findings += loop_findings(name, hot_loops(path))
    assert not findings, "\n".join(findings)


# Forty sums need more than the 32 vector registers there are.
PLANTED = """
#include <immintrin.h>
namespace kt {
template <int kSums>
void spilling(const float* a, float* c, long steps) {
  __m512 sum[kSums];
#pragma GCC unroll 64
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_ps();
  for (long s = 0; s < steps; ++s) {
    const __m512 w = _mm512_loadu_ps(a + 1024 * s);
#pragma GCC unroll 64
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(a[16 * i + 1024 * s]), w, sum[i]);
  }
#pragma GCC unroll 64
  for (int i = 0; i < kSums; ++i) _mm512_storeu_ps(c + 16 * i, sum[i]);
}
template void spilling<40>(const float*, float*, long);
template void spilling<6>(const float*, float*, long);
}  // namespace kt
"""


@pytest.fixture(scope="module")
def planted_loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loop]:
    compiler = shutil.which("g++")
    assert compiler, "g++ is missing; install.sh installs it"
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(PLANTED)
    command = [compiler, "-O3", "-mavx512f", "-mprefer-vector-width=512", "-c", "planted.cpp", "-o", "planted.cpp.o"]
    subprocess.run(command, check=True, cwd=folder)
    return {loop.function: loop for loop in hot_loops(folder / "planted.cpp.o")}


def test_a_planted_spill_is_found(planted_loops, monkeypatch) -> None:
    monkeypatch.setitem(BOUNDS, "planted.cpp", {r"<40": 1000, r"<6": 1000})
    findings = loop_findings("planted.cpp", list(planted_loops.values()))
    assert len(findings) == 1 and "spilling<40>" in findings[0] and "spills in a hot loop" in findings[0]
    spills = planted_loops["spilling<40>"].spills
    monkeypatch.setitem(SPILLS, "planted.cpp", {r"<6": spills, r"<40": spills - 1})
    assert loop_findings("planted.cpp", list(planted_loops.values())) == [
        f"planted.cpp: spilling<40>: {spills} spills in a hot loop, {spills - 1} are allowed"
    ]
    monkeypatch.setitem(SPILLS, "planted.cpp", {r"<40": spills})
    assert not loop_findings("planted.cpp", list(planted_loops.values()))


def test_planted_instructions_are_found(planted_loops, monkeypatch) -> None:
    good = planted_loops["spilling<6>"]
    assert good.products == 6 * 16 and 6 < good.instructions < 24
    monkeypatch.setitem(BOUNDS, "planted.cpp", {r"<6": good.cost * 0.9})
    assert "instructions for 1,000 products" in loop_findings("planted.cpp", [good])[0]
    monkeypatch.setitem(BOUNDS, "planted.cpp", {r"<6": good.cost * 1.1})
    assert not loop_findings("planted.cpp", [good])


def test_a_kernel_that_the_gate_does_not_know_is_found(planted_loops, monkeypatch) -> None:
    assert "no bound" in loop_findings("gemm_fp8_avx512.cpp", list(planted_loops.values()))[0]
    monkeypatch.setitem(BOUNDS, "planted.cpp", {r"<7": 1000})
    findings = loop_findings("planted.cpp", [planted_loops["spilling<6>"]])
    assert findings == [
        "planted.cpp: no hot loop in a function like <7",
        "planted.cpp: spilling<6>: a hot loop without a bound",
    ]


# --- barriers and bytes of a forward ---

SIZES = {"hidden_size": 576, "intermediate_size": 320}
NUM_EXPERTS, TOP_K = 8, 2
FEW_TOKENS, MANY_TOKENS = 3, 100


def forward_findings(counters: Callable[[], dict], run: Callable[[], object], barriers: int, weight_bytes: int) -> list:
    """What the gate has against one forward: barriers and bytes of weights beyond what it needs."""
    before = counters()
    run()
    spent = {name: counters()[name] - before[name] for name in ("barriers", "read_bytes")}
    findings = []
    if spent["barriers"] > barriers:
        findings.append(f"{spent['barriers']} barriers, {barriers} are allowed")
    if spent["read_bytes"] != weight_bytes:
        findings.append(f"{spent['read_bytes']} bytes of weights read, {weight_bytes} are needed")
    return findings


@pytest.fixture(scope="module", params=["int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "bf16_n64k2_v1"])
def experts(request) -> CpuExperts:
    config = MoEConfig(layer_idx=0, num_experts=NUM_EXPERTS, top_k=TOP_K, **SIZES)
    experts = CpuExperts(config, layouts=(request.param,) * 2, engine=get_engine(EngineConfig.resolve(2)))
    hidden, wide = SIZES["hidden_size"], SIZES["intermediate_size"]
    gate, down = torch.randn(wide, hidden), torch.randn(hidden, wide)
    ids = range(NUM_EXPERTS)
    experts.load_experts(list(ids), [gate for _ in ids], [gate for _ in ids], [down for _ in ids])
    yield experts
    experts.close()


def forward_of(experts: CpuExperts, num_tokens: int) -> tuple[Callable[[], object], int]:
    """A forward of so many tokens, and the bytes of its distinct experts."""
    ids = torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    hidden = torch.randn(num_tokens, SIZES["hidden_size"])
    weights = torch.rand(num_tokens, TOP_K)
    needed = len(ids.unique()) * sum(packed_bytes(experts.layouts, **SIZES))
    return lambda: ops.moe_forward(hidden, ids, weights, None, experts.layer.handle), needed


@pytest.mark.parametrize("num_tokens, barriers", [(1, 2), (FEW_TOKENS, 2), (MANY_TOKENS, 4)])
def test_a_forward_waits_and_reads_no_more_than_it_must(experts, num_tokens, barriers) -> None:
    run, needed = forward_of(experts, num_tokens)
    assert not forward_findings(experts.layer.counters, run, barriers, needed)


@pytest.mark.parametrize("num_tokens, barriers", [(1, 2), (MANY_TOKENS, 4)])
def test_a_second_read_of_the_weights_is_found(experts, num_tokens, barriers) -> None:
    run, needed = forward_of(experts, num_tokens)
    findings = forward_findings(experts.layer.counters, lambda: (run(), run()), barriers, needed)
    assert findings == [
        f"{2 * barriers} barriers, {barriers} are allowed",
        f"{2 * needed} bytes of weights read, {needed} are needed",
    ]


def test_an_extra_barrier_is_found(experts) -> None:
    run, needed = forward_of(experts, 1)
    planted = []

    def counters() -> dict:
        found = experts.layer.counters()
        return {**found, "barriers": found["barriers"] + len(planted)}

    findings = forward_findings(counters, lambda: (run(), planted.append(1)), 2, needed)
    assert findings == ["3 barriers, 2 are allowed"]

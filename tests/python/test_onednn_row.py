"""oneDNN's rows of the kernel table, beside ours: what the C++ tests ask of a GEMM row, and what KT_GEMM chooses.

The rows exist in the extension only, so the C++ tests do not see them. Where the CPU has none, every case runs on ours.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from reference import BOUNDS, relative_error
from torch import Tensor

from kt_kernel import _ext

OPS = torch.ops.kt_kernel
WEIGHTS = ("int8", "bf16")
GEMMS = [
    row for row in _ext.list_kernels() if row["op"] == "gemm" and row["supported"] and row["weight"] in WEIGHTS
]
ONEDNN = [row["name"] for row in GEMMS if row["source"] == "onednn"]
# what KT_GEMM may be here beside native
OTHER = "onednn" if len(ONEDNN) == 2 else "auto"
ROW_COUNTS = (0, 1, 2, 3, 5, 6, 7, 8, 13, 31, 32, 33, 48, 64)
DEPTHS = (64, 128, 192, 576, 2048)
UNTOUCHED = 12345.0
LAYOUTS = {"int8": "int8_n64k4_v1", "bf16": "bf16_n64k2_v1"}


@dataclass(frozen=True)
class Problem:
    """One panel and activations: a ``[rows, k]`` int8 codes or bf16, w ``[64, k]``, row_idx ``[m]`` or None."""

    a: Tensor
    a_scale: Tensor | None
    w: Tensor
    panel: Tensor
    m: int
    row_idx: Tensor | None = None


def make_problem(weight: str, m: int, k: int, *, gather: bool, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    rows = m + 5 if gather else max(m, 1)
    row_idx = torch.randint(0, rows, (m,), generator=generator, dtype=torch.int32) if gather else None
    if weight == "bf16":
        a, w = (torch.randn(n, k, generator=generator).bfloat16() for n in (rows, 64))
        return Problem(a, None, w, OPS.pack(w, torch.zeros(0), LAYOUTS[weight], k), m, row_idx)
    a, w = (torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8) for n in (rows, 64))
    scales = 0.01 * torch.randn(64, 1, generator=generator)
    a_scale = 0.001 + 0.01 * torch.rand(rows, generator=generator)
    return Problem(a, a_scale, w, OPS.pack(w, scales, LAYOUTS[weight], k), m, row_idx)


def multiply(row: dict, problem: Problem) -> Tensor:
    """c ``[m, 64]`` of a row of the table; nothing beside it is written."""
    a = problem.a
    if row["a"] == "uint8":
        a = (a.short() + 128).to(torch.uint8)
    memory = torch.full((problem.m + 1, 72), UNTOUCHED)
    c = memory[: problem.m, :64]
    OPS.multiply_panel(row["name"], a, problem.row_idx, problem.a_scale, problem.panel, c)
    assert (memory[:, 64:] == UNTOUCHED).all() and (memory[problem.m :] == UNTOUCHED).all()
    return c.contiguous()


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def assert_correct(row: dict, problem: Problem) -> None:
    """Integer products have the bits of the reference row; bf16 is within k roundings of the exact sum's magnitude."""
    c = multiply(row, problem)
    if row["weight"] == "int8":
        reference = next(other for other in GEMMS if other["weight"] == "int8" and other["tier"] == "reference")
        assert torch.equal(bits(c), bits(multiply(reference, problem)))
        return
    a = problem.a[: problem.m] if problem.row_idx is None else problem.a[problem.row_idx.long()]
    a, w = a.double(), problem.w.double()
    bound = a.shape[1] * 2.0**-23 * (a.abs() @ w.abs().T) + 2.0**-100
    assert ((c.double() - a @ w.T).abs() <= bound).all()


def rows_of(*weights: str) -> pytest.MarkDecorator:
    rows = [row for row in GEMMS if row["weight"] in weights]
    return pytest.mark.parametrize("row", rows, ids=[row["name"] for row in rows])


def test_the_rows_are_there_where_the_cpu_has_their_features() -> None:
    found = _ext.cpu_features()["found"].split()
    wanted = ["gemm_u8_int8_fp32_32x64x4_onednn"] * ("avx512vnni" in found)
    wanted += ["gemm_bf16_bf16_fp32_32x64x2_onednn"] * ("avx512bf16" in found)
    assert wanted == ONEDNN


@rows_of("int8", "bf16")
def test_a_row_agrees_with_the_reference_for_all_shapes(row: dict) -> None:
    for k in DEPTHS:
        for seed, m in enumerate(ROW_COUNTS):
            assert_correct(row, make_problem(row["weight"], m, k, gather=(seed + k // 64) % 2 == 0, seed=seed))


@rows_of("int8", "bf16")
def test_a_row_of_activations_has_the_same_bits_among_any_rows(row: dict) -> None:
    everything = make_problem(row["weight"], 64, 576, gather=False, seed=7)
    expected = bits(multiply(row, everything))
    for m in ROW_COUNTS:
        some = (torch.arange(m, dtype=torch.int32) * 37 + m) % 64
        assert torch.equal(bits(multiply(row, replace(everything, m=m, row_idx=some))), expected[some.long()])
        assert torch.equal(bits(multiply(row, replace(everything, m=m))), expected[:m])


@rows_of("int8", "bf16")
def test_a_row_has_the_same_bits_on_threads_that_meet_it_anew(row: dict) -> None:
    problems = [make_problem(row["weight"], m, k, gather=True, seed=m) for k in (64, 192) for m in (3, 40)]
    expected = [bits(multiply(row, problem)) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = pool.map(lambda problem: bits(multiply(row, problem)), problems * 4)
            assert all(map(torch.equal, found, expected * 4))


@rows_of("int8")
@pytest.mark.parametrize("weights", [(127, 127), (-127, -127), (-127, 127)], ids=str)
def test_a_row_holds_the_largest_sums(row: dict, weights: tuple[int, int]) -> None:
    k = 65536
    problem = make_problem("int8", 7, k, gather=False)
    w = torch.tensor(weights, dtype=torch.int8).repeat(64, k // 2)
    signs = torch.tensor([1, -1, 1, -1, 1, -1, 1], dtype=torch.int8)
    problem.a.copy_(signs[:, None] * w[0])
    problem.a[5:] = 127
    panel = OPS.pack(w, torch.full((64, 1), 0.01), LAYOUTS["int8"], k)
    assert_correct(row, replace(problem, w=w, panel=panel))


@rows_of("int8")
def test_a_row_keeps_zero_nan_and_subnormal_scales(row: dict) -> None:
    problem = make_problem("int8", 7, 192, gather=False, seed=5)
    scales = torch.tensor([0.0, math.nan, 2.0**-140, 2.0**-120, 1.0, 2.0**100, 3.0])
    problem.a[:2] = 0  # as quantize writes such rows
    problem = replace(problem, a_scale=scales)
    c = multiply(row, problem)
    assert (c[0] == 0).all() and c[1].isnan().all()
    reference = next(other for other in GEMMS if other["weight"] == "int8" and other["tier"] == "reference")
    assert torch.equal(bits(c[2:]), bits(multiply(reference, problem)[2:]))


@rows_of("bf16")
def test_a_row_keeps_infinity_and_nan_in_their_row(row: dict) -> None:
    problem = make_problem("bf16", 7, 128, gather=False, seed=11)
    before = multiply(row, problem)
    problem.a[2, 5], problem.a[5, 77] = math.inf, math.nan
    after = multiply(row, problem)
    assert after[2].isinf().all() and after[5].isnan().all()
    others = [0, 1, 3, 4, 6]
    assert torch.equal(bits(after[others]), bits(before[others]))


@rows_of("bf16")
def test_a_row_takes_subnormal_activations(row: dict) -> None:
    problem = make_problem("bf16", 3, 192, gather=True, seed=13)
    problem.a[:, ::3] = 2.0**-130
    assert_correct(row, problem)


def test_what_multiply_panel_refuses() -> None:
    problem = make_problem("int8", 3, 64, gather=True)
    name = next(row["name"] for row in GEMMS if row["a"] == "int8")
    c = torch.zeros(3, 64)
    given = (problem.a, problem.row_idx, problem.a_scale, problem.panel, c)
    OPS.multiply_panel(name, *given)
    for at, wrong, words in [
        (0, problem.a.float(), "a is Float"),
        (0, problem.a[:, :32], "padded"),
        (0, torch.full_like(problem.a, -128), "a has a code of -128"),
        (1, problem.row_idx + 8, "row_idx names rows outside 0 to 7"),
        (1, None, None),
        (2, None, "needs a_scale"),
        (2, problem.a_scale[1:], "a_scale has shape"),
        (1, problem.row_idx.repeat(2)[::2], "row_idx has strides"),
        (2, problem.a_scale.repeat(2)[::2], "a_scale has strides"),
        (3, problem.panel[64:], "panel has shape"),
        (3, problem.panel.repeat_interleave(2)[::2], "panel has strides"),
        (4, torch.zeros(3, 32), "c has shape"),
        (4, torch.zeros(64, 3).T, "columns side by side"),
    ]:
        changed = (*given[:at], wrong, *given[at + 1 :])
        if words is None:
            OPS.multiply_panel(name, *changed)
            continue
        with pytest.raises(RuntimeError, match=words):
            OPS.multiply_panel(name, *changed)
    with pytest.raises(RuntimeError, match="no GEMM kernel none"):
        OPS.multiply_panel("none", *given)
    with pytest.raises(RuntimeError, match="weights with groups"):
        OPS.multiply_panel("gemm_s8_int4_fp32_1x64x8_reference", *given)


# A layer of each method that KT_GEMM concerns, or AMXINT4, in a process of its own; prints what was chosen and how many
# kernels oneDNN had compiled when the layers were there and when they had run.
LAYERS = """
import json, sys
from pathlib import Path
import torch
from checkpoints import random_experts
from kt_kernel.config import EngineConfig, MoEConfig
from kt_kernel.experts import CpuExperts, get_engine
from kt_kernel.methods import METHODS

threads, out = int(sys.argv[1]), Path(sys.argv[2])
E, K, H, INNER = 6, 2, 320, 96
compiled = lambda: len(list(Path.cwd().glob("dnnl_dump_*")))
config = MoEConfig(layer_idx=0, num_experts=E, top_k=K, hidden_size=H, intermediate_size=INNER)
engine = get_engine(EngineConfig(num_threads=threads))
layers = {}
for name in sys.argv[3:]:
    layers[name] = CpuExperts(config, layouts=(METHODS[name].layout,) * 2, engine=engine)
made = compiled()
weights, outputs = random_experts(E, H, INNER), {}
for name, layer in layers.items():
    layer.load_experts(range(E), *map(list, weights))
    for tokens in (1, 3, 40, 150):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, H, generator=generator).bfloat16()
        ids = torch.randint(0, E, (tokens, K), generator=generator)
        scales = torch.rand(tokens, K, generator=generator)
        outputs[name, tokens] = torch.ops.kt_kernel.moe_forward(x, ids, scales, None, layer.layer.handle)
        ticket = torch.ops.kt_kernel.submit(x, ids, scales, None, layer.layer.handle)
        assert torch.equal(torch.ops.kt_kernel.sync(ticket, x), outputs[name, tokens])
        if name == "BF16":
            alone = [torch.ops.kt_kernel.moe_forward(*(t[i : i + 1] for t in (x, ids, scales)), None,
                                                     layer.layer.handle) for i in range(tokens)]
            assert torch.equal(torch.cat(alone), outputs[name, tokens])
torch.save(outputs, out)
print(json.dumps({"explain": {n: l.layer.explain for n, l in layers.items()}, "compiled": [made, compiled()]}))
if "BF16" in layers:
    with torch.backends.mkldnn.flags(enabled=False):
        try:
            torch.ops.kt_kernel.moe_forward(x, ids, scales, None, layers["BF16"].layer.handle)
        except RuntimeError as error:
            print(error, file=sys.stderr)
    again = torch.ops.kt_kernel.moe_forward(x, ids, scales, None, layers["BF16"].layer.handle)
    assert torch.equal(again, outputs["BF16", tokens])
"""


def run_layers(folder: Path, *methods: str, threads: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    # tokens alone have the bits of a batch in bf16 too: tiles are for experts of several rows
    fixed = {"PYTHONPATH": str(Path(__file__).parent), "ONEDNN_JIT_DUMP": "1", "KT_DETERMINISTIC": "1"}
    environment = {**os.environ, **fixed, **variables}
    command = [sys.executable, "-c", LAYERS, str(threads), "outputs.pt", *methods]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def outputs_of(folder: Path) -> dict[tuple[str, int], Tensor]:
    return torch.load(folder / "outputs.pt")


def test_layers_of_onednn_beside_ours(tmp_path: Path) -> None:
    methods = ("AMXINT8", "BF16", "AMXINT4")
    ours = run_layers(tmp_path / "native", *methods, KT_GEMM="native")
    assert ours.returncode == 0, ours.stderr
    assert "onednn" not in ours.stdout
    expected = outputs_of(tmp_path / "native")
    for threads in (1, 2):
        folder = tmp_path / f"{threads}"
        result = run_layers(folder, *methods, threads=threads, KT_GEMM=OTHER)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert [("onednn" in text) for text in report["explain"].values()] == [OTHER == "onednn"] * 2 + [False]
        found = outputs_of(folder)
        for (method, tokens), output in found.items():
            if method == "BF16":
                assert relative_error(output, expected[method, tokens].double()) < BOUNDS["BF16"]
            else:
                assert torch.equal(output, expected[method, tokens])
        # at load and never in a forward: 6 blocks for both k of each method, on each thread that may be a worker
        made, after = report["compiled"]
        assert made == after and (made > 0) == bool(ONEDNN)
        # what torch was told meanwhile is an error of the forward, not of the process
        assert ("leave torch.backends.mkldnn enabled" in result.stderr) == (OTHER == "onednn")
    one, two = (outputs_of(tmp_path / name) for name in ("1", "2"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_without_a_wish_our_rows_run(tmp_path: Path) -> None:
    result = run_layers(tmp_path / "auto", "AMXINT8")
    assert result.returncode == 0 and "onednn" not in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"KT_GEMM": "mkl"}, 'KT_GEMM="mkl" is no choice of kernels; give auto, native or onednn.'),
        ({"KT_GEMM": "onednn", "ONEDNN_MAX_CPU_ISA": "AVX2"}, 'KT_GEMM="onednn" asks for oneDNN\'s kernel for int8'),
        ({"KT_GEMM": "onednn", "KT_FORCE_ISA": "avx2"}, 'KT_GEMM="onednn" asks for'),
    ],
    ids=["wrong", "absent", "forced"],
)
def test_an_impossible_choice_is_refused_in_a_sentence(tmp_path: Path, variables: dict[str, str], words: str) -> None:
    result = run_layers(tmp_path / "run", "AMXINT8", **variables)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert words in last and last.endswith(".")
    assert not (tmp_path / "run/outputs.pt").exists()


def test_ours_run_where_onednn_refuses_the_cpu(tmp_path: Path) -> None:
    result = run_layers(tmp_path / "run", "AMXINT8", "BF16", KT_GEMM="native", ONEDNN_MAX_CPU_ISA="AVX2")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["compiled"] == [0, 0]


@pytest.mark.parametrize("gemm", [OTHER, "mkl"])
def test_collect_env_shows_the_choice(gemm: str) -> None:
    environment = {**os.environ, "KT_GEMM": gemm}
    command = [sys.executable, "-m", "kt_kernel.collect_env", "--json"]
    report = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert report["environment"]["set"]["KT_GEMM"] == gemm
    choice = report["kernels"]["choice"]["int8"]
    assert ("_onednn" in choice) == (gemm == "onednn")
    assert ("no choice of kernels" in choice) == (gemm == "mkl")
    assert any("no choice of kernels" in warning for warning in report["environment"]["warnings"]) == (gemm == "mkl")
    assert {row["name"] for row in report["kernels"]["table"]} >= set(ONEDNN)

"""AMX from Python, on any host: layers, wrappers and the kernel bench in processes whose tiles are interpreted.

tests/amx is what runs them; the kernels themselves, their shapes and their counted instructions are tested there. On a
host with AMX the same processes run real instructions, and what is counted or refused is not asked for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from amx_process import ROWS, WIDE, batch, weights_of_a_layer
from reference import BOUNDS, moe_reference, relative_error
from torch import Tensor

from kt_kernel import _ext
from kt_kernel.bench.kernels import FORMATS
from kt_kernel.methods import FLOAT_METHODS

NEEDED = ("avx512vnni", "avx512bf16")  # what the kernels in tiles use beside them
pytestmark = pytest.mark.skipif(
    not set(NEEDED) <= set(_ext.cpu_features()["found"].split()), reason=f"needs {' and '.join(NEEDED)}"
)

FOLDER = Path(__file__).parent
# The product that the kernel in tiles of each layer does: AMXINT4 and BF16 multiply bf16.
PRODUCT = {"AMXINT8": "tdpbusd", "AMXINT4": "tdpbf16ps", "BF16": "tdpbf16ps", **dict.fromkeys(WIDE, "tdpbsud")}
TILE_KERNELS = {
    "AMXINT8": "gemm_u8_int8_fp32_32x64x4_amxint8",
    "AMXINT4": "gemm_s8_int4b_fp32_32x64x2_amxbf16",
    "BF16": "gemm_bf16_bf16_fp32_32x64x2_amxbf16",
    **dict.fromkeys(WIDE, "gemm_s8_int4x_fp32_32x64x4_amxint8"),
}
# How far a result in tiles may be from that of AVX-512, in relative_error; all others have the same bits.
#
# BF16     the same products, summed in another order: sums of k <= 192 differ by at most k * 2^-24 < 2^-16 of their
#          magnitude. The intermediate is rounded to bf16, which makes of a difference d a step of 2^-8 for d / 2^-8 of
#          all values: sqrt(2^-16 * 2^-8) in the root mean square.
# AMXINT4  weights are rounded to bf16 with their scale, by at most 2^-8 of themselves; gate and up, the intermediate,
#          whose int8 codes then differ here and there, and down: less than 2^-6, the bound of csrc/moe/tile_check.cpp.
ROUNDING = {"BF16": 2**-12, "AMXINT4": 2**-6}
REFUSED = re.compile(
    r'KT_FORCE_ISA="amx" asks for the tier amx, but this host has only: [a-z0-9 ]+; give avx512 or a lower tier, or '
    r"unset it; not amx, because the kernel does not grant tiles \(errno 22, Invalid argument\)[^.]*\."
)

Run = Callable[..., dict[str, Any]]


def environment(interpreter: Path, **variables: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("KT_GEMM", "KT_DETERMINISTIC")}
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    return {**own, "PYTHONPATH": path, "LD_PRELOAD": str(interpreter), "KT_FORCE_ISA": "amx", **variables}


@pytest.fixture(scope="module")
def run(amx_interpreter: Path) -> Run:
    """Runs a part of amx_process.py in tiles, under more variables, and returns what it prints."""

    def start(part: str, *arguments: str, **variables: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, FOLDER / "amx_process.py", part, *arguments],
            env=environment(amx_interpreter, **variables), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    return start


class Layers:
    """What the layers of amx_process.py computed under some variables."""

    def __init__(self, run: Run, file: Path, **variables: str) -> None:
        report = run("layers", str(file), **variables)
        self.emulating: bool = report["emulating"]
        self.result: dict[str, Any] = report["result"]
        self.outputs: dict[tuple[str, int], Tensor] = torch.load(file)

    def products(self, name: str, tokens: int) -> dict[str, int]:
        return self.result["layers"][name]["products"][str(tokens)]

    def checked(self) -> list[str]:
        """The kernels that the log says were checked and right, and every other line as it is."""
        lines = self.result["log"]
        return [re.sub(r"^INFO: (\w+) gave the right result for one expert\.$", r"\1", line) for line in lines]


@pytest.fixture(scope="module")
def layers(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Layers]:
    known: dict[tuple, Layers] = {}

    def get(**variables: str) -> Layers:
        key = tuple(variables.items())
        if key not in known:
            known[key] = Layers(run, tmp_path_factory.mktemp("layers") / "outputs.pt", **variables)
        return known[key]

    return get


# --- layers ---


@pytest.mark.parametrize("name", PRODUCT)
def test_many_rows_run_in_tiles_and_one_token_does_not(layers: Callable[..., Layers], name: str) -> None:
    amx, avx512 = layers(), layers(KT_FORCE_ISA="avx512")
    assert TILE_KERNELS[name] in amx.result["layers"][name]["explain"]
    assert "amx" not in avx512.result["layers"][name]["explain"]
    if amx.emulating:
        assert list(amx.products(name, 60)) == [PRODUCT[name]] and not amx.products(name, 1)
    assert not avx512.products(name, 60)


@pytest.mark.parametrize("tokens", [60, 1])
@pytest.mark.parametrize("name", PRODUCT)
def test_results_are_those_of_avx512(layers: Callable[..., Layers], name: str, tokens: int) -> None:
    found, expected = (part.outputs[name, tokens] for part in (layers(), layers(KT_FORCE_ISA="avx512")))
    if name not in ROUNDING or tokens == 1:
        assert torch.equal(found, expected)
        return
    apart = relative_error(found, expected.double())
    print(f"{name}: {apart:.2e} of {ROUNDING[name]:.2e}")
    assert 0 < apart < ROUNDING[name]  # 0 would be the kernel of AVX-512


@pytest.mark.parametrize("method", FLOAT_METHODS)
def test_a_layer_in_tiles_equals_the_torch_moe(layers: Callable[..., Layers], method: str) -> None:
    wanted = moe_reference(*batch(60), *weights_of_a_layer())
    assert relative_error(layers().outputs[method, 60], wanted) < BOUNDS[method]


@pytest.mark.parametrize("name", PRODUCT)
def test_deterministic_leaves_tiles_to_integers(layers: Callable[..., Layers], name: str) -> None:
    fixed = layers(KT_DETERMINISTIC="1")
    for tokens in (60, 1):
        assert torch.equal(fixed.outputs[name, tokens], layers(KT_FORCE_ISA="avx512").outputs[name, tokens])
    if fixed.emulating:
        assert bool(fixed.products(name, 60)) == (name not in ROUNDING)


def test_layers_of_onednn_agree_with_tiles(layers: Callable[..., Layers]) -> None:
    amx, onednn = layers(), layers(KT_GEMM="onednn")
    for method in ("AMXINT8", "BF16"):
        assert "m>=1 gemm" in onednn.result["layers"][method]["explain"]
        assert "_onednn" in onednn.result["layers"][method]["explain"] and not onednn.products(method, 60)
    assert torch.equal(amx.outputs["AMXINT8", 60], onednn.outputs["AMXINT8", 60])
    assert relative_error(amx.outputs["BF16", 60], onednn.outputs["BF16", 60].double()) < ROUNDING["BF16"]


def test_the_log_tells_of_each_kernel_once(layers: Callable[..., Layers]) -> None:
    amx = layers()
    assert sorted(amx.checked()) == sorted(set(TILE_KERNELS.values()))
    assert sorted(layers(KT_DETERMINISTIC="1").checked()) == sorted({TILE_KERNELS[n] for n in ("AMXINT8", *WIDE)})
    assert layers(KT_FORCE_ISA="avx512").checked() == []
    # threads that wait hold no tiles
    assert amx.result["configs"] == amx.result["releases"] and bool(amx.result["configs"]) == amx.emulating


# --- beside oneDNN on one thread ---


def test_every_row_of_the_table_is_right_between_rows_in_tiles(run: Run) -> None:
    """Ours before and behind oneDNN's on one thread; every call configures its tiles and leaves none to others."""
    report = run("bench")
    calls = report["result"]
    assert {(call["format"], call["m"]) for call in calls} == {(name, m) for name in FORMATS for m in ROWS}
    assert not [call for call in calls if not call["right"]]
    others = {call["other"] for call in calls}
    assert sum(name.endswith("_onednn") for name in others) == 2 and set(TILE_KERNELS.values()) <= others
    if report["emulating"]:
        assert all(call["configs"] == call["releases"] == 1 for call in calls)


def test_the_rows_in_tiles_equal_those_of_onednn(run: Run) -> None:
    report = run("oracle")
    assert len(report["result"]) == 2 * len(ROWS) * 3
    assert not [one for one in report["result"] if not one["apart"] <= 1]
    assert not report["emulating"] or report["products"] > 0


@pytest.mark.parametrize(
    ("file", "chosen", "least"),
    [
        ("test_onednn_row.py", "amxint8 or amxbf16 or what_multiply", 12),
        ("test_scratch.py", "chunk or 64-32-1 or 144-528-1 or INT8-64-32-32", 12),
    ],
    ids=["rows", "buffers"],
)
def test_the_tests_of_rows_and_buffers_pass_in_tiles(
    amx_interpreter: Path, tmp_path: Path, file: str, chosen: str, least: int
) -> None:
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", FOLDER / file, "-q", "-k", chosen, "-p", "no:cacheprovider",
         f"--junitxml={report}"],
        env=environment(amx_interpreter), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(list(ElementTree.parse(report).iter("testcase"))) >= least


# --- what is refused ---


def test_a_refused_permission_is_one_sentence(run: Run, amx_interpreter: Path) -> None:
    report = run("refusal", KT_TEST_AMX_PERMISSION="refused")
    if not report["emulating"]:
        assert report["result"]["error"] is None  # the kernel of this host grants them
        return
    assert REFUSED.fullmatch(report["result"]["error"])
    assert report["result"]["wrong"]["KT_FORCE_ISA"] == report["result"]["error"]
    done = subprocess.run(
        [sys.executable, "-m", "kt_kernel.collect_env"],
        env=environment(amx_interpreter, KT_TEST_AMX_PERMISSION="refused"), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert REFUSED.search(done.stderr) and done.stderr.count("\n") == 1


def test_collect_env_names_the_kernels_in_tiles(amx_interpreter: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kt_kernel.collect_env", "--json"], env=environment(amx_interpreter),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["isa"]["tier"] == "amx" and report["readings"]["tile_errno"] == 0
    for method, dtype in (("AMXINT8", "int8"), ("AMXINT4", "int4"), ("BF16", "bf16")):
        assert f"m>=5 {TILE_KERNELS[method]}" in report["kernels"]["choice"][dtype]


def test_a_wrong_wish_for_determinism_is_one_sentence(run: Run) -> None:
    sentence = 'KT_DETERMINISTIC="2" is neither 0 nor 1; give one of them.'
    for isa in ("amx", "avx512"):
        result = run("refusal", KT_FORCE_ISA=isa, KT_DETERMINISTIC="2")["result"]
        assert result == {"error": sentence, "wrong": {"KT_DETERMINISTIC": sentence}}

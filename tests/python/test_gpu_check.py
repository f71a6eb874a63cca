"""``tests/gpu`` without a GPU: its tests on the double, and the one file of stock SGLang that a GPU machine gets.

That file is the installed release's, and those of the interpreters that ``KT_TEST_SGLANG_PYTHONS`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_sglang_cuda_host import PYTHONS

TESTS = Path(__file__).resolve().parents[1]
FIND = """
from importlib.util import find_spec
print(find_spec("sglang").origin)
"""
# as on a machine without SGLang, of which only the carried file is there
RUN = """
import importlib.util, sys
from pathlib import Path

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "sglang" else find_spec(name, *rest)
sys.path[:0] = [sys.argv[1] + "/gpu", sys.argv[1] + "/python"]
import stock_sglang
stock_sglang.CARRIED = Path(sys.argv[2])
assert "kt_ep_wrapper.py of stock SGLang" in stock_sglang.ensure_sglang()
import device_model
assert device_model.kt_ep_wrapper.__file__ == sys.argv[2]
hidden = device_model.tokens(5)
answers = [device_model.answer(device_model.Model(num_gpu_experts=count, method="BF16"), hidden) for count in (0, 3)]
alone, shared = (answer.float() for answer in answers)
assert (alone - shared).norm() < 0.02 * alone.norm() < (alone - hidden.float()).norm()
"""


@pytest.mark.parametrize("python", PYTHONS)
def test_the_carried_file_runs_on_the_stand_ins(python: str, tmp_path: Path) -> None:
    found = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120)
    file = Path(found.stdout.split()[-1]).parent / "srt/layers/moe/kt_ep_wrapper.py"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(TESTS), str(file)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("signal", ["doorbell", "hostfunc"])
def test_the_gpu_tests_run_on_the_double(fake_cuda: Path, signal: str, tmp_path: Path) -> None:
    """What ``scripts/gpu_check.sh --double`` does: the tests and the figures, which say nothing about hardware."""
    variables = {"KT_CUDA_DRIVER": str(fake_cuda), "KT_CUDA_SIGNAL": signal, "KT_GPU_CHECK_FOLDER": str(tmp_path)}
    environment = {**os.environ, **variables, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    for command in (
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "gpu/test_gpu.py")],
        [str(TESTS / "gpu/measure.py"), "--json", str(tmp_path / "figures.json")],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "figures.json").read_text())["is_double"]

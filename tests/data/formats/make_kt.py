"""Writes tests/data/formats/kt with the incumbent itself: kt-kernel 0.7.2 from PyPI, on a CPU.

    <environment with kt-kernel and numpy>/bin/python -I tests/data/formats/make_kt.py

Its extension's classes quantize, pack and save (``config.save``, ``config.path``), as its converter has them do. All
subpools stand on node 0: the extension splits by subpool and not by node, so one node makes trees of any number of
NUMA parts. The converter's merged form is the same bytes under other names (`kt_files.merged_arrays`); the converter
is not in the wheel.

Kept: two trees as files, and in digests.json a digest of each of `kt_files.DIGESTED`.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests/python"), str(ROOT / "kt_kernel/bench")]

import numpy as np  # noqa: E402
from kt_files import DIGESTED, KEPT, PROJECTIONS, Case, digests, read_tree, source_bits  # noqa: E402
from peers.kt_wheel import CLASSES, load_extension  # noqa: E402


def convert(case: Case, folder: Path) -> None:
    """One conversion by kt-kernel, in this process."""
    extension = load_extension()
    pool = extension.WorkerPoolConfig()
    pool.subpool_count = case.parts
    pool.subpool_numa_map = [0] * case.parts
    pool.subpool_thread_count = [1] * case.parts
    infer = extension.CPUInfer(pool)
    on_gpu = np.zeros(case.num_experts, np.uint8)
    config = extension.moe.MOEConfig(case.num_experts, 1, case.hidden_size, case.intermediate_size, on_gpu.ctypes.data)
    config.layer_idx, config.pool, config.max_len = case.layer, infer.backend_, 32
    config.save, config.load, config.path = True, False, str(folder)
    weights = {projection: source_bits(case, projection) for projection in PROJECTIONS}
    for projection, bits in weights.items():
        setattr(config, f"{projection}_proj", bits.ctypes.data)
    layer = getattr(extension.moe, CLASSES[case.method])(config)
    same_place = np.arange(case.num_experts, dtype=np.int64)
    infer.submit(layer.load_weights_task(same_place.ctypes.data))
    infer.sync()


def convert_apart(case: Case, folder: Path) -> dict[str, bytes]:
    """The same in a process of its own, for the extension has one pool a process; the files."""
    subprocess.run([sys.executable, "-I", __file__, *map(str, case), str(folder)], check=True, stdout=sys.stderr)
    return read_tree(folder)


def main() -> None:
    target = Path(__file__).parent / "kt"
    for case in KEPT:
        folder = target / f"{case.method.lower()}x{case.parts}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        convert_apart(case, folder)
    found = {"producer": f"kt-kernel {importlib.metadata.version('kt-kernel')}"}
    for case in DIGESTED:
        with tempfile.TemporaryDirectory() as folder:
            found[case.name] = digests(convert_apart(case, Path(folder)))
    (target / "digests.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        method, *numbers, folder = sys.argv[1:]
        convert(Case(method, *map(int, numbers)), Path(folder))
    else:
        main()

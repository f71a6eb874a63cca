"""A real server whose experts are multiplied in AMX tiles, interpreted where the host has none, says what AVX-512 says.

The tiles of a process are asked for and counted in that process, so each of SGLang's writes its counters into a folder:
a sitecustomize.py on its path does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import models
import pytest
import server
from test_server import TEXTS, WITHOUT_CACHE

from kt_kernel import _ext

pytestmark = pytest.mark.server

MODEL = models.QWEN3_MOE_40  # its router has the same bits in every run
PROMPT = list(TEXTS[1])  # 190 tokens by 4 of 40 experts: about 19 rows each
NUM_TOKENS = 8
KERNEL = "gemm_u8_int8_fp32_32x64x4_amxint8"

COUNT = """
import ctypes, json, os, threading, time
from pathlib import Path

def write() -> None:
    library = ctypes.CDLL(None)
    library.kt_amx_counter.restype = ctypes.c_uint64
    file = Path(os.environ["AMX_COUNTS"]) / f"{os.getpid()}.json"
    while True:
        time.sleep(0.2)
        counts = {name: library.kt_amx_counter(name.encode()) for name in ("tdpbusd", "configs", "releases")}
        file.with_suffix(".part").write_text(json.dumps(counts))
        file.with_suffix(".part").rename(file)

threading.Thread(target=write, daemon=True).start()
"""


@contextmanager
def serve(folder: Path, isa: str, interpreter: Path) -> Iterator[server.Server]:
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(COUNT)
    (folder / isa).mkdir()
    path = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))
    environment = server.server_environment(
        LD_PRELOAD=str(interpreter), KT_FORCE_ISA=isa, PYTHONPATH=path, AMX_COUNTS=str(folder / isa)
    )
    flags = ["--kt-weight-path", str(folder / "model"), "--kt-method", "AMXINT8", *WITHOUT_CACHE]
    with server.serve(
        folder / "model", flags, log_path=folder / f"{isa}.log", environment=environment, timeout=120
    ) as running:
        yield running


def has_tiles() -> bool:
    return "amx_tile" in Path("/proc/cpuinfo").read_text()


def products(counts: Path) -> dict[str, int]:
    """Products in tiles by process."""
    return {file.stem: json.loads(file.read_text())["tdpbusd"] for file in counts.glob("*.json")}


def first_beyond(before: dict[str, int], counts: Path) -> str:
    """The one process whose products have become more since."""
    found: list[str] = []

    def reached() -> bool:
        found[:] = [pid for pid, count in products(counts).items() if count > before.get(pid, 0)]
        return bool(found)

    server.wait_until(reached, seconds=10)
    (pid,) = found
    return pid


def test_a_launch_without_the_permission_ends_in_a_sentence(amx_interpreter: Path, tmp_path: Path) -> None:
    if has_tiles():
        return  # only the interpreter refuses on demand
    folder = models.write_model(tmp_path / "model", MODEL)
    environment = server.server_environment(
        LD_PRELOAD=str(amx_interpreter), KT_FORCE_ISA="amx", KT_TEST_AMX_PERMISSION="refused"
    )
    flags = ["--kt-weight-path", str(folder), "--kt-method", "AMXINT8"]
    code, output = server.run_to_exit(folder, flags, environment=environment)
    last = output.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in output
    assert last.startswith('kt_kernel: KT_FORCE_ISA="amx" asks for the tier amx, but this host has only: ')
    assert "not grant tiles" in last and last.endswith(".")


def test_a_server_in_tiles_says_what_avx512_says(amx_interpreter: Path, tmp_path: Path) -> None:
    if "avx512vnni" not in _ext.cpu_features()["found"].split():
        return  # without AVX-512 the launch is refused as above
    models.write_model(tmp_path / "model", MODEL)
    answers = {}
    for isa in ("amx", "avx512"):
        with serve(tmp_path, isa, amx_interpreter) as running:
            before = products(tmp_path / isa)
            answers[isa] = running.generate(PROMPT, NUM_TOKENS)
            tiers = re.findall(r"kt_kernel (?:loaded|active): .* AMXINT8, (\w+) \(", running.log)
            assert tiers == [isa, isa]
            assert running.log.count(f"{KERNEL} gave the right result for one expert.") == (isa == "amx")
            if isa == "amx" and not has_tiles():
                # one process computes in tiles, for the prompt too: the scheduler
                scheduler = first_beyond(before, tmp_path / "amx")
                assert b"sglang::scheduler" in Path(f"/proc/{scheduler}/cmdline").read_bytes()
                assert str(amx_interpreter) in Path(f"/proc/{scheduler}/maps").read_text()
            if isa == "avx512":
                assert set(products(tmp_path / isa).values()) == {0}
    assert answers["amx"] == answers["avx512"]

"""How the way to signal is found, and the operators of a device's stream under torch's own checks.

A process loads its CUDA driver once, so each test runs programs in processes of their own, with the test double.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def run(arguments: list[str], driver: Path | str, **variables: str) -> subprocess.CompletedProcess[str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("KT_CUDA_SIGNAL")}
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**cleared, "KT_CUDA_DRIVER": str(driver), "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def program(text: str, driver: Path | str, **variables: str) -> str:
    done = run(["-c", textwrap.dedent(text)], driver, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("mode", "answer"),
    [("1", "doorbell"), ("0", "CUDA_ERROR_NOT_SUPPORTED"), ("2", "did not end")],
    ids=["works", "refused", "hangs"],
)
def test_the_probe_says_whether_doorbells_work(fake_cuda: Path, mode: str, answer: str) -> None:
    done = run(["-m", "kt_kernel.device_stream", "0"], fake_cuda, FAKE_CUDA_STREAM_MEMORY_OPERATIONS=mode)
    assert done.returncode == 0 and done.stderr == "", "no warning of runpy's either"
    assert answer in done.stdout
    assert (done.stdout.strip() == "doorbell") == (mode == "1")


@pytest.mark.parametrize(
    ("arguments", "driver", "code", "words"),
    [
        ([], None, 0, ""),
        (["x"], None, 2, "argument ORDINAL: invalid ordinal value: 'x'"),
        (["-1"], None, 2, "argument ORDINAL: invalid ordinal value"),
        (["0", "1"], None, 2, "unrecognized arguments: 1"),
        (["99"], None, 1, "kt_kernel.device_stream: device 99 cannot be used: "),
        ([], "/nowhere/libcuda.so.1", 1, "kt_kernel.device_stream: the CUDA driver cannot be loaded (/nowhere/"),
    ],
)
def test_the_command_line_of_the_probe(
    fake_cuda: Path, arguments: list[str], driver: str | None, code: int, words: str
) -> None:
    done = run(["-m", "kt_kernel.device_stream", *arguments], driver or fake_cuda)
    assert done.returncode == code
    assert words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ("" if code else "doorbell\n")
    if code == 1:
        assert done.stderr.count("\n") == 1


CHOOSE = """
    import os
    from kt_kernel import device_stream
    for ordinal in (0, 1, 0):
        device_stream.choose_signal(ordinal)
    print(os.environ.get("KT_CUDA_SIGNAL_FOUND"))
"""


def test_the_answer_is_kept_for_child_processes(fake_cuda: Path) -> None:
    """For each device its own; the double has only device 0, so doorbells do not work on device 1."""
    assert program(CHOOSE, fake_cuda).strip() == "0=doorbell,1=hostfunc"
    assert program(CHOOSE, fake_cuda, FAKE_CUDA_STREAM_MEMORY_OPERATIONS="0").strip() == "0=hostfunc,1=hostfunc"
    # found before, chosen by the user, or no driver: no probe
    kept = {"KT_CUDA_SIGNAL_FOUND": "1=doorbell,0=doorbell"}
    assert program(CHOOSE, fake_cuda, FAKE_CUDA_STREAM_MEMORY_OPERATIONS="0", **kept).strip() == "1=doorbell,0=doorbell"
    assert program(CHOOSE, fake_cuda, KT_CUDA_SIGNAL="hostfunc").strip() == "None"
    assert program(CHOOSE, "/nowhere/libcuda.so.1").strip() == "None"


def test_without_a_driver_the_sentence_names_it(fake_cuda: Path) -> None:
    out = program("from kt_kernel import _ext; print(_ext.device_driver())", "/nowhere/libcuda.so.1")
    assert "/nowhere/libcuda.so.1" in out and "'is_double': False" in out
    out = program("from kt_kernel import _ext; print(_ext.device_driver())", fake_cuda)
    assert out.strip() == "{'reason': '', 'is_double': True}"


OPERATORS = """
    import ctypes, os, torch
    from checkpoints import random_experts
    from wrapper_cases import E, H, INNER, batch, loaded
    from kt_kernel import ops

    driver = ctypes.CDLL(os.environ["KT_CUDA_DRIVER"])
    stream = ctypes.c_void_p()
    context = ctypes.c_void_p()
    assert driver.cuInit(0) == 0 and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert driver.cuCtxSetCurrent(context) == 0 and driver.cuStreamCreate(ctypes.byref(stream), 1) == 0
    wrapper = loaded(random_experts(E, H, INNER))
    layer, handle = wrapper.moe._handle, stream.value
    hidden, ids, weights = batch(5)
    skip = wrapper.gpu_experts_mask
    answer = wrapper.forward(hidden, ids, weights)

    def forward(hidden, ids, weights):
        ticket = ops.submit_on_stream(hidden, ids, weights, skip, layer, handle, handle)
        return ops.sync_on_stream(ticket, hidden, handle, handle)

    def jobs():
        return wrapper.moe.counters()["device_jobs"]

    # a compiled module makes both calls, each time
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for call in range(1, 4):
        result = compiled(hidden, ids, weights)
        assert driver.cuStreamSynchronize(stream) == 0
        assert torch.equal(result, answer)
        assert jobs() == call, jobs()
    # without tokens: opcheck's copies of the inputs are gone before the double's stream reads them
    torch.library.opcheck(
        torch.ops.kt_kernel.submit_on_stream.default,
        (hidden[:0], ids[:0], weights[:0], skip, layer, handle, handle),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert driver.cuStreamSynchronize(stream) == 0

    def message(*arguments):
        try:
            ops.submit_on_stream(*arguments)
        except RuntimeError as error:
            return str(error)
        return ""

    assert "int32 or int64" in message(hidden, ids.short(), weights, skip, layer, handle, handle)
    assert "fp32" in message(hidden, ids, weights.half(), skip, layer, handle, handle)
    assert "strides" in message(hidden.T.contiguous().T, ids, weights, skip, layer, handle, handle)
    assert "on the CPU" in message(hidden, ids, weights, skip, layer, 0, 0)
    assert "has shape" in message(hidden, ids[:3], weights, skip, layer, handle, handle)
    ticket = ops.submit(hidden, ids, weights, skip, layer)
    try:
        ops.sync_on_stream(ticket, hidden, handle, handle)
    except RuntimeError as error:
        assert "give it to sync" in str(error)
    else:
        raise AssertionError("a ticket of submit was taken")
    empty = forward(hidden[:0], ids[:0], weights[:0])
    assert empty.shape == (0, H)
    print("done")
"""


@pytest.mark.parametrize("signal", ["doorbell", "hostfunc"])
def test_operators_are_kept_by_a_compiler_and_check_their_inputs(fake_cuda: Path, signal: str) -> None:
    assert program(OPERATORS, fake_cuda, KT_CUDA_SIGNAL=signal).strip() == "done"

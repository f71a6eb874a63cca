"""Environments of the peers: one virtual environment each, made on request in a cache folder.

By default in `kt_kernel/peers` of `XDG_CACHE_HOME` (`~/.cache`). pip's own variables hold, so `PIP_FIND_LINKS` takes
packages from a folder. llama.cpp is compiled: CMake and a C++ compiler must be there; its source package takes 80 MB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .catalog import System

INSTALLED = "installed"
LLAMA_TARGETS = ("ggml-base", "ggml-cpu")


def default_folder() -> Path:
    """Where the environments are by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kt_kernel" / "peers"


def environment_of(system: System, folder: Path) -> Path:
    """The virtual environment of one release of a peer."""
    return folder / system.release.replace("==", "-")


def interpreter(system: System, folder: Path) -> Path | None:
    """The interpreter that runs a system; None where it has not been installed."""
    if not system.release:
        return Path(sys.executable)
    environment = environment_of(system, folder)
    return environment / "bin" / "python" if (environment / INSTALLED).exists() else None


def install(system: System, folder: Path) -> None:
    """Make the environment of a peer, or leave it if it is there.

    Raises
    ------
    RuntimeError
        A step failed; the message names the step and the log with its output.
    """
    if interpreter(system, folder) is not None:
        return
    environment = environment_of(system, folder)
    shutil.rmtree(environment, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(f"{environment}.log", "w") as log:

        def step(*command: str | Path) -> None:
            log.write(f"== {' '.join(map(str, command))}\n")
            log.flush()
            try:
                done = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT).returncode
            except OSError as error:
                raise RuntimeError(f"{command[0]} cannot be run: {error}.") from None
            if done:
                raise RuntimeError(f"{' '.join(map(str, command))} ended with {done}; its output is in {log.name}.")

        step(sys.executable, "-m", "venv", environment)
        python = environment / "bin" / "python"
        pip = (python, "-m", "pip", "--disable-pip-version-check")
        # --no-deps: of what these packages ask for (torch, a web server) the adapters need nothing but numpy
        step(*pip, "install", "numpy")
        if system.name == "llama":
            build_ggml(system, environment, pip, step)
        else:
            step(*pip, "install", "--no-deps", system.release)
    (environment / INSTALLED).touch()


def build_ggml(system: System, environment: Path, pip: tuple, step) -> None:
    """Compile ggml of the source package for this machine; the rest of llama.cpp is not needed."""
    with tempfile.TemporaryDirectory(dir=environment) as work:
        source = Path(work)
        step(*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", source, system.release)
        archive = next(source.glob("*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(source, filter="data")
        project = next(source.glob("*/vendor/llama.cpp"))
        build = source / "build"
        options = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")]
        native = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON"]
        step("cmake", "-S", project, "-B", build, *native, *options)
        jobs = str(len(os.sched_getaffinity(0)))
        step("cmake", "--build", build, "-j", jobs, "--target", *LLAMA_TARGETS)
        libraries = environment / "ggml"
        libraries.mkdir()
        for target in LLAMA_TARGETS:
            for file in build.glob(f"bin/lib{target}.so*"):
                shutil.copy2(file, libraries, follow_symlinks=True)

"""Fixtures of the Python tests."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    """No opened weight path and no unfinished model of one test reaches the next."""
    yield
    import sys

    loader = sys.modules.get("kt_kernel.loader")
    if loader is not None:
        loader.close_sources()
        loader._report.abandon()
    wrapper = sys.modules.get("kt_kernel.wrapper")
    if wrapper is not None:
        wrapper.KTMoEWrapper.set_capture_batch_sizes([])
        wrapper.layer_chain._latest.clear()
    logging.getLogger("kt_kernel").setLevel(logging.NOTSET)


def built_library(name: str, folder: Path, options: list[str], elsewhere: Path) -> Path:
    """lib`name`.so of scripts/test.sh's build if it is of the sources in `folder`, else one that is built here."""
    sources = sorted(path for path in folder.glob("*.cpp") if not path.name.startswith("test_"))
    built = ROOT / f"build/test/lib{name}.so"
    newest = max(path.stat().st_mtime for path in (*sources, *folder.glob("*.h")))
    if built.exists() and built.stat().st_mtime >= newest:
        return built
    library = elsewhere / built.name
    common = ["-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", f"-I{ROOT / 'tests'}"]
    subprocess.run(["g++", *common, *options, "-o", library, *sources], check=True, timeout=800)
    return library


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test double of the CUDA driver."""
    return built_library("fake_cuda", ROOT / "tests/fake_cuda", ["-O1"], tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture(scope="session")
def amx_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs AMX instructions on a host without them, under LD_PRELOAD."""
    options = ["-O2", "-mavx2", "-mfma"]  # the file of products needs them, and without them nothing is interpreted
    return built_library("kt_amx_interpreter", ROOT / "tests/amx", options, tmp_path_factory.mktemp("amx"))

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


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test double: that of scripts/test.sh's build if it is of these sources, else one built here."""
    folder = ROOT / "tests/fake_cuda"
    sources = sorted(path for path in folder.glob("*.cpp") if not path.name.startswith("test_"))
    built = ROOT / "build/test/libfake_cuda.so"
    newest = max(path.stat().st_mtime for path in (*sources, *folder.glob("*.h")))
    if built.exists() and built.stat().st_mtime >= newest:
        return built
    library = tmp_path_factory.mktemp("fake_cuda") / "libfake_cuda.so"
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", f"-I{ROOT / 'tests'}"]
    subprocess.run(["g++", *options, "-o", library, *sources], check=True, timeout=800)
    return library

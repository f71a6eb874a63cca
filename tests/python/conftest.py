"""Fixtures of the Python tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


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

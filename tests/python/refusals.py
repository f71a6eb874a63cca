"""What every reader owes a file that is damaged, or made to do damage: one sentence, at once and in little memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HUGE = 1 << 60


@pytest.fixture(autouse=True)
def limited_memory_and_time() -> Iterator[None]:
    """512 MiB beyond what is in use, and 5 s."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (512 << 20), limit[1]))
    started = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert time.process_time() - started < 5


def assert_refused(read: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read()
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.endswith(".") and message.isprintable() and len(message) < 2000

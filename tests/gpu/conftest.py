"""What must be in place before the tests of this folder are imported."""

import device  # noqa: F401 - makes tests/ and tests/python/ importable
from stock_sglang import ensure_sglang

ensure_sglang()

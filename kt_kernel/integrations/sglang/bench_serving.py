"""SGLang's own client for measuring a server, also on a host without a GPU, and for several runs in one process.

``python -m kt_kernel.integrations.sglang.bench_serving RUNS``: RUNS is a JSON file with one list of the flags of
``sglang.bench_serving`` for each run. Its imports take ten seconds of a core, so ``kt_kernel.bench.serving`` starts one
process for all of its runs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from kt_kernel.integrations.torchvision_repair import repair_torchvision
from kt_kernel.proxy import bypass_proxy_for_own_traffic


def declare_datasets() -> None:
    """Make ``from datasets import load_dataset`` work where Hugging Face's ``datasets`` is not installed.

    SGLang imports it for a benchmark with pictures, which is not run here; its pyarrow and pandas are 60 MB.
    """
    if importlib.util.find_spec("datasets") is not None:
        return
    module = ModuleType("datasets")
    module.__spec__ = ModuleSpec("datasets", None)  # transformers asks for it
    module.load_dataset = None  # type: ignore[attr-defined]
    sys.modules["datasets"] = module


def main(runs: Path) -> None:
    """Run ``bench_serving`` once for each list of flags in a JSON file."""
    bypass_proxy_for_own_traffic()
    repair_torchvision()
    declare_datasets()
    from sglang.benchmark.serving import cli_main

    for flags in json.loads(runs.read_text()):
        sys.argv = ["bench_serving", *flags]
        cli_main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

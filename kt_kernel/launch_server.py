"""``python -m kt_kernel.launch_server``: SGLang's server, also on a host without a GPU.

Takes every flag of ``python -m sglang.launch_server``. Without ``--kt-*`` flags it is plain SGLang on the CPU.

The top level of this module runs again in each process SGLang spawns, which is where the repair of torchvision is
needed as well.
"""

from __future__ import annotations

import os
import sys

import torch

from kt_kernel.config import usable_cpus
from kt_kernel.integrations.torchvision_repair import repair_torchvision

PLATFORM = "kt_cpu"


def prepare_environment() -> None:
    """Set what the spawned processes inherit: the platform, and threads of torch that sleep when idle.

    Torch's OpenMP threads spin after each parallel region by default, and would take the cores from the workers of
    our pool, which runs between them on the same cores. Values the user set are kept.
    """
    if torch.cuda.is_available():
        return
    defaults = {
        "SGLANG_PLATFORM": PLATFORM,
        "TORCHDYNAMO_DISABLE": "1",  # else SGLang's decorators compile C++ at start-up: 30 s instead of 15 s
        "OMP_NUM_THREADS": str(usable_cpus()),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def main(argv: list[str]) -> None:
    """Parse SGLang's flags and serve until stopped."""
    prepare_environment()
    from kt_kernel.integrations.sglang.checks import check_typed_flags

    try:
        check_typed_flags(argv)
    except ValueError as error:
        raise SystemExit(f"kt_kernel: {error}") from None
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    from kt_kernel.integrations.sglang.plugin import verify_hooks

    try:
        verify_hooks()
    except RuntimeError as error:
        raise SystemExit(f"kt_kernel: {error}") from None
    server_args = prepare_server_args(argv)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


repair_torchvision()

if __name__ == "__main__":
    main(sys.argv[1:])

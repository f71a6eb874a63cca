"""``python -m kt_kernel.launch_server``: SGLang's server, also on a host without a GPU.

Takes every flag of ``python -m sglang.launch_server``. Without ``--kt-*`` flags it is plain SGLang on the CPU.

The top level of this module runs again in each process SGLang spawns, which is where the repair of torchvision is
needed as well.
"""

from __future__ import annotations

import os
import sys

from kt_kernel.integrations.sglang import prepare_environment
from kt_kernel.integrations.torchvision_repair import repair_torchvision


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

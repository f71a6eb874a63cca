"""Entry points that stock SGLang finds by itself: ``sglang.srt.plugins`` and ``sglang.srt.platforms``.

SGLang loads both in its main process and in every scheduler. Importing this module is cheap; SGLang is touched only
when it calls one of the two functions.
"""

from __future__ import annotations

import os
import sys

from kt_kernel.proxy import bypass_proxy_for_own_traffic

PLATFORM_NAME = "kt_cpu"


def register() -> None:
    """Install the hooks of kt_kernel in this process (group ``sglang.srt.plugins``).

    Notes
    -----
    SGLang logs an exception raised here and goes on without the plug-in; ``plugin.verify_hooks`` is what turns a hook
    that did not take into an error, as soon as a ``--kt-*`` flag is used.
    """
    bypass_proxy_for_own_traffic()
    select_platform()
    from kt_kernel.integrations.sglang import plugin

    plugin.install()


def activate() -> str | None:
    """Return the class path of the CPU platform (group ``sglang.srt.platforms``).

    Returns
    -------
    str or None
        None unless ``SGLANG_PLATFORM=kt_cpu`` is set or :func:`select_platform` sets it: a host with a GPU keeps the
        platform SGLang chooses.
    """
    select_platform()
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    return "kt_kernel.integrations.sglang.platform.KtCpuPlatform"


def select_platform() -> None:
    """Choose our platform where ``--kt-*`` flags are given and there is no device that SGLang knows.

    SGLang ends with "No accelerator or platform plugin is available" there. ``SGLANG_PLATFORM`` and ``--device`` of the
    user stand; the processes SGLang spawns inherit the choice.
    """
    if "SGLANG_PLATFORM" in os.environ or not any(word.startswith("--kt-") for word in sys.argv):
        return
    if any(word == "--device" or word.startswith("--device=") for word in sys.argv):
        return
    prepare_environment()


def prepare_environment() -> None:
    """Set what SGLang's processes inherit on a host without a GPU: our platform, torch threads that sleep when idle.

    Torch's OpenMP threads spin after each parallel region by default, and would take the cores from the workers of
    our pool, which runs between them on the same cores. Values the user set are kept; a host with a device that torch
    knows is left alone.
    """
    import torch

    if torch.accelerator.is_available():
        return
    from kt_kernel.config import usable_cpus

    defaults = {
        "SGLANG_PLATFORM": PLATFORM_NAME,
        "TORCHDYNAMO_DISABLE": "1",  # else SGLang's decorators compile C++ at start-up: 30 s instead of 15 s
        "OMP_NUM_THREADS": str(usable_cpus()),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

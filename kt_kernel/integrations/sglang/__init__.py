"""Entry points that stock SGLang finds by itself: ``sglang.srt.plugins`` and ``sglang.srt.platforms``.

SGLang loads both in its main process and in every scheduler. Importing this module is cheap; SGLang is touched only
when it calls one of the two functions.
"""

from __future__ import annotations

import os

PLATFORM_NAME = "kt_cpu"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0", "::1")


def register() -> None:
    """Install the hooks of kt_kernel in this process (group ``sglang.srt.plugins``).

    Notes
    -----
    SGLang logs an exception raised here and goes on without the plug-in; ``plugin.verify_hooks`` is what turns a hook
    that did not take into an error, as soon as a ``--kt-*`` flag is used.
    """
    bypass_proxy_for_own_traffic()
    from kt_kernel.integrations.sglang import plugin

    plugin.install()


def activate() -> str | None:
    """Return the class path of the CPU platform (group ``sglang.srt.platforms``).

    Returns
    -------
    str or None
        None unless ``SGLANG_PLATFORM=kt_cpu``: a host with a GPU keeps the platform SGLang chooses.
    """
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    return "kt_kernel.integrations.sglang.platform.KtCpuPlatform"


def bypass_proxy_for_own_traffic() -> None:
    """Add the local addresses to ``no_proxy`` and ``NO_PROXY``, keeping what either of them names.

    SGLang's start-up check is an HTTP request to itself. A proxy that answers it with an error makes 120 tries fail,
    after which SGLang kills its own process tree: the "crash after four minutes". Where both variables are set the
    lower case one wins, so both get the union; ``*`` (no proxy at all) stays what it is.
    """
    hosts: list[str] = []
    for key in ("no_proxy", "NO_PROXY"):
        hosts += [host.strip() for host in os.environ.get(key, "").split(",")]
    if "*" not in hosts:
        hosts += LOCAL_HOSTS
    named = ["*"] if "*" in hosts else list(dict.fromkeys(host for host in hosts if host))
    for key in ("no_proxy", "NO_PROXY"):
        os.environ[key] = ",".join(named)

"""Traffic of this machine with itself goes around the HTTP proxies that the environment names."""

from __future__ import annotations

import os

# Not "[::1]", which urllib looks for: httpx, the client of huggingface_hub, raises InvalidURL where it finds brackets.
LOCAL_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0", "::1")


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

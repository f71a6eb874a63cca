"""The proxy variables after our plug-in: local addresses bypass it, and nothing the user set is lost."""

from __future__ import annotations

import os
import urllib.request

import httpx
import pytest

from kt_kernel.proxy import bypass_proxy_for_own_traffic


@pytest.mark.parametrize(
    "lower, upper",
    [
        (None, None),
        ("mirror.corp", None),
        (None, "mirror.corp"),
        ("mirror.corp", "other.corp"),
        ("*", None),
        (None, "*"),
    ],
)
def test_local_addresses_bypass_and_the_users_hosts_still_do(monkeypatch, lower, upper):
    wanted = {"127.0.0.1:30000", "localhost", "0.0.0.0", "::1"}
    for key, value in (("no_proxy", lower), ("NO_PROXY", upper)):
        monkeypatch.setenv(key, "")  # registers both with monkeypatch, which takes our changes back
        monkeypatch.delenv(key)
        if value is not None:
            monkeypatch.setenv(key, value)
            wanted.add("anything.example" if value == "*" else value)
    bypass_proxy_for_own_traffic()
    bypass_proxy_for_own_traffic()  # every process of a server runs it, on what its parent left
    # some programs read the one, some the other
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
    assert all(urllib.request.proxy_bypass_environment(host) for host in wanted)
    if "*" not in (lower, upper):
        assert not urllib.request.proxy_bypass_environment("anything.example")


def test_httpx_takes_what_is_left_in_the_environment(monkeypatch):
    """The hub's client reads the variables when it is made, and refuses hosts that it cannot parse."""
    for key in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(key, "")
    bypass_proxy_for_own_traffic()
    httpx.Client().close()

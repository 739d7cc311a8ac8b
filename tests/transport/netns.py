"""The fixture `two_hosts`: two network namespaces joined by a cable, skipped with the reason where
there can be none. A conftest.py makes it known: `from tests.transport.netns import two_hosts`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from kvstore.bench.two_hosts import Host, HostsUnavailableError, TwoHosts

__all__ = ["Host", "HostsUnavailableError", "TwoHosts", "two_hosts"]


@pytest.fixture
def two_hosts() -> Iterator[TwoHosts]:
    missing = [tool for tool in ("nft", "tc") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no two hosts: no {missing[0]!r} (Debian: apt-get install nftables iproute2)")
    try:
        hosts = TwoHosts()
    except HostsUnavailableError as error:
        pytest.skip(f"no two hosts: {error}")
    with hosts:
        yield hosts

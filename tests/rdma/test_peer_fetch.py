"""Daemons fetch from each other by RDMA; see `inside_peer_fetch.py`, which runs in the guest."""

from __future__ import annotations

import pytest

from tests.rdma.guest import Guest
from tests.rdma.test_ucx import in_the_guest

pytestmark = [pytest.mark.rdma, pytest.mark.timeout(900)]


def test_blocks_come_from_another_daemon_by_rdma(guest: Guest) -> None:
    finished = in_the_guest(guest, "tests/rdma/inside_peer_fetch.py")
    assert finished.status == 0, finished.output
    assert "skipped" not in finished.output, finished.output

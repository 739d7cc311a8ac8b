"""Run in a guest, by test_peer_fetch.py: a daemon brings blocks from another by RDMA, or does not.

Both daemons may use RDMA and nothing else; the holder is a process of its own, which may be killed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.daemon.service import Service
from kvstore.peers import flight, holders, session
from tests.daemon.daemon_support import Daemon, clean_up
from tests.transport.peers_support import (
    NAMESPACE,
    SIZE,
    client_of,
    fetched,
    loaded,
    metrics,
    put,
    serving,
    token,
    wait_until,
)
from tests.transport.test_peer_fetch import peer_address

ADDRESS = "fd77::1"  # of the interface under the RDMA device
SECONDS = 60.0  # of calls: this machine is emulated
SECRET = "clients-" + "x" * 32


def rdma_only(directory: Path) -> dict[str, Any]:
    secret = directory / "clients.token"
    secret.touch(0o600)
    secret.write_text(SECRET)
    return {
        "tcp": f"[{ADDRESS}]:0",
        "peer_listen": ADDRESS,
        "token_file": str(secret),
        "peer_require_rdma": True,
        "movers": "ucx",
    }


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Daemon]:
    home = tmp_path / "apart"
    home.mkdir()
    settings = {**rdma_only(home), "peer_token": token(home), "hold_seconds": "0"}
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, value]
    daemon = Daemon(home, *flags)
    try:
        yield daemon.ready()
    finally:
        clean_up(daemon)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """To connect takes seconds here."""
    for module in (session, holders):
        monkeypatch.setattr(module, "CALL_SECONDS", SECONDS / 2)


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path, "ours", **rdma_only(tmp_path)) as service:
        yield service


def connected(daemon: Daemon) -> kvstore.Store:
    return kvstore.connect(daemon.address, NAMESPACE, timeout=SECONDS)


def test_bytes_are_exact_and_came_by_rdma(ours: Service, holder: Daemon) -> None:
    with client_of(ours) as store, connected(holder) as other:
        put(other, 1, 40)
        assert loaded(store, 1, 40, [peer_address(holder)], SECONDS) == 40
        assert fetched(metrics(ours)) == {"ucx": 40}
        wait_until(lambda: other.stats()["kvstore_leases"] == 0)


def test_a_holder_that_is_killed_costs_a_miss(
    tmp_path: Path, holder: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a fetch, which a bandwidth makes last. What came before it is exact."""
    for name in ("PIECE_BYTES_MIN", "PIECE_BYTES_FIRST", "PIECE_BYTES_MAX"):
        monkeypatch.setattr(flight, name, 4 * SIZE)
    slow = {**rdma_only(tmp_path), "peer_bandwidth": "64KiB"}
    with (
        serving(tmp_path, "ours", **slow) as ours,
        client_of(ours) as store,
        connected(holder) as other,
    ):
        put(other, 2, 40)
        address = peer_address(holder)

        def strike() -> None:
            wait_until(lambda: sum(fetched(metrics(ours)).values()) >= 1)
            holder.process.send_signal(signal.SIGKILL)

        thread = threading.Thread(target=strike)
        thread.start()
        found = loaded(store, 2, 40, [address], SECONDS)
        thread.join()
        assert 0 < found < 40
        put(store, 3, 4)  # it goes on
        assert loaded(store, 3, 4, [], SECONDS) == 4

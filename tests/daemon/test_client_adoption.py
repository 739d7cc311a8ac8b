"""A client's store across kill -9 of a daemon whose arena the next one adopts.

Real daemons. Proved: the blocks are there again without a call of the user's, through the maps that
the client has already; leases of before still read exact bytes; slots that were reserved but not
committed when the daemon died come free as soon as the client is back; and `kvstore restart` is no
more than a short outage.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import kvstore
from kvstore.client import RemoteControl
from tests.daemon.daemon_support import (
    SPEC,
    RawClient,
    chain,
    command,
    content,
    running,
    wait_until,
)

COUNT = 6


def load(store: kvstore.Store, first: int) -> int:
    room = np.zeros((COUNT, SPEC.block_bytes), np.uint8)
    count = store.load(chain(first, COUNT), kvstore.ContiguousBlocks(room)).wait().num_blocks
    assert np.array_equal(room[:count], content(first, COUNT)[:count])
    return count


def put(store: kvstore.Store, first: int) -> kvstore.TransferResult:
    blocks = kvstore.ContiguousBlocks(content(first, COUNT))
    return store.put(chain(first, COUNT), blocks).wait()


def num_maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd")


def test_an_adopted_arena_is_read_through_the_maps_of_before(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, kvstore.connect(daemon.address, "model", spec=SPEC) as store:
        assert put(store, 1).num_stored == COUNT
        maps = num_maps()
        control = store.control
        assert isinstance(control, RemoteControl)
        before = control._session()
        lease = store.acquire(chain(1, COUNT))
        unfinished = store.reserve(chain(2, 3))
        daemon.kill()
        assert load(store, 1) == 0
        with running(tmp_path):
            wait_until(lambda: load(store, 1) == COUNT)
            after = control._session()
            assert after is not before
            assert after.arena is before.arena
            assert num_maps() == maps
            room = np.zeros((COUNT, SPEC.block_bytes), np.uint8)
            assert lease.load(kvstore.ContiguousBlocks(room), np.arange(COUNT)) == COUNT
            assert np.array_equal(room, content(1, COUNT))
            with RawClient(daemon.address) as admin:
                wait_until(lambda: admin.status()["quarantined_slots"] == 0)
            unfinished.write(kvstore.ContiguousBlocks(content(2, 3)), np.arange(3))
            assert unfinished.commit().wait().num_unavailable == 3
            assert put(store, 2).num_stored == COUNT
            assert load(store, 2) == COUNT


def test_slots_stay_apart_while_we_write_to_them(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, kvstore.connect(daemon.address, "model", spec=SPEC) as store:
        reservation = store.reserve(chain(2, 3))
        writers = reservation._reserved.writers
        assert writers is not None
        assert writers.begin()  # a copy that takes its time
        daemon.kill()
        assert store.match(chain(2, 3)) == 0
        with running(tmp_path), RawClient(daemon.address) as admin:
            wait_until(lambda: put(store, 1).num_blocks == COUNT)
            assert admin.status()["quarantined_slots"] == 3
            writers.end()
            wait_until(lambda: admin.status()["quarantined_slots"] == 0)


def test_a_restart_is_a_short_outage(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, kvstore.connect(daemon.address, "model", spec=SPEC) as store:
        assert put(store, 1).num_stored == COUNT
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            code, _ = command("restart", "--connect", daemon.address)
            assert code == 0
            wait_until(lambda: load(store, 1) == COUNT)
        assert put(store, 2).num_stored == COUNT
        assert len(os.listdir("/proc/self/fd")) <= files + 2

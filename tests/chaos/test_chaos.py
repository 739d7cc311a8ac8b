"""Random clients, random deaths: what a store promises still holds.

Clients with random work, over shared memory and over TCP; clients and the daemon are killed and
stopped at random, the daemon restarted cleanly, its holder killed, the disk full or failing.
Proved: no client ever sees a wrong byte or an error that is not ours; no call outlives its deadline
unless its own process was stopped; afterwards no slot, lease, reservation, descriptor, process or
shared memory is left.

`pytest -m chaos --chaos-seconds 600` for longer; --chaos-seed repeats a run's decisions (not its
timing).
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import ContiguousBlocks
from tests.chaos.conductor import (
    END_S,
    Chaos,
    arenas_of,
    processes_that_name,
    wait_until,
)
from tests.chaos.random_client import DOCUMENTS, NAMESPACE, SPEC, bytes_of
from tests.faults.faultfs import faulty_disk, missing_tools

# Files of segments that the daemon keeps open, a scrub or promotion under way.
SPARE_DESCRIPTORS = 24

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(0),
    pytest.mark.skipif(bool(missing_tools()), reason=missing_tools() or "complete"),
]


def test_nothing_wrong_late_or_leaked(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    seconds = float(request.config.getoption("--chaos-seconds"))
    seed = request.config.getoption("--chaos-seed")
    seed = random.randrange(1 << 16) if seed is None else int(seed)
    print(f"chaos: {seconds:.0f} s, seed {seed}")
    with (
        tempfile.TemporaryDirectory(prefix="kv-") as sockets,
        faulty_disk(tmp_path) as disk,
    ):
        chaos = Chaos(seed, tmp_path, Path(sockets), disk)
        try:
            chaos.start()
            wait_until(lambda: chaos.daemon.status()["state"] == "serving", "serving")
            descriptors = chaos.daemon.num_descriptors()
            chaos.run(seconds)
            chaos.end_clients()
            print(f"chaos: {chaos.num_calls} calls, {len(chaos.events)} events")
            told = "\n".join(chaos.events[-40:])
            assert not chaos.wrong, "\n".join(chaos.wrong[:10]) + "\n" + told
            assert not chaos.slow, "\n".join(chaos.slow[:10]) + "\n" + told
            assert chaos.num_calls > 0
            check_content(chaos)
            check_nothing_held(chaos, descriptors)
            check_nothing_left(chaos)
        finally:
            chaos.kill_all()


def check_content(chaos: Chaos) -> None:
    """All that is still there is right, through both kinds of connection."""
    for address in (chaos.daemon.address, chaos.daemon.tcp):
        token = None if address.startswith("unix:") else chaos.daemon.token_file
        with kvstore.connect(address, NAMESPACE, token=token) as store:
            for chain in DOCUMENTS:
                room = np.zeros((len(chain), SPEC.block_bytes), np.uint8)
                loaded = store.load(chain, ContiguousBlocks(room)).wait(END_S).num_blocks
                for i in range(loaded):
                    assert np.array_equal(room[i], bytes_of(chain[i]))


def check_nothing_held(chaos: Chaos, descriptors: int) -> None:
    daemon = chaos.daemon

    def held() -> dict[str, int]:
        status = daemon.status()
        names = ("leases", "reservations", "quarantined_slots")
        return {name: status[name] for name in names if status[name]}

    wait_until(lambda: not held(), f"leases, reservations and quarantine end: {held()}")
    with kvstore.connect(daemon.address, NAMESPACE) as store:
        store.clear()
        wait_until(lambda: store.stats()["kvstore_cpu_used_bytes"] == 0, "every slot is free")
    wait_until(
        lambda: daemon.num_descriptors() <= descriptors + SPARE_DESCRIPTORS,
        f"descriptors: {daemon.num_descriptors()}, {descriptors} at the start",
    )


def check_nothing_left(chaos: Chaos) -> None:
    daemon = chaos.daemon
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(END_S) == 0, daemon.log.read_text()[-3000:]
    wait_until(
        lambda: not processes_that_name(str(daemon.state)), "the holder and all others are gone"
    )
    mine = os.getpid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != mine:
            assert not arenas_of(int(entry.name)) & daemon.arenas, f"process {entry.name} holds one"

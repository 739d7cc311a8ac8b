"""What bounds leases, and that each ends at its time, in whatever order they were taken.

A lease of ttl 0 is over at once, one of an hour never while the test runs.
"""

import random

import numpy as np
import pytest

from kvstore import _native
from tests.core_support import View, chain, rows

SIZE = 4096
LEASED_MAX, LEASE_COST = 1 << 25, 32  # StoreCore


@pytest.fixture
def core() -> _native.StoreCore:
    view = View.create()
    view.core.add_namespace(SIZE)
    view.put(chain("a", 8))
    return view.core


def test_leases_end_at_their_time_and_no_other(core: _native.StoreCore) -> None:
    random.seed(5)
    hashes = rows(chain("a", 8))
    for _ in range(20):
        owner = core.new_owner()
        leases = {}
        for _ in range(400):
            ttl = random.choice([None, 3600.0, 7200.0])
            leases[core.acquire(owner, 0, hashes[: random.randint(1, 8)], ttl, True)[0]] = ttl
        for lease in random.sample(sorted(leases), 200):
            assert core.release(owner, lease)
            del leases[lease]
        assert core.expire_leases() == 0
        over = [core.acquire(owner, 0, hashes, 0.0, True)[0] for _ in range(3)]
        core.expire_leases()
        assert not any(core.release(owner, lease) for lease in over)
        assert core.stats()["leases"] == len(leases)
        for lease in leases:
            assert core.release(owner, lease)
    assert core.stats()["leases_expired"] == 60
    assert core.stats()["leases"] == 0
    core.clear(0)
    assert core.stats()["cpu_used_bytes"] == 0


def test_what_one_owner_leases_is_bounded(core: _native.StoreCore) -> None:
    greedy, other = core.new_owner(), core.new_owner()
    many = np.repeat(rows(["a0"]), 1 << 20, axis=0)
    leases, held = [], 0
    while (granted := core.acquire(greedy, 0, many, None, False))[0]:
        leases.append(granted[0])
        held += len(granted[1])
    assert held == LEASED_MAX - LEASE_COST * len(leases)
    assert core.acquire(greedy, 0, many[:1], None, False)[0] == 0
    assert core.acquire(other, 0, many[:1], None, False)[0] > 0  # nobody else is bothered
    assert core.release(greedy, leases[0])
    assert core.acquire(greedy, 0, many[:1], None, False)[0] > 0
    core.release_owner(greedy)
    core.release_owner(other)
    assert core.stats()["leases"] == 0
    assert core.acquire(greedy, 0, many[:1], None, False)[0] > 0

"""Quotas and shares of tenants: each evicts its own blocks first, nobody pays for another's greed.

One core of 28 slots; the model in tests/property/test_tenants_model.py checks the same rules under
random use.
"""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.control import NO_SPACE, RESERVED
from kvstore.records import records_from
from tests.core_support import View, adopt, chain, rows

SLOT = 4096
CAPACITY = 28


@pytest.fixture
def view() -> Iterator[View]:
    made = View.create(4 << 15, 1 << 15)
    yield made
    os.close(made.keep)


def used(view: View, tenant: int) -> int:
    return view.core.tenant_stats(tenant)["cpu_used_bytes"] // SLOT


def test_tenant_and_namespace_must_be_known(view: View) -> None:
    with pytest.raises(IndexError, match="tenant"):
        view.core.add_namespace(SLOT, 1)
    with pytest.raises(IndexError, match="tenant"):
        view.core.tenant_stats(1)
    assert view.core.add_tenant(0, 0) == 1
    assert view.core.add_namespace(SLOT, 1) == 0


def test_tenant_at_its_quota_evicts_its_own_oldest(view: View) -> None:
    guest = view.core.add_tenant(10 * SLOT, 0)
    ours, theirs = view.core.add_namespace(SLOT), view.core.add_namespace(SLOT, guest)
    view.put(chain("o", 5), ours)
    for name in "abc":
        assert view.put(chain(name, 5), theirs) == 5
    assert used(view, guest) == 10
    assert [view.core.match(theirs, rows(chain(name, 5)), 0) for name in "abc"] == [0, 5, 5]
    assert view.core.match(ours, rows(chain("o", 5)), 0) == 5  # though there was room to spare
    stats = view.core.tenant_stats(guest)
    assert (stats["evicted"], stats["cpu_blocks"], stats["refused_no_space"]) == (5, 10, 0)


def test_put_over_the_quota_is_refused_when_all_is_leased(view: View) -> None:
    guest = view.core.add_tenant(4 * SLOT, 0)
    space = view.core.add_namespace(SLOT, guest)
    view.put(chain("a", 4), space)
    owner = view.core.new_owner()
    lease, *_ = view.core.acquire(owner, space, rows(chain("a", 4)), None, True)
    _, statuses, _ = view.core.reserve(owner, space, rows(["x", "y"]), -1, None, False)
    assert statuses.tolist() == [NO_SPACE] * 2
    assert view.core.tenant_stats(guest)["refused_no_space"] == 2
    view.core.release(owner, lease)
    _, statuses, _ = view.core.reserve(owner, space, rows(["x", "y"]), -1, None, False)
    assert statuses.tolist() == [RESERVED] * 2
    assert used(view, guest) == 4


def test_quota_counts_blocks_of_all_sizes(view: View) -> None:
    guest = view.core.add_tenant(6 * SLOT, 0)
    small, large = view.core.add_namespace(SLOT, guest), view.core.add_namespace(3 * SLOT, guest)
    view.put(chain("s", 5), small)
    assert view.put(["l"], large) == 1
    assert used(view, guest) == 6
    assert view.core.match(small, rows(chain("s", 5)), 0) == 3


def test_full_arena_takes_from_the_tenant_most_over_its_share(view: View) -> None:
    modest, greedy = view.core.add_tenant(8 * SLOT, 0), view.core.add_tenant(0, 0)
    first = view.core.add_namespace(SLOT)
    second = view.core.add_namespace(SLOT, modest)
    third = view.core.add_namespace(SLOT, greedy)
    view.put(chain("m", 8), second)
    view.put(chain("g", CAPACITY), third)  # what is left
    assert [used(view, tenant) for tenant in range(3)] == [0, 8, 20]
    assert view.put(chain("d", 6), first) == 6
    assert [used(view, tenant) for tenant in range(3)] == [6, 8, 14]
    view.put(chain("h", 10), third)  # the most over its share is the one that puts
    assert [used(view, tenant) for tenant in range(3)] == [6, 8, 14]
    assert view.core.match(second, rows(chain("m", 8)), 0) == 8
    assert view.core.match(first, rows(chain("d", 6)), 0) == 6


def test_other_block_size_takes_no_chunk_of_a_tenant_within_its_share(view: View) -> None:
    modest = view.core.add_tenant(21 * SLOT, 0)
    small, large = view.core.add_namespace(SLOT, modest), view.core.add_namespace(3 * SLOT)
    assert view.put(chain("m", 21), small) == 21
    view.put(chain("l", 4), large)
    view.put(chain("k", 4), large)
    assert view.core.match(small, rows(chain("m", 21)), 0) == 21
    assert view.core.tenant_stats(modest)["evicted"] == 0


def test_ssd_copies_over_the_quota_become_garbage(view: View) -> None:
    guest = view.core.add_tenant(0, 10_000)
    space = view.core.add_namespace(SLOT, guest)
    view.put(chain("a", 4), space)
    places = records_from(view.core.describe(space, rows(chain("a", 4))))
    places["segment"], places["page"], places["stored_bytes"] = 0, np.arange(4), SLOT
    view.core.set_ssd(places)
    stats = view.core.tenant_stats(guest)
    assert (stats["ssd_blocks"], stats["ssd_used_bytes"]) == (2, 2 * SLOT)
    assert len(records_from(view.core.take_garbage())) == 2
    view.core.remove(space, rows(["a1"]))
    assert view.core.tenant_stats(guest)["ssd_used_bytes"] == SLOT


def test_adopted_blocks_count_for_their_tenant(view: View) -> None:
    guest = view.core.add_tenant(20 * SLOT, 0)
    view.core.add_namespace(SLOT)
    view.core.add_namespace(SLOT, guest)
    view.put(chain("o", 3), 0)
    view.put(chain("g", 9), 1)
    fd = os.dup(view.die())
    plain, _ = adopt(fd, [SLOT, SLOT])
    assert used(plain, 0) == 12  # without tenants, all is the default one's
    core = type(plain.core).adopt(plain.die(), "lru")
    assert core.add_tenant(5 * SLOT, 0) == guest
    core.add_namespace(SLOT)
    core.add_namespace(SLOT, guest)
    core.recover({0: 0, 1: 1})
    after = View(core, fd)
    assert (used(after, 0), used(after, guest)) == (3, 9)
    after.put(["x"], 1)  # its quota is smaller now
    assert used(after, guest) == 5
    os.close(fd)

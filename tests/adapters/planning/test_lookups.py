"""Lookups and Shards: the answer is what the stores of all ranks and groups hold, is known within a
deadline whatever the daemon does, and is asked for once.

Against a store that is shared in this process, and a shared one that answers when a test lets it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st

import kvstore
from kvstore import ConfigError, StoreClosedError
from kvstore_adapters.planning.chains import Chain
from kvstore_adapters.planning.groups import Group, hit_tokens
from kvstore_adapters.planning.lookups import Lookups
from kvstore_adapters.planning.shards import Shards

from .planning_support import (
    BLOCK_BYTES,
    FULL,
    HYBRID,
    WINDOW,
    chain_of,
    namespaces,
    served,
    settings,
    wait_until,
)


class Cache:
    """Stores of all shards, and lookups over them."""

    def __init__(
        self,
        address: str,
        num_ranks: int = 1,
        groups: Sequence[Group] = (FULL,),
        timeout: float = 9.0,
    ) -> None:
        self.shards = Shards(namespaces(num_ranks, groups), settings(address))
        self.lookups = Lookups(self.shards, groups, timeout)

    def put(self, chain: Chain, group: Group, rank: int, begin: int, end: int) -> None:
        if begin == end:
            return
        blocks = chain.blocks(group, begin, end)
        rows = np.zeros((end - begin, BLOCK_BYTES), np.uint8)
        stored = self.shards.store(rank, group.group_id).put(blocks, kvstore.ContiguousBlocks(rows))
        assert stored.wait().num_blocks == end - begin

    def ask(self, chain: Chain, limit: int = 10_000, **options: Any) -> int:
        self.lookups.begin("r", chain, limit, **options)
        wait_until(lambda: self.lookups.result("r", 0.01) is not None)
        found = self.lookups.result("r")
        assert found is not None
        return found

    def close(self) -> None:
        self.lookups.close()
        self.shards.close()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with served(tmp_path) as where:
        yield where


@pytest.fixture
def cache(address: str) -> Iterator[Cache]:
    made = Cache(address)
    yield made
    made.close()


@pytest.fixture
def two_ranks(address: str) -> Iterator[Cache]:
    made = Cache(address, num_ranks=2)
    yield made
    made.close()


def test_the_longest_prefix_that_is_there_is_found(cache: Cache) -> None:
    chain = chain_of(1, 6)
    assert cache.ask(chain) == 0
    cache.put(chain, FULL, 0, 0, 4)
    assert cache.ask(chain) == 64
    assert cache.ask(chain_of(1, 3)) == 48
    assert cache.ask(chain, limit=63) == 48
    assert cache.ask(chain, limit=15) == 0


def test_all_ranks_must_have_a_block(two_ranks: Cache) -> None:
    chain = chain_of(2, 5)
    two_ranks.put(chain, FULL, 0, 0, 5)
    assert two_ranks.ask(chain) == 0
    two_ranks.put(chain, FULL, 1, 0, 3)
    assert two_ranks.ask(chain) == 48


def test_ranks_that_hold_the_same_are_asked_once() -> None:
    names = namespaces(2, HYBRID)
    same = {(rank, group): names[0, group] for rank in range(4) for group in (0, 1)}
    same[3, 1] = names[1, 1]
    assert Shards(same, settings("unix:/nowhere/s")).ranks == (0, 3)


_seeds = itertools.count(1000)  # chains that no other example knows


@given(data=st.data(), num_ranks=st.integers(1, 2))
@profile(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_hybrids_find_what_their_blocks_allow(
    data: st.DataObject, num_ranks: int, address: str
) -> None:
    """The model: each shard's blocks as a set, and `hit_tokens` over what all ranks have."""
    count = 6
    chain = chain_of(next(_seeds), count)
    limit = data.draw(st.integers(0, (count + 1) * 16))
    has = np.ones((2, count), bool)
    cache = Cache(address, num_ranks, HYBRID)
    for rank in range(num_ranks):
        leading = data.draw(st.integers(0, count))
        has[0] &= np.arange(count) < leading
        cache.put(chain, FULL, rank, 0, leading)
        stored = data.draw(st.sets(st.integers(0, count - 1)))
        has[1] &= np.isin(np.arange(count), list(stored))
        for i in stored:
            cache.put(chain, WINDOW, rank, i, i + 1)
    assert cache.ask(chain, limit) == hit_tokens(HYBRID, list(has), limit)
    cache.close()


def test_an_answer_is_kept_until_it_is_forgotten(cache: Cache) -> None:
    chain = chain_of(4, 2)
    assert cache.ask(chain) == 0
    cache.put(chain, FULL, 0, 0, 2)
    assert cache.lookups.result("r") == 0
    cache.lookups.forget("r")
    assert cache.lookups.result("r") == 0  # nobody asked
    assert cache.ask(chain) == 32


def test_a_chain_that_grew_is_looked_up_as_it_is_by_then(cache: Cache) -> None:
    chain, longer = chain_of(5, 2), chain_of(5, 4)
    cache.put(longer, FULL, 0, 0, 4)
    assert cache.ask(chain) == 32
    chain.extend(list(longer.blocks(FULL, 0, 4)))
    assert cache.ask(chain) == 64


# --- blocks that another instance is still saving


def test_wanted_blocks_are_waited_for(two_ranks: Cache) -> None:
    chain = chain_of(6, 4)
    two_ranks.lookups.begin("r", chain, 64, want_tokens=64, wait_seconds=60.0)
    for rank, begin, end in ((0, 0, 2), (1, 0, 4), (0, 2, 3)):
        two_ranks.put(chain, FULL, rank, begin, end)
        assert two_ranks.lookups.result("r", 0.02) is None
    two_ranks.put(chain, FULL, 0, 3, 4)
    wait_until(lambda: two_ranks.lookups.result("r", 0.01) == 64)


def test_when_the_wait_is_over_what_is_there_counts(cache: Cache) -> None:
    chain = chain_of(7, 4)
    cache.put(chain, FULL, 0, 0, 2)
    began = time.monotonic()
    assert cache.ask(chain, want_tokens=64, wait_seconds=0.05) == 32
    assert time.monotonic() - began >= 0.05


def test_no_more_is_waited_for_than_can_be_found(cache: Cache) -> None:
    """The limit leaves a token to compute, and a partial block has no hash."""
    chain = chain_of(8, 4)
    cache.put(chain, FULL, 0, 0, 4)
    assert cache.ask(chain, limit=63, want_tokens=70, wait_seconds=600.0) == 48
    assert cache.ask(chain, want_tokens=640, wait_seconds=600.0) == 64
    assert cache.ask(chain, want_tokens=-5, wait_seconds=600.0) == 64


def test_a_request_that_waits_holds_up_no_other(cache: Cache) -> None:
    cache.lookups.begin("waits", chain_of(9, 4), 64, want_tokens=64, wait_seconds=600.0)
    for seed in range(10, 20):
        assert cache.ask(chain_of(seed, 2)) == 0
    assert cache.lookups.result("waits") is None


# --- a daemon that does not answer


class StuckShards(Shards):
    """Shards whose stores are there only once a test says so: a daemon that hangs."""

    def __init__(self, address: str) -> None:
        super().__init__(namespaces(), settings(address))
        self.may_answer = threading.Event()
        self.num_asked = 0

    def store(self, rank: int, group_id: int) -> kvstore.Store:
        self.num_asked += 1
        self.may_answer.wait(60.0)
        return super().store(rank, group_id)


def test_past_the_deadline_nothing_was_found_and_that_stays(address: str) -> None:
    chain = chain_of(20, 3)
    cache = Cache(address)
    cache.put(chain, FULL, 0, 0, 3)
    stuck = StuckShards(address)
    lookups = Lookups(stuck, (FULL,), timeout=0.05)
    try:
        for name in ("asked", "queued"):
            lookups.begin(name, chain, 48)
            assert lookups.result(name) is None
        for name in ("asked", "queued"):
            wait_until(lambda name=name: lookups.result(name, 0.01) == 0)  # type: ignore[misc]
        stuck.may_answer.set()
        lookups.begin("next", chain, 48)
        wait_until(lambda: lookups.result("next", 0.01) == 48)
        assert lookups.result("asked") == lookups.result("queued") == 0
        assert stuck.num_asked == 2  # nobody asked for what was too late
    finally:
        stuck.may_answer.set()
        lookups.close()
        stuck.close()
        cache.close()


def test_with_nobody_listening_nothing_is_found_at_once(tmp_path: Path) -> None:
    cache = Cache(f"unix:{tmp_path}/none", timeout=600.0)
    assert cache.ask(chain_of(21, 2)) == 0
    assert cache.ask(chain_of(21, 2), want_tokens=32, wait_seconds=0.05) == 0
    cache.close()


def test_a_store_that_raises_has_nothing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(rank: int, group_id: int) -> kvstore.Store:
        raise kvstore.IncompatibleError("another version")

    monkeypatch.setattr(cache.shards, "store", refuse)
    assert cache.ask(chain_of(22, 2)) == 0
    assert cache.ask(chain_of(23, 2)) == 0
    assert caplog.text.count("another version") == 1  # said once in a while


def test_close_settles_what_is_open(address: str) -> None:
    stuck = StuckShards(address)
    lookups = Lookups(stuck, (FULL,), timeout=600.0)
    lookups.begin("a", chain_of(24, 2), 32)
    lookups.close(0.0)
    assert lookups.result("a") == 0
    lookups.begin("b", chain_of(24, 2), 32)
    assert lookups.result("b") == 0
    stuck.may_answer.set()
    stuck.close()


# --- shards


def test_other_namespaces_are_taken_over(cache: Cache) -> None:
    shards, chain = cache.shards, chain_of(25, 2)
    cache.put(chain, FULL, 0, 0, 2)
    former = shards.store(0, 0)
    shards.adopt(namespaces(2))
    assert shards.ranks == (0, 1)
    assert cache.ask(chain) == 0
    with pytest.raises(StoreClosedError):
        former.match(chain.blocks(FULL, 0, 2))
    shards.adopt(namespaces(1))
    assert cache.ask(chain) == 32


def test_shards_are_cleared_and_closed(two_ranks: Cache) -> None:
    chain = chain_of(26, 2)
    for rank in (0, 1):
        two_ranks.put(chain, FULL, rank, 0, 2)
    assert two_ranks.ask(chain) == 32
    two_ranks.shards.clear()
    assert two_ranks.ask(chain) == 0
    two_ranks.shards.close()
    two_ranks.shards.close()
    with pytest.raises(StoreClosedError):
        two_ranks.shards.store(0, 0)


def test_a_store_is_one_however_many_threads_ask_for_it_first(address: str) -> None:
    shards = Shards(namespaces(), settings(address))
    start, found = threading.Barrier(4), []

    def ask() -> None:
        start.wait()
        found.append(shards.store(0, 0))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    assert found[0].match(chain_of(27, 1).blocks(FULL, 0, 1)) == 0
    shards.close()


def test_a_daemon_that_refuses_us_says_so_at_the_start(address: str) -> None:
    larger = kvstore.Namespace("model", kvstore.BlockSpec.of_bytes(4 << 20))  # than the arena
    shards = Shards({(0, 0): larger}, settings(address))
    with pytest.raises(ConfigError, match=str(4 << 20)):
        shards.connect_all()
    shards.close()


def test_without_a_shard_there_is_nothing_to_connect() -> None:
    with pytest.raises(ConfigError, match="namespaces"):
        Shards({}, settings("unix:/nowhere/s"))
    with pytest.raises(ConfigError, match="elsewhere"):
        Shards(namespaces(), settings("unix:/nowhere/s")).push_store("elsewhere", 0, 0)

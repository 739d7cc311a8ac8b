"""Proves what tells the eviction policies apart, on short sequences worked out by hand.

Also that the bindings refuse bad arguments, and that on a generated workload with shared prefixes
every policy finds at least what FIFO finds and at most what Belady's MIN finds.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bench import eviction
from kvstore import _native

ALL = _native.eviction_policy_names()


def key(block: int) -> int:
    """Spreads small numbers over 64 bits, as the keys of real blocks are."""
    return (block + 1) * 0x9E3779B97F4A7C15 % 2**64


class Cache:
    """A full cache of independent blocks: evicts when there is no free slot."""

    def __init__(self, name: str, num_slots: int) -> None:
        self.policy = _native.EvictionPolicy(name, num_slots)
        self.slots: dict[int, int] = {}
        self.free = list(range(num_slots))
        self.anything = np.ones(num_slots, dtype=np.bool_)

    def use(self, block: int) -> int | None:
        """Touches the block, or brings it in; returns the block that left for it."""
        if block in self.slots:
            self.policy.touch(self.slots[block])
            return None
        victim = None if self.free else self.evict()
        slot = self.free.pop()
        self.slots[block] = slot
        self.policy.add(slot, key(block))
        return victim

    def evict(self) -> int | None:
        slot = self.policy.pop_victim(self.anything)
        if slot is None:
            return None
        block = next(block for block, at in self.slots.items() if at == slot)
        del self.slots[block]
        self.free.append(slot)
        return block

    def drain(self) -> list[int]:
        order = []
        while (block := self.evict()) is not None:
            order.append(block)
        return order


def test_the_required_policies_are_there() -> None:
    assert sorted(ALL) == ALL
    assert {"lru", "lfu", "s3fifo", "mq"} <= set(ALL)


@pytest.mark.parametrize("name", ["LRU", "", "fifo"])
def test_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"name: .*lfu, lru, mq, s3fifo"):
        _native.EvictionPolicy(name, 4)
    with pytest.raises(ValueError, match=r"name: .*lfu, lru, mq, s3fifo"):
        _native.PolicySimulator(name, 4)


def test_lru_lets_the_least_recently_used_leave() -> None:
    cache = Cache("lru", 4)
    for block in (1, 2, 3, 4, 1, 3):
        cache.use(block)
    assert cache.drain() == [2, 4, 1, 3]


def test_lru_touched_from_tail_to_head_leaves_tail_first() -> None:
    cache = Cache("lru", 6)
    for block in (13, 12, 11, 22, 21):  # two prefixes, each from its tail
        cache.use(block)
    assert cache.drain() == [13, 12, 11, 22, 21]


def test_lfu_lets_the_least_often_used_leave_and_the_older_of_equals() -> None:
    cache = Cache("lfu", 4)
    for block in (1, 1, 1, 2, 3, 3, 4):
        cache.use(block)
    assert cache.drain() == [2, 4, 3, 1]


def test_lfu_forgets_a_block_that_was_hot_long_ago() -> None:
    cache = Cache("lfu", 4)
    for _ in range(20):
        cache.use(0)
    left = [cache.use(block) for block in range(1, 200)]
    assert 0 in left
    # But it outlived as many generations of new blocks as it had more uses.
    assert left.index(0) > 20


def test_lfu_remembers_how_often_a_block_was_used_before_it_left() -> None:
    cache = Cache("lfu", 4)
    for block in (1, 1, 1, 1, 1, 2):
        cache.use(block)
    assert cache.evict() == 2
    cache.use(2)
    cache.use(3)
    assert cache.drain() == [3, 2, 1]  # 2 came before 3, but for the second time


def test_lfu_counts_beyond_its_ring_of_buckets() -> None:
    cache = Cache("lfu", 3)
    for _ in range(1000):
        cache.use(1)
    for block in (2, 3, 3):
        cache.use(block)
    assert cache.drain() == [2, 3, 1]


def test_s3fifo_lets_a_scan_pass_by_its_hot_blocks() -> None:
    hot = list(range(9))
    scan = range(1000, 1200)
    caches = {name: Cache(name, 20) for name in ("s3fifo", "lru")}
    for cache in caches.values():
        for _ in range(4):
            for block in hot:
                cache.use(block)
        for block in scan:
            cache.use(block)
    assert set(hot) <= set(caches["s3fifo"].slots)
    assert not set(hot) & set(caches["lru"].slots)


def test_s3fifo_takes_a_remembered_block_into_the_main_queue() -> None:
    cache = Cache("s3fifo", 10)  # small queue of one, nine remembered
    for block in range(11):
        cache.use(block)
    assert 0 not in cache.slots
    assert cache.use(0) == 1
    for block in range(100, 150):
        cache.use(block)
    assert 0 in cache.slots  # new blocks leave from the small queue, 0 does not


def test_s3fifo_gives_a_used_main_block_another_round() -> None:
    cache = Cache("s3fifo", 3)
    for block in (1, 1, 1, 2, 2, 2, 3, 3, 3):
        cache.use(block)
    assert cache.use(4) == 1  # all three are promoted with their count at zero
    cache.use(2)
    assert cache.evict() == 4  # the small queue first
    assert cache.evict() == 3  # 2 is older but was used
    assert cache.evict() == 2


def test_mq_lets_low_queues_leave_first_and_the_older_of_a_queue() -> None:
    cache = Cache("mq", 100)  # a lifetime that nothing here outlives
    for block in (1, 1, 1, 1, 2, 2, 2, 3, 3, 4):
        cache.use(block)
    assert cache.drain() == [4, 2, 3, 1]  # 2 and 3 share the queue of two or three uses


def test_mq_puts_a_remembered_block_back_where_it_was() -> None:
    cache = Cache("mq", 100)
    for block in (1, 1, 2, 2, 2):
        cache.use(block)
    assert cache.evict() == 1
    assert cache.evict() == 2
    for block in (2, 3, 3, 3):  # the fourth use of 2 brings it to the queue above that of 3
        cache.use(block)
    assert cache.drain() == [3, 2]


def test_mq_forgets_what_left_long_ago() -> None:
    cache = Cache("mq", 2)  # remembers eight
    for block in (1, 1, 1, 1):
        cache.use(block)
    assert cache.evict() == 1
    for block in range(100, 108):
        cache.use(block)
        cache.evict()
    cache.use(1)
    cache.use(2)
    assert cache.drain() == [1, 2]


def test_mq_forgets_a_block_that_was_hot_long_ago() -> None:
    cache = Cache("mq", 4)
    for _ in range(200):
        cache.use(0)
    left = [cache.use(block) for block in range(1, 1000)]
    assert 0 in left
    assert left.index(0) > 4


@pytest.mark.parametrize("name", ALL)
def test_parked_slot_is_not_asked_about_again_until_it_is_due(name: str) -> None:
    policy = _native.EvictionPolicy(name, 3)
    for slot in range(3):
        policy.add(slot, key(slot))
    asked: list[int] = []

    def refuse(slot: int) -> bool:
        asked.append(slot)
        return False

    assert policy.pop_victim(refuse) is None
    assert sorted(asked) == [0, 1, 2]
    asked.clear()
    assert policy.pop_victim(refuse) is None
    assert asked == []
    assert policy.size == 3

    policy.due(1)
    assert policy.pop_victim(np.ones(3, dtype=np.bool_)) == 1
    assert policy.pop_victim(np.ones(3, dtype=np.bool_)) is None
    policy.touch(0)
    assert policy.pop_victim(np.ones(3, dtype=np.bool_)) == 0
    policy.due(2)
    policy.touch(2)  # due no more, but queued
    assert policy.pop_victim(np.ones(3, dtype=np.bool_)) == 2
    assert policy.size == 0


@pytest.mark.parametrize("name", ALL)
def test_due_does_nothing_to_a_slot_that_is_not_parked(name: str) -> None:
    policy = _native.EvictionPolicy(name, 2)
    policy.due(0)
    assert policy.size == 0
    policy.add(0, key(0))
    policy.add(1, key(1))
    policy.due(1)
    assert policy.pop_victim(np.ones(2, dtype=np.bool_)) == 0


@pytest.mark.parametrize("name", ALL)
def test_exception_in_evictable_is_passed_on_and_loses_no_slot(name: str) -> None:
    policy = _native.EvictionPolicy(name, 3)
    for slot in range(3):
        policy.add(slot, key(slot))

    def fail(slot: int) -> bool:
        raise LookupError(slot)

    with pytest.raises(LookupError):
        policy.pop_victim(fail)
    for slot in range(3):
        policy.due(slot)
    victims = [policy.pop_victim(np.ones(3, dtype=np.bool_)) for _ in range(4)]
    assert victims[3] is None
    assert {0, 1, 2, None} == set(victims)


@pytest.mark.parametrize("name", ALL)
def test_policy_may_not_be_used_while_it_asks(name: str) -> None:
    policy = _native.EvictionPolicy(name, 2)
    policy.add(0, key(0))

    def meddle(slot: int) -> bool:
        policy.touch(slot)
        return True

    with pytest.raises(RuntimeError, match="evictable"):
        policy.pop_victim(meddle)
    policy.due(0)
    assert policy.pop_victim(lambda slot: True) == 0


def test_bad_arguments_are_refused() -> None:
    for number in (0, -1, 2**31):
        with pytest.raises(ValueError, match="num_slots"):
            _native.EvictionPolicy("lru", number)
        with pytest.raises(ValueError, match="capacity_blocks"):
            _native.PolicySimulator("lru", number)
    policy = _native.EvictionPolicy("lru", 2)
    policy.add(0, 0)
    with pytest.raises(ValueError, match="added before"):
        policy.add(0, 0)
    for slot in (-1, 2):
        for call in (policy.touch, policy.remove, policy.due):
            with pytest.raises(ValueError, match="slot"):
                call(slot)
    with pytest.raises(ValueError, match="slot"):
        policy.touch_all(np.array([0, 2], dtype=np.uint32))
    with pytest.raises(ValueError, match="one flag for each slot"):
        policy.pop_victim(np.ones(3, dtype=np.bool_))
    with pytest.raises(TypeError, match="evictable"):
        policy.pop_victim(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        policy.touch_all(np.array([0]))


def ids(*blocks: int) -> npt.NDArray[np.uint64]:
    return np.array(blocks, dtype=np.uint64)


def test_simulator_refuses_ids_that_are_not_prefixes() -> None:
    simulator = _native.PolicySimulator("lru", 8)
    simulator.request(ids(1, 2, 3))
    for wrong in (ids(1, 3), ids(2), ids(9, 2), ids(1, 2, 3, 1), ids(4, 4)):
        with pytest.raises(ValueError, match="ids"):
            simulator.request(wrong)
    with pytest.raises(TypeError):
        simulator.request(np.array([1, 2]))
    assert simulator.request(ids(1, 2, 3)) == 3
    assert simulator.resident == 3


def test_simulator_keeps_the_head_of_a_request_that_does_not_fit() -> None:
    simulator = _native.PolicySimulator("lru", 3)
    assert simulator.request(ids(1, 2, 3, 4, 5)) == 0
    assert simulator.request(ids(1, 2, 3, 4, 5)) == 3


def zipf_requests(count: int, seed: int) -> list[eviction.Request]:
    """Conversations of Zipf popularity, each a shared system prompt and turns that grow."""
    random = np.random.default_rng(seed)
    turns: dict[int, int] = {}
    requests = []
    for _ in range(count):
        conversation = int(random.zipf(1.3)) % 400
        turns[conversation] = turns.get(conversation, 0) + 1
        system = [1_000_000 + conversation % 4 * 100 + depth for depth in range(4)]
        own = [2_000_000 + conversation * 1000 + depth for depth in range(2 * turns[conversation])]
        requests.append(ids(*system, *own[:24]))
    return requests


def fifo_hits(requests: list[eviction.Request], capacity_blocks: int) -> int:
    """Usable hits of FIFO by blocks, tail in first."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        blocks = request.tolist()
        leading = next((i for i, block in enumerate(blocks) if block not in cached), len(blocks))
        hits += leading
        for block in reversed(blocks):
            if block not in cached:
                cached[block] = None
                if len(cached) > capacity_blocks:
                    cached.popitem(last=False)
    return hits


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("capacity_blocks", [50, 200, 800])
def test_every_policy_lies_between_fifo_and_belady(name: str, capacity_blocks: int) -> None:
    requests = zipf_requests(3000, seed=7)
    hits = eviction.policy_hits(name, requests, capacity_blocks)
    assert fifo_hits(requests, capacity_blocks) <= hits
    assert hits <= eviction.belady_hits(requests, capacity_blocks)


def test_belady_keeps_what_is_needed_soonest() -> None:
    requests = [ids(1), ids(2), ids(3), ids(2), ids(1)]
    assert eviction.belady_hits(requests, 1) == 1
    assert eviction.belady_hits(requests, 2) == 2
    assert eviction.belady_hits([ids(1, 2, 3), ids(9), ids(1, 2, 3)], 2) == 2


def test_bench_prints_figures_against_lru(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "small.jsonl"
    lines = [json.dumps({"hash_ids": request.tolist()}) for request in zipf_requests(50, seed=1)]
    trace.write_text("\n".join(lines), encoding="utf-8")
    assert eviction.main([str(trace), "--capacities", "20,40", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert len(figures) == 2 * (len(ALL) + 1)
    assert {figure["against"] for figure in figures} == {"lru"}
    ratios = {figure["name"]: figure["ratio"] for figure in figures}
    assert ratios["hit_ratio.small.lru.20"] == 1
    assert ratios["hit_ratio.small.belady.40"] >= 1

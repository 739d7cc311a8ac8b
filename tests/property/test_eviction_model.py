"""Proves that every eviction policy keeps the contract of csrc/core/eviction.h.

Each policy runs as a Hypothesis state machine beside a set of known slots and a set of parked ones.
After every step the sizes agree. A pop returns a slot that may leave, or nothing when none of the
queued slots may; every slot that it asks about and may not have is parked, and is not asked about
again until it is due or used. At the end everything may leave, and every known slot comes out once.
LRU is also compared with an exact model of its order.

The simulator stays within its capacity and finds only what it was shown.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore import _native

NUM_SLOTS = 12
SLOTS = st.integers(0, NUM_SLOTS - 1)
# Few keys, so that blocks come back while they are remembered.
KEYS = st.integers(0, 7).map(lambda small: small * 0x2492492492492492)


class PolicyMachine(RuleBasedStateMachine):
    name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.policy = _native.EvictionPolicy(self.name, NUM_SLOTS)
        self.queued: list[int] = []  # oldest first; exact for LRU only
        self.parked: set[int] = set()
        self.due: list[int] = []  # next candidate last
        self.credit = 0  # how many times a slot may be asked about
        self.may_leave = np.ones(NUM_SLOTS, dtype=np.bool_)

    def known(self) -> set[int]:
        return {*self.queued, *self.parked, *self.due}

    def forget(self, slot: int) -> None:
        for order in (self.queued, self.due):
            if slot in order:
                order.remove(slot)
        self.parked.discard(slot)

    @precondition(lambda self: len(self.known()) < NUM_SLOTS)
    @rule(data=st.data(), key=KEYS)
    def add(self, data: st.DataObject, key: int) -> None:
        slot = data.draw(st.sampled_from(sorted(set(range(NUM_SLOTS)) - self.known())))
        self.policy.add(slot, key)
        self.queued.append(slot)
        self.credit += 1

    @rule(slot=SLOTS)
    def touch(self, slot: int) -> None:
        self.policy.touch(slot)
        if slot in self.known():
            self.forget(slot)
            self.queued.append(slot)
            self.credit += 1

    @rule(slot=SLOTS)
    def remove(self, slot: int) -> None:
        self.policy.remove(slot)
        self.forget(slot)

    @rule(slot=SLOTS)
    def hold(self, slot: int) -> None:
        self.may_leave[slot] = False

    @rule(slot=SLOTS)
    def release(self, slot: int) -> None:
        self.may_leave[slot] = True
        self.due_again(slot)

    @rule(slot=SLOTS)
    def due_again(self, slot: int) -> None:
        self.policy.due(slot)
        if slot in self.parked:
            self.parked.discard(slot)
            self.due.append(slot)
            self.credit += 1

    @rule()
    def pop(self) -> None:
        self.pop_one()

    def pop_one(self) -> int | None:
        asked: list[int] = []

        def evictable(slot: int) -> bool:
            asked.append(slot)
            return bool(self.may_leave[slot])

        victim = self.policy.pop_victim(evictable)
        candidates = [*self.queued, *self.due]
        due_first = list(reversed(self.due))
        assert asked[: len(due_first)] == due_first[: len(asked)]
        assert len(set(asked)) == len(asked)
        assert set(asked) <= set(candidates)
        for slot in asked:
            self.forget(slot)
            if slot != victim:
                assert not self.may_leave[slot]
                self.parked.add(slot)
        if victim is None:
            assert set(asked) == set(candidates)
        else:
            assert victim == asked[-1]
            assert self.may_leave[victim]
        self.credit -= len(asked)
        assert self.credit >= 0
        return victim

    @invariant()
    def sizes_agree(self) -> None:
        assert self.policy.size == len(self.known())

    def teardown(self) -> None:
        self.may_leave[:] = True
        for slot in sorted(self.parked):
            self.due_again(slot)
        left = self.known()
        came_out = [self.pop_one() for _ in left]
        assert set(came_out) == left
        assert self.pop_one() is None
        assert self.policy.size == 0


class LruMachine(PolicyMachine):
    """The same, with the exact order: due slots, the latest first, then the least recently used."""

    def pop_one(self) -> int | None:
        order = [*reversed(self.due), *self.queued]
        expected = next((slot for slot in order if self.may_leave[slot]), None)
        victim = super().pop_one()
        assert victim == expected
        return victim


def machine_for(name: str) -> type[PolicyMachine]:
    base = LruMachine if name == "lru" else PolicyMachine
    return type(f"{name}_machine", (base,), {"name": name})


@pytest.mark.parametrize("name", _native.eviction_policy_names())
def test_policy_agrees_with_its_model(name: str) -> None:
    case: Any = machine_for(name).TestCase
    case.settings = settings(deadline=None, max_examples=60, stateful_step_count=60)
    case().runTest()


def prefix_ids(tokens: list[int]) -> list[int]:
    """Numbers the prefixes of a path in a ternary tree: equal ids are equal prefixes."""
    ids, node = [], 0
    for token in tokens:
        node = node * 3 + token + 1
        ids.append(node)
    return ids


PATHS = st.lists(st.integers(0, 2), min_size=0, max_size=7).map(prefix_ids)


@pytest.mark.parametrize("name", _native.eviction_policy_names())
@given(requests=st.lists(PATHS, max_size=60), capacity=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_simulator_stays_within_capacity_and_finds_only_what_it_has_seen(
    name: str, requests: list[list[int]], capacity: int
) -> None:
    simulator = _native.PolicySimulator(name, capacity)
    seen: set[int] = set()
    for ids in requests:
        array = np.array(ids, dtype=np.uint64)
        assert seen.issuperset(ids[: simulator.request(array)])
        assert simulator.resident <= capacity
        seen.update(ids[:capacity])
        # Whatever a request brought is found by the same request at once.
        assert simulator.request(array) == min(len(ids), capacity)


@pytest.mark.parametrize("name", _native.eviction_policy_names())
@given(requests=st.lists(PATHS, max_size=60))
@settings(deadline=None, max_examples=30)
def test_nothing_leaves_while_there_is_room(name: str, requests: list[list[int]]) -> None:
    simulator = _native.PolicySimulator(name, 4096)
    seen: set[int] = set()
    for ids in requests:
        expected = sum(block in seen for block in ids)
        assert simulator.request(np.array(ids, dtype=np.uint64)) == expected
        seen.update(ids)
    assert simulator.evictions == 0
    assert simulator.resident == len(seen)


@pytest.mark.parametrize("name", _native.eviction_policy_names())
@given(
    parents=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    uses=st.lists(st.integers(0, 29), max_size=60),
    head_first=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_tree_drains_leaves_first_and_asks_at_most_twice_a_slot(
    name: str, parents: list[int], uses: list[int], head_first: bool
) -> None:
    size = len(parents)
    parent = [choice % slot if slot else None for slot, choice in enumerate(parents)]
    children = [0] * size
    policy = _native.EvictionPolicy(name, size)
    for slot in range(size) if head_first else reversed(range(size)):
        policy.add(slot, slot << 40)
    for above in parent:
        if above is not None:
            children[above] += 1
    for slot in uses:
        policy.touch(slot % size)
    asked = 0

    def evictable(slot: int) -> bool:
        nonlocal asked
        asked += 1
        return children[slot] == 0

    left: set[int] = set()
    while (victim := policy.pop_victim(evictable)) is not None:
        left.add(victim)
        above = parent[victim]
        if above is not None:
            assert above not in left
            children[above] -= 1
            if children[above] == 0:
                policy.due(above)
    assert left == set(range(size))
    assert asked <= 2 * size

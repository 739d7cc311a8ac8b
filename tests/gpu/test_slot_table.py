"""Proves that the table of a GPU pool's slots keeps its rules, against a model made of dicts.

The model knows blocks by hash only. After each step: no slot has two blocks, no block of a chain is
there without the one before it, what is used stays, and what the table finds the model has.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore import BlockHashes, hash_blocks
from kvstore.gpu.slots import NO_SPACE, ORPHAN, PENDING, PRESENT, RESERVED, SlotState, SlotTable

SLOTS = 6


def chain(seed: int, num_blocks: int) -> BlockHashes:
    """Chains of seeds 0 to 2 share their first two blocks."""
    shared = hash_blocks(np.arange(8, dtype=np.int64), 4)
    own = hash_blocks(np.arange(40, dtype=np.int64) + 1000 * (seed + 1), 4, parent=shared)
    return (shared + own)[:num_blocks]


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(SLOTS, "lru")
        self.filling: list[np.ndarray] = []  # slots of reservations
        self.uses: list[tuple[np.ndarray, list[bytes]]] = []
        self.hash_at: dict[int, bytes] = {}  # what was last reserved there
        self.ready: set[bytes] = set()  # what may be there: committed and not removed since
        self.parent: dict[bytes, bytes] = {}

    @rule(seed=st.integers(0, 2), begin=st.integers(0, 3), size=st.integers(0, 8))
    def reserve(self, seed: int, begin: int, size: int) -> None:
        part = chain(seed, begin + size)[begin:]
        found = self.table.reserve(part)
        used = {int(slot) for slots, _ in self.uses for slot in slots}
        taken = {int(slot) for slots in self.filling for slot in slots}
        for status, slot, block_hash in zip(found.statuses, found.slots, part, strict=True):
            assert (status == RESERVED) == (slot >= 0)
            if status == RESERVED:
                assert int(slot) not in used | taken, "a slot that is in use was given away"
                self.hash_at[int(slot)] = block_hash
                self.ready.discard(block_hash)
            elif status == PRESENT:
                assert block_hash in self.ready
        for i in range(1, len(part)):
            self.parent[part[i]] = part[i - 1]
        if begin and part.parent is not None and len(part):
            self.parent[part[0]] = part.parent
        order = [int(s) for s in found.statuses]
        for i, status in enumerate(order):
            if status in (NO_SPACE, ORPHAN):
                assert set(order[i:]) == {status}
                break
            assert status in (RESERVED, PRESENT, PENDING)
        if len(found.new):
            self.filling.append(found.new)

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), keep=st.booleans())
    def end_reservation(self, data: st.DataObject, keep: bool) -> None:
        slots = self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1)))
        if keep:
            live = [s for s in slots if self.table._states[s] == SlotState.FILLING]
            self.ready |= {self.hash_at[int(s)] for s in live}
            self.table.commit(slots, None)
        else:
            self.table.abort(slots, None)

    @rule(seed=st.integers(0, 2), size=st.integers(1, 10))
    def use(self, seed: int, size: int) -> None:
        part = chain(seed, size)
        slots = self.table.use(part)
        assert len(slots) == self.table.match(part)
        for slot, block_hash in zip(slots, part, strict=False):
            assert self.hash_at[int(slot)] == block_hash
            assert block_hash in self.ready
        if len(slots):
            self.uses.append((slots, list(part[: len(slots)])))

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def unuse(self, data: st.DataObject) -> None:
        slots, _ = self.uses.pop(data.draw(st.integers(0, len(self.uses) - 1)))
        self.table.unuse(map(int, slots), None)

    @rule(seed=st.integers(0, 2), at=st.integers(0, 9))
    def remove(self, seed: int, at: int) -> None:
        self.table.remove(chain(seed, at + 1)[at:])
        assert chain(seed, at + 1)[at] not in self.table._slot_of

    @rule()
    def clear(self) -> None:
        self.table.clear()
        assert len(self.table) == 0

    @invariant()
    def slots_are_accounted_for(self) -> None:
        table = self.table
        states = [SlotState(int(s)) for s in table._states]
        assert sorted(table._free) == [i for i, s in enumerate(states) if s == SlotState.FREE]
        found = list(table._slot_of.values())
        assert len(set(found)) == len(found)
        assert set(found) == {
            i for i, s in enumerate(states) if s in (SlotState.FILLING, SlotState.READY)
        }
        assert table._policy.size == states.count(SlotState.READY)

    @invariant()
    def no_block_is_without_the_one_before(self) -> None:
        for block_hash in self.table._slot_of:
            before = self.parent.get(block_hash)
            assert before is None or before in self.table._slot_of

    @invariant()
    def what_is_used_stays(self) -> None:
        for slots, hashes in self.uses:
            for slot, block_hash in zip(slots, hashes, strict=True):
                assert self.hash_at[int(slot)] == block_hash
                assert self.table._states[slot] in (SlotState.READY, SlotState.LEAVING)

    def teardown(self) -> None:
        for slots in self.filling:
            self.table.abort(slots, None)
        for slots, _ in self.uses:
            self.table.unuse(map(int, slots), None)
        self.table.clear()
        assert len(self.table._free) == SLOTS
        assert not self.table._uses.any()


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestSlotTable = Machine.TestCase


def test_leaves_go_first_and_what_was_used_last_stays() -> None:
    table = SlotTable(4)
    long, other = chain(0, 3), chain(1, 4)
    table.commit(table.reserve(long).new, None)
    found = table.reserve(other)
    assert found.statuses.tolist() == [PRESENT, PRESENT, RESERVED, RESERVED]
    table.commit(found.new, None)
    assert table.match(other) == 4
    assert table.match(long) == 2
    assert table.num_evicted == 1


def test_a_pool_in_use_has_no_space() -> None:
    table = SlotTable(2)
    table.commit(table.reserve(chain(0, 2)).new, None)
    slots = table.use(chain(0, 2))
    statuses = table.reserve(chain(0, 4)).statuses.tolist()
    assert statuses == [PRESENT, PRESENT, NO_SPACE, NO_SPACE]
    table.unuse(slots, None)
    assert table.reserve(chain(0, 4)[2:]).statuses.tolist() == [NO_SPACE] * 2, "its own prefix"


@pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo", "mq"])
def test_blocks_without_a_chain_are_kept_one_by_one(policy: str) -> None:
    table = SlotTable(2, policy)
    for i in range(4):
        single = BlockHashes.of([bytes([i]) * 32])
        found = table.reserve(single)
        assert found.statuses.tolist() == [RESERVED]
        table.commit(found.new, None)
        assert table.match(single) == 1
    assert table.num_evicted == 2

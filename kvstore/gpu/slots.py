"""SlotTable: which block is in which slot of a pool of GPU memory.

The rules are those of the store (csrc/core/store_core.h): a linked block is kept only while the
block before it is, so blocks leave leaves first; a block that is used stays; one that is removed
while it is used is found no more, and leaves when its last use ends.

        FREE --reserve--> FILLING --commit--> READY --evict, remove--> FREE
                             |                   \\--remove, in use--> LEAVING --unused--> FREE
                             \\--abort--> FREE (or LEAVING: what continues it goes along)

Bytes are moved by streams that the table knows nothing of, but for two things it keeps for each
slot: the event after which its bytes are there, and those after which nobody uses them any more.
Who reads waits for the first, who writes for the others; both on their streams, not on the CPU.

A GPU's pool has thousands of slots, not millions: a dict by hash and loops over a batch in Python
cost about a microsecond a block.

Thread safety: none; its owner holds a lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.gpu.device import Event


class SlotState(IntEnum):
    FREE = 0
    FILLING = 1
    READY = 2
    LEAVING = 3


# As csrc/core/store_core.h's ReserveStatus.
RESERVED, PRESENT, PENDING, NO_SPACE, ORPHAN = range(5)
NO_SLOT: Final = -1
Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Reserved:
    """`statuses[i]` of block i; `slots[i]` is its slot where that is RESERVED, else NO_SLOT."""

    statuses: npt.NDArray[np.uint8]
    slots: Slots

    @property
    def new(self) -> Slots:
        """The slots to be filled."""
        new: Slots = self.slots[self.statuses == RESERVED]
        return new


class SlotTable:
    """See the top."""

    def __init__(self, num_slots: int, policy: str = "lru") -> None:
        self.num_slots = num_slots
        self.num_evicted = 0
        self._policy = _native.EvictionPolicy(policy, num_slots)
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}  # FILLING and READY
        self._hash_of: list[bytes] = [b""] * num_slots
        self._states = np.zeros(num_slots, np.uint8)
        self._uses = np.zeros(num_slots, np.int64)
        self._parents = np.full(num_slots, NO_SLOT, np.int64)
        self._children: list[set[int]] = [set() for _ in range(num_slots)]
        self._filled: list[Event | None] = [None] * num_slots
        self._used: list[list[Event]] = [[] for _ in range(num_slots)]

    def __len__(self) -> int:
        return len(self._slot_of)

    # --- reading

    def match(self, hashes: BlockHashes) -> int:
        """Return how many leading blocks are ready."""
        count = 0
        for block_hash in hashes:
            if not self._is_ready(block_hash):
                break
            count += 1
        return count

    def use(self, hashes: BlockHashes) -> Slots:
        """Return the slots of the leading ready blocks, which stay until `unuse`."""
        slots = np.array(
            [self._slot_of[block_hash] for block_hash in hashes[: self.match(hashes)]], np.int64
        )
        self._uses[slots] += 1
        # Tail first: no block is then more recent than the ones before it.
        self._policy.touch_all(slots[::-1].astype(np.uint32))
        return slots

    def hold(self, slots: Slots) -> None:
        """Begin one more use of slots that are used already."""
        self._uses[slots] += 1

    def unuse(self, slots: Iterable[int], after: Event | None) -> None:
        """End a use; `after`: the event behind the last access."""
        for slot in slots:
            self._uses[slot] -= 1
            if after is not None:
                self._used[slot] = [e for e in self._used[slot] if not e.done()] + [after]
            if self._uses[slot] == 0:
                if self._states[slot] == SlotState.LEAVING:
                    self._release(slot)
                elif not self._children[slot]:
                    self._policy.due(slot)

    def fill_events(self, slots: Iterable[int]) -> list[Event]:
        """What a stream has to wait for before it reads these slots."""
        return _distinct(event for slot in slots if (event := self._filled[slot]) is not None)

    def use_events(self, slots: Iterable[int]) -> list[Event]:
        """What a stream has to wait for before it writes these slots."""
        return _distinct(event for slot in slots for event in self._used[slot])

    # --- writing

    def reserve(self, hashes: BlockHashes) -> Reserved:
        """Take a slot for each block that is not there; after the first without, for none.

        Slots that are taken count as used until `commit` or `abort`.
        """
        count = len(hashes)
        statuses = np.full(count, ORPHAN, np.uint8)
        slots = np.full(count, NO_SLOT, np.int64)
        parent = self._parent_of(hashes)
        held: list[int] = []  # what must not be evicted for the blocks that continue it
        if parent is not None and parent != NO_SLOT:
            self._uses[parent] += 1
            held.append(parent)
        for i, block_hash in enumerate(hashes):
            if parent is None:
                break
            known = self._slot_of.get(block_hash)
            if known is not None:
                is_ready = self._states[known] == SlotState.READY
                statuses[i] = PRESENT if is_ready else PENDING
            else:
                known = self._take()
                if known is None:
                    statuses[i:] = NO_SPACE
                    break
                self._enter(known, block_hash, parent)
                statuses[i], slots[i] = RESERVED, known
            self._uses[known] += 1
            held.append(known)
            parent = known if hashes.linked else NO_SLOT
        fresh = set(slots.tolist())
        self.unuse([slot for slot in held if slot not in fresh], None)
        return Reserved(statuses, slots)

    def commit(self, slots: Sequence[int] | Slots, filled: Event | None) -> None:
        """Blocks may be found from now on; their bytes are there after `filled`."""
        for slot in map(int, slots):
            self._filled[slot] = filled
            if self._states[slot] == SlotState.FILLING:
                self._states[slot] = SlotState.READY
                key = int.from_bytes(self._hash_of[slot][:8], "little")
                self._policy.add(slot, key)
        self.unuse(map(int, slots), filled)

    def abort(self, slots: Sequence[int] | Slots, after: Event | None) -> None:
        """Give slots back, with what continues them; `after`: the event behind the last access."""
        for slot in map(int, slots):
            if self._states[slot] == SlotState.FILLING:
                self._drop(slot)
        self.unuse(map(int, slots), after)

    def remove(self, hashes: BlockHashes) -> int:
        """Remove blocks, and with each all that continue it; return how many were ready."""
        count = 0
        for block_hash in hashes:
            slot = self._slot_of.get(block_hash)
            if slot is not None:
                count += int(self._states[slot] == SlotState.READY)
                self._drop(slot)
        return count

    def clear(self) -> None:
        for slot in list(self._slot_of.values()):
            if self._states[slot] in (SlotState.FILLING, SlotState.READY):
                self._drop(slot)

    # ---

    def _is_ready(self, block_hash: bytes) -> bool:
        slot = self._slot_of.get(block_hash)
        return slot is not None and bool(self._states[slot] == SlotState.READY)

    def _parent_of(self, hashes: BlockHashes) -> int | None:
        """The slot of the block before the first; NO_SLOT: it needs none; None: it is missing."""
        if not hashes.linked or hashes.start == 0:
            return NO_SLOT
        return self._slot_of.get(hashes.parent or b"")

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        slot = self._policy.pop_victim(self._may_leave)
        if slot is None:
            return None
        self.num_evicted += 1
        self._unlink(slot)
        return slot

    def _may_leave(self, slot: int) -> bool:
        return bool(self._uses[slot] == 0) and not self._children[slot]

    def _enter(self, slot: int, block_hash: bytes, parent: int) -> None:
        self._slot_of[block_hash] = slot
        self._hash_of[slot] = block_hash
        self._states[slot] = SlotState.FILLING
        self._parents[slot] = parent
        self._filled[slot] = None
        if parent != NO_SLOT:
            self._children[parent].add(slot)

    def _unlink(self, slot: int) -> None:
        """It is found no more, and nothing before it waits for it."""
        if self._slot_of.get(self._hash_of[slot]) == slot:
            del self._slot_of[self._hash_of[slot]]
        parent = int(self._parents[slot])
        self._parents[slot] = NO_SLOT
        if parent != NO_SLOT:
            self._children[parent].discard(slot)
            if self._may_leave(parent):
                self._policy.due(parent)

    def _drop(self, slot: int) -> None:
        """Remove a block and what continues it, the last first."""
        todo = [slot]
        for each in todo:
            todo.extend(self._children[each])
        for each in reversed(todo):
            self._policy.remove(each)
            self._unlink(each)
            self._states[each] = SlotState.LEAVING
            if self._uses[each] == 0:
                self._release(each)

    def _release(self, slot: int) -> None:
        self._states[slot] = SlotState.FREE
        self._free.append(slot)


def _distinct(events: Iterable[Event]) -> list[Event]:
    return list({id(event): event for event in events if not event.done()}.values())

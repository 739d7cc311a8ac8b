"""The side that computes: one request's full blocks go out layer by layer while the next are made.

A state machine without threads: whoever drives it calls, and sends the messages that it returns, in
their order. `poll` collects the moves that have ended.

    OPEN    layers come in by `add` and go out
    ENDING  failed or stopped: no new moves; those under way end, each by its timeout
    OVER    none of our memory is read for it any more: the pages may be reused

Push: moves are never cancelled, because a cancelled one may leave memory that is not settled (see
`kvstore.transport`) and a link that others use too would have to be closed; they end by themselves.
After a move that was late or lost the link is closed, as that alone settles it.
Pull: pages stay until the receiver stops, or the lease ends. What it reads after that fails its
checksum.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.errors import KVStoreError
from kvstore.transport.handoff.messages import (
    Computed,
    Ended,
    Failed,
    Grant,
    HandoffMessage,
    Offer,
    Ready,
    Stop,
)
from kvstore.transport.handoff.party import (
    U64,
    Direction,
    LinkLike,
    MoveLike,
    Party,
    checksums_of,
    pack_checksums,
    piece_lengths,
    pieces,
    same_shape,
)
from kvstore.transport.types import Batch, Status

RESENDS_MAX = 2  # of a batch of which a piece arrived damaged
CLOSE_SECONDS = 0.05  # what one poll may wait for a link to settle
UNSETTLED = (Status.LOST, Status.LATE, Status.CANCELLED)


class SenderState(enum.Enum):
    OPEN = enum.auto()
    ENDING = enum.auto()
    OVER = enum.auto()


@dataclass(frozen=True)
class _Part:
    """A layer of consecutive blocks."""

    layer: int
    first_block: int
    pages: list[int]
    resends: int = 0


@dataclass(frozen=True)
class _Write:
    move: MoveLike
    part: _Part
    checksums: U64
    first_slot: int | None  # of our staging memory, where it is encoded
    num_bytes: int


class Sender:
    """Not thread-safe. Messages go out in the order in which they are returned."""

    def __init__(
        self, direction: Direction, party: Party, num_blocks: int, *, lease_s: float
    ) -> None:
        assert num_blocks > 0
        self.state = SenderState.OPEN
        self.failure = ""
        self.wire_bytes = 0  # that were written; what a receiver reads, it counts
        self._direction = direction
        self._party = party
        self._num_blocks = num_blocks
        self._added = [0] * party.layout.num_layers  # leading blocks of each layer
        self._written = 0  # layers of blocks
        self._lease_end = party.clock() + lease_s
        self._grant: Grant | None = None
        self._link: LinkLike | None = None
        self._waiting: list[_Part] = []
        self._writes: list[_Write] = []
        self._staged: list[tuple[int, int]] = []  # slots that may be read until this is over
        self._must_close = False
        self._has_peer = True

    @property
    def is_over(self) -> bool:
        return self.state is SenderState.OVER

    @property
    def mover(self) -> str:
        """Of our own writes; empty where the receiver reads."""
        return self._link.mover if self._link is not None else ""

    @property
    def is_computed(self) -> bool:
        return min(self._added) == self._num_blocks

    # --- what happens

    def start(self) -> list[HandoffMessage]:
        if self._direction is Direction.PUSH:
            return []
        party = self._party
        wire = party.wire.info(0) if party.wire is not None else None
        return [Offer(party.endpoint, party.layout, wire)]

    def add(self, layer: int, first_block: int, pages: Sequence[int]) -> list[HandoffMessage]:
        """These blocks' layer is in these pages, and stays there until this is over.

        What was added before (a request that was preempted computes it again) is left out.
        REQUIRES: no block before it is missing.
        """
        have = self._added[layer]
        end = min(first_block + len(pages), self._num_blocks)
        if self.state is not SenderState.OPEN or end <= have:
            return []
        assert first_block <= have, f"layer {layer}: blocks {have} to {first_block} are missing"
        self._added[layer] = end
        part = _Part(layer, have, list(pages[have - first_block : end - first_block]))
        out: list[HandoffMessage] = []
        if self._direction is Direction.PULL:
            out += self._offer(part)
        elif self._grant is None:
            self._waiting.append(part)
        else:
            out += self._write(part)
        if self.is_computed and self.state is SenderState.OPEN:
            out.append(Computed())
        return out

    def take(self, message: Grant | Stop) -> list[HandoffMessage]:
        if isinstance(message, Grant):
            return self._take_grant(message)
        if self.state is SenderState.OPEN:
            self._close(message.reason)
        return self._end_if_settled()

    def stop(self, reason: str) -> list[HandoffMessage]:
        """The caller gives up."""
        return self._fail(reason) + self._end_if_settled()

    def receiver_lost(self) -> list[HandoffMessage]:
        """Nobody listens any more."""
        self._has_peer = False
        if self.state is SenderState.OPEN:
            self._close("the receiver is gone")
        return self._end_if_settled()

    def poll(self) -> list[HandoffMessage]:
        """Collect what has ended."""
        out: list[HandoffMessage] = []
        ended = [write for write in self._writes if write.move.done()]
        if ended:
            self._writes = [write for write in self._writes if write not in ended]
        for write in ended:
            out += self._finish(write)
        if self.state is SenderState.OPEN and self._party.clock() >= self._lease_end:
            out += self._fail("the lease of its pages ended")
        return out + self._end_if_settled()

    # --- push

    def _take_grant(self, grant: Grant) -> list[HandoffMessage]:
        if self.state is not SenderState.OPEN or self._grant is not None:
            return []
        difference = same_shape(self._party.layout, grant.layout)
        if self._direction is not Direction.PUSH:
            difference = "a grant, but the receiver is to read"
        elif len(grant.pages) != self._num_blocks:
            difference = f"{len(grant.pages)} pages for {self._num_blocks} blocks"
        elif not all(0 <= page < 1 << 40 for page in grant.pages):
            difference = "a page that is none"
        if difference:
            return self._fail(f"the receiver granted {difference}") + self._end_if_settled()
        try:
            self._link = self._party.connect(grant.endpoint)
        except KVStoreError as error:
            return self._fail(str(error)) + self._end_if_settled()
        self._grant = grant
        out: list[HandoffMessage] = []
        waiting, self._waiting = self._waiting, []
        for part in waiting:
            out += self._write(part)
        return out

    def _write(self, part: _Part) -> list[HandoffMessage]:
        party, grant, link = self._party, self._grant, self._link
        if self.state is not SenderState.OPEN:
            return []
        assert grant is not None
        assert link is not None
        local = pieces(party.layout, party.address, part.layer, part.pages)
        count, first_slot = len(part.pages), None
        if party.wire is not None and grant.wire is not None and party.wire.suits(grant.wire):
            first_slot = party.wire.encode(local)
        if first_slot is None:
            theirs = grant.pages[part.first_block : part.first_block + count]
            region, remote = grant.layout.region_id, pieces(grant.layout, 0, part.layer, theirs)
            lengths = piece_lengths(party.layout, count)
        else:
            assert party.wire is not None
            assert grant.wire is not None
            local = party.wire.addresses(first_slot, count)
            slots = part.layer * self._num_blocks + part.first_block
            steps = np.arange(slots, slots + count, dtype=np.uint64)
            region = grant.wire.region_id
            remote = steps * np.uint64(grant.wire.stride) + np.uint64(grant.wire.offset)
            lengths = np.full(count, party.wire.slot_bytes, np.uint64)
        checksums = checksums_of(local, lengths)
        batch = Batch(local, remote, lengths, checksums)
        try:
            move = link.submit_write(region, batch, timeout=party.move_timeout_s)
        except KVStoreError as error:
            self._give_slots(first_slot, count)
            return self._fail(str(error))
        self._writes.append(_Write(move, part, checksums, first_slot, int(lengths.sum())))
        move.when_done(party.on_progress)
        return []

    def _finish(self, write: _Write) -> list[HandoffMessage]:
        statuses = write.move.wait()
        part = write.part
        worst = {Status(status) for status in set(statuses.tolist())} - {Status.OK}
        if worst & set(UNSETTLED):
            self._must_close = True
            if write.first_slot is not None:
                self._staged.append((write.first_slot, len(part.pages)))
        else:
            self._give_slots(write.first_slot, len(part.pages))
        if self.state is not SenderState.OPEN:
            return []
        if worst == {Status.DAMAGED} and part.resends < RESENDS_MAX:
            return self._write(_Part(part.layer, part.first_block, part.pages, part.resends + 1))
        if worst:
            names = ", ".join(sorted(status.name for status in worst))
            return self._fail(f"layer {part.layer} could not be written: {names}")
        self.wire_bytes += write.num_bytes
        self._written += len(part.pages)
        sums = pack_checksums(write.checksums)
        return [
            Ready(
                part.layer,
                part.first_block,
                len(part.pages),
                sums,
                is_encoded=write.first_slot is not None,
            )
        ]

    # --- pull

    def _offer(self, part: _Part) -> list[HandoffMessage]:
        party = self._party
        local = pieces(party.layout, party.address, part.layer, part.pages)
        lengths = piece_lengths(party.layout, len(part.pages))
        places = part.pages
        first_slot = party.wire.encode(local) if party.wire is not None else None
        if first_slot is not None:
            assert party.wire is not None
            self._staged.append((first_slot, len(part.pages)))
            local = party.wire.addresses(first_slot, len(part.pages))
            lengths = np.full(len(part.pages), party.wire.slot_bytes, np.uint64)
            places = list(range(first_slot, first_slot + len(part.pages)))
        sums = pack_checksums(checksums_of(local, lengths))
        is_encoded = first_slot is not None
        return [Ready(part.layer, part.first_block, len(part.pages), sums, places, is_encoded)]

    # --- the end

    def _fail(self, reason: str) -> list[HandoffMessage]:
        if self.state is not SenderState.OPEN:
            return []
        self._close(reason)
        return [Failed(reason)] if self._has_peer else []

    def _close(self, reason: str) -> None:
        self.state = SenderState.ENDING
        self.failure = reason
        self._waiting.clear()

    def _end_if_settled(self) -> list[HandoffMessage]:
        everything = self._num_blocks * len(self._added)
        is_done = self.state is SenderState.ENDING or self._written == everything
        if self.is_over or not is_done or self._writes:
            return []
        if self._must_close and self._link is not None:
            if not self._link.close(CLOSE_SECONDS):
                return []
            self._must_close = False
        self.state = SenderState.OVER
        for first, count in self._staged:
            self._give_slots(first, count)
        self._staged.clear()
        return [Ended()] if self._has_peer else []

    def _give_slots(self, first: int | None, count: int) -> None:
        if first is not None and self._party.wire is not None:
            self._party.wire.slots.give(first, count)

"""The side that goes on with what another computed: one request's full blocks come into its pages.

A state machine without threads: whoever drives it calls, and sends the messages that it returns, in
their order. `poll` collects the moves that have ended, and keeps the deadline.

What holds:
  * a block's layer counts as arrived only after its checksum was verified here;
  * the pages may be used for something else only when `is_settled`, however this ended. Push: when
    all of them have arrived, or the sender said Ended, or it died `death_grace_s` ago. Pull: when
    our own reads have ended; after a late or lost one, when the link is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.errors import KVStoreError
from kvstore.transport.handoff.messages import (
    Computed,
    Ended,
    Failed,
    Grant,
    HandoffMessage,
    Layout,
    Offer,
    Ready,
    Stop,
    ToReceiver,
    WireInfo,
)
from kvstore.transport.handoff.party import (
    U64,
    Direction,
    LinkLike,
    MoveLike,
    Party,
    checksums_of,
    piece_lengths,
    pieces,
    same_shape,
    unpack_checksums,
)
from kvstore.transport.handoff.sender import CLOSE_SECONDS, UNSETTLED
from kvstore.transport.types import Batch, Status


@dataclass(frozen=True)
class _Read:
    move: MoveLike
    ready: Ready
    local: U64
    lengths: U64
    first_slot: int | None


class Receiver:
    """Not thread-safe. Messages go out in the order in which they are returned.

    Args:
        pages: where block i goes; they belong to this until `is_settled`.
        deadline: of the party's clock; it is stopped then. May be set later.
    """

    def __init__(
        self,
        direction: Direction,
        party: Party,
        pages: Sequence[int],
        deadline: float = float("inf"),
    ) -> None:
        assert pages
        self.failure = ""  # why what has not arrived will not come; empty: it may
        self.deadline = deadline
        self.bytes_arrived = 0  # as they came over the wire, verified
        self.bytes_before_computed = 0  # of those: before the sender had computed everything
        self.computed_at: float | None = None
        self.completed_at: float | None = None
        self._direction = direction
        self._party = party
        self._pages = list(pages)
        self._arrived = np.zeros((party.layout.num_layers, len(pages)), np.bool_)
        self._link: LinkLike | None = None
        self._offer: Offer | None = None
        self._reads: list[_Read] = []
        self._deferred: list[Ready] = []  # encoded ones, until there are slots
        self._first_slot: int | None = None  # push: the run that was granted
        self._must_close = False
        self._unsettled_slots: list[tuple[int, int]] = []
        self._sender_ended = direction is Direction.PULL  # it never writes here
        self._sender_died_at: float | None = None

    # --- how it stands

    @property
    def is_complete(self) -> bool:
        return bool(self._arrived.all())

    @property
    def layers_ready(self) -> int:
        """Leading layers that have arrived whole."""
        return _leading(self._arrived.all(axis=1))

    @property
    def blocks_ready(self) -> int:
        """Leading blocks of which all layers have arrived."""
        return _leading(self._arrived.all(axis=0))

    @property
    def mover(self) -> str:
        """Of our own reads; empty where the sender writes."""
        return self._link.mover if self._link is not None else ""

    @property
    def is_settled(self) -> bool:
        """Nobody writes to the pages any more."""
        if self._reads or self._must_close:
            return False
        if not (self.is_complete or self.failure):
            return False
        return self.is_complete or self._sender_ended or self._death_is_past()

    def _death_is_past(self) -> bool:
        died = self._sender_died_at
        return died is not None and self._party.clock() >= died + self._party.death_grace_s

    # --- what happens

    def start(self) -> list[HandoffMessage]:
        if self._direction is Direction.PULL:
            return []
        party, wire = self._party, None
        if party.wire is not None:
            self._first_slot = party.wire.slots.take(self._arrived.size)
            if self._first_slot is not None:
                wire = party.wire.info(self._first_slot)
        return [Grant(party.endpoint, party.layout, self._pages, wire)]

    def take(self, message: ToReceiver) -> list[HandoffMessage]:
        out: list[HandoffMessage] = []
        if isinstance(message, Ended):
            self._sender_ended = True
            if not self.is_complete and not self._reads and not self._deferred:
                self.failure = self.failure or "the sender ended before everything had come"
        elif self.failure:
            pass
        elif isinstance(message, Failed):
            self.failure = f"the sender failed: {message.reason}"
            if self._direction is Direction.PULL:
                self._deferred.clear()
        elif isinstance(message, Computed):
            self.computed_at = self._party.clock()
        elif isinstance(message, Offer):
            out = self._take_offer(message)
        else:
            out = self._take_ready(message)
        self._give_slots()
        return out

    def abandon(self, reason: str) -> list[HandoffMessage]:
        """What has not arrived is not wanted any more."""
        if self.is_complete or self.failure:
            return []
        self.failure = reason
        self._deferred.clear()
        self._give_slots()
        return [Stop(reason)]

    def sender_lost(self) -> None:
        """Its process is dead: call this only when that is certain."""
        if self._sender_died_at is None:
            self._sender_died_at = self._party.clock()
        if not self.is_complete:
            self.failure = self.failure or "the sender is gone"
            self._deferred.clear()

    def poll(self) -> list[HandoffMessage]:
        """Collect what has ended."""
        out: list[HandoffMessage] = []
        ended = [read for read in self._reads if read.move.done()]
        if ended:
            self._reads = [read for read in self._reads if read not in ended]
        for read in ended:
            out += self._finish(read)
        deferred, self._deferred = self._deferred, []
        for ready in deferred:
            out += self._read(ready)
        if self._party.clock() >= self.deadline:
            out += self.abandon("it did not come by its deadline")
        if self._must_close and not self._reads and self._link is not None:
            self._must_close = not self._link.close(CLOSE_SECONDS)
        if not self._must_close:
            for first, count in self._unsettled_slots:
                self._give_read_slots(first, count)
            self._unsettled_slots.clear()
        self._give_slots()
        return out

    # --- pieces

    def _take_offer(self, offer: Offer) -> list[HandoffMessage]:
        difference = same_shape(self._party.layout, offer.layout)
        if self._direction is not Direction.PULL or self._offer is not None:
            difference = "a second offer, or one where it is to write"
        if difference:
            return self.abandon(f"the sender offered {difference}")
        try:
            self._link = self._party.connect(offer.endpoint)
        except KVStoreError as error:
            return self.abandon(str(error))
        self._offer = offer
        return []

    def _take_ready(self, ready: Ready) -> list[HandoffMessage]:
        wrong = self._why_wrong(ready)
        if wrong:
            return self.abandon(f"the sender said {wrong}")
        if self._direction is Direction.PULL:
            return self._read(ready)
        wire, slot = self._party.wire, None
        if ready.is_encoded:
            assert wire is not None
            assert self._first_slot is not None
            slot = self._first_slot + ready.layer * len(self._pages) + ready.first_block
        local, lengths = self._local(ready, slot)
        if not np.array_equal(checksums_of(local, lengths), unpack_checksums(ready.checksums)):
            return self.abandon(f"layer {ready.layer} arrived damaged")
        return self._arrive(ready, local, lengths)

    def _why_wrong(self, ready: Ready) -> str:
        layers, blocks = self._arrived.shape
        first, count = ready.first_block, ready.num_blocks
        if not (0 <= ready.layer < layers and first >= 0 and 0 < count <= blocks - first):
            return "of blocks that were not asked for"
        if ready.is_encoded and not self._may_be_encoded():
            return "that it is encoded, and nobody asked for it"
        if self._arrived[ready.layer, first : first + count].any():
            return "the same twice"
        return self._why_places_wrong(ready)

    def _why_places_wrong(self, ready: Ready) -> str:
        parts = 1 if ready.is_encoded else len(self._party.layout.sizes)
        if len(ready.checksums) != 8 * parts * ready.num_blocks:
            return "another number of checksums than of pieces"
        if self._direction is Direction.PULL:
            if self._offer is None:
                return "what is ready before what it offers"
            if len(ready.places) != ready.num_blocks or not all(
                0 <= place < 1 << 40 for place in ready.places
            ):
                return "another number of places than of blocks"
        return ""

    def _may_be_encoded(self) -> bool:
        if self._direction is Direction.PUSH:
            return self._first_slot is not None
        theirs = self._offer.wire if self._offer is not None else None
        return self._party.wire is not None and self._party.wire.suits(theirs)

    def _local(self, ready: Ready, slot: int | None) -> tuple[U64, U64]:
        """Where its pieces arrive here."""
        party, count = self._party, ready.num_blocks
        if slot is not None:
            assert party.wire is not None
            lengths = np.full(count, party.wire.slot_bytes, np.uint64)
            return party.wire.addresses(slot, count), lengths
        return self._in_pages(ready), piece_lengths(party.layout, count)

    def _in_pages(self, ready: Ready) -> U64:
        pages = self._pages[ready.first_block : ready.first_block + ready.num_blocks]
        return pieces(self._party.layout, self._party.address, ready.layer, pages)

    def _read(self, ready: Ready) -> list[HandoffMessage]:
        party, offer, link = self._party, self._offer, self._link
        assert offer is not None
        assert link is not None
        slot = None
        source: Layout | WireInfo = offer.layout
        if ready.is_encoded:
            assert party.wire is not None
            assert offer.wire is not None
            slot = party.wire.slots.take(ready.num_blocks)
            if slot is None:
                if ready.num_blocks > party.wire.slots.count:
                    return self.abandon(f"{ready.num_blocks} encoded blocks at once: no room")
                self._deferred.append(ready)
                return []
            source = offer.wire
            steps = np.asarray(ready.places, np.uint64) * np.uint64(source.stride)
            remote = steps + np.uint64(source.offset)
        else:
            remote = pieces(offer.layout, 0, ready.layer, ready.places)
        local, lengths = self._local(ready, slot)
        batch = Batch(local, remote, lengths, unpack_checksums(ready.checksums))
        try:
            move = link.submit_read(source.region_id, batch, timeout=party.move_timeout_s)
        except KVStoreError as error:
            self._give_read_slots(slot, ready.num_blocks)
            return self.abandon(str(error))
        self._reads.append(_Read(move, ready, local, lengths, slot))
        move.when_done(party.on_progress)
        return []

    def _finish(self, read: _Read) -> list[HandoffMessage]:
        statuses = read.move.wait()
        ready = read.ready
        worst = {Status(status) for status in set(statuses.tolist())} - {Status.OK}
        out: list[HandoffMessage] = []
        if worst & set(UNSETTLED):
            self._must_close = True
        if worst:
            names = ", ".join(sorted(status.name for status in worst))
            out = self.abandon(f"layer {ready.layer} could not be read: {names}")
        elif self.failure:
            pass
        elif not np.array_equal(
            checksums_of(read.local, read.lengths), unpack_checksums(ready.checksums)
        ):
            out = self.abandon(f"layer {ready.layer} arrived damaged")
        else:
            out = self._arrive(ready, read.local, read.lengths)
        if self._must_close and read.first_slot is not None:
            self._unsettled_slots.append((read.first_slot, ready.num_blocks))
        else:
            self._give_read_slots(read.first_slot, ready.num_blocks)
        return out

    def _arrive(self, ready: Ready, local: U64, lengths: U64) -> list[HandoffMessage]:
        """Its pieces lie here, verified."""
        wire = self._party.wire
        if ready.is_encoded:
            assert wire is not None
            if not wire.decode(local, self._in_pages(ready)):
                return self.abandon(f"layer {ready.layer} cannot be decoded")
        end = ready.first_block + ready.num_blocks
        self._arrived[ready.layer, ready.first_block : end] = True
        size = int(lengths.sum())
        self.bytes_arrived += size
        if self.computed_at is None:
            self.bytes_before_computed += size
        if not self.is_complete:
            return []
        self.completed_at = self._party.clock()
        return [Stop()] if self._direction is Direction.PULL else []

    def _give_slots(self) -> None:
        """Push: the run of slots that was granted, once nobody writes to it."""
        if self._first_slot is not None and self.is_settled:
            assert self._party.wire is not None
            self._party.wire.slots.give(self._first_slot, self._arrived.size)
            self._first_slot = None

    def _give_read_slots(self, first: int | None, count: int) -> None:
        if first is not None and self._party.wire is not None:
            self._party.wire.slots.give(first, count)


def _leading(whole: Any) -> int:
    """How many are True before the first that is not."""
    return len(whole) if whole.all() else int(whole.argmin())

"""Flight: a run of blocks, brought from several holders into slots of our arena.

    the chain:  [ ended ......... | pieces under way | not begun .......... | nobody has ]
                                                     ^ next                  ^ end

Lanes, a few for each holder, take pieces: the next blocks of the run, or a piece that failed at
another holder. A faster holder takes larger pieces and takes more often, so the run is divided by
measured speed without a plan. A piece keeps its slots until it is whole or no holder is left to
try: giving up a block gives up all that continue it.

Rules that always hold:
  * slots are reserved in the order of the chain, under the lock: a block whose parent has no slot
    would be refused one.
  * a block is published only when its checksum is the one that a holder granted with its lease.
  * every piece is ended exactly once, by whoever has it; every lease is released.
  * no lane begins anything after the deadline, and nothing that it began outlives that by much.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHashes
from kvstore.errors import KVStoreError
from kvstore.peers.bandwidth import Bandwidth
from kvstore.peers.counts import PeerCounts
from kvstore.peers.quarantine import Quarantine
from kvstore.peers.slots import NO_SPACE, ORPHAN, Piece, Slots
from kvstore.peers.sources import Held, Read, Source
from kvstore.transport.types import Status

LANES = 2  # of a holder: while one piece arrives, the lease of the next is asked for
PIECE_BYTES_MIN = 1 << 20
PIECE_BYTES_FIRST = 4 << 20  # of a holder whose speed is not known
PIECE_BYTES_MAX = 32 << 20
PIECE_SECONDS = 0.05  # what one piece is to take: short enough to even out, long enough to pay
_LAST_SECONDS = 0.01  # of the last ones: less would be more asking than reading
READ_SECONDS = 2.0  # a holder that gives no sign for so long is given up for now
_SLOWEST = 1 << 20  # bytes a second that are waited for
_SETTLE_SECONDS = 0.5  # for a link that may still write, before its slots are set aside

_REASONS = {
    Status.DAMAGED: "damaged",
    Status.REFUSED: "refused",
    Status.LOST: "lost",
    Status.LATE: "late",
    Status.CANCELLED: "late",
}


class Flight:
    """See above. Made for one call of `run`. Thread-safe: `_changed` guards all fields."""

    def __init__(
        self,
        hashes: BlockHashes,
        slots: Slots,
        sources: Sequence[Source],
        deadline: float,
        *,
        bandwidth: Bandwidth,
        quarantine: Quarantine,
        counts: PeerCounts,
        closing: threading.Event,
    ) -> None:
        """`deadline`: on the monotonic clock."""
        self._hashes = hashes
        self._slots = slots
        self._sources = list(sources)
        self._deadline = deadline
        self._bandwidth = bandwidth
        self._quarantine = quarantine
        self._counts = counts
        self._closing = closing
        self._changed = threading.Condition()
        self._next = 0
        self._end = len(hashes)
        self._limits: dict[str, int] = {}  # holder -> blocks of the run that it may have
        self._retries: list[Piece] = []
        self._lanes = {source.address: 0 for source in self._sources}  # that run or are to
        self._num_lanes = 0
        self.num_fetched = 0
        self.had_trouble = False  # something failed that may go well another time

    def run(self) -> None:
        """Fetch what can be had. Returns when every piece is ended."""
        for source in self._sources:
            self._begin_lane(source)
        with self._changed:
            self._changed.wait_for(lambda: self._num_lanes == 0)
            left, self._retries = self._retries, []
        for piece in left:
            self._give_up(piece)

    # --- lanes

    def _begin_lane(self, source: Source) -> None:
        with self._changed:
            self._lanes[source.address] += 1
            self._num_lanes += 1
        if not source.submit(lambda: self._lane(source)):
            self._abandon_lane(source)

    def _end_lane(self) -> None:
        with self._changed:
            self._num_lanes -= 1
            self._changed.notify_all()

    def _abandon_lane(self, source: Source) -> None:
        with self._changed:
            self._lanes[source.address] -= 1
        self._end_lane()

    def _lane(self, source: Source) -> None:
        """One step of a lane; submits itself again, so that flights take turns at a holder."""
        try:
            goes_on = self._step(source)
        except BaseException as error:
            self._failed(source)
            self._abandon_lane(source)
            if not isinstance(error, KVStoreError):
                raise
            return
        if not goes_on:
            self._end_lane()
        elif not source.submit(lambda: self._lane(source)):
            self._abandon_lane(source)

    def _step(self, source: Source) -> bool:
        """Fetch one piece; False where there is none for this holder."""
        if not self._is_known(source):
            available = source.available(self._hashes, min(self._left(), READ_SECONDS))
            with self._changed:
                self._limits[source.address] = available
            if available == 0:
                self._counts.failed("absent")
            for _ in range(LANES - 1 if available else 0):
                self._begin_lane(source)
        piece = self._take(source)
        if piece is None:
            return False
        try:
            self._fetch(source, piece)
        except BaseException:
            self._failed_piece(source, piece)
            raise
        return True

    def _is_known(self, source: Source) -> bool:
        with self._changed:
            return source.address in self._limits

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _is_over(self) -> bool:
        return self._closing.is_set() or time.monotonic() >= self._deadline

    def _failed(self, source: Source) -> None:
        """The holder does not answer: it is left alone for the rest of this flight."""
        self._counts.failed("unreachable")
        with self._changed:
            self._limits[source.address] = 0
            self.had_trouble = True

    # --- pieces

    def _take(self, source: Source) -> Piece | None:
        """Return a piece to fetch from this holder, its slots reserved."""
        with self._changed:
            limit = self._limits[source.address]
            while not self._is_over():
                for piece in self._retries:
                    if source.address not in piece.tried and piece.first_missing < limit:
                        self._retries.remove(piece)
                        return piece
                begin = self._next
                end = min(begin + self._piece_blocks(source), limit, self._end)
                if end <= begin:
                    break
                fresh, statuses = self._slots.reserve(begin, self._hashes[begin:end])
                self._next = end
                stopped = np.flatnonzero((statuses == NO_SPACE) | (statuses == ORPHAN))
                if len(stopped):
                    self._stop_at(begin + int(stopped[0]), int(statuses[stopped[0]]))
                if fresh is not None:
                    return fresh
            # Under the same lock as the look: whoever leaves work from now on begins a new lane.
            self._lanes[source.address] -= 1
        return None

    def _stop_at(self, block: int, why: int) -> None:
        """Nothing from `block` on can be kept here. REQUIRES: `_changed` is held."""
        self._end = min(self._end, block)
        self.had_trouble |= why == ORPHAN  # its parent was evicted or removed meanwhile
        if why == NO_SPACE:
            self._counts.failed("no_space")

    def _piece_blocks(self, source: Source) -> int:
        """How many blocks this holder gets at once. REQUIRES: `_changed` is held."""
        speed = source.bytes_per_second
        num_bytes = min(max(speed * PIECE_SECONDS, PIECE_BYTES_MIN), PIECE_BYTES_MAX)
        if speed == 0:
            num_bytes = PIECE_BYTES_FIRST
        if self._bandwidth.rate:
            num_bytes = min(num_bytes, self._bandwidth.rate * PIECE_SECONDS)
        # Towards the end smaller ones, so that all holders come to it at the same time.
        rest = (self._end - self._next) * self._slots.block_bytes
        others = sum(s.bytes_per_second for s in self._sources if self._limits.get(s.address))
        share = speed / others if speed else 1.0 / len(self._sources)
        least = max(PIECE_BYTES_MIN, min(speed * _LAST_SECONDS, PIECE_BYTES_MAX))
        num_bytes = min(num_bytes, max(rest * share / LANES, least))
        return max(1, int(num_bytes) // self._slots.block_bytes)

    def _fetch(self, source: Source, piece: Piece) -> None:
        """Lease and read what is missing of a piece, and pass it on, or end it."""
        missing = piece.missing()
        if not self._may_move(len(missing)):
            self._give_up(piece)
            return
        first, last = int(piece.places[missing[0]]), int(piece.places[missing[-1]])
        held = source.acquire(piece.hashes[first : last + 1], self._left())
        read: Read | None = None
        try:
            there = missing[piece.places[missing] < first + len(held)]
            if len(there):
                places = (piece.places[there] - first).astype(np.uint64)
                num_bytes = len(there) * self._slots.block_bytes
                seconds = min(self._left(), READ_SECONDS + num_bytes / _SLOWEST)
                read = source.read(held, places, piece.addresses[there], seconds)
                self._take_in(source, piece, there, held, read)
        finally:
            source.release(held)
        if len(there) < len(missing):
            with self._changed:
                limit = self._limits[source.address]
                self._limits[source.address] = min(limit, piece.begin + first + len(held))
        if piece.ok.all():
            self._slots.end(piece)
        elif read is not None and read.unsettled is not None:
            self._set_aside(source, piece, read)
        else:
            self._failed_piece(source, piece)

    def _may_move(self, num_blocks: int) -> bool:
        wait = self._bandwidth.take(num_blocks * self._slots.block_bytes, self._left())
        if wait is None:
            self._counts.failed("late", num_blocks)
            return False
        return not (wait > 0 and self._closing.wait(wait))

    def _take_in(
        self,
        source: Source,
        piece: Piece,
        there: npt.NDArray[np.intp],
        held: Held,
        read: Read,
    ) -> None:
        """Note what arrived."""
        whole = read.statuses == Status.OK
        piece.ok[there[whole]] = True
        first = int(piece.places[there[0]])
        piece.checksums[there] = held.checksums[piece.places[there] - first]
        count = int(np.count_nonzero(whole))
        self._counts.fetched(read.mover, count, count * self._slots.block_bytes)
        with self._changed:
            self.num_fetched += count
        for status, reason in _REASONS.items():
            failed = np.flatnonzero(read.statuses == status)
            if not len(failed):
                continue
            self._counts.failed(reason, len(failed))
            with self._changed:
                self.had_trouble = True
            if status == Status.DAMAGED:
                for place in piece.places[there[failed]]:
                    source.report_damaged(piece.hashes[int(place)])

    def _set_aside(self, source: Source, piece: Piece, read: Read) -> None:
        """Something may still write into the piece's slots: nobody else may, until it cannot."""
        unsettled = read.unsettled
        assert unsettled is not None
        if unsettled.settle(min(_SETTLE_SECONDS, self._left())):
            self._failed_piece(source, piece)
            return
        with self._changed:
            self._end = min(self._end, piece.first_missing)
        self._quarantine.add(piece, self._slots, unsettled)

    def _failed_piece(self, source: Source, piece: Piece) -> None:
        """What is missing of it cannot be had from this holder now."""
        if piece.ok.all():
            self._slots.end(piece)
            return
        piece.tried.add(source.address)
        with self._changed:
            others = [
                other
                for other in self._sources
                if other.address not in piece.tried
                and self._limits.get(other.address, len(self._hashes)) > piece.first_missing
            ]
            if others and not self._is_over():
                self._retries.append(piece)
                idle = [other for other in others if self._lanes[other.address] == 0]
            else:
                others = []
        if not others:
            self._give_up(piece)
            return
        for other in idle:
            self._begin_lane(other)

    def _give_up(self, piece: Piece) -> None:
        with self._changed:
            if not piece.ok.all():
                self._end = min(self._end, piece.first_missing)
        self._slots.end(piece)

"""Promotion: blocks on ssd are read straight into slots of the cpu tier, on one thread.

One thread, so that blocks that many wait for are read once. It works in groups: the next parts of
all promotions that wait, up to a batch, go to the disk together, so that many small ones fill its
queue as one large one does. Who waits comes before prefetches, between two batches of one as well;
those who wait take turns. Both queues are bounded.

Where the disk does not answer, nobody waits for that thread longer than a deadline, and once it is
known to be stuck, not at all. A promotion that is cancelled ends after the batch under way.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.control import RESERVED
from kvstore.errors import StoreClosedError
from kvstore.metrics import Counters
from kvstore.records import NO_CODEC, RECORD, Records, records_from
from kvstore.tiers.background import BackgroundThread
from kvstore.tracing import traced
from kvstore.transfer import TransferResult

if TYPE_CHECKING:
    from kvstore.tiers.ssd_side import SsdSide

BATCH_BYTES = 32 << 20  # published at once; large enough for the disk, small enough to start early
PREFETCH_BATCH_BYTES = 8 << 20  # less: whoever comes to wait, waits for it first
QUEUED_MAX = 1024  # promotions that somebody waits for; more are not begun
PREFETCHES_MAX = 64
STUCK_SECONDS = 2.0  # without one batch read: slower than computing it again


@dataclass(eq=False, slots=True)
class _Promotion:
    number: int
    hashes: BlockHashes
    is_prefetch: bool
    future: Future[TransferResult] = field(default_factory=Future)
    ready: int = 0
    has_ended: bool = False
    leases: list[int] = field(default_factory=list)  # what arrived must not leave for what follows


@dataclass(eq=False, slots=True)
class _Part:
    """The next blocks of a promotion, and those of them that are read."""

    promotion: _Promotion
    hashes: BlockHashes
    reservation: int
    wanted: npt.NDArray[np.uint8]
    addresses: npt.NDArray[np.uint64]
    ok: npt.NDArray[np.bool_]
    sums: npt.NDArray[np.uint64]


class Promoter:
    """Reads leading blocks of chains in from ssd.

    Thread safety: `submit`, `prefetch`, `close` from any thread; `_lock` guards the queues.
    """

    def __init__(self, core: _native.StoreCore, ssd: SsdSide | None, counters: Counters) -> None:
        self._core = core
        self._ssd = ssd
        self._counters = counters
        self._owner = core.new_owner()
        self._base = np.uint64(core.arena.ctypes.data)
        self._lock = threading.Lock()
        self._waited_for: deque[_Promotion] = deque()
        self._prefetches: deque[_Promotion] = deque()
        self._under_way: list[_Promotion] = []
        self._is_scheduled = False  # the thread works, or is about to
        self._closing = False
        self._pool = BackgroundThread("kvstore-promote", 8)

    def submit(self, number: int, hashes: BlockHashes) -> Future[TransferResult]:
        """For somebody who waits for the future."""
        return self._enqueue(self._waited_for, QUEUED_MAX, _Promotion(number, hashes, False))

    def prefetch(self, number: int, hashes: BlockHashes) -> Future[TransferResult]:
        """For somebody who may come later. Over the bound it is dropped and counted."""
        promotion = _Promotion(number, hashes, True)
        if self.is_stuck:
            return self._refuse(promotion)
        return self._enqueue(self._prefetches, PREFETCHES_MAX, promotion)

    @property
    def is_stuck(self) -> bool:
        """Whether the disk has stopped answering: waiting for it is of no use."""
        return self._pool.stuck_seconds() > STUCK_SECONDS

    def close(self, timeout: float) -> bool:
        """End the thread; False when it did not come back from the disk in `timeout` seconds.

        What has not begun is cancelled, what has ends with what has arrived.
        """
        with self._lock:
            self._closing = True
            left = [*self._waited_for, *self._prefetches]
            self._waited_for.clear()
            self._prefetches.clear()
        for promotion in left:
            if not promotion.leases:
                promotion.future.cancel()
        ended = self._pool.shutdown(timeout)
        with self._lock:
            hung = list(self._under_way) if not ended else []
        for promotion in hung:
            promotion.future.cancel()
        for promotion in left:
            self._finish(promotion)
        return ended

    def _enqueue(
        self, queue: deque[_Promotion], bound: int, promotion: _Promotion
    ) -> Future[TransferResult]:
        try:
            with self._lock:
                if self._closing:
                    raise StoreClosedError("the store is closed")
                if len(queue) >= bound:
                    self._drop_cancelled(queue)
                if len(queue) < bound:
                    queue.append(promotion)
                    if not self._is_scheduled:
                        self._is_scheduled = self._pool.submit(self._work) is not None
                    return promotion.future
        except RuntimeError:
            raise StoreClosedError("the store is closed") from None
        return self._refuse(promotion)  # so far behind that these would come too late

    def _refuse(self, promotion: _Promotion) -> Future[TransferResult]:
        if promotion.is_prefetch:
            self._counters.add("prefetch_dropped_blocks", len(promotion.hashes))
        self._finish(promotion)
        return promotion.future

    def _drop_cancelled(self, queue: deque[_Promotion]) -> None:
        for promotion in [p for p in queue if p.future.cancelled()]:
            queue.remove(promotion)
            self._finish(promotion)

    def _finish(self, promotion: _Promotion, error: Exception | None = None) -> None:
        """Tell who waits, once for each promotion."""
        for lease in promotion.leases:
            self._core.release(self._owner, lease)
        promotion.leases.clear()
        if not promotion.future.set_running_or_notify_cancel():
            return
        if error is not None:
            promotion.future.set_exception(error)
            return
        ready = promotion.ready
        promotion.future.set_result(TransferResult(ready, num_missed=len(promotion.hashes) - ready))

    # --- on the thread

    def _work(self) -> None:
        while group := self._next_group():
            self._pool.note_progress()
            error: Exception | None = None
            try:
                self._step(group)
            except Exception as raised:  # noqa: BLE001  (whoever waits for the future gets it)
                error = raised
            with self._lock:
                self._under_way = []
                ended = [p for p in group if p.has_ended or error or self._closing]
                for promotion in group:
                    if promotion not in ended:
                        self._queue_of(promotion).append(promotion)
            for promotion in ended:
                self._finish(promotion, error)

    def _queue_of(self, promotion: _Promotion) -> deque[_Promotion]:
        return self._prefetches if promotion.is_prefetch else self._waited_for

    def _next_group(self) -> list[_Promotion]:
        with self._lock:
            for queue, limit in (
                (self._waited_for, BATCH_BYTES),
                (self._prefetches, PREFETCH_BATCH_BYTES),
            ):
                self._drop_cancelled(queue)
                num_bytes = 0
                while queue:
                    num_bytes += len(self._next_hashes(queue[0])) * self._block_bytes(queue[0])
                    if self._under_way and num_bytes > limit:
                        break
                    self._under_way.append(queue.popleft())
                if self._under_way:
                    return self._under_way
            self._is_scheduled = False
            return []

    def _block_bytes(self, promotion: _Promotion) -> int:
        return self._core.block_bytes(promotion.number)

    def _next_hashes(self, promotion: _Promotion) -> BlockHashes:
        limit = PREFETCH_BATCH_BYTES if promotion.is_prefetch else BATCH_BYTES
        step = max(1, limit // self._block_bytes(promotion))
        return promotion.hashes[promotion.ready : promotion.ready + step]

    @traced("promote", lambda _, __, group: {"promotions": len(group)})
    def _step(self, group: list[_Promotion]) -> None:
        """Read the next part of each."""
        parts: list[_Part] = []
        try:
            for promotion in group:
                parts.append(self._reserve(promotion))
            if self._ssd is not None:
                for number in {promotion.number for promotion in group}:
                    self._fetch(number, [p for p in parts if p.promotion.number == number])
        finally:
            for part in parts:
                if part.reservation:
                    self._core.commit(self._owner, part.reservation, part.sums, part.ok)
        for part in parts:
            promotion = part.promotion
            lease, offsets, *_ = self._core.acquire(
                self._owner, promotion.number, part.hashes.array, None, False
            )
            if lease:
                promotion.leases.append(lease)
            promotion.ready += len(offsets)
            promotion.has_ended = len(offsets) < len(part.hashes) or promotion.ready == len(
                promotion.hashes
            )

    def _reserve(self, promotion: _Promotion) -> _Part:
        hashes = self._next_hashes(promotion)
        reservation, statuses, offsets = self._core.reserve(
            self._owner, promotion.number, hashes.array, hashes.start, hashes.parent, True
        )
        wanted = np.flatnonzero(statuses == RESERVED)
        return _Part(
            promotion,
            hashes,
            reservation,
            np.ascontiguousarray(hashes.array[wanted]),
            offsets[wanted] + self._base,
            np.zeros(len(wanted), bool),
            np.zeros(len(wanted), np.uint64),
        )

    def _fetch(self, number: int, parts: list[_Part]) -> None:
        assert self._ssd is not None
        failed: Records | None = None
        # Twice: a reclaim may move a block between asking where it lies and reading it there.
        for _ in range(2):
            asked = [(part, *self._places(part)) for part in parts if not part.ok.all()]
            rows = np.concatenate([rows for _, rows, _ in asked]) if asked else np.zeros(0, RECORD)
            if len(rows) == 0 or (failed is not None and _same_places(failed, rows)):
                break  # all arrived, or nothing moved: a second read would fail alike
            addresses = np.concatenate([part.addresses[at] for part, _, at in asked])
            arrived = self._ssd.read(number, rows, addresses)
            # Of the bytes on ssd: a later put of the same block may have had others.
            sums = rows["stored_checksum"].copy()
            encoded = np.flatnonzero(rows["codec"] != NO_CODEC)
            if len(encoded):  # a lossy codec gives other bytes than were put
                fresh = np.empty(len(encoded), np.uint64)
                _native.checksum_blocks(
                    addresses[encoded], self._core.block_bytes(number), fresh, 1
                )
                sums[encoded] = fresh
            begin = 0
            for part, _, at in asked:
                part.ok[at] = arrived[begin : begin + len(at)]
                part.sums[at] = sums[begin : begin + len(at)]
                begin += len(at)
            failed = rows[~arrived]
        self._give_up(number, failed)

    def _places(self, part: _Part) -> tuple[Records, npt.NDArray[np.intp]]:
        """Where what has not arrived lies, up to the first block that was removed meanwhile."""
        rows = records_from(self._core.describe(part.promotion.number, part.wanted))
        at = np.flatnonzero(~part.ok[: len(rows)])
        return rows[at], at

    def _give_up(self, number: int, failed: Records | None) -> None:
        """Drop copies that cannot be read: they are misses from now on."""
        if failed is None or len(failed) == 0:
            return
        self._counters.add("ssd_read_failures", len(failed))
        for row in failed:
            self._core.drop_ssd(
                number, row["hash"].tobytes(), int(row["segment"]), int(row["page"])
            )


def _same_places(before: Records, now: Records) -> bool:
    return len(before) == len(now) and all(
        np.array_equal(before[name], now[name]) for name in ("segment", "page")
    )

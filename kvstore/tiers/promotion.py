"""Promotion: blocks on ssd are read straight into slots of the cpu tier, on one thread.

One thread, because one batch at full depth already saturates a disk, and because two promotions of
the same prefix then cost one read. Where the disk does not answer, nobody waits for that thread
longer than a deadline, and once it is known to be stuck, not at all.
"""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.control import PRESENT, RESERVED
from kvstore.errors import StoreClosedError
from kvstore.metrics import Counters
from kvstore.records import Records, records_from
from kvstore.tiers.background import BackgroundThread
from kvstore.tiers.ssd_side import NO_CODEC, SsdSide
from kvstore.transfer import TransferResult

BATCH_BYTES = 32 << 20  # published at once; large enough for the disk, small enough to start early
QUEUED_MAX = 1024  # promotions; more are not begun
STUCK_SECONDS = 2.0  # without one batch read: slower than computing it again


class Promoter:
    """Reads leading blocks of a chain in from ssd. Thread-safe."""

    def __init__(self, core: _native.StoreCore, ssd: SsdSide | None, counters: Counters) -> None:
        self._core = core
        self._ssd = ssd
        self._counters = counters
        self._owner = core.new_owner()
        self._base = np.uint64(core.arena.ctypes.data)
        self._pool = BackgroundThread("kvstore-promote", QUEUED_MAX)

    def submit(self, number: int, hashes: BlockHashes) -> Future[TransferResult]:
        try:
            future = self._pool.submit(self._promote, number, hashes)
        except RuntimeError:
            raise StoreClosedError("the store is closed") from None
        if future is None:  # so far behind that these would come too late
            future = Future()
            future.set_result(TransferResult(0, num_missed=len(hashes)))
        return future

    @property
    def is_stuck(self) -> bool:
        """Whether the disk has stopped answering: waiting for it is of no use."""
        return self._pool.stuck_seconds() > STUCK_SECONDS

    def close(self, timeout: float) -> bool:
        """End the thread; False when it did not come back from the disk in `timeout` seconds."""
        return self._pool.shutdown(timeout)

    def _promote(self, number: int, hashes: BlockHashes) -> TransferResult:
        step = max(1, BATCH_BYTES // self._core.block_bytes(number))
        leases = []  # what has arrived must not leave to make room for what follows it
        ready = 0
        try:
            while ready < len(hashes):
                self._pool.note_progress()
                part = hashes[ready : ready + step]
                arrived = self._read_batch(number, part)
                ready += arrived
                if arrived < len(part):
                    break
                lease, *_ = self._core.acquire(self._owner, number, part.array, None, False)
                leases.append(lease)
        finally:
            for lease in leases:
                self._core.release(self._owner, lease)
        return TransferResult(ready, num_missed=len(hashes) - ready)

    def _read_batch(self, number: int, part: BlockHashes) -> int:
        """Make leading blocks ready; return how many are."""
        reservation, statuses, offsets = self._core.reserve(
            self._owner, number, part.array, part.start, part.parent, True
        )
        good = statuses == PRESENT
        wanted = np.flatnonzero(statuses == RESERVED)
        if reservation:
            addresses = offsets[wanted] + self._base
            ok, sums = np.zeros(len(wanted), bool), np.zeros(len(wanted), np.uint64)
            try:
                if self._ssd is not None:
                    self._fetch(number, part.array[wanted], addresses, ok, sums)
            finally:
                self._core.commit(self._owner, reservation, sums, ok)
            good[wanted] = ok
        bad = np.flatnonzero(~good)
        return int(bad[0]) if len(bad) else len(good)

    def _fetch(
        self,
        number: int,
        hashes: npt.NDArray[np.uint8],
        addresses: npt.NDArray[np.uint64],
        ok: npt.NDArray[np.bool_],
        sums: npt.NDArray[np.uint64],
    ) -> None:
        assert self._ssd is not None
        failed: Records | None = None
        # Twice: a reclaim may move a block between asking where it lies and reading it there.
        for _ in range(2):
            rows = records_from(self._core.describe(number, np.ascontiguousarray(hashes)))
            at = np.flatnonzero(~ok[: len(rows)])
            if len(at) == 0 or (failed is not None and _same_places(failed, rows[at])):
                break  # all arrived, or nothing moved: a second read would fail alike
            ok[at] = self._ssd.read(number, rows[at], addresses[at])
            # Of the bytes on ssd: a later put of the same block may have had others.
            sums[at] = rows["stored_checksum"][at]
            encoded = at[rows["codec"][at] != NO_CODEC]
            if len(encoded):  # a lossy codec gives other bytes than were put
                fresh = np.empty(len(encoded), np.uint64)
                _native.checksum_blocks(
                    addresses[encoded], self._core.block_bytes(number), fresh, 1
                )
                sums[encoded] = fresh
            failed = rows[at[~ok[at]]]
        self._give_up(number, failed)

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

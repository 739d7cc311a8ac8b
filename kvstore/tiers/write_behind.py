"""Write-behind: puts reach the ssd tier on one background thread, in batches.

A job names blocks; their bytes are read from the arena when its turn comes. A job that was promised
a level ("ssd", "durable") leases its blocks from the start, so that they cannot be evicted first;
others are best effort: what has left the cpu tier by then is not written.

The queue is bounded in bytes. Promised jobs wait for room until their deadline. Best-effort jobs do
not: the engine is never held up by a slow disk. Over the bound their hashes go to the backlog, from
which they are taken when the queue is empty; a burst costs no copies of what is still in DRAM then.
The backlog is bounded too: the oldest, likeliest to have left DRAM, are dropped and counted.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.control import Ack
from kvstore.errors import StoreClosedError
from kvstore.metrics import Counters
from kvstore.tiers.admission import Origin

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """Blocks of one namespace to write; `lease` 0 when best effort."""

    namespace_id: int
    hashes: npt.NDArray[np.uint8]
    num_bytes: int
    ack: Ack = "memory"
    owner: int = 0  # of the lease
    lease: int = 0
    future: Future[Ack] | None = field(default=None)
    origin: Origin = Origin.STORED

    def split(self, num_blocks: int) -> Job:
        """Take the first blocks off into a job of their own. Best-effort jobs only."""
        size = self.num_bytes // len(self.hashes) * num_blocks
        first = Job(self.namespace_id, self.hashes[:num_blocks], size, origin=self.origin)
        self.hashes, self.num_bytes = self.hashes[num_blocks:], self.num_bytes - size
        return first

    def reach(self, level: Ack) -> None:
        if self.future is not None:
            with contextlib.suppress(InvalidStateError):  # given up by close meanwhile
                self.future.set_result(level)

    def fail(self, error: Exception) -> None:
        if self.future is not None:
            with contextlib.suppress(InvalidStateError):
                self.future.set_exception(error)


class WriteBehind:
    """A bounded queue and the thread that empties it through `write`.

    Thread safety: all methods may be called from any thread. `_condition` guards all fields.
    """

    BATCH_BYTES = 64 << 20  # a group commit: large enough to hide the index's fsync
    BACKLOG_BLOCKS_MAX = 1 << 20  # 32 bytes each
    BACKLOG_JOBS_MAX = 1 << 14

    def __init__(
        self, write: Callable[[list[Job]], None], max_bytes: int, counters: Counters
    ) -> None:
        self._write = write
        self._max_bytes = max_bytes
        self._counters = counters
        self._condition = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._queued_bytes = 0
        self._backlog: deque[Job] = deque()  # best effort, their hashes copied
        self._backlog_blocks = 0
        self._batch: list[Job] = []  # under way
        self._flushes: list[Future[bool]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvstore-write-behind", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    @property
    def backlog_blocks(self) -> int:
        return self._backlog_blocks

    def submit(self, job: Job, timeout: float = 0.0) -> bool:
        """Queue a job; where there is no room within `timeout` seconds, put it off if it may be.

        Returns False when it was not taken: a promised one without room, or we are closing.
        """
        deadline = time.monotonic() + timeout
        with self._condition:
            if not len(job.hashes) and self._jobs and not len(self._jobs[-1].hashes):
                return True  # only makes the thread look for garbage: once will do
            while self._queued_bytes and self._queued_bytes + job.num_bytes > self._max_bytes:
                left = deadline - time.monotonic()
                if left <= 0 or self._closing or not self._condition.wait(left):
                    return self._put_off(job)
            if self._closing:
                return False
            self._jobs.append(job)
            self._queued_bytes += job.num_bytes
            self._condition.notify_all()
        return True

    def offer_later(self, job: Job) -> bool:
        """Write blocks when there is nothing else to write; False when we are closing."""
        with self._condition:
            return self._put_off(job)

    def _put_off(self, job: Job) -> bool:
        """The caller holds `_condition`."""
        if self._closing or job.ack != "memory":
            self._counters.add("write_behind_dropped_blocks", len(job.hashes))
            return False
        excess = len(job.hashes) - self.BACKLOG_BLOCKS_MAX
        if excess > 0:
            job.split(excess)
            self._counters.add("write_behind_dropped_blocks", excess)
        job.hashes = job.hashes.copy()  # it may be a view of much more
        self._backlog.append(job)
        self._backlog_blocks += len(job.hashes)
        self._counters.add("write_behind_deferred_blocks", len(job.hashes))
        while (
            self._backlog_blocks > self.BACKLOG_BLOCKS_MAX
            or len(self._backlog) > self.BACKLOG_JOBS_MAX
        ):
            oldest = self._backlog.popleft()
            self._backlog_blocks -= len(oldest.hashes)
            self._counters.add("write_behind_dropped_blocks", len(oldest.hashes))
        self._condition.notify_all()
        return True

    def flush(self, timeout: float) -> bool:
        """Wait until everything queued so far is written; False when `timeout` seconds went by."""
        with self._condition:
            return self._condition.wait_for(self._is_idle, timeout)

    def flush_later(self) -> Future[bool]:
        """Return what becomes True once everything queued so far is written; False when we are
        closed before."""
        done: Future[bool] = Future()
        with self._condition:
            is_idle = self._is_idle()
            if not is_idle and not self._closing:
                self._flushes = [each for each in self._flushes if not each.cancelled()]
                self._flushes.append(done)
                return done
        done.set_result(is_idle)
        return done

    def _end_flushes(self) -> None:
        with self._condition:
            is_idle = self._is_idle()
            if not is_idle and not self._closing:
                return
            ended, self._flushes = self._flushes, []
        for done in ended:
            if done.set_running_or_notify_cancel():
                done.set_result(is_idle)

    def _is_idle(self) -> bool:
        return not self._jobs and not self._batch and not self._backlog

    def close(self, timeout: float) -> bool:
        """Write what is queued, for at most `timeout` seconds, then end the thread."""
        deadline = time.monotonic() + timeout
        done = self.flush(timeout)
        with self._condition:
            self._closing = True
            left = [] if done else [*self._batch, *self._jobs]
            if left:
                self._jobs.clear()
                self._queued_bytes = 0
                self._backlog.clear()
                self._backlog_blocks = 0
            self._condition.notify_all()
        for job in left:
            job.fail(StoreClosedError("the store was closed before the write"))
        self._end_flushes()
        self._thread.join(max(0.0, deadline - time.monotonic()) if left else None)
        return done and not self._thread.is_alive()

    def _take(self) -> list[Job]:
        with self._condition:
            self._condition.wait_for(lambda: self._jobs or self._backlog or self._closing)
            if not self._jobs:
                self._take_from_backlog()
            batch: list[Job] = []
            size = 0
            while self._jobs and (not batch or size + self._jobs[0].num_bytes <= self.BATCH_BYTES):
                job = self._jobs.popleft()
                size += job.num_bytes
                batch.append(job)
            self._batch = batch
            return batch

    def _take_from_backlog(self) -> None:
        """Queue one batch. The caller holds `_condition`."""
        room = min(self.BATCH_BYTES, self._max_bytes)
        while self._backlog and room > 0:
            job = self._backlog[0]
            if job.num_bytes > room:
                block_bytes = job.num_bytes // len(job.hashes)
                job = job.split(max(1, room // block_bytes))
            else:
                self._backlog.popleft()
            self._backlog_blocks -= len(job.hashes)
            self._jobs.append(job)
            self._queued_bytes += job.num_bytes
            room -= job.num_bytes

    def _run(self) -> None:
        while batch := self._take():
            try:
                self._write(batch)
            except Exception:
                self._counters.add("background_errors")
                log.exception("write-behind step failed")
                for job in batch:
                    job.reach("memory")
            with self._condition:
                self._queued_bytes -= sum(job.num_bytes for job in batch)
                self._queued_bytes = max(0, self._queued_bytes)
                self._batch = []
                self._condition.notify_all()
            self._end_flushes()

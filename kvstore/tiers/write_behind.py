"""Write-behind: puts reach the ssd tier on one background thread, in batches.

A job names blocks; their bytes are read from the arena when its turn comes. A job that was promised
a level ("ssd", "durable") leases its blocks from the start, so that they cannot be evicted first;
others are best effort: what has left the cpu tier by then is not written.

The queue is bounded in bytes. Over the bound, best-effort jobs are dropped and counted: the engine
is never held up by a slow disk. Promised jobs wait for room until their deadline.
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

    def __init__(
        self, write: Callable[[list[Job]], None], max_bytes: int, counters: Counters
    ) -> None:
        self._write = write
        self._max_bytes = max_bytes
        self._counters = counters
        self._condition = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._queued_bytes = 0
        self._batch: list[Job] = []  # under way
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvstore-write-behind", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def submit(self, job: Job, timeout: float = 0.0) -> bool:
        """Queue a job; False when there is no room within `timeout` seconds or we are closing."""
        deadline = time.monotonic() + timeout
        with self._condition:
            while self._queued_bytes and self._queued_bytes + job.num_bytes > self._max_bytes:
                left = deadline - time.monotonic()
                if left <= 0 or self._closing or not self._condition.wait(left):
                    self._counters.add("write_behind_dropped_blocks", len(job.hashes))
                    return False
            if self._closing:
                return False
            self._jobs.append(job)
            self._queued_bytes += job.num_bytes
            self._condition.notify_all()
        return True

    def flush(self, timeout: float) -> bool:
        """Wait until everything queued so far is written; False when `timeout` seconds went by."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._jobs and not self._batch, timeout)

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
            self._condition.notify_all()
        for job in left:
            job.fail(StoreClosedError("the store was closed before the write"))
        self._thread.join(max(0.0, deadline - time.monotonic()) if left else None)
        return done and not self._thread.is_alive()

    def _take(self) -> list[Job]:
        with self._condition:
            self._condition.wait_for(lambda: self._jobs or self._closing)
            batch: list[Job] = []
            size = 0
            while self._jobs and (not batch or size + self._jobs[0].num_bytes <= self.BATCH_BYTES):
                job = self._jobs.popleft()
                size += job.num_bytes
                batch.append(job)
            self._batch = batch
            return batch

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

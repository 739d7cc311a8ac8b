"""Threads: a bounded number of them that run what is submitted, made when first needed.

They are daemon threads: those of concurrent.futures are joined when the interpreter ends, however
long what they do may take.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)


class Threads:
    """Thread-safe: `_changed` guards all fields."""

    def __init__(self, name: str, threads_max: int, queued_max: int) -> None:
        self._name = name
        self._threads_max = threads_max
        self._queued_max = queued_max
        self._changed = threading.Condition()
        self._queue: deque[Callable[[], None]] = deque()
        self._threads: list[threading.Thread] = []
        self._num_idle = 0
        self._closed = False

    def submit(self, work: Callable[[], None]) -> bool:
        """Have `work` run; False, and it never runs, where too much waits or we are closed."""
        with self._changed:
            if self._closed or len(self._queue) >= self._queued_max:
                return False
            self._queue.append(work)
            if self._num_idle < len(self._queue) and len(self._threads) < self._threads_max:
                thread = threading.Thread(
                    target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return True

    def close(self, timeout: float) -> bool:
        """Take no more; return whether what had been submitted has ended by the timeout."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._num_idle += 1
                self._changed.wait_for(lambda: self._queue or self._closed)
                self._num_idle -= 1
                if not self._queue:
                    return
                work = self._queue.popleft()
            try:
                work()
            except Exception:
                log.exception("%s: a step failed", self._name)
            del work

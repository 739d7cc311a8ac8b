"""Requests that wait for a future, each until its own deadline, without a thread for each.

Each request is finished exactly once: when its future is done (on the thread that finished it) or
when its deadline came (on the thread that calls `expire`).
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

IDLE_SECONDS = 0.5  # how often somebody looks when nothing is due
_ANSWERED_MAX = 64  # entries kept of requests that were answered, besides one for each that waits


class Waiting:
    """Thread-safe: `_lock` guards `_heap` and `_open`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heap: list[tuple[float, int]] = []
        self._open: dict[int, Callable[[bool], None]] = {}
        self._numbers = itertools.count()

    def add(self, future: Future[Any], deadline: float, finish: Callable[[bool], None]) -> None:
        """Call `finish(True)` once the future is done, `finish(False)` if it is not in time.

        It must not raise. `deadline` is on the monotonic clock.
        """
        number = next(self._numbers)
        with self._lock:
            self._open[number] = finish
            heapq.heappush(self._heap, (deadline, number))
            if len(self._heap) > 2 * len(self._open) + _ANSWERED_MAX:
                # Answered long before a far deadline, which need not be waited for to forget them.
                self._heap = [entry for entry in self._heap if entry[1] in self._open]
                heapq.heapify(self._heap)
        future.add_done_callback(lambda _: self._finish(number, True))

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def seconds_left(self) -> float:
        """Return until when `expire` need not be called."""
        with self._lock:
            while self._heap and self._heap[0][1] not in self._open:
                heapq.heappop(self._heap)
            if not self._heap:
                return IDLE_SECONDS
            return min(IDLE_SECONDS, max(0.0, self._heap[0][0] - time.monotonic()))

    def expire(self) -> None:
        """Finish what is overdue."""
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._heap or self._heap[0][0] > now:
                    return
                _, number = heapq.heappop(self._heap)
            self._finish(number, False)

    def _finish(self, number: int, is_done: bool) -> None:
        with self._lock:
            finish = self._open.pop(number, None)
        if finish is not None:
            finish(is_done)

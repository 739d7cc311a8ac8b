"""One background thread that can be left behind.

The threads of concurrent.futures are joined when the interpreter ends, for ever where a disk hangs.
This one is a daemon, its queue is bounded, and waiting for it is bounded too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class BackgroundThread:
    """Runs what is submitted, in order. Thread-safe; `_condition` guards all fields.

    Work that is cancelled before it has begun never runs.
    """

    def __init__(self, name: str, queued_max: int) -> None:
        self._queued_max = queued_max
        self._condition = threading.Condition()
        self._queue: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._shutdown = False
        self._progress_at: float | None = None  # None: idle
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any] | None:
        """Queue work; None when the queue is full.

        Raises:
            RuntimeError: the thread was told to end.
        """
        future: Future[Any] = Future()
        with self._condition:
            if self._shutdown:
                raise RuntimeError("the thread was told to end")
            if len(self._queue) >= self._queued_max:
                self._queue = deque(item for item in self._queue if not item[0].cancelled())
            if len(self._queue) >= self._queued_max:
                return None
            self._queue.append((future, work, args))
            self._condition.notify_all()
        return future

    def note_progress(self) -> None:
        """For work that takes long: it is not stuck."""
        with self._condition:
            self._progress_at = time.monotonic()

    def stuck_seconds(self) -> float:
        """How long the work under way has not come forward; 0 when there is none."""
        with self._condition:
            return 0.0 if self._progress_at is None else time.monotonic() - self._progress_at

    def shutdown(self, timeout: float) -> bool:
        """Cancel what has not begun, wait for what has; False when `timeout` seconds went by."""
        with self._condition:
            self._shutdown = True
            left = list(self._queue)
            self._queue.clear()
            self._condition.notify_all()
        for future, _, _ in left:
            future.cancel()
        self._thread.join(max(0.0, timeout))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._progress_at = None
                self._condition.wait_for(lambda: self._queue or self._shutdown)
                if not self._queue:
                    return
                future, work, args = self._queue.popleft()
                self._progress_at = time.monotonic()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work(*args)
            except BaseException as error:  # noqa: BLE001  (whoever waits for the future gets it)
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, work, args

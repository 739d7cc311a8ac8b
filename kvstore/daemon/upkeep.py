"""What has to be done now and then while the daemon serves, on one thread.

Scrubbing in slices of at most a tenth of a second's budget; every second: leases that are over,
slots whose writer has died, a holder that has gone; every other second a sample for the history.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from kvstore import _native, tracing
from kvstore.daemon.processes import is_alive
from kvstore.metrics import Counters

log = logging.getLogger(__name__)

STEP_SECONDS = 0.1
SECOND = 1.0


def sweep_quarantine(core: _native.StoreCore) -> int:
    """Free the slots of writers that died with the last daemon or since; return how many."""
    freed = 0
    for writer, pid, start, _slots in core.quarantine():
        if not is_alive(pid, start):
            freed += core.release_quarantine(writer)
    return freed


class Scrubber:
    """Checks blocks in DRAM against their checksums, round after round. Thread-safe."""

    def __init__(self, core: _native.StoreCore, counters: Counters) -> None:
        self._core = core
        self._counters = counters
        self._lock = threading.Lock()  # one round at a time; guards all fields
        self._cursor = 0
        self._round_bytes, self._round_began = 0, time.monotonic()
        self.checked_bytes = 0
        self.removed_blocks = 0
        self.rounds = 0

    def step(self, max_bytes: int) -> int:
        """Check about `max_bytes`; return how many were, 0 where there is nothing."""
        with self._lock:
            checked: int
            self._cursor, checked, removed = self._core.scrub(self._cursor, max_bytes)
            self._note(checked, removed)
            self._round_bytes += checked
            if self._cursor == 0:
                self._end_round()
            return checked

    def _end_round(self) -> None:
        now = time.monotonic()
        if self._round_bytes:  # an empty arena has no rounds
            self.rounds += 1
            tracing.note("scrub", now - self._round_began, bytes=self._round_bytes)
        self._round_began, self._round_bytes = now, 0

    def everything(self, seconds: float) -> tuple[int, int, bool]:
        """Check all there is; return bytes, blocks removed, and whether it got through in time."""
        deadline = time.monotonic() + seconds
        cursor, checked_bytes, removed_blocks = 0, 0, 0
        while True:
            cursor, checked, removed = self._core.scrub(cursor, 64 << 20)
            with self._lock:
                self._note(checked, removed)
            checked_bytes += checked
            removed_blocks += removed
            if cursor == 0:
                return checked_bytes, removed_blocks, True
            if time.monotonic() >= deadline:
                return checked_bytes, removed_blocks, False

    def _note(self, checked: int, removed: int) -> None:
        self.checked_bytes += checked
        self.removed_blocks += removed
        if removed:
            self._counters.add("integrity_failures", removed)
            log.error("%d blocks in DRAM were damaged and are removed", removed)


class Upkeep:
    """The thread. `each_second` are called in turn; what one raises is logged and counted."""

    def __init__(
        self,
        scrubber: Scrubber,
        scrub_bytes_per_second: int,
        each_second: list[Callable[[], object]],
        counters: Counters,
    ) -> None:
        self._scrubber = scrubber
        self._scrub_rate = scrub_bytes_per_second
        self._each_second = each_second
        self._counters = counters
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10.0)

    def _run(self) -> None:
        due, budget, before = 0.0, 0.0, time.monotonic()
        while not self._stop.wait(STEP_SECONDS):
            now = time.monotonic()
            # Saved up while there was no time, but for no more than a second.
            budget = min(budget + (now - before) * self._scrub_rate, float(self._scrub_rate))
            before = now
            if budget >= 1:
                budget -= self._guarded(partial(self._scrubber.step, int(budget)))
            if now >= due:
                due = now + SECOND
                for step in self._each_second:
                    if self._stop.is_set():
                        return
                    self._guarded(step)

    def _guarded(self, step: Callable[[], object]) -> int:
        try:
            done = step()
        except Exception:
            self._counters.add("background_errors")
            log.exception("upkeep failed")
            return 0
        return done if isinstance(done, int) else 0

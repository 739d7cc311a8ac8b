"""Bandwidth: a bound of bytes a second, as a bucket of tokens that may go below empty.

Whoever takes more than there is waits until the debt is paid, and all after it. So over any time t
at most `rate * t`, and one burst, are granted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_BURST_SECONDS = 0.1


class Bandwidth:
    """Thread-safe: `_lock` guards `_tokens` and `_at`. A rate of 0 is no bound."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._burst = rate * _BURST_SECONDS
        self._tokens = self._burst
        self._at = clock()

    def take(self, num_bytes: int, seconds: float) -> float | None:
        """Return how long to wait before moving `num_bytes`; None, and nothing is taken, where that
        is more than `seconds`."""
        if self.rate <= 0:
            return 0.0
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self.rate)
            self._at = now
            wait = max(0.0, -self._tokens / self.rate)
            if wait > seconds:
                return None
            self._tokens -= num_bytes
        return wait

"""Notices: warnings about a cache that fails, few enough to be read."""

from __future__ import annotations

import logging
import threading
import time

PAUSE_SECONDS = 30.0


class Notices:
    """Says each kind of trouble once in PAUSE_SECONDS: a daemon that is away fails every call.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next: dict[str, float] = {}  # guarded by _lock
        self._lock = threading.Lock()

    def warn(self, what: str, reason: object) -> None:
        """`what`: the kind, from a fixed few; `reason`: what happened now."""
        now = time.monotonic()
        with self._lock:
            if now < self._next.get(what, now):
                return
            self._next[what] = now + PAUSE_SECONDS
        self._log.warning("%s: %s", what, reason)

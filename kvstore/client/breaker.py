"""Breaker: when to ask again whoever did not answer.

    closed --failed--> open --attempted--> open, an attempt under way --succeeded--> closed
                        ^------------------------failed-----------------'

Closed, calls go through. Open, they are refused at once, and one attempt at a time is made to get
through again: the first at once, then `first` to `longest` seconds apart, each pause twice the one
before. Whoever answers an attempt and then fails again soon is no better than before: the pauses
go on growing where they stood.

Pure: it only looks at the clock that it is given. Thread safety: none, callers lock.
"""

from __future__ import annotations

from collections.abc import Callable

PAUSE_SECONDS_FIRST = 0.05
PAUSE_SECONDS_LONGEST = 0.25  # a daemon that is started again serves within a second


class Breaker:
    """See above. Starts closed."""

    __slots__ = ("_attempting", "_clock", "_closed_at", "_first", "_longest", "_pause", "_retry_at")

    def __init__(
        self,
        clock: Callable[[], float],
        first: float = PAUSE_SECONDS_FIRST,
        longest: float = PAUSE_SECONDS_LONGEST,
    ) -> None:
        self._clock = clock
        self._first = first
        self._longest = longest
        self._pause = 0.0  # before the next attempt, from the failure on
        self._closed_at = float("-inf")
        self._retry_at: float | None = None  # None: closed
        self._attempting = False

    @property
    def is_open(self) -> bool:
        return self._retry_at is not None

    def failed(self, pause_seconds: float = 0.0) -> None:
        """A call, or the attempt under way, failed; `pause_seconds` is the least to wait now."""
        now = self._clock()
        if self.is_open and not self._attempting:
            return  # a call that was under way when the first failed: nothing new
        if not self.is_open and now - self._closed_at >= self._longest:
            self._pause = 0.0
        self._attempting = False
        self._retry_at = now + max(self._pause, pause_seconds)
        self._pause = min(max(2 * self._pause, self._first), self._longest)

    def wait_seconds(self) -> float:
        """Return how long it is until an attempt may be made; 0 also when closed."""
        if self._retry_at is None:
            return 0.0
        return max(0.0, self._retry_at - self._clock())

    def attempt(self) -> bool:
        """Return whether to try now. After a True comes `succeeded` or `failed`."""
        if self._retry_at is None or self._attempting or self.wait_seconds() > 0:
            return False
        self._attempting = True
        return True

    def succeeded(self) -> None:
        """The attempt got through: closed again."""
        self._retry_at = None
        self._attempting = False
        self._closed_at = self._clock()

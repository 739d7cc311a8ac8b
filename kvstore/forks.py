"""What a forked child must not share with its parent.

A child has its parent's memory, but only the thread that forked: a lock that another thread held
stays held for ever, and what it had counted never ends. `PerProcess` keeps such state by process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

_State = TypeVar("_State")


class PerProcess(Generic[_State]):
    """One state for this process, and another, made when it is first asked for, for each child.

    Thread-safe, and needs no lock to be.
    """

    __slots__ = ("_by_pid", "_make")

    def __init__(self, make: Callable[[], _State]) -> None:
        self._make = make
        self._by_pid = {os.getpid(): make()}

    def here(self) -> _State:
        pid = os.getpid()
        state = self._by_pid.get(pid)
        if state is None:
            state = self._by_pid.setdefault(pid, self._make())  # of several threads, one's
        return state

"""Admission: which blocks are worth a write to the ssd tier.

"all" writes every block that is stored. "reuse" writes a block when it is wanted a second time: at
its first read after it was stored, or when it is stored again after it had left. That saves most
writes and costs hits, because most reuse is the first (`bench/admission.py` measures both).

A write budget bounds either, in bytes a second: a token bucket. While it is low, "all" writes only
what is wanted again; what then still does not fit is skipped and counted. Promised blocks (ack
"ssd", "durable") and what a reclaim moves are written in any case, and draw on the budget.

A policy is asked twice: when blocks were stored or used (`stored`, `used`: cheap, on the caller's
thread), and when they are about to be written (`grant`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.config import Admission

HashRows = npt.NDArray[np.uint8]  # (n, 32)

BURST_SECONDS = 4.0  # of the budget may be spent at once: some group commits of a usual budget
SEEN_ENTRIES_MIN, SEEN_ENTRIES_MAX = 1 << 12, 1 << 22  # of 8 bytes each
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Origin(IntEnum):
    """Why blocks are to be written; who comes first when not all may be."""

    PROMISED = 0  # somebody waits for it
    USED = 1  # wanted a second time
    STORED = 2


class TokenBucket:
    """`rate` bytes a second, up to `burst` of them saved up. Thread-safe.

    Invariant: level <= burst. In any time t, `take` grants at most burst + rate * t bytes and one
    unit, less what was drawn.
    """

    def __init__(
        self, rate: float, burst: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._now = now
        self._lock = threading.Lock()
        self._level = burst
        self._at = now()

    @property
    def level(self) -> float:
        """Bytes that may be taken; negative after more was drawn than there was."""
        with self._lock:
            return self._refill()

    @property
    def burst(self) -> float:
        return self._burst

    def take(self, units: int, unit_bytes: int, keep: float = 0.0) -> int:
        """Take up to `units`, leaving `keep` bytes; return how many.

        A unit that is larger than what could ever be there is granted when the bucket is full,
        and owed.
        """
        with self._lock:
            level = self._refill()
            granted = min(units, max(0, int((level - keep) // unit_bytes)))
            if granted == 0 and units and level >= self._burst:
                granted = 1
            self._level = level - granted * unit_bytes
            return granted

    def draw(self, num_bytes: int) -> None:
        """Take bytes that are written in any case; of those, at most one burst is owed."""
        with self._lock:
            level = self._refill()
            self._level = min(level, max(-self._burst, level - num_bytes))

    def give_back(self, num_bytes: int) -> None:
        """Return bytes that were taken and not written."""
        with self._lock:
            self._level = min(self._burst, self._refill() + num_bytes)

    def _refill(self) -> float:
        now = self._now()
        self._level = min(self._burst, self._level + max(0.0, now - self._at) * self._rate)
        self._at = max(self._at, now)
        return self._level


class SeenBlocks:
    """Remembers which blocks were stored, in a fixed table of 64-bit fingerprints. Thread-safe.

    Newer blocks overwrite older ones; a forgotten block is one more write that is put off.
    """

    def __init__(self, entries: int) -> None:
        self._table = np.zeros(1 << max(1, entries - 1).bit_length(), np.uint64)
        self._lock = threading.Lock()

    def add(self, namespace_id: int, hashes: HashRows) -> npt.NDArray[np.bool_]:
        """Remember `hashes`; return which of them were remembered already."""
        prefixes = np.ascontiguousarray(hashes[:, :8]).view(np.uint64).ravel()
        marks = prefixes ^ np.uint64((namespace_id + 1) * int(_MIX) % (1 << 64))
        marks |= np.uint64(1)  # 0: an empty entry
        places = (marks >> np.uint64(1)) & np.uint64(len(self._table) - 1)
        with self._lock:
            seen = self._table[places] == marks
            self._table[places] = marks
        return np.asarray(seen)


class AdmissionPolicy(Protocol):
    """Decides for one ssd tier. Thread-safe."""

    @property
    def wants_used(self) -> bool:
        """Whether `used` can change anything; else reads need not tell."""
        ...

    def stored(self, namespace_id: int, hashes: HashRows) -> list[tuple[Origin, HashRows]]:
        """Return which of the blocks just stored are to be written, each once and in order."""
        ...

    def used(self, hashes: HashRows, block_bytes: int) -> HashRows:
        """Return which of the blocks just read, not on ssd yet, are to be written."""
        ...

    def grant(self, origin: Origin, num_blocks: int, block_bytes: int) -> int:
        """Return how many leading blocks may be written now."""
        ...

    def draw(self, num_bytes: int) -> None:
        """Bytes are written that nobody was asked for."""
        ...

    def give_back(self, num_bytes: int) -> None:
        """Bytes that were granted and not written."""
        ...


class AdmitAll:
    """Every block when it is stored; while the budget is low, when it is wanted again."""

    def __init__(self, budget: TokenBucket | None = None, seen: SeenBlocks | None = None) -> None:
        """`seen` is of use with a budget only: what is stored again then comes before the rest."""
        self._budget = budget
        self._seen = seen

    @property
    def wants_used(self) -> bool:
        return self._budget is not None

    def stored(self, namespace_id: int, hashes: HashRows) -> list[tuple[Origin, HashRows]]:
        if self._seen is None:
            return [(Origin.STORED, hashes)]
        again = self._seen.add(namespace_id, hashes)
        parts = [(Origin.USED, hashes[again]), (Origin.STORED, hashes[~again])]
        return [(origin, part) for origin, part in parts if len(part)]

    def used(self, hashes: HashRows, block_bytes: int) -> HashRows:
        # A hot block that does not fit would else be queued at each read.
        budget = self._budget
        if budget is not None and budget.level < min(block_bytes, budget.burst):
            return hashes[:0]
        return hashes

    def grant(self, origin: Origin, num_blocks: int, block_bytes: int) -> int:
        budget = self._budget
        if budget is None:
            return num_blocks
        if origin is Origin.PROMISED:
            budget.draw(num_blocks * block_bytes)
            return num_blocks
        # What is stored may have the upper half: the lower is for what has shown that it is used.
        keep = budget.burst / 2 if origin is Origin.STORED else 0.0
        return budget.take(num_blocks, block_bytes, keep)

    def draw(self, num_bytes: int) -> None:
        if self._budget is not None:
            self._budget.draw(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        if self._budget is not None:
            self._budget.give_back(num_bytes)


class AdmitReused(AdmitAll):
    """A block when it is read, or stored again, after it was stored."""

    def __init__(self, budget: TokenBucket | None, seen: SeenBlocks) -> None:
        super().__init__(budget, seen)

    @property
    def wants_used(self) -> bool:
        return True

    def stored(self, namespace_id: int, hashes: HashRows) -> list[tuple[Origin, HashRows]]:
        parts = super().stored(namespace_id, hashes)
        return [(origin, part) for origin, part in parts if origin is not Origin.STORED]


def make_admission(
    kind: Admission,
    budget_bytes: int,
    capacity_blocks: int,
    now: Callable[[], float] = time.monotonic,
) -> AdmissionPolicy:
    """Return the policy for settings.

    Args:
        budget_bytes: a second; 0 for no bound.
        capacity_blocks: about how many blocks the ssd holds; twice as many are remembered.
    """
    if kind == "all" and not budget_bytes:
        return AdmitAll()
    bucket = TokenBucket(budget_bytes, budget_bytes * BURST_SECONDS, now) if budget_bytes else None
    seen = SeenBlocks(min(SEEN_ENTRIES_MAX, max(SEEN_ENTRIES_MIN, 2 * capacity_blocks)))
    return AdmitAll(bucket, seen) if kind == "all" else AdmitReused(bucket, seen)

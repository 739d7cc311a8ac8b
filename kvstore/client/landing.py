"""Landing: room for copies of blocks that come from, or go to, a daemon over a socket.

Its `memory` is to a copying client what the arena is to one that maps it, so leases and
reservations work on it alike: a block's place is an offset, and beside it lies a sequence number
that changes when the place is given to another block.

    | sequence numbers, 8 B a place, up to a 4 KiB edge | place 0 | place 1 | ... |

Bounded: whoever wants room when there is none waits, and takes it from copies whose lease is over.

Thread-safe; `_changed` guards everything but the payload.
"""

from __future__ import annotations

import mmap
import threading
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LANDING_BYTES = 64 << 20
_PAGE_BYTES = 4096
_RECLAIM_SECONDS = 0.05  # who waits for room looks this often for leases that are over

Places = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Copies:
    places: Places
    expires: float  # on the monotonic clock


class Landing:
    """Room for at least two blocks. Memory that was never used costs nothing."""

    def __init__(self, block_bytes: int, num_bytes: int = LANDING_BYTES) -> None:
        self._stride = -(-block_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self.capacity = max(2, num_bytes // self._stride)
        self._begin = -(-self.capacity * 8 // _PAGE_BYTES) * _PAGE_BYTES
        # Private: a forked child gets a copy of its own, not a share in ours.
        area = mmap.mmap(
            -1, self._begin + self.capacity * self._stride, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(area, np.uint8)
        self.address: int = self.memory.ctypes.data
        self._sequences = self.memory[: self.capacity * 8].view(np.uint64)
        self._changed = threading.Condition(threading.Lock())
        self._free: Places = np.arange(self.capacity, dtype=np.int64)
        self._num_free = self.capacity
        self._held: dict[int, _Copies] = {}

    def take(self, count: int, deadline: float) -> Places:
        """Return up to `count` places; fewer, but one at least, when no more are free; none when
        the deadline (monotonic clock) came first."""
        if count == 0:
            return self._free[:0]
        with self._changed:
            while self._num_free < count and self._reclaim():
                pass
            while self._num_free == 0 and not self._reclaim():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, _RECLAIM_SECONDS))
            rest = self._num_free - min(count, self._num_free)
            places = self._free[rest : self._num_free].copy()
            self._num_free = rest
        return places

    def give(self, places: Places) -> None:
        """Give places back; who still holds them sees by the sequence that they are not theirs."""
        if len(places):
            with self._changed:
                self._give(places)

    def hold(self, key: int, places: Places, ttl: float | None) -> None:
        """Keep places under a number, for `ttl` seconds at least, until `end`."""
        expires = float("inf") if ttl is None else time.monotonic() + ttl
        with self._changed:
            self._held[key] = _Copies(places, expires)

    def end(self, key: int) -> Places | None:
        """Stop keeping; return the places, which are the caller's to give back; None if unknown."""
        with self._changed:
            copies = self._held.pop(key, None)
        return None if copies is None else copies.places

    def offsets(self, places: Places) -> npt.NDArray[np.uint64]:
        return (places * self._stride + self._begin).astype(np.uint64)

    def header_offsets(self, places: Places) -> npt.NDArray[np.uint64]:
        return (places * 8).astype(np.uint64)

    def sequences(self, places: Places) -> npt.NDArray[np.uint64]:
        return self._sequences[places]

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_free(self) -> int:
        return self._num_free

    def _give(self, places: Places) -> None:
        self._sequences[places] += np.uint64(1)
        self._free[self._num_free : self._num_free + len(places)] = places
        self._num_free += len(places)
        self._changed.notify_all()

    def _reclaim(self) -> bool:
        """Take back what one overdue lease holds."""
        now = time.monotonic()
        for key, copies in self._held.items():
            if copies.expires <= now:
                del self._held[key]
                self._give(copies.places)
                return True
        return False

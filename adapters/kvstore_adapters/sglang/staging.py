"""Staging: pieces of device memory, sent through pinned host memory.

Two halves take turns: while one is being sent, the device fills the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore import DeadlineExceededError
from kvstore.gpu.device import Device, Event, wait_for
from kvstore.transport import Status
from kvstore_adapters.sglang.address_map import Addresses

HALF_BYTES = 32 << 20

# Sends pieces of host memory: where they lie, where they go, how long they are.
Send = Callable[[Addresses, Addresses, Addresses], npt.NDArray[np.uint8]]


class Round(NamedTuple):
    """Parts of pieces that fill one half: of which pieces, from which byte of each, how long, and
    where in the half."""

    rows: npt.NDArray[np.intp]
    begins: Addresses
    lengths: Addresses
    places: Addresses


def rounds(lengths: Addresses, half_bytes: int) -> Iterator[Round]:
    """Pack pieces in their order; one that is too long for what is left of a half is cut."""
    parts: list[tuple[int, int, int, int]] = []
    used = 0
    for row, length in enumerate(lengths.tolist()):
        begin = 0
        while begin < length:
            part = min(length - begin, half_bytes - used)
            parts.append((row, begin, part, used))
            begin += part
            used += part
            if used == half_bytes:
                yield _round(parts)
                parts, used = [], 0
    if parts:
        yield _round(parts)


def _round(parts: list[tuple[int, int, int, int]]) -> Round:
    rows, begins, lengths, places = zip(*parts, strict=True)
    return Round(
        np.array(rows, np.intp),
        np.array(begins, np.uint64),
        np.array(lengths, np.uint64),
        np.array(places, np.uint64),
    )


class Staging:
    """Thread safety: sends of several threads take turns.

    Raises:
        GpuError: host memory cannot be pinned.
    """

    def __init__(self, device: Device, half_bytes: int = HALF_BYTES) -> None:
        self._device = device
        self._half_bytes = half_bytes
        self._buffer = np.zeros(2 * half_bytes, np.uint8)
        self._address = self._buffer.ctypes.data
        self._lock = threading.Lock()
        self._stream = device.new_stream()
        self._last: Event | None = None
        device.register(self._address, 2 * half_bytes, read_only=False)

    def send(
        self,
        addresses: Addresses,
        peer_addresses: Addresses,
        lengths: Addresses,
        send: Send,
        deadline: float,
    ) -> npt.NDArray[np.uint8]:
        """Send pieces of the device's memory that nothing writes meanwhile; return the status of
        each.

        Raises:
            DeadlineExceededError: the device did not copy in time.
            GpuError: it refused to.
        """
        with self._lock:
            self._wait(self._last, deadline)  # of a send that was given up
            statuses = np.full(len(addresses), Status.OK, np.uint8)
            todo = rounds(lengths, self._half_bytes)
            side = 0
            filled = self._fill(next(todo, None), addresses, side)
            while filled is not None:
                now, sources, event = filled
                self._wait(event, deadline)
                side = 1 - side
                filled = self._fill(next(todo, None), addresses, side)
                peers = peer_addresses[now.rows] + now.begins
                np.maximum.at(statuses, now.rows, send(sources, peers, now.lengths))
                if (statuses != Status.OK).any():
                    unsent = statuses[now.rows[-1] :]  # of the first of them perhaps a part
                    unsent[unsent == Status.OK] = Status.CANCELLED
                    break
            self._wait(self._last, deadline)
            return statuses

    def _fill(
        self, part: Round | None, addresses: Addresses, side: int
    ) -> tuple[Round, Addresses, Event] | None:
        if part is None:
            return None
        staged = part.places + np.uint64(self._address + side * self._half_bytes)
        sources = addresses[part.rows] + part.begins
        self._device.copy(staged, sources, part.lengths, self._stream)
        self._last = self._device.record(self._stream)
        return part, staged, self._last

    def _wait(self, event: Event | None, deadline: float) -> None:
        if event is not None and not wait_for(event, max(deadline - time.monotonic(), 0.0)):
            raise DeadlineExceededError("the device did not copy in time")

    def close(self) -> None:
        """REQUIRES: no send is under way, and the device has done what it was told."""
        self._device.unregister(self._address)
        self._device.close_stream(self._stream)

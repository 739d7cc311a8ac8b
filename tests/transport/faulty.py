"""FaultyLink: a MoverLink that delays, drops, corrupts, reorders or dies, as it is told.

What it does to a batch is what networks and dying peers do: pieces arrive in another order, late,
or not at all; bytes differ. It then answers as an honest mover must: a piece whose checksum was
given and differs is DAMAGED. Only a piece without a checksum can come damaged and be called OK.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvstore import _native
from kvstore._native import CancelFlag
from kvstore.transport.mover import MoverLink
from kvstore.transport.types import Batch, RegionInfo, Status, Statuses, all_of


@dataclass
class Faults:
    """What is to happen; change it at any time. Probabilities are of each piece.

    Args:
        delay: seconds before each batch.
        drop: the piece never arrives: the batch takes all of its time, the piece is LATE.
        corrupt: one of its bytes is flipped on the way.
        reorder: pieces move in a random order, in batches of their own.
        die_after: pieces moved before the link dies; None: it lives.
        before: called before each batch.
    """

    seed: int = 0
    delay: float = 0.0
    drop: float = 0.0
    corrupt: float = 0.0
    reorder: bool = False
    die_after: int | None = None
    before: Callable[[], None] | None = None
    struck: int = 0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)


class FaultyLink:
    """See `kvstore.transport.mover.MoverLink`."""

    def __init__(self, link: MoverLink, faults: Faults) -> None:
        self._link = link
        self.faults = faults
        self._lock = threading.Lock()
        self._died = False

    @property
    def is_alive(self) -> bool:
        return not self._died and self._link.is_alive

    @property
    def detail(self) -> str:
        return f"{self._link.detail}, with faults"

    def open(self, region: RegionInfo) -> None:
        self._link.open(region)

    def close(self, timeout: float) -> bool:
        return self._link.close(timeout)

    def read(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        return self._move(self._link.read, region_id, batch, timeout, cancel, True)

    def write(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        return self._move(self._link.write, region_id, batch, timeout, cancel, False)

    def _move(
        self,
        move: Callable[[int, Batch, float, CancelFlag | None], Statuses],
        region_id: int,
        batch: Batch,
        timeout: float,
        cancel: CancelFlag | None,
        is_read: bool,
    ) -> Statuses:
        faults, deadline = self.faults, time.monotonic() + timeout
        if faults.before is not None:
            faults.before()
        if faults.delay > 0:
            _rest(min(faults.delay, timeout), cancel)
        statuses = all_of(Status.LOST, len(batch))
        with self._lock:
            order = list(range(len(batch)))
            if faults.reorder:
                faults.random.shuffle(order)
            dropped = [i for i in order if faults.random.random() < faults.drop]
            kept = [i for i in order if i not in dropped]
            flipped = {i for i in kept if faults.random.random() < faults.corrupt}
            if faults.die_after is not None:
                order = kept[: faults.die_after]
                faults.die_after -= len(order)
                self._died |= len(order) < len(kept)
            faults.struck += len(dropped) + len(flipped) + self._died
        groups = [[i] for i in order] if faults.reorder or flipped else [order]
        for group in groups:
            todo = [i for i in group if i not in dropped]
            left = max(0.0, deadline - time.monotonic())
            if todo and (flipped & set(todo)):
                part = _flipped(move, region_id, batch.pick(todo), left, cancel, is_read)
            elif todo:
                part = move(region_id, batch.pick(todo), left, cancel)
            else:
                continue
            statuses[todo] = part
        if dropped:
            was_cancelled = _rest(max(0.0, deadline - time.monotonic()), cancel)
            statuses[dropped] = Status.CANCELLED if was_cancelled else Status.LATE
        return statuses


def _flipped(
    move: Callable[[int, Batch, float, CancelFlag | None], Statuses],
    region_id: int,
    batch: Batch,
    timeout: float,
    cancel: CancelFlag | None,
    is_read: bool,
) -> Statuses:
    """Move one piece, and flip a byte on the way."""
    size = int(batch.lengths[0])
    bytes_there = np.empty(size, np.uint8)
    through = np.array([bytes_there.ctypes.data], np.uint64)
    here = batch.local_addresses
    if is_read:
        statuses = move(region_id, Batch(through, batch.remote_offsets, size), timeout, cancel)
    else:
        statuses = _native.move_pieces(through, here, batch.lengths, None, 1, timeout)
    if statuses[0] != Status.OK or size == 0:
        return statuses
    bytes_there[size // 2] ^= 0x10
    if is_read:
        _native.move_pieces(here, through, batch.lengths, None, 1, timeout)
    else:
        statuses = move(region_id, Batch(through, batch.remote_offsets, size), timeout, cancel)
    if batch.checksums is not None:
        statuses[0] = Status.DAMAGED
    return statuses


def _rest(seconds: float, cancel: CancelFlag | None) -> bool:
    """Wait; return whether it was cut short by a cancellation."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if cancel is not None and cancel.is_set():
            return True
        time.sleep(min(left, 0.01))
    return False

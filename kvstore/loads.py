"""Loads: blocks are acquired and copied into engine blocks, piece by piece if need be.

Either the leading blocks, or each by itself. A control grants leading blocks; so for the latter the
blocks are put in order first, those in DRAM before those on ssd before those that are nowhere, and
acquired as if they stood so. Where one is lost between the look and the acquire, or there is no
room to read in all of them at once, another turn goes on with the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHashes
from kvstore.control import Control
from kvstore.layout import BlockBuffers
from kvstore.lease import Lease

IN_CPU, ON_SSD = 1, 2  # bits of a block's residency

_TURNS = 16  # one is enough unless blocks go meanwhile, or more are on ssd than fit into DRAM
_DRAM, _SSD, _NOWHERE = range(3)
_RANK = np.array([_NOWHERE, _DRAM, _SSD, _DRAM], np.uint8)  # by residency & 3

Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]  # in the hashes that were given


def is_available(residency: npt.NDArray[np.uint8]) -> Flags:
    """Return for each block whether it is in some tier, and may be read."""
    there: Flags = (residency & (IN_CPU | ON_SSD)) != 0
    return there


class Load:
    """One load: what is wanted, whereto, and until when."""

    __slots__ = ("_acquire", "_buffers", "_chain", "_control", "_deadline", "_ids", "_last_begin")

    def __init__(
        self,
        control: Control,
        acquire: Callable[[BlockHashes, float], Lease],
        chain: BlockHashes,
        buffers: BlockBuffers,
        ids: npt.NDArray[np.int64],
        timeout: float,
        call_seconds: float,
    ) -> None:
        """
        Args:
            acquire: hashes and seconds to wait for lower tiers to a lease.
            timeout: seconds to wait for lower tiers.
            call_seconds: how long one call of `control` may take besides.
        """
        self._control = control
        self._acquire = acquire
        self._chain = chain
        self._buffers = buffers
        self._ids = ids
        began = time.monotonic()
        self._deadline = began + timeout
        # A control that answers, but slowly, must not add up a deadline for each piece.
        self._last_begin = max(self._deadline, began + call_seconds)

    def leading(self) -> int:
        """Copy leading blocks; return how many."""
        count = len(self._chain)
        piece = self._control.piece_blocks or max(count, 1)
        loaded = 0
        for begin in range(0, count, piece):
            part = self._chain[begin : begin + piece] if piece < count else self._chain
            if begin and self._is_over():
                break
            loaded += self._copy(part, self._ids[begin : begin + len(part)])
            if loaded < begin + len(part):
                break
        return loaded

    def each(self) -> Flags:
        """Copy what is there; return for each block whether it arrived."""
        arrived = np.zeros(len(self._chain), bool)
        todo = np.arange(len(self._chain))
        last_rank = _SSD
        for turn in range(_TURNS):
            if turn and self._is_over():
                break
            rank = _RANK[self._control.residency(_picked(self._chain, todo)) & 3]
            num_there = int(np.count_nonzero(rank <= last_rank))
            if num_there == 0 and turn:
                break
            todo = todo[np.argsort(rank, kind="stable")]
            there, missing = todo[:num_there], todo[num_there:]
            # In the first turn with those that are nowhere: they are to count as missed.
            self._copy_each(there, missing[:0] if turn else missing, arrived)
            todo = there[~arrived[there]]
            if len(todo) == 0:
                break
            if len(todo) == num_there or time.monotonic() >= self._deadline:
                if last_rank == _DRAM:
                    break
                last_rank = _DRAM  # the ssd gives nothing, or not in time
        return arrived

    def _copy_each(self, there: Places, missing: Places, arrived: Flags) -> None:
        """Copy blocks that were there a moment ago, and mark those that arrived."""
        piece = self._control.piece_blocks or max(len(there), 1)
        for begin in range(0, max(len(there), 1), piece):
            if begin and self._is_over():
                break
            part = there[begin : begin + piece]
            if begin + piece >= len(there):
                part = np.concatenate((part, missing))
            arrived[part[: self._copy(_picked(self._chain, part), self._ids[part])]] = True

    def _copy(self, part: BlockHashes, ids: npt.NDArray[np.int64]) -> int:
        left = max(0.0, self._deadline - time.monotonic())
        with self._acquire(part, left) as lease:
            return lease.load(self._buffers, ids[: len(lease)]) if len(lease) else 0

    def _is_over(self) -> bool:
        return time.monotonic() >= self._last_begin


def _picked(chain: BlockHashes, places: Places) -> BlockHashes:
    """Those hashes as blocks by themselves."""
    array = chain.array[places]
    array.flags.writeable = False
    return BlockHashes(array)

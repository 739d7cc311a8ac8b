"""Puts: slots are reserved, filled from engine blocks, and committed; piece by piece if need be."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.control import (
    ACK_LEVELS,
    NO_SPACE,
    PRESENT,
    RESERVED,
    UNAVAILABLE,
    Ack,
    Control,
    Reserved,
)
from kvstore.errors import ConfigError, DeadlineExceededError, PeerUnavailableError
from kvstore.layout import BlockBuffers
from kvstore.transfer import Transfer, TransferResult, join

Statuses = npt.NDArray[np.uint8]

_WAIT_SLICE_SECONDS = 0.25  # a put that waits for room sees this often whether its store closes


class Put:
    """One put: what is to be stored, from where, and how."""

    __slots__ = ("_ack", "_block_ids", "_buffers", "_chain", "_control", "_threads")

    def __init__(
        self,
        control: Control,
        chain: BlockHashes,
        buffers: BlockBuffers,
        block_ids: npt.NDArray[np.int64],
        ack: Ack,
        threads: int,
    ) -> None:
        self._control = control
        self._chain = chain
        self._buffers = buffers
        self._block_ids = block_ids
        self._ack: Ack = ack
        self._threads = threads

    def run(self, wait: float, is_closing: Callable[[], bool]) -> Transfer:
        """Store all blocks, in pieces where the control takes no more at once.

        While there is no room, waits up to `wait` seconds for it, with nothing held.
        """
        count = len(self._chain)
        piece = min(self._control.piece_blocks or count, count)
        deadline = time.monotonic() + wait if wait > 0 else 0.0
        transfers: list[Transfer] = []
        begin = 0
        while begin < count or not transfers:
            part = self._chain
            if begin or piece < count:
                part = part[begin : begin + piece]
            left = deadline - time.monotonic() if wait > 0 else 0.0
            step = min(max(left, 0.0), _WAIT_SLICE_SECONDS)
            reserved = self._control.reserve(part, step)
            if left > 0:
                num_full = int(np.count_nonzero(reserved.statuses == NO_SPACE))
                if num_full and not reserved.reservation and not is_closing():
                    continue
                if num_full and reserved.reservation:
                    # What has room goes first. The rest waits while this one holds nothing.
                    part = part[: len(part) - num_full]
                    reserved.statuses = reserved.statuses[: len(part)]
                    reserved.offsets = reserved.offsets[: len(part)]
            transfers.append(self._write_and_commit(reserved, part, self._block_ids[begin:]))
            begin += len(part)
        return transfers[0] if len(transfers) == 1 else join(transfers)

    def _write_and_commit(
        self, reserved: Reserved, part: BlockHashes, block_ids: npt.NDArray[np.int64]
    ) -> Transfer:
        wanted = np.flatnonzero(reserved.statuses == RESERVED)
        addresses = reserved.offsets[wanted] + np.uint64(reserved.address)
        sums = np.empty(len(addresses), np.uint64)
        writers = reserved.writers if len(wanted) else None
        try:
            if writers is not None and not writers.begin():
                return Transfer(not_stored(reserved.statuses))
            try:
                _native.gather(
                    self._buffers.plan, block_ids[wanted], addresses, sums, self._threads
                )
            finally:
                if writers is not None:
                    writers.end()
        except BaseException:
            self._control.abort(reserved.reservation)
            raise
        return finish_put(
            self._control, reserved.reservation, sums, part, reserved.statuses, self._ack
        )


def check_ack(ack: str) -> None:
    if ack not in ACK_LEVELS:
        raise ConfigError(f"ack: {ack!r} is not one of {', '.join(ACK_LEVELS)}")


def finish_put(
    control: Control,
    reservation: int,
    checksums: npt.NDArray[np.uint64],
    chain: BlockHashes,
    statuses: Statuses,
    ack: Ack,
) -> Transfer:
    """Commit, and turn the level's future into a transfer."""
    if not reservation and np.any(statuses == UNAVAILABLE):
        return Transfer(result_of(statuses, ""))
    try:
        level = control.commit(reservation, checksums, chain, ack)
    except (PeerUnavailableError, DeadlineExceededError):
        return Transfer(not_stored(statuses))
    if level is None:
        return Transfer(result_of(statuses, "memory"))
    done: Future[TransferResult] = Future()

    def finish(reached: Future[Ack]) -> None:
        error = reached.exception()
        if error is None:
            done.set_result(result_of(statuses, reached.result()))
        elif isinstance(error, (PeerUnavailableError, DeadlineExceededError)):
            done.set_result(not_stored(statuses))
        else:
            done.set_exception(error)

    level.add_done_callback(finish)
    return Transfer(future=done)


def result_of(statuses: Statuses, ack: str) -> TransferResult:
    """Return a put's result from its blocks' reserve statuses."""
    elsewhere = np.flatnonzero((statuses != RESERVED) & (statuses != PRESENT))
    leading = int(elsewhere[0]) if len(elsewhere) else len(statuses)
    stored, present, pending, no_space, orphan, away = np.bincount(statuses, minlength=6).tolist()
    return TransferResult(leading, stored, present, pending, no_space, orphan, away, ack=ack)


def not_stored(statuses: Statuses) -> TransferResult:
    """The result where nobody said that the reserved blocks were published."""
    return result_of(np.where(statuses == RESERVED, UNAVAILABLE, statuses), "")

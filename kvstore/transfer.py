"""Transfer: the one way to be asynchronous.

A transfer is either done when it is returned (the copy ran on the caller's thread) or runs in the
background. Both are polled, waited for, and awaited in the same way.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from typing import Any

from kvstore.errors import DeadlineExceededError, StoreClosedError


@dataclass(slots=True)
class TransferResult:
    """What became of a batch.

    `num_blocks` is what most callers need: how many leading blocks are now where they were to go.
    The other counts say why it is less than was asked for; they add up to the blocks given.
    """

    num_blocks: int
    num_stored: int = 0  # put: copied now
    num_present: int = 0  # put: were there already
    num_pending: int = 0  # put: another writer has them in hand
    num_no_space: int = 0  # put: every slot is leased or being written
    num_orphan: int = 0  # put: the block before is not in the store
    num_unavailable: int = 0  # put: the daemon is away, or went while it was asked
    num_missed: int = 0  # load, prefetch: not there, or failed their checksum
    ack: str = ""  # put: the level reached for all stored blocks: memory, ssd or durable


_LEVELS = ("", "memory", "ssd", "durable")
_COUNTS = tuple(
    field.name for field in fields(TransferResult) if field.name not in ("num_blocks", "ack")
)


class Transfer:
    """One asynchronous move of a batch of blocks; awaitable."""

    __slots__ = ("_future", "_result")

    def __init__(
        self,
        result: TransferResult | None = None,
        future: concurrent.futures.Future[TransferResult] | None = None,
    ) -> None:
        self._result = result
        self._future = future

    def done(self) -> bool:
        """Return True when `wait` would not block."""
        return self._future is None or self._future.done()

    def wait(self, timeout: float | None = None) -> TransferResult:
        """Return the result, waiting at most `timeout` seconds (None: until it is done).

        Raises:
            DeadlineExceededError: not done in time; the transfer goes on.
            KVStoreError: what stopped the transfer.
        """
        if self._future is None:
            assert self._result is not None
            return self._result
        try:
            return self._future.result(timeout)
        except concurrent.futures.CancelledError:
            raise StoreClosedError("the store was closed before the transfer began") from None
        except concurrent.futures.TimeoutError:
            if self._future.done():
                raise  # what stopped the transfer was a deadline of its own
            raise DeadlineExceededError(f"transfer not done after {timeout} s") from None

    def then(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the transfer is done, on the finishing thread; at once if it is."""
        if self._future is None:
            callback()
        else:
            self._future.add_done_callback(lambda _: callback())

    def __await__(self) -> Generator[Any, None, TransferResult]:
        return self._finish().__await__()

    async def _finish(self) -> TransferResult:
        if self._future is None or self._future.done():
            return self.wait(0)
        import asyncio  # costs more to import than all of kvstore

        try:
            # Shielded: who gives up waiting does not stop the transfer.
            return await asyncio.shield(asyncio.wrap_future(self._future))
        except asyncio.CancelledError:
            if self._future.cancelled():
                return self.wait(0)  # says that the store was closed
            raise


def join(transfers: list[Transfer]) -> Transfer:
    """Return the transfer of a batch from those of its consecutive pieces."""
    if all(transfer.done() for transfer in transfers):
        return Transfer(_sum([transfer.wait(0) for transfer in transfers]))
    future: concurrent.futures.Future[TransferResult] = concurrent.futures.Future()
    lock = threading.Lock()
    num_left = len(transfers)

    def one_done() -> None:
        nonlocal num_left
        with lock:
            num_left -= 1
            if num_left:
                return
        try:
            future.set_result(_sum([transfer.wait(0) for transfer in transfers]))
        except Exception as error:  # noqa: BLE001  whatever stopped a piece stopped the whole
            future.set_exception(error)

    for transfer in transfers:
        transfer.then(one_done)
    return Transfer(future=future)


def _sum(pieces: list[TransferResult]) -> TransferResult:
    """The result of a batch whose pieces follow on each other: of levels the lowest."""
    total = TransferResult(0, ack=min((piece.ack for piece in pieces), key=_LEVELS.index))
    is_leading = True
    for piece in pieces:
        if is_leading:
            total.num_blocks += piece.num_blocks
        counts = [getattr(piece, name) for name in _COUNTS]
        for name, count in zip(_COUNTS, counts, strict=True):
            setattr(total, name, getattr(total, name) + count)
        is_leading = is_leading and piece.num_blocks == sum(counts)
    return total

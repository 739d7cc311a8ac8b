"""Transfer: the one way to be asynchronous.

A transfer is either done when it is returned (the copy ran on the caller's thread) or runs in the
background. Both are polled, waited for, and awaited in the same way.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from kvstore.errors import DeadlineExceededError


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
    num_missed: int = 0  # load, prefetch: not there, or failed their checksum
    ack: str = ""  # put: the level reached for all stored blocks: memory, ssd or durable


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
        except concurrent.futures.TimeoutError:
            raise DeadlineExceededError(f"transfer not done after {timeout} s") from None

    def then(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the transfer is done, at once when it is; on the finishing thread."""
        if self._future is None:
            callback()
        else:
            self._future.add_done_callback(lambda _: callback())

    def __await__(self) -> Generator[Any, None, TransferResult]:
        if self._future is not None and not self._future.done():
            import asyncio  # costs more to import than all of kvstore

            return asyncio.wrap_future(self._future).__await__()
        return self._ready().__await__()

    async def _ready(self) -> TransferResult:
        return self.wait(0)

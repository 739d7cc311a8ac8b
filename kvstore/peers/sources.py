"""What a fetch sees of one holder: blocks under a lease, and a way to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHashes

U64s = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Held:
    """Leading blocks that a holder keeps for us until `release`, or for a bounded time."""

    lease: int  # 0: none
    offsets: U64s  # in the holder's arena
    checksums: U64s
    session: object = None  # whose lease it is

    def __len__(self) -> int:
        return len(self.offsets)


class Unsettled(Protocol):
    """What may still write into memory that was a read's destination."""

    def settle(self, timeout: float) -> bool:
        """Return whether nothing writes there any more, ever."""
        ...


@dataclass(frozen=True, slots=True)
class Read:
    """What became of a read. `unsettled`: see `kvstore.transport.Link.settles_late`."""

    statuses: npt.NDArray[np.uint8]  # kvstore.transport.Status
    mover: str
    unsettled: Unsettled | None = None


class Source(Protocol):
    """One holder, for one tenant's namespace. Thread-safe. No call outlives its `seconds` by much.

    Raises:
        KVStoreError: the holder does not answer, or refuses; it is of no use for now.
    """

    @property
    def address(self) -> str: ...

    @property
    def bytes_per_second(self) -> float:
        """As measured lately; 0: not known."""
        ...

    def submit(self, step: Callable[[], None]) -> bool:
        """Run `step` on a thread that is there for this holder; see `Threads`."""
        ...

    def available(self, hashes: BlockHashes, seconds: float) -> int:
        """Return how many leading blocks it has in any tier."""
        ...

    def acquire(self, hashes: BlockHashes, seconds: float) -> Held:
        """Lease leading blocks; it reads in from its ssd what it can in the time."""
        ...

    def read(self, held: Held, places: U64s, addresses: U64s, seconds: float) -> Read:
        """Read blocks `places` of `held` to `addresses`, and check them. Raises nothing."""
        ...

    def release(self, held: Held) -> None:
        """Raises nothing."""
        ...

    def report_damaged(self, block_hash: bytes) -> None:
        """Raises nothing."""
        ...

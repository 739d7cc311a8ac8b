"""Control: the decisions of a store, wherever they are made.

`Store` copies bytes; it asks a `Control` which slots to copy to and from. The embedded store's
control calls the native core in this process, the client's asks a daemon over a socket, and the
daemon serves each client with a control of the first kind: one code path.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHashes, Namespace
from kvstore.events import Event
from kvstore.transfer import TransferResult

Ack = Literal["memory", "ssd", "durable"]
ACK_LEVELS: tuple[Ack, ...] = ("memory", "ssd", "durable")

# ReserveStatus in csrc/core/store_core.h
RESERVED, PRESENT, PENDING, NO_SPACE, ORPHAN = range(5)

Offsets = npt.NDArray[np.uint64]


@dataclass(slots=True)
class Granted:
    """Leading blocks pinned for a reader: places in the arena, valid until the lease ends."""

    lease: int  # 0: none
    offsets: Offsets
    header_offsets: Offsets  # where each slot's sequence number lies
    sequences: Offsets  # what it reads as long as the slot holds the block
    checksums: Offsets


@dataclass(slots=True)
class Reserved:
    """Slots granted to a writer. `statuses[i]` is one of RESERVED, PRESENT, ...."""

    reservation: int  # 0: none
    statuses: npt.NDArray[np.uint8]
    offsets: Offsets


class Control(Protocol):
    """All methods are thread-safe, and bounded in time by their `timeout` where they have one."""

    @property
    def namespace(self) -> Namespace: ...
    @property
    def arena(self) -> npt.NDArray[np.uint8]:
        """The whole arena, mapped in this process."""
        ...

    def match(self, hashes: BlockHashes) -> int:
        """Return how many leading blocks are available in any tier."""
        ...

    def residency(self, hashes: BlockHashes) -> npt.NDArray[np.uint8]:
        """Return for each block: bit 0 ready in cpu, bit 1 on ssd, bit 2 being written."""
        ...

    def describe(self, hashes: BlockHashes) -> bytes:
        """Return rows of `kvstore.records.RECORD` of leading known blocks, packed."""
        ...

    def wait_for(self, hashes: BlockHashes, want: int, timeout: float) -> int:
        """Wait until `want` leading blocks are available; return how many are."""
        ...

    def acquire(self, hashes: BlockHashes, ttl: float | None, timeout: float) -> Granted:
        """Pin leading blocks, reading in from lower tiers what arrives within `timeout`."""
        ...

    def release(self, lease: int) -> bool:
        """End a lease; False when it had ended before."""
        ...

    def reserve(self, hashes: BlockHashes) -> Reserved: ...

    def commit(
        self, reservation: int, checksums: Offsets, hashes: BlockHashes, ack: Ack
    ) -> Future[Ack] | None:
        """Publish reserved blocks. None at level memory, else a future of the level reached.

        Raises:
            StoreClosedError: the reservation is gone, nothing was published.
        """
        ...

    def abort(self, reservation: int) -> None: ...
    def prefetch(self, hashes: BlockHashes) -> Future[TransferResult]: ...
    def remove(self, hashes: BlockHashes) -> int: ...
    def report_corrupt(self, block_hash: bytes) -> None:
        """A reader found that a block fails its checksum: count it and remove the block."""
        ...

    def clear(self) -> None: ...
    def flush(self, timeout: float) -> bool: ...
    def events(self) -> Iterator[Event]: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self, timeout: float = 60.0) -> None: ...

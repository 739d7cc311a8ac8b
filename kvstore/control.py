"""Control: the decisions of a store, wherever they are made.

`Store` copies bytes; it asks a `Control` which slots to copy to and from. The embedded store's
control calls the native core in this process, the client's asks a daemon over a socket, and the
daemon serves each client with a control of the first kind: one code path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

# ReserveStatus in csrc/core/store_core.h; the last is a client's own: the daemon is away
RESERVED, PRESENT, PENDING, NO_SPACE, ORPHAN, UNAVAILABLE = range(6)

Offsets = npt.NDArray[np.uint64]


@dataclass(slots=True)
class Granted:
    """Leading blocks pinned for a reader: places in an arena, valid until the lease ends."""

    lease: int  # 0: none
    offsets: Offsets
    header_offsets: Offsets  # where each slot's sequence number lies
    sequences: Offsets  # what it reads as long as the slot holds the block
    checksums: Offsets
    arena: npt.NDArray[np.uint8]  # the whole of it, mapped here; stays mapped while referenced
    address: int  # where it begins


@dataclass(frozen=True, slots=True)
class Terms:
    """What whoever decides asks of those who copy."""

    verify_always: bool  # check every block that is read
    threads: int  # that may copy one batch
    lease_seconds: float  # of a lease of which nothing else was said


class SlotWriters(Protocol):
    """Counts those who write into a reservation's slots, which may cease to be ours meanwhile."""

    def begin(self) -> bool:
        """Return whether the slots are still ours to write. Each True needs one `end`."""
        ...

    def end(self) -> None: ...


@dataclass(slots=True)
class Reserved:
    """Slots granted to a writer. `statuses[i]` is one of RESERVED, PRESENT, ...."""

    reservation: int  # 0: none
    statuses: npt.NDArray[np.uint8]
    offsets: Offsets
    arena: npt.NDArray[np.uint8]  # writable; stays mapped while referenced
    address: int  # where it begins
    writers: SlotWriters | None = None  # None: ours for as long as the store is open


class Control(Protocol):
    """All methods are thread-safe, and bounded in time by their `timeout` where they have one.

    A control whose decisions are made elsewhere may lose who makes them. Then looking and reading
    find nothing, `reserve` says UNAVAILABLE, and what must not be pretended (`commit`, `remove`,
    `clear`, `flush`, `describe`, `events`) raises PeerUnavailableError or DeadlineExceededError.
    """

    @property
    def namespace(self) -> Namespace: ...
    @property
    def terms(self) -> Terms:
        """May change while nothing is granted; ask again after a grant."""
        ...

    @property
    def piece_blocks(self) -> int | None:
        """The most blocks that one acquire or reserve can take; None: any number."""
        ...

    def require_open(self) -> None:
        """Raise StoreClosedError after `close`: leases and reservations ended with it."""
        ...

    def match(self, hashes: BlockHashes) -> int:
        """Return how many leading blocks are available in any tier."""
        ...

    def lookup(self, hashes: BlockHashes, prefetch: bool) -> tuple[int, int]:
        """Return how many leading blocks are available, and how many of those are in DRAM.

        With `prefetch`, start to read in the others.
        """
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
        """Grant leading blocks, reading in from lower tiers what arrives within `timeout`."""
        ...

    def pin(self, hashes: BlockHashes, timeout: float) -> tuple[int, int]:
        """Keep leading blocks in DRAM without reading them: a lease without end, and how many."""
        ...

    def release(self, lease: int) -> bool:
        """End a lease; False when it had ended before."""
        ...

    def reserve(self, hashes: BlockHashes, wait: float = 0.0) -> Reserved:
        """Grant slots for what is not there yet; with `wait`, wait for room while there is none."""
        ...

    def commit(
        self, reservation: int, checksums: Offsets, hashes: BlockHashes, ack: Ack
    ) -> Future[Ack] | None:
        """Publish reserved blocks. None at level memory, else a future of the level reached.

        Raises:
            StoreClosedError: the reservation is gone, nothing was published.
            PeerUnavailableError, DeadlineExceededError: count it as not published. The future
                may end with them too.
        """
        ...

    def abort(self, reservation: int) -> None: ...
    def prefetch(
        self, hashes: BlockHashes, holders: Sequence[str] = ()
    ) -> Future[TransferResult]: ...
    def fetch(self, hashes: BlockHashes, holders: Sequence[str], timeout: float) -> int:
        """Bring leading blocks that no tier has from other daemons, as far as they come within
        `timeout`; return how many are available then.

        Raises:
            ConfigError: a holder is no address, or whoever decides has no peers.
        """
        ...

    def remove(self, hashes: BlockHashes) -> int: ...
    def report_corrupt(self, block_hash: bytes) -> None:
        """A reader found that a block fails its checksum: count it and remove the block."""
        ...

    def clear(self) -> None: ...
    def flush(self, timeout: float) -> bool: ...
    def events(self) -> Iterator[Event]: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self, timeout: float = 60.0) -> None: ...

"""One process' side of all its hand-offs: its paged memory, how it reaches peers, its limits."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.transport.handoff.messages import Layout
from kvstore.transport.handoff.wire import Wire
from kvstore.transport.types import Batch

U64 = npt.NDArray[np.uint64]


class Direction(enum.Enum):
    PUSH = "push"  # the receiver grants pages, the sender writes
    PULL = "pull"  # the sender says what is ready, the receiver reads


class MoveLike(Protocol):
    """A batch under way: `kvstore.transport.Move`."""

    def done(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> npt.NDArray[np.uint8]: ...
    def when_done(self, call: Callable[[], None]) -> None: ...


class LinkLike(Protocol):
    """What a hand-off needs of `kvstore.transport.Link`."""

    @property
    def mover(self) -> str: ...
    @property
    def is_alive(self) -> bool: ...

    def submit_read(
        self, region_id: int, batch: Batch, *, timeout: float | None = None
    ) -> MoveLike: ...
    def submit_write(
        self, region_id: int, batch: Batch, *, timeout: float | None = None
    ) -> MoveLike: ...
    def close(self, timeout: float = ...) -> bool: ...


@dataclass(frozen=True)
class Party:
    """
    layout, address: the paged memory, and where its region begins in this process.
    endpoint: our encoded EndpointInfo; a peer connects with it.
    connect: makes or finds the link to a peer's endpoint, in bounded time. Raises KVStoreError.
    wire: encodes layers on the way, where the peer has the same codec.
    move_timeout_s: of each batch.
    on_progress: called from any thread when a move has ended, so that somebody polls.
    death_grace_s: for so long what a dead process sent may still arrive in our memory.
    """

    layout: Layout
    address: int
    endpoint: bytes
    connect: Callable[[bytes], LinkLike]
    wire: Wire | None = None
    move_timeout_s: float = 2.0
    death_grace_s: float = 4.0
    on_progress: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic


def pieces(layout: Layout, base: int, layer: int, pages: Sequence[int]) -> U64:
    """Where the pieces of these pages' layer begin, from `base`: all pages of part 0 first."""
    steps = np.asarray(pages, np.uint64) * np.uint64(layout.stride)
    starts = np.asarray([base + offset for offset in layout.offsets[layer]], np.uint64)
    return (starts[:, None] + steps[None, :]).ravel()


def piece_lengths(layout: Layout, num_pages: int) -> U64:
    return np.repeat(np.asarray(layout.sizes, np.uint64), num_pages)


def checksums_of(addresses: U64, lengths: U64) -> U64:
    sums = np.empty(len(addresses), np.uint64)
    # Not np.unique, whose first call imports for longer than all the rest takes.
    for size in set(lengths.tolist()):
        chosen = lengths == size
        part = np.empty(int(np.count_nonzero(chosen)), np.uint64)
        _native.checksum_blocks(np.ascontiguousarray(addresses[chosen]), size, part)
        sums[chosen] = part
    return sums


def pack_checksums(checksums: U64) -> bytes:
    return checksums.astype("<u8").tobytes()


def unpack_checksums(data: bytes) -> U64:
    return np.frombuffer(data, "<u8").astype(np.uint64)


def same_shape(ours: Layout, theirs: Layout) -> str:
    """Why pages of the two layouts are not the same blocks; empty when they are."""
    if ours.sizes != theirs.sizes:
        return f"layers of {theirs.sizes} bytes, ours have {ours.sizes}"
    if ours.num_layers != theirs.num_layers:
        return f"{theirs.num_layers} layers, we have {ours.num_layers}"
    numbers = [theirs.stride, *(offset for layer in theirs.offsets for offset in layer)]
    if any(len(layer) != len(theirs.sizes) for layer in theirs.offsets):
        return "a layer that has another number of parts than its sizes say"
    if not all(0 <= number < 1 << 63 for number in numbers):
        return "an offset that is none"
    return ""

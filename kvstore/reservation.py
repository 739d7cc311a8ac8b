"""Reservation: the two-phase form of a put."""

from __future__ import annotations

import threading
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.buffers import as_block_ids
from kvstore.control import RESERVED, Ack, Control
from kvstore.errors import ConfigError, StoreClosedError
from kvstore.forks import PerProcess
from kvstore.layout import BlockBuffers
from kvstore.puts import check_ack, finish_put
from kvstore.transfer import Transfer


class _Count:
    """`changed` guards both fields."""

    __slots__ = ("changed", "closed", "num_inside")

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.num_inside = 0
        self.closed = False


class Writers:
    """Counts calls that write into slots. A slot must not be given back, and so to another writer,
    while somebody still copies into it: the bytes would be published as the other's.

    Thread-safe. A forked child counts its own.
    """

    def __init__(self) -> None:
        self._counts = PerProcess(_Count)

    def __enter__(self) -> None:
        count = self._counts.here()
        with count.changed:
            if count.closed:
                raise StoreClosedError("the store is closed")
            count.num_inside += 1

    def __exit__(self, *_: object) -> None:
        count = self._counts.here()
        with count.changed:
            count.num_inside -= 1
            if count.closed:
                count.changed.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._counts.here().closed

    def close(self) -> None:
        """Let nobody in any more, and wait until all are out."""
        count = self._counts.here()
        with count.changed:
            count.closed = True
            count.changed.wait_for(lambda: count.num_inside == 0)


class Reservation:
    """Slots to be written in place, layer by layer if need be, then committed or aborted.

    `wanted[i]` says whether block i of the hashes is to be written; the others are in the store
    already, or cannot be (`commit` says why). Use it as a context manager: leaving without `commit`
    aborts. A writer that dies leaves nothing visible.

    When the daemon goes away meanwhile, `write` copies nothing and `commit` says that nothing was
    stored.

    Thread safety: `write` may run on several threads for different layers; `commit` once.
    """

    __slots__ = (
        "_addresses",
        "_control",
        "_ended",
        "_hashes",
        "_reserved",
        "_threads",
        "_writers",
        "_written",
        "wanted",
    )

    def __init__(self, control: Control, hashes: BlockHashes, writers: Writers) -> None:
        self._control = control
        self._hashes = hashes
        self._writers = writers
        self._reserved = control.reserve(hashes)  # its number is 0: nothing to write
        self._threads = control.terms.threads
        self._ended = False
        self._written: list[tuple[int, int]] = []  # payload bytes [begin, end) of every block
        self.wanted: npt.NDArray[np.bool_] = self._reserved.statuses == RESERVED
        self._addresses = self._reserved.offsets[self.wanted] + np.uint64(self._reserved.address)

    def write(
        self, buffers: BlockBuffers, block_ids: object, layers: tuple[int, int] | None = None
    ) -> None:
        """Copy engine blocks into the reserved slots.

        Args:
            buffers: the engine's blocks.
            block_ids: the engine block of each *wanted* block, shape (wanted.sum(),).
            layers: copy only layers [a, b); all layers must be written before `commit`.
        """
        self._check_open()
        buffers.require_block_bytes(self._control.namespace.spec.block_bytes)
        ids = as_block_ids(block_ids)
        if len(ids) != len(self._addresses):
            raise ConfigError(f"block_ids: {len(ids)} given, {len(self._addresses)} are wanted")
        begin, end = 0, buffers.block_bytes
        if layers is not None:
            begin, end = buffers.layer_range(layers[0], layers[1] - layers[0])
        with self._writers:
            slots = self._reserved.writers
            if slots is None or slots.begin():
                try:
                    self._copy(buffers, ids, begin, end)
                finally:
                    if slots is not None:
                        slots.end()
        self._written.append((begin, end))

    def _copy(
        self, buffers: BlockBuffers, ids: npt.NDArray[np.int64], begin: int, end: int
    ) -> None:
        if (begin, end) == (0, buffers.block_bytes):
            _native.gather(buffers.plan, ids, self._addresses, None, self._threads)
        else:
            _native.gather_range(buffers.plan, ids, self._addresses, begin, end, self._threads)

    def commit(self, ack: Ack = "memory") -> Transfer:
        """Publish the written blocks: checksums are computed, then readers may find them.

        Raises:
            ConfigError: some layers were not written: their bytes would be another block's.
            StoreClosedError: the reservation was committed or aborted, or the store closed.
        """
        check_ack(ack)
        self._check_open()
        size = self._control.namespace.spec.block_bytes
        reserved = self._reserved
        if reserved.reservation:
            self._check_whole(size)
        sums = np.empty(len(self._addresses), np.uint64)
        _native.checksum_blocks(self._addresses, size, sums, self._threads)
        self._ended = True
        return finish_put(
            self._control, reserved.reservation, sums, self._hashes, reserved.statuses, ack
        )

    def abort(self) -> None:
        """Give the slots back; nothing becomes visible. Does nothing after `commit` or `close`."""
        if self._ended:
            return
        self._ended = True
        if self._reserved.reservation:
            self._control.abort(self._reserved.reservation)

    def _check_open(self) -> None:
        if self._ended:
            raise StoreClosedError("the reservation was committed or aborted")
        self._control.require_open()  # else the slots are others' now

    def _check_whole(self, size: int) -> None:
        done = 0
        for begin, end in sorted(self._written):
            if begin > done:
                break
            done = max(done, end)
        else:
            begin = size
        if done < size:
            raise ConfigError(f"layers: bytes {done} to {begin} of the blocks were not written")

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

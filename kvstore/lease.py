"""Lease: blocks pinned for a reader until it is released, expires, or its holder dies."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.buffers import as_block_ids
from kvstore.control import Control, Granted, Terms
from kvstore.errors import ConfigError, StoreClosedError
from kvstore.layout import BlockBuffers

_UNCHECKED = np.zeros(0, bool)


class Lease:
    """Leading blocks of a chain, pinned in the cpu tier.

    Use it as a context manager. The bytes stay in place until the lease is released; a lease that
    outlives its time is noticed after the copy, and what was copied does not count. A store that is
    reached through a socket fetches the bytes when it is acquired, and loads from that copy.

    Thread safety: `load` may run on several threads; `release` once.
    """

    __slots__ = (
        "_checked",
        "_control",
        "_granted",
        "_hashes",
        "_released",
        "_threads",
        "_verify",
    )

    def __init__(
        self, control: Control, hashes: BlockHashes, granted: Granted, terms: Terms
    ) -> None:
        self._control = control
        self._hashes = hashes
        self._granted = granted
        self._verify = terms.verify_always
        self._threads = terms.threads
        self._released = granted.lease == 0
        self._checked = np.zeros(len(granted.offsets), bool) if self._verify else _UNCHECKED

    @property
    def num_blocks(self) -> int:
        """How many leading blocks are pinned."""
        return len(self._granted.offsets)

    def __len__(self) -> int:
        return self.num_blocks

    def load(
        self,
        buffers: BlockBuffers,
        block_ids: object,
        *,
        first: int = 0,
        layers: tuple[int, int] | None = None,
    ) -> int:
        """Copy pinned blocks `first, first + 1, ...` into engine blocks `block_ids`.

        Args:
            buffers: where the engine's blocks lie; see `kvstore.PagedBuffers`.
            block_ids: engine block for each block, shape (n,).
            first: which of the pinned blocks is the first.
            layers: copy only layers [a, b), for loads that overlap the forward pass.

        Returns:
            How many leading blocks arrived with exactly their bytes. Fewer than asked for when the
            lease had expired or, with verify="always", when a block failed its checksum; the engine
            blocks after those hold garbage.

        Raises:
            StoreClosedError: the lease was released.
            ConfigError: more blocks than are pinned, or buffers of another block size.
            IndexError: a block id out of range.
        """
        if self._released:
            raise StoreClosedError("the lease was released")
        buffers.require_block_bytes(self._control.namespace.spec.block_bytes)
        buffers.require_writable()
        ids = as_block_ids(block_ids)
        granted = self._granted
        chosen = slice(first, first + len(ids))
        offsets = granted.offsets[chosen]
        if first < 0 or len(offsets) != len(ids):
            raise ConfigError(
                f"block_ids: {len(ids)} from block {first} on, but {self.num_blocks} are pinned"
            )
        self._control.require_open()
        addresses = offsets + np.uint64(granted.address)
        num_good = len(ids)
        if layers is not None:
            begin, end = buffers.layer_range(layers[0], layers[1] - layers[0])
            if self._verify:
                num_good = self._check_once(chosen, addresses)
            _native.scatter_range(buffers.plan, ids, addresses, begin, end, self._threads)
        elif self._verify:
            sums = np.empty(len(ids), np.uint64)
            _native.scatter(buffers.plan, ids, addresses, sums, self._threads)
            num_good = _leading(sums == granted.checksums[chosen])
        else:
            _native.scatter(buffers.plan, ids, addresses, None, self._threads)
        # First of all: where the lease had ended, the bytes are another block's, not damaged.
        num_there = _leading(self._still_there(chosen))
        if num_good < num_there:
            self._control.report_corrupt(self._hashes[first + num_good])
        return min(num_good, num_there)

    def _check_once(self, chosen: slice, addresses: npt.NDArray[np.uint64]) -> int:
        """Return how many leading blocks match their checksum. A block that is read layer by layer
        is checked before its first layer: one layer has no checksum of its own."""
        todo = np.flatnonzero(~self._checked[chosen])
        sums = np.empty(len(todo), np.uint64)
        size = self._control.namespace.spec.block_bytes
        _native.checksum_blocks(np.ascontiguousarray(addresses[todo]), size, sums, self._threads)
        self._checked[chosen.start + todo] = sums == self._granted.checksums[chosen][todo]
        return _leading(self._checked[chosen])

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """Return a read-only view of one block's bytes, shape (block_bytes,), no copy.

        The view is valid while the lease is held.
        """
        if self._released:
            raise StoreClosedError("the lease was released")
        self._control.require_open()
        offset = int(self._granted.offsets[index])
        view = self._granted.arena[offset : offset + self._control.namespace.spec.block_bytes]
        view.flags.writeable = False
        return view

    def num_intact(self) -> int:
        """Return how many leading blocks are still those that were pinned.

        What was read through `block` counts as far as this says afterwards. It is fewer than
        `num_blocks` when the lease had expired, or when the daemon that knew of it died.
        """
        return _leading(self._still_there(slice(0, self.num_blocks)))

    def _still_there(self, chosen: slice) -> npt.NDArray[np.bool_]:
        words = self._granted.arena.view(np.uint64)
        now = words[self._granted.header_offsets[chosen] >> np.uint64(3)]
        there: npt.NDArray[np.bool_] = now == self._granted.sequences[chosen]
        return there

    def release(self) -> None:
        """Unpin the blocks. Further calls do nothing."""
        if not self._released:
            self._released = True
            self._control.release(self._granted.lease)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _leading(good: npt.NDArray[np.bool_]) -> int:
    """Return how many leading elements are True."""
    bad = np.flatnonzero(~good)
    return int(bad[0]) if len(bad) else len(good)

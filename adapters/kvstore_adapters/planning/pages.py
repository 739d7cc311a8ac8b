"""Pages: a group's blocks in the engine's memory, as what moves to and from a store.

Host memory is moved by `HostPages`. Device memory is staged through host memory by whoever knows
the device, see `vllm/pages.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore import BlockBuffers, BlockHashes, Store, TransferResult

BlockIds = npt.NDArray[np.int64]

# What is loaded between two looks at the clock: 64 MiB are copied in about 10 ms.
PIECE_BYTES = 64 << 20


class Pages(Protocol):
    """One group's blocks. Thread-safe for calls on different blocks."""

    @property
    def block_bytes(self) -> int: ...

    def put(self, store: Store, chain: BlockHashes, block_ids: BlockIds) -> TransferResult:
        """Copy engine blocks into the store. They must not change until this returns."""
        ...

    def load(
        self,
        store: Store,
        chain: BlockHashes,
        block_ids: BlockIds,
        deadline: float,
        holders: Sequence[str] = (),
    ) -> int:
        """Copy leading blocks of the store into engine blocks; return how many came.

        Nothing is written to engine blocks after it returned.

        Args:
            deadline: of `time.monotonic`; after it, at most the call under way goes on.
            holders: daemons that may have what the store has not.
        """
        ...


class HostPages:
    """Blocks in memory that the CPU can read and write: copied once, by the store itself."""

    def __init__(self, buffers: BlockBuffers) -> None:
        self._buffers = buffers
        self.piece_blocks = max(1, PIECE_BYTES // buffers.block_bytes)

    @property
    def block_bytes(self) -> int:
        return self._buffers.block_bytes

    def put(self, store: Store, chain: BlockHashes, block_ids: BlockIds) -> TransferResult:
        return store.put(chain, self._buffers, block_ids).wait()

    def load(
        self,
        store: Store,
        chain: BlockHashes,
        block_ids: BlockIds,
        deadline: float,
        holders: Sequence[str] = (),
    ) -> int:
        loaded = 0
        while loaded < len(chain):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            end = loaded + self.piece_blocks
            part = chain[loaded:end]
            ids = block_ids[loaded:end]
            came = store.load(part, self._buffers, ids, timeout=left, holders=holders).wait()
            loaded += came.num_blocks
            if came.num_blocks < len(part):
                break
        return loaded

"""KVTransfer for a worker whose pool is on a GPU: by a `GpuTier`, so a pool of blocks in GPU memory
and the store's arena below it. Copies are enqueued on the stream of the forward passes, which
therefore neither overtake them nor wait for them. Never run on a GPU; see docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvstore import BlockHashes, GpuError, Store, hash_blocks
from kvstore.gpu import CudaDevice, Device, DeviceBlocks
from kvstore.gpu_tier import GpuTier, GpuTransfer

from .counters import TransferCounters
from .pages import PagePool
from .store_transfer import LOST
from .transfer import BlockSave, PendingLoad, WholeLoad

_LOST = (*LOST, GpuError)
_TIMEOUT_SECONDS = 10.0


def current_stream(pool: Tensor) -> int:
    """The stream on which torch computes now; on the CPU there is none."""
    if not pool.is_cuda:
        return 0
    return int(torch.cuda.current_stream(pool.device).cuda_stream)


class _Load(WholeLoad):
    def __init__(self, transfer: GpuTransfer | None, counters: TransferCounters) -> None:
        self._transfer = transfer
        self._counters = counters
        self._loaded = 0

    def done(self) -> bool:
        return self._transfer is None or self._transfer.done()

    def wait(self) -> int:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            try:
                self._loaded = transfer.wait(_TIMEOUT_SECONDS).num_blocks
            except _LOST:
                self._counters.errors += 1
            self._counters.hit_cpu_blocks += self._loaded
        return self._loaded


class GpuStoreTransfer:
    """See `transfer.KVTransfer`. Does not close the store; `close` it before that.

    Args:
        store: of `namespace_of` the worker's model.
        capacity: bytes of GPU memory for blocks.
        device: default: the GPU that has the worker's pool.
        view: the worker's pool as `DeviceBlocks` takes it.
    """

    def __init__(
        self,
        store: Store,
        capacity: int | str,
        device: Device | None = None,
        view: Callable[[Tensor], object] = lambda pool: pool,
    ) -> None:
        self.counters = TransferCounters()
        self._store = store
        self._spec = store.namespace.spec
        self._capacity = capacity
        self._device = device
        self._view = view
        self._saves: list[tuple[BlockHashes, list[int]]] = []
        self._under_way: list[GpuTransfer] = []

    def attach(self, pool: Tensor, pages: PagePool) -> None:
        self._pool = pool
        device = self._device or CudaDevice(pool.device.index or 0)
        self._blocks = DeviceBlocks.paged(device, "reference", self._view(pool), self._spec)
        self.tier = GpuTier(self._store.control, device, self._capacity)

    def poll(self) -> None:
        self._count([moved for moved in self._under_way if moved.done()])

    # --- loading

    def match(self, request_id: str, token_ids: Sequence[int], blocks_max: int) -> int:
        self.counters.queried_blocks += blocks_max
        try:
            return self.tier.lookup(self._hashes(token_ids, blocks_max))[0]
        except _LOST:
            self.counters.errors += 1
            return 0

    def load(self, request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> PendingLoad:
        hashes = self._hashes(token_ids, len(pages))
        try:
            moved = self.tier.load(
                hashes, self._blocks, list(pages), stream=current_stream(self._pool)
            )
        except _LOST:
            self.counters.errors += 1
            return _Load(None, self.counters)
        return _Load(moved, self.counters)

    # --- saving

    def begin_save(self, saves: Sequence[BlockSave]) -> None:
        for save in saves:
            hashes = self._hashes(save.token_ids, save.first_block + len(save.pages))
            self._saves.append((hashes[save.first_block :], list(save.pages)))

    def save_layer(self, layer: int) -> None:
        pass

    def end_save(self) -> None:
        """The pages may be reused at once: whatever writes them runs later on the same stream."""
        saves, self._saves = self._saves, []
        for hashes, pages in saves:
            try:
                moved = self.tier.put(
                    hashes, self._blocks, pages, stream=current_stream(self._pool)
                )
                self._under_way.append(moved)
            except _LOST:
                self.counters.errors += 1

    def abort_save(self) -> None:
        self._saves = []

    def flush(self) -> None:
        """Wait until what was saved is in the store."""
        for moved in self._under_way:
            try:
                moved.wait(_TIMEOUT_SECONDS)
            except _LOST:
                continue  # counted as lost below
        self._count(list(self._under_way))

    # ---

    def _count(self, done: Sequence[GpuTransfer]) -> None:
        for moved in done:
            self._under_way.remove(moved)
            try:
                stored = moved.wait(0).num_stored
            except _LOST:
                self.counters.errors += 1
                continue
            self.counters.saved_blocks += stored
            self.counters.saved_bytes += stored * self._spec.block_bytes

    def _hashes(self, token_ids: Sequence[int], num_blocks: int) -> BlockHashes:
        tokens = self._spec.block_tokens
        return hash_blocks(list(token_ids[: num_blocks * tokens]), tokens)

    def close(self) -> None:
        self.flush()
        self.tier.close()
        self._blocks.close()

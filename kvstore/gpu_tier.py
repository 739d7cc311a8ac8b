"""GpuTier: a pool of blocks in GPU memory above a store, and the way from there to the arena.

    tier = GpuTier(store.control, device, "8GiB")
    blocks = DeviceBlocks.paged(device, "vllm_nhd", kv_caches, spec)
    came = tier.load(hashes, blocks, page_ids, stream=stream.cuda_stream)
    ...                                     # enqueue the forward pass on the same stream
    num_loaded = came.wait().num_blocks     # the pages after those hold garbage

A load copies what is in the pool within the GPU's memory, and the rest by DMA from the arena, which
this process has registered; that rest stays in the pool. A put goes the other way: into the pool,
and from there to the arena, where it is published when it has arrived.

All is enqueued on the caller's stream, or on one of ours that events tie to it; no stream is ever
waited for. So a transfer is not done when its method returns, and what a load brought counts only
when `wait` says so, after it was seen that the lease on the arena's blocks had held. Until then no
token computed from it may be shown, nor its pages be offered to others.

Transfers are finished by whoever looks: `wait`, `done`, or a later call of the tier. Close the tier
before its store.

The pool is this process's own. Its bytes are not verified when they are read: nobody else writes to
that memory, and GPUs check it (ECC).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from kvstore.block import BlockHashes, HashesLike
from kvstore.config import parse_bytes
from kvstore.control import Ack, Control, Granted
from kvstore.errors import ConfigError, DeadlineExceededError, GpuError, StoreClosedError
from kvstore.gpu.blocks import DeviceBlocks
from kvstore.gpu.copies import STAGE_BYTES, ArenaCopies
from kvstore.gpu.device import BlockIds, Device, Event, wait_for
from kvstore.gpu.registration import Registrations
from kvstore.gpu.slots import SlotTable
from kvstore.gpu_moves import LoadMove, Pool, PutMove
from kvstore.puts import check_ack
from kvstore.transfer import Transfer, TransferResult

_SLOT_ALIGNMENT = 256  # as cudaMalloc's
_Finish = Callable[[GpuError | None], Transfer]


class GpuTransfer:
    """What a tier has under way; see `kvstore.Transfer`."""

    def __init__(self, tier: GpuTier, events: Sequence[Event], finish: _Finish) -> None:
        self._tier = tier
        self._events = events
        self._finish = finish
        self._lock = threading.Lock()  # held by whoever finishes it
        self._result: Transfer | None = None

    def done(self) -> bool:
        """Return True when `wait` would not block."""
        if self._result is None:
            error: GpuError | None = None
            try:
                if not all(event.done() for event in self._events):
                    return False
            except GpuError as failed:
                error = failed
            with self._lock:
                if self._result is None:
                    self._result = self._finished(error)
            self._tier._forget(self)
        return self._result.done()

    def _finished(self, error: GpuError | None) -> Transfer:
        failed: Future[TransferResult] = Future()
        try:
            result = self._finish(error)
        except Exception as other:  # noqa: BLE001  it is for whoever waits, not for who looks
            failed.set_exception(other)
            return Transfer(future=failed)
        if error is None:
            return result
        failed.set_exception(error)
        return Transfer(future=failed)

    def wait(self, timeout: float | None = None) -> TransferResult:
        """Return the result, waiting at most `timeout` seconds (None: until it is done).

        Raises:
            DeadlineExceededError: not done in time; the transfer goes on.
            GpuError: the GPU failed; nothing of the transfer counts.
            KVStoreError: what else stopped it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._result is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not wait_for(self, left) and self._result is None:
                raise DeadlineExceededError(f"transfer not done after {timeout} s")
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return self._result.wait(left)


class GpuTier:
    """Thread safety: all methods may be called from any thread."""

    def __init__(
        self,
        control: Control,
        device: Device,
        capacity: int | str,
        *,
        policy: str = "lru",
        stage_bytes: int = STAGE_BYTES,
    ) -> None:
        """
        Args:
            control: of the store below: `store.control`.
            device: that has the pool.
            capacity: bytes of its memory for blocks, taken now.
            policy: what leaves first; as of the cpu tier.
            stage_bytes: of its memory, for blocks that pass by the pool; taken when needed.

        Raises:
            ConfigError: the capacity is less than a block.
            GpuError: the memory cannot be had.
        """
        self._control = control
        self._device = device
        self._block_bytes = control.namespace.spec.block_bytes
        stride = -(-self._block_bytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
        num_slots = parse_bytes(capacity, "capacity") // stride
        if num_slots < 1:
            raise ConfigError(f"capacity: {capacity} holds no block of {stride} bytes")
        self._memory = device.allocate(num_slots * stride)
        self._lock = threading.Lock()  # the pool's, and guards all below
        self._pool = Pool(
            control,
            device,
            SlotTable(num_slots, policy),
            self._memory.address,
            stride,
            self._block_bytes,
            device.new_stream(),
            ArenaCopies(device, stage_bytes),
            Registrations(device),
            self._lock,
        )
        self._released = False
        self._transfers: list[GpuTransfer] = []
        self._closed = False

    @property
    def num_slots(self) -> int:
        return self._pool.table.num_slots

    @property
    def num_evicted(self) -> int:
        return self._pool.table.num_evicted

    # --- looking

    def lookup(self, hashes: HashesLike) -> tuple[int, int]:
        """Return how many leading blocks are available, and how many of those are in the pool."""
        chain = BlockHashes.of(hashes)
        self._finish_some()
        with self._lock:
            num_gpu = self._pool.table.match(chain)
        if num_gpu == len(chain):
            return num_gpu, num_gpu
        return max(num_gpu, self._control.match(chain)), num_gpu

    def remove(self, hashes: HashesLike) -> int:
        """Remove blocks, and with each all that continue it, here and from every tier below."""
        chain = BlockHashes.of(hashes)
        with self._lock:
            self._pool.table.remove(chain)
        return self._control.remove(chain)

    def clear(self) -> None:
        """Empty the pool; what is below stays."""
        with self._lock:
            self._pool.table.clear()

    # --- reading

    def load(
        self,
        hashes: HashesLike,
        blocks: DeviceBlocks,
        block_ids: object = None,
        *,
        stream: int,
        timeout: float = 10.0,
    ) -> GpuTransfer:
        """Copy the leading blocks that pool and store have into engine blocks.

        Args:
            hashes: the chain; block i goes to engine block `block_ids[i]`.
            blocks: where the engine's blocks lie on the device.
            block_ids: shape (n,), all different; default 0, 1, 2, ...
            stream: what is enqueued there afterwards finds the blocks in place.
            timeout: seconds for the store to read in what is in its lower tiers.

        Raises:
            ConfigError, IndexError, TypeError, ValueError: an argument is wrong.
            GpuError: the device refused.
            StoreClosedError: the tier or the store is closed.
        """
        chain = BlockHashes.of(hashes)
        ids = self._ids(blocks, chain, block_ids, distinct=True)
        blocks.require_writable()
        self._finish_some()
        with self._lock:
            self._check_open()
            slots = self._pool.table.use(chain)
        granted: list[tuple[BlockHashes, Granted]] = []
        job = LoadMove(self._pool, chain, slots, granted)
        try:
            job.acquire(timeout)
            with self._lock:
                job.enqueue(blocks, ids, stream)
        except BaseException:
            self._start(job.finish_failed, stream)
            raise
        return self._start(job.finish, stream)

    # --- writing

    def put(
        self,
        hashes: HashesLike,
        blocks: DeviceBlocks,
        block_ids: object = None,
        *,
        stream: int,
        ack: Ack = "memory",
    ) -> GpuTransfer:
        """Copy engine blocks into pool and store.

        The engine may change the blocks by what it enqueues on `stream` afterwards. Loads find them
        in the pool at once, in the store when the transfer is done.

        Args:
            hashes: block i is engine block `block_ids[i]`.
            blocks: where the engine's blocks lie on the device.
            block_ids: shape (n,); default 0, 1, 2, ...
            stream: on which they were computed, or which waits for that.
            ack: see `Store.put`.

        Raises: as `load`.
        """
        check_ack(ack)
        chain = BlockHashes.of(hashes)
        ids = self._ids(blocks, chain, block_ids, distinct=False)
        self._finish_some()
        job = PutMove(self._pool, chain, ack)
        try:
            with self._lock:
                self._check_open()
                job.fill_pool(blocks, ids, stream)
            job.reserve()
            with self._lock:
                job.enqueue(blocks, ids, stream)
        except BaseException:
            self._start(job.finish_failed, stream, self._pool.out)
            raise
        return self._start(job.finish, stream, self._pool.out)

    # --- ending

    def close(self, timeout: float = 60.0) -> bool:
        """Finish what is under way, and give all memory back. Safe to call twice.

        False: the GPU was not done after `timeout` seconds. Then the memory stays, and must not be
        unmapped; call again.
        """
        with self._lock:
            self._closed = True
            left = list(self._transfers)
        deadline = time.monotonic() + timeout
        for transfer in left:
            if not wait_for(transfer, max(0.0, deadline - time.monotonic())):
                return False
        if not self._released:
            self._released = True
            self._device.close_stream(self._pool.out)
            self._pool.copies.close()
            self._pool.registrations.close()
            self._memory.close()
        return True

    def __enter__(self) -> GpuTier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---

    def _ids(
        self, blocks: DeviceBlocks, chain: BlockHashes, block_ids: object, *, distinct: bool
    ) -> BlockIds:
        if blocks.device is not self._device:
            raise ConfigError("blocks: are on another device than the tier")
        blocks.require_block_bytes(self._block_bytes)
        ids = blocks.check_ids(
            np.arange(len(chain)) if block_ids is None else block_ids, distinct=distinct
        )
        if len(ids) != len(chain):
            raise ConfigError(f"block_ids: {len(ids)} given for {len(chain)} hashes")
        return ids

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the GPU tier is closed")

    def _start(self, finish: _Finish, *streams: int) -> GpuTransfer:
        """What `finish` finishes ends with what is now enqueued on `streams`."""
        transfer = GpuTransfer(self, [self._device.record(stream) for stream in streams], finish)
        with self._lock:
            self._transfers.append(transfer)
        return transfer

    def _finish_some(self) -> None:
        with self._lock:
            transfers = list(self._transfers)
        for transfer in transfers:
            transfer.done()

    def _forget(self, transfer: GpuTransfer) -> None:
        with self._lock:
            if transfer in self._transfers:
                self._transfers.remove(transfer)

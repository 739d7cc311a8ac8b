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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes, HashesLike
from kvstore.config import parse_bytes
from kvstore.control import RESERVED, Ack, Control, Granted, Reserved
from kvstore.errors import ConfigError, DeadlineExceededError, GpuError, StoreClosedError
from kvstore.gpu.blocks import DeviceBlocks
from kvstore.gpu.copies import STAGE_BYTES, ArenaCopies
from kvstore.gpu.device import Addresses, BlockIds, Device, Event, wait_for
from kvstore.gpu.registration import Registrations
from kvstore.gpu.slots import Slots, SlotTable
from kvstore.puts import check_ack, finish_put, not_stored
from kvstore.transfer import Transfer, TransferResult, join

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
        self._stride = -(-self._block_bytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
        num_slots = parse_bytes(capacity, "capacity") // self._stride
        if num_slots < 1:
            raise ConfigError(f"capacity: {capacity} holds no block of {self._stride} bytes")
        self._pool = device.allocate(num_slots * self._stride)
        self._out = device.new_stream()  # to the arena
        self._copies = ArenaCopies(device, stage_bytes)
        self._registrations = Registrations(device)
        self._lock = threading.Lock()  # guards all below, and the order of what is enqueued
        self._table = SlotTable(num_slots, policy)
        self._transfers: list[GpuTransfer] = []
        self._closed = False

    @property
    def num_slots(self) -> int:
        return self._table.num_slots

    @property
    def num_evicted(self) -> int:
        return self._table.num_evicted

    # --- looking

    def lookup(self, hashes: HashesLike) -> tuple[int, int]:
        """Return how many leading blocks are available, and how many of those are in the pool."""
        chain = BlockHashes.of(hashes)
        self._finish_some()
        with self._lock:
            num_gpu = self._table.match(chain)
        if num_gpu == len(chain):
            return num_gpu, num_gpu
        return max(num_gpu, self._control.match(chain)), num_gpu

    def remove(self, hashes: HashesLike) -> int:
        """Remove blocks, and with each all that continue it, here and from every tier below."""
        chain = BlockHashes.of(hashes)
        with self._lock:
            self._table.remove(chain)
        return self._control.remove(chain)

    def clear(self) -> None:
        """Empty the pool; what is below stays."""
        with self._lock:
            self._table.clear()

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
            slots = self._table.use(chain)
        granted: list[tuple[BlockHashes, Granted]] = []
        job = _Load(self, chain, slots, granted)
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
        job = _Put(self, chain, ack)
        try:
            with self._lock:
                self._check_open()
                job.fill_pool(blocks, ids, stream)
            job.reserve()
            with self._lock:
                job.enqueue(blocks, ids, stream)
        except BaseException:
            self._start(job.finish_failed, stream, self._out)
            raise
        return self._start(job.finish, stream, self._out)

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
        if self._out:
            self._device.close_stream(self._out)
            self._out = 0
            self._copies.close()
            self._registrations.close()
            self._pool.close()
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

    def _places(self, slots: Slots) -> Addresses:
        places: Addresses = np.uint64(self._pool.address) + slots.astype(np.uint64) * np.uint64(
            self._stride
        )
        return places

    def _pieces(self, chain: BlockHashes) -> Iterator[BlockHashes]:
        """Parts that the control takes at once."""
        size = self._control.piece_blocks or max(len(chain), 1)
        for begin in range(0, len(chain), size):
            yield chain[begin : begin + size]

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


class _Load:
    """One load. `finish` is called once, when all that was enqueued has run, or failed."""

    def __init__(
        self,
        tier: GpuTier,
        chain: BlockHashes,
        slots: Slots,
        granted: list[tuple[BlockHashes, Granted]],
    ) -> None:
        self._tier = tier
        self._chain = chain
        self._slots = slots  # in the pool already
        self._granted = granted  # of the blocks after those
        self._counts: list[int] = []  # how many blocks of each grant were enqueued
        self._fills: list[Slots] = []  # the slots that those fill; empty where none could be had

    def acquire(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        rest = self._chain[len(self._slots) :]
        for part in self._tier._pieces(rest):
            left = max(0.0, deadline - time.monotonic())
            control = self._tier._control
            found = control.acquire(part, control.terms.lease_seconds, left)
            if found.lease:
                self._granted.append((part, found))
            if len(found.offsets) < len(part):
                break

    def enqueue(self, blocks: DeviceBlocks, ids: BlockIds, stream: int) -> None:
        """REQUIRES: the tier's lock."""
        tier, device, table = self._tier, self._tier._device, self._tier._table
        for event in table.fill_events(self._slots):
            device.wait_event(stream, event)
        at = len(self._slots)
        device.scatter(blocks.prepared, ids[:at], tier._places(self._slots), stream)
        for part, found in self._granted:
            host = tier._registrations.of(found.arena)
            addresses = found.offsets + np.uint64(found.address)
            count = self._num_sound(part, found, addresses)
            addresses, own = addresses[:count], ids[at : at + count]
            fills = self._take_slots(part[:count])
            self._counts.append(count)
            self._fills.append(fills)
            if len(fills):
                for event in table.use_events(fills):
                    device.wait_event(stream, event)
                places = tier._places(fills)
                sizes = np.full(count, tier._block_bytes, np.uint64)
                host.require(addresses, tier._block_bytes)
                tier._copies.copy(host, addresses, places, sizes, stream, is_to_host=False)
                device.scatter(blocks.prepared, own, places, stream)
            else:
                tier._copies.from_host(blocks, own, host, addresses, stream)
            at += count
            if count < len(part):
                break

    def _num_sound(self, part: BlockHashes, found: Granted, addresses: Addresses) -> int:
        """How many leading blocks may be used; all, unless the store wants them verified."""
        terms = self._tier._control.terms
        if not terms.verify_always:
            return len(addresses)
        sums = np.empty(len(addresses), np.uint64)
        _native.checksum_blocks(addresses, self._tier._block_bytes, sums, terms.threads)
        count = _leading(sums == found.checksums)
        if count < _leading(_still_there(found)):
            self._tier._control.report_corrupt(part[count])
        return count

    def _take_slots(self, part: BlockHashes) -> Slots:
        """A slot for each block, or none at all."""
        table = self._tier._table
        taken = table.reserve(part)
        if len(taken.new) == len(part):
            return taken.new
        table.abort(taken.new, None)
        return taken.new[:0]

    def finish(self, error: GpuError | None) -> Transfer:
        tier, table = self._tier, self._tier._table
        held = [
            0 if error else min(_leading(_still_there(found)), count)
            for (_, found), count in zip(self._granted, self._counts, strict=False)
        ]
        loaded = 0 if error else len(self._slots)
        is_leading = True
        for count, good in zip(self._counts, held, strict=True):
            loaded += good if is_leading else 0
            is_leading = is_leading and good == count
        with tier._lock:
            for fills, good in zip(self._fills, held, strict=True):
                # What was filled when the lease had ended is another block's bytes.
                table.commit(fills[:good], None)
                table.abort(fills[good:], None)
            table.unuse(map(int, self._slots), None)
        for _, found in self._granted:
            tier._control.release(found.lease)
        return Transfer(TransferResult(loaded, num_missed=len(self._chain) - loaded))

    def finish_failed(self, error: GpuError | None) -> Transfer:
        return self.finish(error or GpuError("the load could not be enqueued"))


class _Put:
    """One put; see `_Load`."""

    def __init__(self, tier: GpuTier, chain: BlockHashes, ack: Ack) -> None:
        self._tier = tier
        self._chain = chain
        self._ack: Ack = ack
        self._slots: Slots = np.zeros(0, np.int64)  # of each block; -1: none of ours
        self._filled: Event | None = None
        self._reserved: list[tuple[BlockHashes, Reserved, bool]] = []  # True: ours to write

    def fill_pool(self, blocks: DeviceBlocks, ids: BlockIds, stream: int) -> None:
        """REQUIRES: the tier's lock."""
        tier, device, table = self._tier, self._tier._device, self._tier._table
        taken = table.reserve(self._chain)
        try:
            for event in table.use_events(taken.new):
                device.wait_event(stream, event)
            own = ids[taken.statuses == RESERVED]
            device.gather(blocks.prepared, own, tier._places(taken.new), stream)
            self._filled = device.record(stream)
        except BaseException:
            # Something may be enqueued: whoever gets the slots next has to wait for it.
            table.abort(taken.new, device.record(stream))
            raise
        table.hold(taken.new)  # until they are in the arena
        table.commit(taken.new, self._filled)
        self._slots = taken.slots

    def reserve(self) -> None:
        for part in self._tier._pieces(self._chain):
            found = self._tier._control.reserve(part)
            is_ours = bool(found.reservation) and (found.writers is None or found.writers.begin())
            self._reserved.append((part, found, is_ours))

    def enqueue(self, blocks: DeviceBlocks, ids: BlockIds, stream: int) -> None:
        """REQUIRES: the tier's lock."""
        tier, device = self._tier, self._tier._device
        if self._filled is not None:
            device.wait_event(tier._out, self._filled)
        at = 0
        for part, found, is_ours in self._reserved:
            here = slice(at, at + len(part))
            at += len(part)
            if not is_ours:
                continue
            host = tier._registrations.of(found.arena)
            addresses = found.offsets + np.uint64(found.address)
            is_wanted = found.statuses == RESERVED
            is_pooled = is_wanted & (self._slots[here] >= 0)
            others = is_wanted & ~is_pooled
            if others.any():
                tier._copies.to_host(blocks, ids[here][others], host, addresses[others], stream)
            ours, places = addresses[is_pooled], tier._places(self._slots[here][is_pooled])
            sizes = np.full(len(ours), tier._block_bytes, np.uint64)
            host.require(ours, tier._block_bytes)
            tier._copies.copy(host, ours, places, sizes, tier._out, is_to_host=True)

    def finish(self, error: GpuError | None) -> Transfer:
        tier = self._tier
        with tier._lock:
            tier._table.unuse([int(slot) for slot in self._slots if slot >= 0], None)
        done: list[Transfer] = []
        for part, found, is_ours in self._reserved:
            addresses = (found.offsets + np.uint64(found.address))[found.statuses == RESERVED]
            sums = np.empty(len(addresses), np.uint64)
            if is_ours:
                if error is None:
                    threads = tier._control.terms.threads
                    _native.checksum_blocks(addresses, tier._block_bytes, sums, threads)
                if found.writers is not None:
                    found.writers.end()
            if error is not None or (found.reservation and not is_ours):
                if found.reservation:
                    tier._control.abort(found.reservation)
                done.append(Transfer(not_stored(found.statuses)))
            else:
                done.append(
                    finish_put(
                        tier._control, found.reservation, sums, part, found.statuses, self._ack
                    )
                )
        return join(done) if done else Transfer(TransferResult(0))

    def finish_failed(self, error: GpuError | None) -> Transfer:
        return self.finish(error or GpuError("the put could not be enqueued"))


def _still_there(granted: Granted) -> npt.NDArray[np.bool_]:
    words = granted.arena.view(np.uint64)
    there: npt.NDArray[np.bool_] = (
        words[granted.header_offsets >> np.uint64(3)] == granted.sequences
    )
    return there


def _leading(good: npt.NDArray[np.bool_]) -> int:
    bad = np.flatnonzero(~good)
    return int(bad[0]) if len(bad) else len(good)

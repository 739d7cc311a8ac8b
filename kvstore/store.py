"""Store: lookup, acquire, load, put, prefetch, pin, remove.

One class for the embedded store and for a client of a daemon: it copies bytes between the engine's
buffers and the arena; what goes where is decided by its `Control`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes, Namespace
from kvstore.buffers import as_block_ids
from kvstore.codec import CodecId
from kvstore.control import ACK_LEVELS, PRESENT, RESERVED, Ack, Control
from kvstore.errors import ConfigError, StoreClosedError
from kvstore.events import Event
from kvstore.layout import BlockBuffers
from kvstore.lease import Lease
from kvstore.records import records_from
from kvstore.tracing import traced
from kvstore.transfer import Transfer, TransferResult

Hashes = BlockHashes | Sequence[bytes] | npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Hit:
    """What a lookup found: `num_blocks` leading blocks, and in which tier each would be read."""

    num_blocks: int
    num_cpu: int
    num_ssd: int


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What is known of one block. `codec` and `stored_bytes` are of its copy on ssd."""

    block_hash: bytes
    depth: int  # 1-based place in its chain; 0: unknown
    in_cpu: bool
    on_ssd: bool
    codec: str  # "" when not on ssd
    stored_bytes: int  # 0 when not on ssd
    checksum: int  # XXH3-64 of the payload


class Reservation:
    """Slots to be written in place, layer by layer if need be, then committed or aborted.

    `wanted[i]` says whether block i of the hashes is to be written; the others are in the store
    already, or cannot be (`commit` says why). Use it as a context manager: leaving without `commit`
    aborts. A writer that dies leaves nothing visible.
    """

    __slots__ = (
        "_addresses",
        "_ended",
        "_hashes",
        "_id",
        "_statuses",
        "_store",
        "_written",
        "wanted",
    )

    def __init__(self, store: Store, hashes: BlockHashes) -> None:
        control = store.control
        reserved = control.reserve(hashes)
        self._store = store
        self._hashes = hashes
        self._id = reserved.reservation  # 0: nothing to write
        self._ended = False
        self._written: list[tuple[int, int]] = []  # payload bytes [begin, end) of every block
        self.wanted: npt.NDArray[np.bool_] = reserved.statuses == RESERVED
        self._statuses = reserved.statuses
        self._addresses = reserved.offsets[self.wanted] + np.uint64(control.arena.ctypes.data)

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
        buffers.require_block_bytes(self._store.namespace.spec.block_bytes)
        ids = as_block_ids(block_ids)
        if len(ids) != len(self._addresses):
            raise ConfigError(f"block_ids: {len(ids)} given, {len(self._addresses)} are wanted")
        threads = self._store.threads
        with self._store.writing():
            if layers is None:
                begin, end = 0, buffers.block_bytes
                _native.gather(buffers.plan, ids, self._addresses, None, threads)
            else:
                begin, end = buffers.layer_range(layers[0], layers[1] - layers[0])
                _native.gather_range(buffers.plan, ids, self._addresses, begin, end, threads)
        self._written.append((begin, end))

    def commit(self, ack: Ack = "memory") -> Transfer:
        """Publish the written blocks: checksums are computed, then readers may find them.

        Raises:
            ConfigError: some layers were not written: their bytes would be another block's.
            StoreClosedError: the reservation was committed or aborted, or the store closed.
        """
        check_ack(ack)
        self._check_open()
        size = self._store.namespace.spec.block_bytes
        if self._id:
            self._check_whole(size)
        sums = np.empty(len(self._addresses), np.uint64)
        _native.checksum_blocks(self._addresses, size, sums, self._store.threads)
        self._ended = True
        return self._store.finish_put(self._id, sums, self._hashes, self._statuses, ack)

    def abort(self) -> None:
        """Give the slots back; nothing becomes visible. Does nothing after `commit` or `close`."""
        if self._ended or self._store.closed:
            return
        self._ended = True
        if self._id:
            self._store.control.abort(self._id)

    def _check_open(self) -> None:
        if self._ended:
            raise StoreClosedError("the reservation was committed or aborted")
        _ = self._store.control  # raises when the store was closed and the slots are others' now

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


def check_ack(ack: str) -> None:
    if ack not in ACK_LEVELS:
        raise ConfigError(f"ack: {ack!r} is not one of {', '.join(ACK_LEVELS)}")


def _load_attributes(result: TransferResult, chain: BlockHashes) -> dict[str, int]:
    return {"blocks": len(chain), "loaded_blocks": result.num_blocks}


class _Writers:
    """Counts calls that write into slots. A slot must not be given back, and so to another writer,
    while somebody still copies into it: the bytes would be published as the other's.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._count = 0
        self._closed = False

    def __enter__(self) -> None:
        with self._changed:
            if self._closed:
                raise StoreClosedError("the store is closed")
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            if self._closed:
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more, and wait until all are out."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._count == 0)


class Store:
    """A KV-cache store for the blocks of one namespace.

    Made by `kvstore.open` (embedded) or `kvstore.connect` (a daemon's). Methods that move bytes
    return a `Transfer`, which is done when they return unless `background=True` or a level above
    "memory" was asked for. Thread-safe.

    A miss is data, never an error. Every method raises StoreClosedError after `close`.
    """

    def __init__(
        self,
        control: Control,
        *,
        verify_always: bool,
        threads: int,
        lease_seconds: float,
        timeout: float = 10.0,
    ) -> None:
        self._control = control
        self._block_bytes = control.namespace.spec.block_bytes
        self._verify = verify_always
        self.threads = threads
        self._lease_seconds = lease_seconds
        self._timeout = timeout
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # guards _pool and _closing
        self._writers = _Writers()
        self._pins: dict[bytes, list[int]] = {}  # first block -> leases
        self._closing = False
        self._closed = False
        # The embedded control puts and loads in one native call; see csrc/copy/block_io.h.
        self._fast_put = getattr(control, "put", None)
        self._fast_load = getattr(control, "load", None)

    @property
    def namespace(self) -> Namespace:
        return self._control.namespace

    @property
    def control(self) -> Control:
        """The decisions behind this store.

        Raises:
            StoreClosedError: the store was closed.
        """
        if self._closed:
            raise StoreClosedError("the store is closed")
        return self._control

    def writing(self) -> _Writers:
        """Return a context in which slots are written: `close` waits for all of them to end."""
        return self._writers

    @property
    def closed(self) -> bool:
        return self._closed

    # --- looking

    def lookup(self, hashes: Hashes) -> Hit:
        """Return how many leading blocks are available, and from which tiers. Nothing is pinned."""
        control = self.control
        chain = BlockHashes.of(hashes)
        num_blocks = control.match(chain)
        if num_blocks == 0:
            return Hit(0, 0, 0)
        in_cpu = control.residency(chain[:num_blocks]) & 1
        num_cpu = int(np.count_nonzero(in_cpu))
        return Hit(num_blocks, num_cpu, num_blocks - num_cpu)

    def match(self, hashes: Hashes) -> int:
        """Return how many leading blocks are available in any tier: `lookup` without the tiers.

        O(log n) index reads for hashes that know their chain (made by `hash_blocks`).
        """
        return self.control.match(BlockHashes.of(hashes))

    def describe(self, hashes: Hashes) -> list[BlockInfo]:
        """Return what is known of leading blocks; ends at the first that is unknown."""
        chain = BlockHashes.of(hashes)
        rows = records_from(self.control.describe(chain))
        tiers = self.control.residency(chain[: len(rows)])
        return [_info(row, int(bits)) for row, bits in zip(rows, tiers, strict=False)]

    def wait_for(self, hashes: Hashes, num_blocks: int | None = None, timeout: float = 10.0) -> int:
        """Wait until `num_blocks` (default: all) leading blocks are there; return how many are."""
        chain = BlockHashes.of(hashes)
        want = len(chain) if num_blocks is None else num_blocks
        return self.control.wait_for(chain, want, timeout)

    # --- reading

    def acquire(
        self, hashes: Hashes, *, ttl: float | None = None, timeout: float | None = None
    ) -> Lease:
        """Pin the leading blocks that are in DRAM, reading in those on ssd first.

        Args:
            hashes: the chain.
            ttl: seconds until the lease ends by itself; default from the configuration.
            timeout: seconds to wait for lower tiers; what has not arrived by then is not pinned.
        """
        chain = BlockHashes.of(hashes)
        control = self.control
        granted = control.acquire(
            chain,
            self._lease_seconds if ttl is None else ttl,
            self._timeout if timeout is None else timeout,
        )
        return Lease(control, chain, granted, self._verify, self.threads)

    def load(
        self,
        hashes: Hashes,
        buffers: BlockBuffers,
        block_ids: object = None,
        *,
        background: bool = False,
        timeout: float | None = None,
    ) -> Transfer:
        """Copy the leading blocks that the store has into engine blocks.

        Args:
            hashes: the chain; block i goes to engine block `block_ids[i]`.
            buffers: where the engine's blocks lie.
            block_ids: shape (n,); default 0, 1, 2, ...
            background: return at once, copy on a background thread.
            timeout: seconds to wait for lower tiers.

        Returns:
            A transfer whose `num_blocks` leading blocks hold exactly the bytes that were put.
            Engine blocks after those may hold anything.
        """
        chain = BlockHashes.of(hashes)
        ids = self._ids(chain, block_ids)
        buffers.require_block_bytes(self._block_bytes)
        buffers.require_writable()
        if background:
            return self._submit(lambda: self._load(chain, buffers, ids, timeout))
        return Transfer(self._load(chain, buffers, ids, timeout))

    @traced("load", lambda result, _, chain, *__: _load_attributes(result, chain))
    def _load(
        self,
        chain: BlockHashes,
        buffers: BlockBuffers,
        ids: npt.NDArray[np.int64],
        timeout: float | None,
    ) -> TransferResult:
        _ = self.control
        if self._fast_load is not None:
            loaded, is_all = self._fast_load(chain, buffers.plan, ids, self._verify, self.threads)
            if is_all:
                return TransferResult(loaded, num_missed=len(chain) - loaded)
        with self.acquire(chain, timeout=timeout) as lease:
            loaded = lease.load(buffers, ids[: len(lease)]) if len(lease) else 0
        return TransferResult(loaded, num_missed=len(chain) - loaded)

    def prefetch(self, hashes: Hashes) -> Transfer:
        """Start to read leading blocks from lower tiers into DRAM."""
        return Transfer(future=self.control.prefetch(BlockHashes.of(hashes)))

    # --- writing

    def put(
        self,
        hashes: Hashes,
        buffers: BlockBuffers,
        block_ids: object = None,
        *,
        ack: Ack = "memory",
        background: bool = False,
    ) -> Transfer:
        """Copy engine blocks into the store. Never waits for room: a full store evicts or refuses.

        Args:
            hashes: block i is engine block `block_ids[i]`. Hashes that know their chain (from
                `hash_blocks`, or slices of it) are stored only after the block before them.
            buffers: where the engine's blocks lie.
            block_ids: shape (n,); default 0, 1, 2, ...
            ack: the level at which the transfer is done: "memory", "ssd" (survives kill -9), or
                "durable" (survives power loss).
            background: return at once; the engine must not change the blocks until it is done.
        """
        check_ack(ack)
        chain = BlockHashes.of(hashes)
        ids = self._ids(chain, block_ids)
        buffers.require_block_bytes(self._block_bytes)
        if background:
            return self._submit(lambda: self._put(chain, buffers, ids, ack).wait())
        return self._put(chain, buffers, ids, ack)

    @traced("put", lambda _, __, chain, *___: {"blocks": len(chain)})
    def _put(
        self, chain: BlockHashes, buffers: BlockBuffers, ids: npt.NDArray[np.int64], ack: Ack
    ) -> Transfer:
        control = self.control
        with self._writers:
            if self._fast_put is not None and ack == "memory":
                return Transfer(self._fast_put(chain, buffers.plan, ids, self.threads))
            return self._reserve_and_put(control, chain, buffers, ids, ack)

    def _reserve_and_put(
        self,
        control: Control,
        chain: BlockHashes,
        buffers: BlockBuffers,
        ids: npt.NDArray[np.int64],
        ack: Ack,
    ) -> Transfer:
        reserved = control.reserve(chain)
        wanted = reserved.statuses == RESERVED
        addresses = reserved.offsets[wanted] + np.uint64(control.arena.ctypes.data)
        sums = np.empty(len(addresses), np.uint64)
        try:
            _native.gather(buffers.plan, ids[wanted], addresses, sums, self.threads)
        except BaseException:
            control.abort(reserved.reservation)
            raise
        return self.finish_put(reserved.reservation, sums, chain, reserved.statuses, ack)

    def reserve(self, hashes: Hashes) -> Reservation:
        """Reserve slots to be written in place: the two-phase form of `put`."""
        return Reservation(self, BlockHashes.of(hashes))

    def finish_put(
        self,
        reservation: int,
        checksums: npt.NDArray[np.uint64],
        chain: BlockHashes,
        statuses: npt.NDArray[np.uint8],
        ack: Ack,
    ) -> Transfer:
        """Commit, and turn the level's future into a transfer. For `Reservation` and `put`."""
        level = self.control.commit(reservation, checksums, chain, ack)
        if level is None:
            return Transfer(_result_of(statuses, "memory"))
        done: Future[TransferResult] = Future()

        def finish(reached: Future[Ack]) -> None:
            error = reached.exception()
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(_result_of(statuses, reached.result()))

        level.add_done_callback(finish)
        return Transfer(future=done)

    # --- keeping and removing

    def pin(self, hashes: Hashes) -> int:
        """Keep leading blocks in DRAM until `unpin`; return how many are pinned now.

        Pins count as leases: they go with the store, and a store full of pins refuses puts.
        """
        chain = BlockHashes.of(hashes)
        granted = self.control.acquire(chain, None, self._timeout)
        if granted.lease:
            self._pins.setdefault(chain[0], []).append(granted.lease)
        return len(granted.offsets)

    def unpin(self, hashes: Hashes) -> None:
        """End all pins that start at the same first block."""
        control = self.control
        chain = BlockHashes.of(hashes)
        for lease in self._pins.pop(chain[0], []) if len(chain) else []:
            control.release(lease)

    def remove(self, hashes: Hashes) -> int:
        """Remove blocks, and with each all that continue it, from every tier; return how many of
        `hashes` were there. Leases go on to read what they hold."""
        return self.control.remove(BlockHashes.of(hashes))

    def clear(self) -> None:
        """Remove all blocks of the namespace from every tier."""
        self.control.clear()

    # --- watching and ending

    def events(self) -> Iterator[Event]:
        """Yield what happened since the last call (the first call starts it); see `events.py`."""
        return self.control.events()

    def stats(self) -> dict[str, Any]:
        """Return the metrics of `kvstore.metrics` by name."""
        return self.control.stats()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until earlier puts are on ssd; False when `timeout` seconds were not enough."""
        return self.control.flush(timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Wait for running transfers, end leases and pins, release all. Safe to call twice.

        Where a disk does not answer, this returns after about `timeout` seconds; what is not on
        ssd by then is given up. The directory stays in use until the disk answers.
        """
        with self._lock:
            pool, self._pool = self._pool, None
            closing, self._closing = not self._closing, True
        if not closing:
            return
        deadline = time.monotonic() + timeout
        if pool is not None:
            ending = threading.Thread(target=pool.shutdown, daemon=True)
            ending.start()
            ending.join(timeout)
        self._writers.close()
        self._closed = True
        self._control.close(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, work: Any) -> Transfer:
        with self._lock:
            if self._closing:
                raise StoreClosedError("the store is closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2, thread_name_prefix="kvstore-transfer")
            return Transfer(future=self._pool.submit(work))

    def _ids(self, chain: BlockHashes, block_ids: object) -> npt.NDArray[np.int64]:
        if block_ids is None:
            return np.arange(len(chain), dtype=np.int64)
        ids = as_block_ids(block_ids)
        if len(ids) != len(chain):
            raise ConfigError(f"block_ids: {len(ids)} given for {len(chain)} hashes")
        return ids


def _result_of(statuses: npt.NDArray[np.uint8], ack: str) -> TransferResult:
    """Return a put's result from its blocks' reserve statuses."""
    elsewhere = np.flatnonzero((statuses != RESERVED) & (statuses != PRESENT))
    leading = int(elsewhere[0]) if len(elsewhere) else len(statuses)
    stored, present, pending, no_space, orphan = np.bincount(statuses, minlength=5).tolist()
    return TransferResult(leading, stored, present, pending, no_space, orphan, ack=ack)


def _info(row: np.void, tiers: int) -> BlockInfo:
    on_ssd = bool(tiers & 2)
    return BlockInfo(
        row["hash"].tobytes(),
        int(row["depth"]),
        bool(tiers & 1),
        on_ssd,
        CodecId(row["codec"]).name.lower() if on_ssd else "",
        int(row["stored_bytes"]) if on_ssd else 0,
        int(row["checksum"]),
    )

"""Store: lookup, acquire, load, put, prefetch, pin, remove.

One class for the embedded store and for a client of a daemon: it copies bytes between the engine's
buffers and an arena; what goes where is decided by its `Control`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHashes, Namespace
from kvstore.buffers import as_block_ids
from kvstore.codec import CodecId
from kvstore.control import Ack, Control
from kvstore.errors import ConfigError, StoreClosedError
from kvstore.events import Event
from kvstore.layout import BlockBuffers
from kvstore.lease import Lease
from kvstore.loads import Flags, Load, is_available
from kvstore.puts import Put, check_ack
from kvstore.records import records_from
from kvstore.reservation import Reservation, Writers
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


def _load_attributes(result: TransferResult, chain: BlockHashes) -> dict[str, int]:
    return {"blocks": len(chain), "loaded_blocks": result.num_blocks}


def _each_attributes(arrived: Flags) -> dict[str, int]:
    return {"blocks": len(arrived), "loaded_blocks": int(np.count_nonzero(arrived))}


class Store:
    """A KV-cache store for the blocks of one namespace.

    Made by `kvstore.open` (embedded) or `kvstore.connect` (a daemon's). Methods that move bytes
    return a `Transfer`, which is done when they return unless `background=True` or a level above
    "memory" was asked for.

    A miss is data, never an error. Every method raises StoreClosedError after `close`. With the
    daemon away, lookups and loads miss, puts are refused (`num_unavailable`), and it is asked again
    in the background; `remove`, `clear`, `describe`, `flush` and `events` raise
    PeerUnavailableError or DeadlineExceededError.

    Thread safety: all methods may be called from any thread. A client (`kvstore.connect`) may be
    used in a forked child too: it connects anew there; leases and reservations stay the parent's.
    """

    def __init__(
        self,
        control: Control,
        *,
        timeout: float = 10.0,
        call_seconds: float = float("inf"),
    ) -> None:
        """`timeout`: to wait for lower tiers; `call_seconds`: that each call of `control` may take
        besides."""
        self._control = control
        self._block_bytes = control.namespace.spec.block_bytes
        self._timeout = timeout
        self._call_seconds = call_seconds
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0  # a forked child has the pool, but not its threads
        self._lock = threading.Lock()  # guards _pool, _pool_pid and _closing
        self._writers = Writers()
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

    # --- looking

    def lookup(self, hashes: Hashes, *, prefetch: bool = False) -> Hit:
        """Return how many leading blocks are available, and from which tiers. Nothing is pinned.

        With `prefetch`, those on ssd are read into DRAM in the background.
        """
        num_blocks, num_cpu = self.control.lookup(BlockHashes.of(hashes), prefetch)
        return Hit(num_blocks, num_cpu, num_blocks - num_cpu)

    def match(self, hashes: Hashes) -> int:
        """Return how many leading blocks are available in any tier: `lookup` without the tiers.

        O(log n) index reads for hashes that know their chain (made by `hash_blocks`).
        """
        return self.control.match(BlockHashes.of(hashes))

    def contains(self, hashes: Hashes) -> Flags:
        """Return for each block by itself whether it is available in any tier."""
        return is_available(self.control.residency(BlockHashes.of(hashes)))

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
        self,
        hashes: Hashes,
        *,
        ttl: float | None = None,
        timeout: float | None = None,
        holders: Sequence[str] = (),
    ) -> Lease:
        """Pin the leading blocks that are in DRAM, reading in those on ssd first.

        Args:
            hashes: the chain.
            ttl: seconds until the lease ends by itself; default from the configuration.
            timeout: seconds to wait for lower tiers; what has not arrived by then is not pinned.
            holders: addresses of other daemons, which may have what no tier has here; they are
                asked first.
        """
        chain = BlockHashes.of(hashes)
        control = self.control
        timeout = self._fetch(control, chain, holders, timeout)
        granted = control.acquire(
            chain,
            control.terms.lease_seconds if ttl is None else ttl,
            self._timeout if timeout is None else timeout,
        )
        return Lease(control, chain, granted, control.terms)

    def load(
        self,
        hashes: Hashes,
        buffers: BlockBuffers,
        block_ids: object = None,
        *,
        background: bool = False,
        timeout: float | None = None,
        holders: Sequence[str] = (),
    ) -> Transfer:
        """Copy the leading blocks that the store has into engine blocks.

        Args:
            hashes: the chain; block i goes to engine block `block_ids[i]`.
            buffers: where the engine's blocks lie.
            block_ids: shape (n,); default 0, 1, 2, ...
            background: return at once, copy on a background thread.
            timeout: seconds to wait for lower tiers, and for `holders`.
            holders: addresses of other daemons ("tcp:host:port"), which may have what no tier has
                here: the daemon, or an embedded store with `peer_token`, fetches it from them. What
                cannot be had from any of them is a miss.

        Returns:
            A transfer whose `num_blocks` leading blocks hold exactly the bytes that were put.
            Engine blocks after those may hold anything.
        """
        chain = BlockHashes.of(hashes)
        ids = self._ids(chain, block_ids)
        buffers.require_block_bytes(self._block_bytes)
        buffers.require_writable()
        if background:
            return self._submit(lambda: self._load(chain, buffers, ids, timeout, holders))
        return Transfer(self._load(chain, buffers, ids, timeout, holders))

    @traced("load", lambda result, _, chain, *__: _load_attributes(result, chain))
    def _load(
        self,
        chain: BlockHashes,
        buffers: BlockBuffers,
        ids: npt.NDArray[np.int64],
        timeout: float | None,
        holders: Sequence[str],
    ) -> TransferResult:
        control = self.control
        timeout = self._fetch(control, chain, holders, timeout)
        if self._fast_load is not None:
            terms = control.terms
            loaded, is_all = self._fast_load(
                chain, buffers.plan, ids, terms.verify_always, terms.threads
            )
            if is_all:
                return TransferResult(loaded, num_missed=len(chain) - loaded)
        loaded = self._new_load(control, chain, buffers, ids, timeout).leading()
        return TransferResult(loaded, num_missed=len(chain) - loaded)

    def load_each(
        self,
        hashes: Hashes,
        buffers: BlockBuffers,
        block_ids: object = None,
        *,
        timeout: float | None = None,
    ) -> Flags:
        """As `load`, for blocks that are of use without one another.

        Returns:
            For each block whether exactly the bytes that were put are in its engine block. The
            engine blocks of the others may hold anything.
        """
        chain = BlockHashes.of(hashes)
        ids = self._ids(chain, block_ids)
        buffers.require_block_bytes(self._block_bytes)
        buffers.require_writable()
        return self._load_each(chain, buffers, ids, timeout)

    @traced("load", lambda result, _, chain, *__: _each_attributes(result))
    def _load_each(
        self,
        chain: BlockHashes,
        buffers: BlockBuffers,
        ids: npt.NDArray[np.int64],
        timeout: float | None,
    ) -> Flags:
        return self._new_load(self.control, chain, buffers, ids, timeout).each()

    def _new_load(
        self,
        control: Control,
        chain: BlockHashes,
        buffers: BlockBuffers,
        ids: npt.NDArray[np.int64],
        timeout: float | None,
    ) -> Load:
        def acquire(part: BlockHashes, left: float) -> Lease:
            return self.acquire(part, timeout=left)

        wait = self._timeout if timeout is None else timeout
        return Load(control, acquire, chain, buffers, ids, wait, self._call_seconds)

    def prefetch(self, hashes: Hashes, *, holders: Sequence[str] = ()) -> Transfer:
        """Start to read leading blocks from lower tiers, and from `holders` what no tier has, into
        DRAM."""
        return Transfer(future=self.control.prefetch(BlockHashes.of(hashes), holders))

    def _fetch(
        self,
        control: Control,
        chain: BlockHashes,
        holders: Sequence[str],
        timeout: float | None,
    ) -> float | None:
        """Have what is missing here come from `holders`; return what that leaves of `timeout`."""
        if not holders or control.match(chain) == len(chain):
            return timeout
        wait = self._timeout if timeout is None else timeout
        began = time.monotonic()
        control.fetch(chain, holders, wait)
        return max(0.0, wait - (time.monotonic() - began))

    # --- writing

    def put(
        self,
        hashes: Hashes,
        buffers: BlockBuffers,
        block_ids: object = None,
        *,
        ack: Ack = "memory",
        background: bool = False,
        wait: float = 0.0,
    ) -> Transfer:
        """Copy engine blocks into the store; a full store evicts, or refuses.

        Args:
            hashes: block i is engine block `block_ids[i]`. Hashes that know their chain (from
                `hash_blocks`, or slices of it) are stored only after the block before them.
            buffers: where the engine's blocks lie.
            block_ids: shape (n,); default 0, 1, 2, ...
            ack: the level at which the transfer is done: "memory", "ssd" (survives kill -9), or
                "durable" (survives power loss).
            background: return at once; the engine must not change the blocks until it is done.
            wait: seconds to wait for room where every slot is leased or being written. By default
                a put never waits for room: the engine's step must not depend on the cache.
        """
        check_ack(ack)
        chain = BlockHashes.of(hashes)
        ids = self._ids(chain, block_ids)
        buffers.require_block_bytes(self._block_bytes)
        if background:
            return self._submit(lambda: self._put(chain, buffers, ids, ack, wait).wait())
        return self._put(chain, buffers, ids, ack, wait)

    @traced("put", lambda _, __, chain, *___: {"blocks": len(chain)})
    def _put(
        self,
        chain: BlockHashes,
        buffers: BlockBuffers,
        ids: npt.NDArray[np.int64],
        ack: Ack,
        wait: float,
    ) -> Transfer:
        control = self.control
        with self._writers:
            if self._fast_put is not None and ack == "memory" and wait <= 0:
                return Transfer(self._fast_put(chain, buffers.plan, ids, control.terms.threads))
            put = Put(control, chain, buffers, ids, ack, control.terms.threads)
            return put.run(wait, lambda: self._closing)

    def put_each(self, hashes: Hashes, buffers: BlockBuffers, block_ids: object = None) -> Flags:
        """As `put`; return for each block by itself whether it is in the store now, stored by this
        call or there before."""
        chain = BlockHashes.of(hashes)
        if self.put(chain, buffers, block_ids).wait().num_blocks == len(chain):
            return np.ones(len(chain), bool)
        return self.contains(chain)

    def reserve(self, hashes: Hashes) -> Reservation:
        """Reserve slots to be written in place: the two-phase form of `put`."""
        return Reservation(self.control, BlockHashes.of(hashes), self._writers)

    # --- keeping and removing

    def pin(self, hashes: Hashes) -> int:
        """Keep leading blocks in DRAM until `unpin`; return how many are pinned now.

        Pins count as leases: they go with the store, and a store full of pins refuses puts. A
        daemon that was started again has forgotten them.
        """
        chain = BlockHashes.of(hashes)
        lease, num_blocks = self.control.pin(chain, self._timeout)
        if lease:
            self._pins.setdefault(chain[0], []).append(lease)
        return num_blocks

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
            if self._pool is None or self._pool_pid != os.getpid():
                self._pool = ThreadPoolExecutor(2, thread_name_prefix="kvstore-transfer")
                self._pool_pid = os.getpid()
            return Transfer(future=self._pool.submit(work))

    def _ids(self, chain: BlockHashes, block_ids: object) -> npt.NDArray[np.int64]:
        if block_ids is None:
            return np.arange(len(chain), dtype=np.int64)
        ids = as_block_ids(block_ids)
        if len(ids) != len(chain):
            raise ConfigError(f"block_ids: {len(ids)} given for {len(chain)} hashes")
        return ids


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

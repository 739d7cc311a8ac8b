"""The tiers of one process: DRAM in the native core, below it an ssd, and what moves between them.

`Tiers` is shared by all namespaces and clients; `LocalControl` is one client's view of one
namespace. The embedded store has one, a daemon has one for each client.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes, Namespace
from kvstore.config import StoreConfig
from kvstore.control import Ack, Granted, Offsets, Reserved
from kvstore.errors import ConfigError, OutOfSpaceError, StoreClosedError
from kvstore.events import Event, decode_events, last_sequence
from kvstore.metrics import Counters
from kvstore.tiers.promotion import Promoter
from kvstore.tiers.ssd_side import SsdSide
from kvstore.tiers.write_behind import Job
from kvstore.transfer import TransferResult

IN_CPU = 1 | 4  # residency: ready, or being written
PROMISE_SECONDS = 10.0  # how long a put at a level above memory waits for room in the queue
EVENT_CAPACITY = 1 << 16  # of a namespace, 96 B each; a reader further behind sees a gap
_WAIT_SLICE_SECONDS = 0.25


def memory_bytes() -> int:
    """Return how much memory this process may use: the machine's, or its control group's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


class Tiers:
    """DRAM and, where configured, an ssd directory.

    Thread safety: all methods may be called from any thread. `_lock` guards `_namespaces`.

    Raises:
        OutOfSpaceError: the arena's memory cannot be had.
        ConfigError, IncompatibleError, InUseError: see `kvstore.tiers.ssd`.
    """

    def __init__(self, config: StoreConfig, first_block_bytes: int) -> None:
        self.config = config
        self.counters = Counters()
        self.closed = False
        self._lock = threading.Lock()
        self._namespaces: dict[bytes, int] = {}
        self._events_on = False
        names = _native.eviction_policy_names()
        if config.eviction not in names:
            raise ConfigError(f"eviction: {config.eviction!r} is not one of {', '.join(names)}")
        chunk = config.chunk_bytes(first_block_bytes)
        if chunk > config.cpu_bytes:
            raise ConfigError(
                f"cpu: {config.cpu_bytes} bytes do not hold one block of {first_block_bytes} bytes"
            )
        # Asked for, the kernel would go on finding pages until it kills somebody.
        there = memory_bytes()
        if config.cpu_bytes > there:
            raise OutOfSpaceError(f"cpu: {config.cpu_bytes} bytes, this machine has {there} bytes")
        try:
            self.core = _native.StoreCore(
                config.cpu_bytes, chunk, config.huge_pages, config.eviction
            )
        except RuntimeError as error:
            raise OutOfSpaceError(f"cpu: {error}") from error
        self.arena: npt.NDArray[np.uint8] = self.core.arena
        self.ssd: SsdSide | None = None
        if config.ssd:
            self.ssd = SsdSide(config, self.core, self.counters, self.arena.ctypes.data)
            try:
                for digest, namespace in self.ssd.stored_namespaces():
                    self._namespaces[digest] = self._add_namespace(namespace)
                self.ssd.restore()
            except BaseException:
                self.ssd.close()  # gives the directory back
                raise
        self._promoter = Promoter(self.core, self.ssd, self.counters)

    def bind(self, namespace: Namespace) -> int:
        """Return the core's number for a namespace, registering it when new."""
        with self._lock:
            number = self._namespaces.get(namespace.digest)
            if number is None:
                number = self._namespaces[namespace.digest] = self._add_namespace(namespace)
            return number

    def _add_namespace(self, namespace: Namespace) -> int:
        try:
            number = self.core.add_namespace(namespace.spec.block_bytes)
        except ValueError as error:
            raise ConfigError(f"chunk: {error}") from error
        if self.ssd is not None:
            self.ssd.bind(number, namespace)
        return number

    def promote(self, namespace_id: int, hashes: BlockHashes) -> Future[TransferResult]:
        return self._promoter.submit(namespace_id, hashes)

    def enable_events(self) -> None:
        if not self._events_on:
            self._events_on = True
            self.core.enable_events(EVENT_CAPACITY)

    def stats(self) -> dict[str, Any]:
        core = self.core.stats()
        values: dict[str, Any] = self.counters.snapshot()
        for name, key in (
            ("kvstore_evicted_cpu_blocks_total", "evicted"),
            ("kvstore_refused_no_space_blocks_total", "refused_no_space"),
            ("kvstore_refused_orphan_blocks_total", "refused_orphan"),
            ("kvstore_leases_expired_total", "leases_expired"),
            ("kvstore_cpu_used_bytes", "cpu_used_bytes"),
            ("kvstore_cpu_capacity_bytes", "cpu_capacity_bytes"),
            ("kvstore_cpu_blocks", "cpu_blocks"),
            ("kvstore_ssd_blocks", "ssd_blocks"),
            ("kvstore_index_bytes", "index_bytes"),
            ("kvstore_leases", "leases"),
        ):
            values[name] = core[key]
        values["kvstore_integrity_failures_total"] += core["damaged"]
        if self.ssd is not None:
            values.update(self.ssd.gauges())
            values["kvstore_integrity_failures_total"] += self.ssd.checksum_failures
        return values

    @property
    def is_stuck(self) -> bool:
        """Whether the disk has stopped answering."""
        return self._promoter.is_stuck

    def close(self, timeout: float = 60.0) -> None:
        """Write out what is queued, then release disk and threads. Safe to call twice.

        After `timeout` seconds what is not written is given up. A thread that the disk does not
        let go is left behind: it ends, and gives the directory free, when the disk answers.
        """
        if self.closed:
            return
        self.closed = True
        deadline = time.monotonic() + timeout
        self._promoter.close(timeout)
        if self.ssd is not None:
            self.ssd.close(max(0.0, deadline - time.monotonic()))


class LocalControl:
    """One client's view of one namespace of `Tiers`; see `kvstore.control.Control`."""

    def __init__(self, tiers: Tiers, namespace: Namespace, *, owns_tiers: bool) -> None:
        self._tiers = tiers
        self._core = tiers.core
        self._namespace = namespace
        self._id = tiers.bind(namespace)
        self._owner = self._core.new_owner()
        self._events_lock = threading.Lock()
        self._events_seen: int | None = None  # None until somebody asks for events
        self._owns_tiers = owns_tiers
        self._closed = False
        self._block_bytes = namespace.spec.block_bytes

    @property
    def namespace(self) -> Namespace:
        return self._namespace

    @property
    def namespace_id(self) -> int:
        return self._id

    @property
    def tiers(self) -> Tiers:
        return self._tiers

    @property
    def arena(self) -> npt.NDArray[np.uint8]:
        if self._closed:  # leases and reservations ended with it: their slots are others' now
            raise StoreClosedError("the store is closed")
        return self._tiers.arena

    # --- looking

    def match(self, hashes: BlockHashes) -> int:
        return self._core.match(self._id, hashes.array, hashes.start)

    def residency(self, hashes: BlockHashes) -> npt.NDArray[np.uint8]:
        return self._core.residency(self._id, hashes.array)

    def describe(self, hashes: BlockHashes) -> bytes:
        return self._core.describe(self._id, hashes.array)

    def wait_for(self, hashes: BlockHashes, want: int, timeout: float) -> int:
        # In slices, so that a store that is closed does not wait for its waiters.
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            step = min(left, _WAIT_SLICE_SECONDS)
            there = self._core.wait_for(self._id, hashes.array, hashes.start, want, step)
            if there >= min(want, len(hashes)) or step == left or self._closed:
                return there

    # --- reading

    def acquire(self, hashes: BlockHashes, ttl: float | None, timeout: float) -> Granted:
        granted = self._acquire(hashes, ttl)
        in_cpu = len(granted.offsets)
        if in_cpu < len(hashes) and self._tiers.ssd is not None:
            available = self.match(hashes)
            if available > in_cpu:
                granted = self._promote_and_acquire(hashes[:available], granted, ttl, timeout)
        held = len(granted.offsets)
        hit_cpu = min(in_cpu, held)
        num_bytes = held * self._block_bytes
        self._tiers.counters.add_load(len(hashes), hit_cpu, held - hit_cpu, num_bytes)
        return granted

    def _promote_and_acquire(
        self, hashes: BlockHashes, granted: Granted, ttl: float | None, timeout: float
    ) -> Granted:
        # The lease on what is in DRAM stays until all is, so that reading the tail cannot push the
        # head out.
        if self._tiers.is_stuck:
            return granted
        future: Future[TransferResult] | None = None
        try:
            future = self._tiers.promote(self._id, hashes[len(granted.offsets) :])
            future.result(timeout)
        except FutureTimeoutError:
            assert future is not None
            future.cancel()
            self._tiers.counters.add("deadline_exceeded")
        except BaseException as error:
            self._core.release(self._owner, granted.lease)
            if isinstance(error, CancelledError):
                raise StoreClosedError("the store is closed") from None
            raise
        longer = self._acquire(hashes, ttl)
        self._core.release(self._owner, granted.lease)
        return longer

    def _acquire(self, hashes: BlockHashes, ttl: float | None) -> Granted:
        return Granted(*self._core.acquire(self._owner, self._id, hashes.array, ttl, True))

    def release(self, lease: int) -> bool:
        return self._core.release(self._owner, lease)

    def load(
        self,
        hashes: BlockHashes,
        plan: _native.CopyPlan,
        block_ids: npt.NDArray[np.int64],
        verify: bool,
        threads: int,
    ) -> tuple[int, bool]:
        """Load what is in the cpu tier in one native call.

        Returns how many leading blocks, and whether that is all there is in any tier. If it is not,
        nothing is counted yet: the caller goes on to `acquire`, which counts.
        """
        loaded, corrupt = self._core.load(
            self._owner, self._id, hashes.array, plan, block_ids, verify, threads
        )
        if corrupt:
            self._tiers.counters.add("integrity_failures")
        is_all = loaded == len(hashes) or self._tiers.ssd is None or self.match(hashes) <= loaded
        if is_all:
            num_bytes = loaded * self._block_bytes
            self._tiers.counters.add_load(len(hashes), loaded, 0, num_bytes)
        return loaded, is_all

    def prefetch(self, hashes: BlockHashes) -> Future[TransferResult]:
        available = self.match(hashes)
        return self._tiers.promote(self._id, hashes[:available])

    # --- writing

    def put(
        self,
        hashes: BlockHashes,
        plan: _native.CopyPlan,
        block_ids: npt.NDArray[np.int64],
        threads: int,
    ) -> TransferResult:
        """Reserve, copy and commit in one native call, at level memory."""
        leading, stored, present, pending, no_space, orphan = self._core.put(
            self._owner,
            self._id,
            hashes.array,
            hashes.start,
            hashes.parent,
            plan,
            block_ids,
            threads,
        )
        self._tiers.counters.add("stored_bytes", stored * self._block_bytes)
        if stored and self._tiers.ssd is not None:
            self._tiers.ssd.write_later(self._job(hashes))
        return TransferResult(leading, stored, present, pending, no_space, orphan, ack="memory")

    def reserve(self, hashes: BlockHashes) -> Reserved:
        return Reserved(
            *self._core.reserve(
                self._owner, self._id, hashes.array, hashes.start, hashes.parent, False
            )
        )

    def commit(
        self, reservation: int, checksums: Offsets, hashes: BlockHashes, ack: Ack
    ) -> Future[Ack] | None:
        if reservation:
            if not self._core.commit(self._owner, reservation, checksums, None):
                raise StoreClosedError("the reservation is gone: its owner was released")
            self._tiers.counters.add("stored_bytes", len(checksums) * self._block_bytes)
        if self._tiers.ssd is None:
            return None if ack == "memory" else _reached("memory")
        job = self._job(hashes)
        if ack == "memory":
            if reservation:
                self._tiers.ssd.write_later(job)
            return None
        granted = self._acquire(hashes, None)
        held = len(granted.offsets)
        future: Future[Ack] = Future()
        # The level is of what was stored. Of a put that was refused in part, the leading blocks.
        if held == 0 or np.any(self.residency(hashes[held:]) & IN_CPU):
            self._core.release(self._owner, granted.lease)
            if reservation:
                self._tiers.ssd.write_later(job)
            return _reached("memory")
        job = self._job(hashes[:held])
        job.ack, job.future = ack, future
        job.owner, job.lease = self._owner, granted.lease
        if not self._tiers.ssd.write_later(job, PROMISE_SECONDS):
            self._core.release(self._owner, granted.lease)
            return _reached("memory")
        return future

    def _job(self, hashes: BlockHashes) -> Job:
        return Job(self._id, hashes.array, len(hashes) * self._block_bytes)

    def abort(self, reservation: int) -> None:
        self._core.abort(self._owner, reservation)

    # --- removing and watching

    def remove(self, hashes: BlockHashes) -> int:
        removed = self._core.remove(self._id, hashes.array)
        if removed and self._tiers.ssd is not None:
            self._tiers.ssd.forget_later()
        return removed

    def report_corrupt(self, block_hash: bytes) -> None:
        self._tiers.counters.add("integrity_failures")
        self._core.remove(self._id, np.frombuffer(block_hash, np.uint8).reshape(1, 32))

    def clear(self) -> None:
        self._core.clear(self._id)
        if self._tiers.ssd is not None:
            self._tiers.ssd.forget_later()

    def flush(self, timeout: float) -> bool:
        return self._tiers.ssd is None or self._tiers.ssd.flush(timeout)

    def packed_events(self) -> bytes:
        with self._events_lock:
            if self._events_seen is None:
                self._tiers.enable_events()
                self._events_seen = self._core.event_sequence(self._id)
            packed = self._core.events_after(self._id, self._events_seen)
            self._events_seen = last_sequence(packed, self._events_seen)
        return packed

    def events(self) -> Iterator[Event]:
        return decode_events(self.packed_events(), self._namespace.spec.block_tokens)

    def stats(self) -> dict[str, Any]:
        return self._tiers.stats()

    def close(self, timeout: float = 60.0) -> None:
        self._closed = True
        self._core.release_owner(self._owner)
        if self._owns_tiers:
            self._tiers.close(timeout)


def _reached(level: Ack) -> Future[Ack]:
    future: Future[Ack] = Future()
    future.set_result(level)
    return future

"""The tiers of one process: DRAM in the native core, below it an ssd, and what moves between them.

`Tiers` is shared by all namespaces and clients; `LocalControl` is one client's view of one
namespace. The embedded store has one, a daemon has one for each client.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.address import checked_holders
from kvstore.block import BlockHashes, Namespace
from kvstore.config import StoreConfig
from kvstore.control import NO_SPACE, Ack, Granted, Offsets, Reserved, Terms
from kvstore.errors import ConfigError, OutOfSpaceError, StoreClosedError
from kvstore.events import Event, decode_events, last_sequence
from kvstore.metrics import Counters
from kvstore.records import hash_rows
from kvstore.tiers.admission import HashRows, Origin
from kvstore.tiers.fetching import Fetches, NoPeers, Wanted
from kvstore.tiers.names import Tenant, pack_metadata, unpack_metadata
from kvstore.tiers.promotion import Promoter
from kvstore.tiers.write_behind import Job
from kvstore.transfer import TransferResult

if TYPE_CHECKING:
    from kvstore.tiers.ssd_side import SsdSide

log = logging.getLogger(__name__)

DEFAULT_TENANT = 0
ON_SSD = 2  # residency
IN_CPU = 1 | 4  # residency: ready, or being written
# MissReason in csrc/core/store_core.h; "": it can be had, maybe from ssd only
_WHY_MISSED = ("absent", "pending", "evicted", "")
PREFETCH_SECONDS = 60.0  # that a prefetch from other daemons may take
PROMISE_SECONDS = 10.0  # how long a put at a level above memory waits for room in the queue
NAMESPACES_MAX = 1024  # of a tenant: each costs memory for as long as this process lives
EVENT_CAPACITY = 1 << 16  # of a namespace, 96 B each; a reader further behind sees a gap
_WAIT_SLICE_SECONDS = 0.25
_MEMORY: Ack = "memory"

_Value = TypeVar("_Value")


def memory_bytes() -> int:
    """Return how much memory this process may use: the machine's, or its control group's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


class Tiers:
    """DRAM and, where configured, an ssd directory.

    Thread safety: all methods may be called from any thread. `_lock` guards `_namespaces`,
    `_num_bound` and `_described`.

    Raises:
        OutOfSpaceError: the arena's memory cannot be had.
        ConfigError, IncompatibleError, InUseError: see `kvstore.tiers.ssd`.
    """

    def __init__(
        self,
        config: StoreConfig,
        first_block_bytes: int,
        *,
        core: _native.StoreCore | None = None,
        tenants: Sequence[Tenant] = (),
    ) -> None:
        """Take the memory, open the ssd directory, and find what both hold.

        Args:
            first_block_bytes: of the blocks that come first; chunks of the arena are cut for them.
            core: from `StoreCore.adopt`, not recovered yet; what its arena holds is recovered here,
                after what the ssd holds. None: an arena of our own.
            tenants: besides the default one. What is stored under other names stays where it is
                on ssd, unreachable, until its segments are reclaimed, and is freed in DRAM.
        """
        self.config = config
        self.counters = Counters()
        self.closed = False
        # What others count on our behalf, by metric; added to ours in `stats`.
        self.outside: list[Callable[[], Mapping[str, int]]] = []
        self._lock = threading.Lock()
        self._namespaces: dict[tuple[int, bytes], int] = {}
        self._num_bound: dict[int, int] = {}  # of a tenant's namespaces
        self._described: list[tuple[int, str, Namespace]] = []  # number, tenant's name
        self._events_on = False
        self.core = _new_core(config, first_block_bytes) if core is None else core
        self.arena: npt.NDArray[np.uint8] = self.core.arena
        self._tenants: dict[str, int] = {"": DEFAULT_TENANT}
        self._ssd_quotas: dict[int, int] = {}
        for tenant in tenants:
            self._add_tenant(tenant)
        # What an adopted core did, by name: adopted, discarded, quarantined, ...
        self.recovered: dict[str, int] | None = None
        self._is_adopting = core is not None
        self.ssd: SsdSide | None = None
        if config.ssd:
            # Here: without an ssd, a daemon that starts has no time to load LMDB.
            from kvstore.tiers.ssd_side import SsdSide

            self.ssd = SsdSide(
                config, self.core, self.counters, self.arena.ctypes.data, first_block_bytes
            )
        try:
            self._restore()
        except BaseException:
            if self.ssd is not None:
                self.ssd.close()  # gives the directory back
            raise
        self.wants_used = self.ssd is not None and self.ssd.admission.wants_used
        self._promoter = Promoter(self.core, self.ssd, self.counters)
        # Set by whoever puts the parts together, before anybody asks; ours to close.
        self.fetches: Fetches = NoPeers()

    def _add_tenant(self, tenant: Tenant) -> None:
        if tenant.name in self._tenants:
            raise ConfigError(f"tenants: {tenant.name!r} is there twice")
        number = self.core.add_tenant(tenant.cpu_quota, tenant.ssd_quota)
        self._tenants[tenant.name] = number
        if tenant.ssd_quota:
            self._ssd_quotas[number] = tenant.ssd_quota

    def _restore(self) -> None:
        """Find again what ssd and arena hold."""
        kept: dict[int, int] = {}
        before = unpack_metadata(self.core.metadata()) if self._is_adopting else []
        for number, name, namespace in before:
            if name in self._tenants:
                kept[number] = self.bind(namespace, self._tenants[name])
        if self.ssd is not None:
            for name, namespace in self.ssd.stored_namespaces():
                if name in self._tenants:
                    self.bind(namespace, self._tenants[name])
            self.ssd.restore()
        if not self._is_adopting:
            return
        self.recovered = self.core.recover(kept)
        self._is_adopting = False
        self._save_metadata()
        for number in kept.values():
            self.adopted(number, self.core.recovered_not_on_ssd(number))

    def described(self) -> list[tuple[int, str, Namespace]]:
        """Return number, tenant's name and namespace of all there are."""
        with self._lock:
            return list(self._described)

    def tenant(self, name: str) -> int:
        """Return the core's number of a tenant. Raises KeyError for a name that was not given."""
        return self._tenants[name]

    def tenant_name(self, number: int) -> str:
        return next(name for name, known in self._tenants.items() if known == number)

    def knows(self, namespace: Namespace, tenant: int) -> bool:
        """Whether anybody has bound it already."""
        with self._lock:
            return (tenant, namespace.digest) in self._namespaces

    def bind(self, namespace: Namespace, tenant: int = DEFAULT_TENANT) -> int:
        """Return the core's number for a tenant's namespace, registering it when new."""
        with self._lock:
            number = self._namespaces.get((tenant, namespace.digest))
            if number is None:
                if self._num_bound.get(tenant, 0) >= NAMESPACES_MAX:
                    raise ConfigError(f"namespace: there are {NAMESPACES_MAX} of them already")
                number = self._register(namespace, tenant)
                if not self._is_adopting:  # until then the old metadata is the right one
                    self._save_metadata()
            return number

    def _register(self, namespace: Namespace, tenant: int) -> int:
        name = self.tenant_name(tenant)
        try:
            number = self.core.add_namespace(namespace.spec.block_bytes, tenant)
        except ValueError as error:
            raise ConfigError(f"chunk: {error}") from error
        if self.ssd is not None:
            quota = self._ssd_quotas.get(tenant)
            room = None if quota is None else partial(self._ssd_room, tenant, quota)
            self.ssd.bind(number, namespace, name, room)
        self._described.append((number, name, namespace))
        self._namespaces[tenant, namespace.digest] = number
        self._num_bound[tenant] = self._num_bound.get(tenant, 0) + 1
        return number

    def _ssd_room(self, tenant: int, quota: int) -> int:
        return quota - self.core.tenant_stats(tenant)["ssd_used_bytes"]

    def _save_metadata(self) -> None:
        try:
            self.core.set_metadata(pack_metadata(self._described))
        except ValueError as error:  # blocks of the newest namespaces will not be adopted
            self.counters.add("background_errors")
            log.warning("the arena cannot name all its namespaces: %s", error)

    def promote(self, namespace_id: int, hashes: BlockHashes) -> Future[TransferResult]:
        """Read leading blocks in from ssd, for somebody who waits."""
        return self._promoter.submit(namespace_id, hashes)

    def prefetch(self, namespace_id: int, hashes: BlockHashes) -> Future[TransferResult]:
        """Read leading blocks in from ssd when nobody waits for others; bounded."""
        return self._promoter.prefetch(namespace_id, hashes)

    def stored(self, namespace_id: int, hashes: HashRows | bytes) -> None:
        """Blocks were committed at level memory. Never waits."""
        if self.ssd is not None:
            self.ssd.stored(namespace_id, _rows(hashes))

    def used(self, namespace_id: int, hashes: HashRows | bytes) -> None:
        """Blocks of which not all are on ssd were read in DRAM. Never waits.

        Needs to be told only where `wants_used`.
        """
        if self.ssd is not None and self.wants_used:
            self.ssd.used(namespace_id, _rows(hashes))

    def adopted(self, namespace_id: int, hashes: HashRows | bytes) -> None:
        """Blocks in DRAM are from before this process: write them when there is time."""
        if self.ssd is not None:
            self.ssd.adopted(namespace_id, _rows(hashes))

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
            failures = self.ssd.checksum_failures
            values["kvstore_integrity_failures_total"] += failures
            values["kvstore_integrity_failures_ssd_total"] += failures
        for count in list(self.outside):
            for name, value in count().items():
                values[name] = values.get(name, 0) + value
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
        self.fetches.close(timeout)
        self._promoter.close(timeout)
        if self.ssd is not None:
            self.ssd.close(max(0.0, deadline - time.monotonic()))


class LocalControl:
    """One client's view of one namespace of `Tiers`; see `kvstore.control.Control`."""

    def __init__(
        self,
        tiers: Tiers,
        namespace: Namespace,
        *,
        owns_tiers: bool,
        tenant: int = DEFAULT_TENANT,
        owner: int | None = None,
    ) -> None:
        """`owner`: whose leases and reservations these are, and who ends with them; None for one of
        our own, which `close` ends."""
        self._tiers = tiers
        self._core = tiers.core
        self._namespace = namespace
        self._id = tiers.bind(namespace, tenant)
        self._tenant = tenant
        self._owner = self._core.new_owner() if owner is None else owner
        self._owns_owner = owner is None
        self._events_lock = threading.Lock()
        self._events_seen: int | None = None  # None until somebody asks for events
        self._owns_tiers = owns_tiers
        self._closed = False
        self._block_bytes = namespace.spec.block_bytes
        self._arena_address = tiers.arena.ctypes.data
        self._block_tokens = namespace.spec.block_tokens
        config = tiers.config
        self.terms = Terms(config.verify == "always", config.threads, config.lease_seconds)

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
        """The whole arena, mapped in this process."""
        self.require_open()
        return self._tiers.arena

    @property
    def piece_blocks(self) -> int | None:
        return None

    def require_open(self) -> None:
        if self._closed:  # leases and reservations ended with it: their slots are others' now
            raise StoreClosedError("the store is closed")

    # --- looking

    def match(self, hashes: BlockHashes) -> int:
        return self._core.match(self._id, hashes.array, hashes.start)

    def lookup(self, hashes: BlockHashes, prefetch: bool) -> tuple[int, int]:
        num_blocks = self.match(hashes)
        if num_blocks == 0:
            return 0, 0
        num_cpu = int(np.count_nonzero(self.residency(hashes[:num_blocks]) & 1))
        if prefetch and num_cpu < num_blocks and not self._tiers.is_stuck:
            self._tiers.promote(self._id, hashes[:num_blocks])
        return num_blocks, num_cpu

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
        granted, late = self._acquire(hashes, ttl), ""
        in_cpu = len(granted.offsets)
        if in_cpu < len(hashes) and self._tiers.ssd is not None:
            available = self.match(hashes)
            if available > in_cpu:
                granted, late = self._promote_and_acquire(hashes[:available], granted, ttl, timeout)
        held = len(granted.offsets)
        hit_cpu = min(in_cpu, held)
        self.count_load(hashes, hit_cpu, held, late)
        if hit_cpu and self._tiers.wants_used:
            self._note_used(hashes[:hit_cpu])
        return granted

    def count_load(self, hashes: BlockHashes, hit_cpu: int, held: int, late: str = "") -> None:
        """Count one load or acquire, of which `held` leading blocks were had.

        Misses have the reason of the first of them: what continues it cannot be had without it.
        `late` is the reason where that one is in some tier.
        """
        counters = self._tiers.counters
        num_bytes = held * self._block_bytes
        counters.add_load(len(hashes), hit_cpu, held - hit_cpu, num_bytes, self._block_tokens)
        if held < len(hashes):
            why = self._core.why(self._id, hashes.array[held].tobytes())
            reason = _WHY_MISSED[why] or late
            if reason:
                counters.add_missed(reason, len(hashes) - held)

    def _note_used(self, hashes: BlockHashes) -> None:
        # Of a chain, where the last is on ssd so are those before it.
        looked_at = hashes.array[-1:] if hashes.linked else hashes.array
        if not np.all(self._core.residency(self._id, looked_at) & ON_SSD):
            self._tiers.used(self._id, hashes.array)

    def _promote_and_acquire(
        self, hashes: BlockHashes, granted: Granted, ttl: float | None, timeout: float
    ) -> tuple[Granted, str]:
        """Return what is held in the end, and why the rest is not: "" where that is not known."""
        # The lease on what is in DRAM stays until all is, so that reading the tail cannot push the
        # head out.
        if self._tiers.is_stuck:
            return granted, "unavailable"
        late = ""
        future: Future[TransferResult] | None = None
        try:
            future = self._tiers.promote(self._id, hashes[len(granted.offsets) :])
            future.result(timeout)
        except FutureTimeoutError:
            assert future is not None
            future.cancel()
            self._tiers.counters.add("deadline_exceeded")
            late = "deadline"
        except BaseException as error:
            self._core.release(self._owner, granted.lease)
            if isinstance(error, CancelledError):
                raise StoreClosedError("the store is closed") from None
            raise
        longer = self._acquire(hashes, ttl)
        self._core.release(self._owner, granted.lease)
        return longer, late

    def _acquire(self, hashes: BlockHashes, ttl: float | None) -> Granted:
        granted = self._core.acquire(self._owner, self._id, hashes.array, ttl, True)
        return Granted(*granted, self._tiers.arena, self._arena_address)

    def pin(self, hashes: BlockHashes, timeout: float) -> tuple[int, int]:
        granted = self.acquire(hashes, None, timeout)
        return granted.lease, len(granted.offsets)

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
            self.count_load(hashes, loaded, loaded)
            if loaded and self._tiers.wants_used:
                self._note_used(hashes[:loaded])
        return loaded, is_all

    def prefetch(self, hashes: BlockHashes, holders: Sequence[str] = ()) -> Future[TransferResult]:
        available = self.match(hashes)
        if holders and available < len(hashes):
            return self._prefetch_from(hashes, holders)
        return self._tiers.prefetch(self._id, hashes[:available])

    def _prefetch_from(self, hashes: BlockHashes, holders: Sequence[str]) -> Future[TransferResult]:
        done: Future[TransferResult] = Future()

        def finish(fetched: Future[int]) -> None:
            ready = fetched.result()
            self._tiers.prefetch(self._id, hashes[:ready])
            done.set_result(TransferResult(ready, num_missed=len(hashes) - ready))

        self.fetch_later(hashes, holders, PREFETCH_SECONDS).add_done_callback(finish)
        return done

    def fetch(self, hashes: BlockHashes, holders: Sequence[str], timeout: float) -> int:
        try:
            return self.fetch_later(hashes, holders, timeout).result(timeout)
        except FutureTimeoutError:
            self._tiers.counters.add("deadline_exceeded")
            return self.match(hashes)

    def fetch_later(
        self, hashes: BlockHashes, holders: Sequence[str], timeout: float
    ) -> Future[int]:
        """As `fetch`; the future never fails, but may be later than `timeout`.

        Raises:
            ConfigError: see `kvstore.control.Control.fetch`.
        """
        wanted = Wanted(self._id, self._namespace, self._tiers.tenant_name(self._tenant), hashes)
        return self._tiers.fetches.fetch(wanted, checked_holders(holders), timeout)

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
        if stored:
            self._tiers.stored(self._id, hashes.array)
        return TransferResult(leading, stored, present, pending, no_space, orphan, ack="memory")

    def reserve(self, hashes: BlockHashes, wait: float = 0.0) -> Reserved:
        deadline = time.monotonic() + wait
        while True:
            seen = self._core.change_count
            reservation, statuses, offsets = self._core.reserve(
                self._owner, self._id, hashes.array, hashes.start, hashes.parent, False
            )
            left = deadline - time.monotonic()
            if reservation or left <= 0 or self._closed or not np.any(statuses == NO_SPACE):
                break
            self._core.wait_for_change(seen, min(left, _WAIT_SLICE_SECONDS))
        return Reserved(reservation, statuses, offsets, self._tiers.arena, self._arena_address)

    def commit(
        self,
        reservation: int,
        checksums: Offsets,
        hashes: BlockHashes,
        ack: Ack,
        promise_seconds: float = PROMISE_SECONDS,
    ) -> Future[Ack] | None:
        if reservation:
            if not self._core.commit(self._owner, reservation, checksums, None):
                raise StoreClosedError("the reservation is gone: its owner was released")
            self._tiers.counters.add("stored_bytes", len(checksums) * self._block_bytes)
        if self._tiers.ssd is None:
            return None if ack == "memory" else _done(_MEMORY)
        if ack == "memory":
            if reservation:
                self._tiers.stored(self._id, hashes.array)
            return None
        granted = self._acquire(hashes, None)
        held = len(granted.offsets)
        future: Future[Ack] = Future()
        # The level is of what was stored. Of a put that was refused in part, the leading blocks.
        if held == 0 or np.any(self.residency(hashes[held:]) & IN_CPU):
            self._core.release(self._owner, granted.lease)
            if reservation:
                self._tiers.stored(self._id, hashes.array)
            return _done(_MEMORY)
        job = Job(
            self._id,
            hashes.array[:held],
            held * self._block_bytes,
            ack=ack,
            owner=self._owner,
            lease=granted.lease,
            future=future,
            origin=Origin.PROMISED,
        )
        if not self._tiers.ssd.write_later(job, promise_seconds):
            self._core.release(self._owner, granted.lease)
            return _done(_MEMORY)
        return future

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

    def flush_later(self) -> Future[bool]:
        """Return what becomes True once earlier puts are on ssd, or False where they never will."""
        return _done(True) if self._tiers.ssd is None else self._tiers.ssd.flush_later()

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
        if self._owns_owner:
            self._core.release_owner(self._owner)
        if self._owns_tiers:
            self._tiers.close(timeout)


def _new_core(config: StoreConfig, first_block_bytes: int) -> _native.StoreCore:
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
        return _native.StoreCore(config.cpu_bytes, chunk, config.huge_pages, config.eviction)
    except RuntimeError as error:
        raise OutOfSpaceError(f"cpu: {error}") from error


def _rows(hashes: HashRows | bytes) -> HashRows:
    return hash_rows(hashes) if isinstance(hashes, bytes) else hashes


def _done(value: _Value) -> Future[_Value]:
    future: Future[_Value] = Future()
    future.set_result(value)
    return future

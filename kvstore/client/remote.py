"""RemoteControl: the decisions of a store that a daemon makes."""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvstore import wire
from kvstore._native import Connection
from kvstore.address import checked_holders
from kvstore.block import BlockHashes, Namespace
from kvstore.client.copies import ACK_SECONDS, Copies
from kvstore.client.handshake import Target
from kvstore.client.landing import LANDING_BYTES
from kvstore.client.link import AWAY, Link, Outages, process
from kvstore.client.session import Session
from kvstore.control import ACK_LEVELS, UNAVAILABLE, Ack, Granted, Offsets, Reserved, Terms
from kvstore.errors import KVStoreError, PeerUnavailableError, StoreClosedError
from kvstore.events import Event, decode_events
from kvstore.transfer import TransferResult

_log = logging.getLogger(__name__)
_UNKNOWN = Terms(verify_always=False, threads=1, lease_seconds=60.0)  # until a daemon answers
_IS_PREFETCH, _IS_PIN = 1, 1  # flags of LOOKUP, of ACQUIRE
_PREFETCH_SECONDS = 60.0
_RELEASE = int(wire.Op.RELEASE)
_RELEASE_ONE = struct.Struct("<QQ")  # how many, which
_POOL_THREADS = 4
_Value = TypeVar("_Value")


class RemoteControl:
    """See `kvstore.control.Control`.

    Blocks are read and written in place where the daemon lets us map its arena, else through a
    landing area of `landing_bytes`. Every request ends within `timeout` seconds and what it may
    wait for by itself; one that fails to end so finds the daemon away, and so do all calls until a
    background thread has connected anew. A call is one request, but to acquire through the landing
    area is two, and to open a connection for it one more.

    Thread safety: all methods may be called from any thread, and from a forked child, which
    connects for itself.

    Raises:
        PeerUnavailableError, DeadlineExceededError: nobody answers, and somebody is `required` to.
        IncompatibleError: whoever does is no daemon, or of another version.
        ConfigError: it refused the namespace, the tenant or the secret.
    """

    def __init__(
        self,
        target: Target,
        timeout: float,
        landing_bytes: int = LANDING_BYTES,
        *,
        required: bool = True,
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._landing_bytes = landing_bytes
        self._outages = Outages()
        self._said_no_peers = False
        self._link = Link(target, timeout, self._outages)
        try:
            if required:
                self._link.connect()
            else:
                self._link.connect_if_there()
        except BaseException:
            self._link.close()
            raise
        self._pool = self._make_pool()
        self._copies = self._make_copies()
        # What cannot be shared with a forked child, of this process and its forebears.
        self._own = {self._link.pid: (self._link, self._pool, self._copies)}

    @property
    def namespace(self) -> Namespace:
        return self._target.namespace

    @property
    def piece_blocks(self) -> int | None:
        last = self._link.last
        is_in_place = last is not None and last.welcome.may_map and last.welcome.may_map_writable
        return None if is_in_place else self._copies.piece_blocks

    @property
    def terms(self) -> Terms:
        """Of the daemon that answered last."""
        last = self._link.last
        return _UNKNOWN if last is None else last.terms

    def require_open(self) -> None:
        self._link.require_open()

    # --- looking

    def match(self, hashes: BlockHashes) -> int:
        try:
            return self._ask(Connection.match, hashes.array, hashes.start, hashes.parent)
        except KVStoreError as error:
            self._missed(error)
            return 0

    def lookup(self, hashes: BlockHashes, prefetch: bool) -> tuple[int, int]:
        flags = _IS_PREFETCH if prefetch else 0
        try:
            return self._ask(Connection.lookup, flags, hashes.array, hashes.start, hashes.parent)
        except KVStoreError as error:
            self._missed(error)
            return 0, 0

    def residency(self, hashes: BlockHashes) -> npt.NDArray[np.uint8]:
        try:
            return self._ask(Connection.residency, hashes.array, hashes.start, hashes.parent)
        except KVStoreError as error:
            self._missed(error)
            return np.zeros(len(hashes), np.uint8)

    def describe(self, hashes: BlockHashes) -> bytes:
        return bytes(self._call(wire.Describe(wire.pack_chain(hashes))))

    def wait_for(self, hashes: BlockHashes, want: int, timeout: float) -> int:
        try:
            return self._session().ask(
                Connection.wait_for,
                timeout,
                timeout,
                want,
                hashes.array,
                hashes.start,
                hashes.parent,
            )
        except KVStoreError as error:
            self._missed(error)
            return 0

    # --- reading

    def acquire(self, hashes: BlockHashes, ttl: float | None, timeout: float) -> Granted:
        try:
            session = self._session()
            began = time.monotonic()
            try:
                return self._acquire(session, hashes, ttl, timeout, 0.0)
            except PeerUnavailableError:
                fresh = self._fresh(session, began)
                if fresh is None:
                    raise
            return self._acquire(fresh, hashes, ttl, timeout, time.monotonic() - began)
        except KVStoreError as error:
            self._missed(error)
            return self._copies.nothing()

    def _acquire(
        self, session: Session, hashes: BlockHashes, ttl: float | None, timeout: float, spent: float
    ) -> Granted:
        if not session.welcome.may_map:
            return self._fetch(session, hashes, ttl, timeout, spent)
        lease, offsets, headers, sequences, checksums = session.ask(
            Connection.acquire,
            timeout - spent,
            -1.0 if ttl is None else ttl,
            timeout,
            0,
            hashes.array,
            hashes.start,
            hashes.parent,
        )
        arena = session.arena
        assert arena.readable is not None
        if lease:
            lease |= session.tag
        return Granted(lease, offsets, headers, sequences, checksums, arena.readable, arena.address)

    def _fetch(
        self, session: Session, hashes: BlockHashes, ttl: float | None, timeout: float, spent: float
    ) -> Granted:
        granted, is_damaged = self._copies.acquire(session, hashes, ttl, timeout, spent)
        if is_damaged:
            self.report_corrupt(hashes[len(granted.offsets)])
        return granted

    def pin(self, hashes: BlockHashes, timeout: float) -> tuple[int, int]:
        try:
            session = self._session()
            lease, offsets, _, _, _ = session.ask(
                Connection.acquire,
                timeout,
                -1.0,
                timeout,
                _IS_PIN,
                hashes.array,
                hashes.start,
                hashes.parent,
            )
        except KVStoreError as error:
            self._missed(error)
            return 0, 0
        return (lease | session.tag if lease else 0), len(offsets)

    def release(self, lease: int) -> bool:
        if self._copies.num_leases:
            self._copies.release(lease)
        try:
            session = self._session()
            if not session.owns(lease):
                return False
            one = _RELEASE_ONE.pack(1, lease - session.tag)  # cheaper than an array of one
            return session.ask(Connection.call, 0.0, _RELEASE, one) != b"\0"
        except StoreClosedError:
            return False
        except KVStoreError as error:
            self._outages.add_call(error)
            return False

    def fetch(self, hashes: BlockHashes, holders: Sequence[str], timeout: float) -> int:
        request = wire.Fetch(wire.pack_chain(hashes), checked_holders(holders), timeout)
        try:
            return int(self._call(request, timeout))
        except AWAY:  # counted
            self.require_open()
        except KVStoreError as error:  # the daemon has no peers: so nothing comes from them
            if not self._said_no_peers:
                self._said_no_peers = True
                _log.warning("%s: nothing comes from holders: %s", self._target.address, error)
        return 0

    def prefetch(self, hashes: BlockHashes, holders: Sequence[str] = ()) -> Future[TransferResult]:
        self.require_open()

        def fetch() -> TransferResult:
            if holders:
                self.fetch(hashes, holders, _PREFETCH_SECONDS)
            request = wire.Prefetch(wire.pack_chain(hashes), _PREFETCH_SECONDS)
            try:
                ready = int(self._call(request, _PREFETCH_SECONDS))
            except KVStoreError:  # counted
                ready = 0
            return TransferResult(ready, num_missed=len(hashes) - ready)

        return self._submit(fetch)

    # --- writing

    def reserve(self, hashes: BlockHashes, wait: float = 0.0) -> Reserved:
        try:
            session = self._session()
            if not session.welcome.may_map_writable:
                return self._copies.reserve(session, hashes, wait)
            arena = session.writable_arena()
            # Before it is asked: where the answer never comes, the slots may have been granted.
            session.has_written = True
            reservation, offsets, statuses = session.reserve(hashes, wait)
        except KVStoreError as error:
            self._missed(error)
            nothing = self._copies.nothing()
            statuses = np.full(len(hashes), UNAVAILABLE, np.uint8)
            offsets = np.zeros(len(hashes), np.uint64)
            return Reserved(0, statuses, offsets, nothing.arena, nothing.address)
        if reservation:
            reservation |= session.tag
        address = session.arena.writable_address
        return Reserved(reservation, statuses, offsets, arena, address, session.writers)

    def commit(
        self, reservation: int, checksums: Offsets, hashes: BlockHashes, ack: Ack
    ) -> Future[Ack] | None:
        if ack == ACK_LEVELS[0]:
            if reservation:
                self._commit(reservation, checksums, hashes, 0)
            return None
        level = ACK_LEVELS.index(ack)
        return self._submit(lambda: self._commit(reservation, checksums, hashes, level))

    def _commit(self, reservation: int, checksums: Offsets, hashes: BlockHashes, level: int) -> Ack:
        try:
            session = self._session()
            if reservation and not session.owns(reservation):
                raise PeerUnavailableError("the daemon went away before the commit")
            if reservation and not session.welcome.may_map_writable:
                reached = self._copies.write(session, reservation, level, checksums, hashes)
            else:
                reached = session.ask(
                    Connection.commit,
                    ACK_SECONDS if level else 0.0,
                    reservation and reservation - session.tag,
                    level,
                    checksums,
                    hashes.array,
                    hashes.start,
                    hashes.parent,
                )
        except KVStoreError as error:
            self._copies.forget(reservation)
            self._missed(error)
            if isinstance(error, AWAY):
                raise
            raise PeerUnavailableError(f"not stored: {error}") from error
        return ACK_LEVELS[reached]

    def abort(self, reservation: int) -> None:
        self._copies.forget(reservation)
        try:
            session = self._session()
            if reservation and session.owns(reservation):
                session.ask(Connection.abort, 0.0, reservation - session.tag)
        except StoreClosedError:
            pass
        except KVStoreError as error:
            self._outages.add_call(error)

    # --- removing and watching

    def remove(self, hashes: BlockHashes) -> int:
        return int(self._call(wire.Remove(wire.pack_chain(hashes))))

    def report_corrupt(self, block_hash: bytes) -> None:
        with contextlib.suppress(KVStoreError):  # the daemon itself checks what it finds
            self._call(wire.Corrupt(block_hash))

    def clear(self) -> None:
        self._call(wire.Clear())

    def flush(self, timeout: float) -> bool:
        return bool(self._call(wire.Flush(timeout), timeout))

    def events(self) -> Iterator[Event]:
        """See `kvstore.events`. Of what happened while the daemon was away nothing is known."""
        packed = self._call(wire.Events())
        return decode_events(packed, self.namespace.spec.block_tokens)

    def stats(self) -> dict[str, Any]:
        """The daemon's metrics and our own; while it is away, our own."""
        try:
            values = dict(self._call(wire.Stats()))
        except AWAY:
            values = {}
        for name, value in self._outages.snapshot().items():
            values[name] = values.get(name, 0) + value
        return values

    def close(self, timeout: float = 60.0) -> None:
        """End the session; waits at most `timeout` seconds for calls in the background."""
        if self._link.pid != process.pid:
            self._after_fork(connect=False)
        ending = threading.Thread(target=self._pool.shutdown, daemon=True)
        ending.start()
        ending.join(timeout)
        self._link.close()

    def _missed(self, error: KVStoreError) -> None:
        """A call ends as a miss or a refusal, whatever the daemon's reason: an engine's step must
        not fail for the cache. Not so once we are closed.
        """
        self.require_open()
        self._outages.add_call(error)

    def _ask(self, method: Callable[..., _Value], *arguments: Any) -> _Value:
        """Ask for what changes nothing."""
        session = self._session()
        began = time.monotonic()
        try:
            return session.ask(method, 0.0, *arguments)
        except PeerUnavailableError:
            fresh = self._fresh(session, began)
            if fresh is None:
                raise
        return fresh.ask(method, began - time.monotonic(), *arguments)

    def _fresh(self, session: Session, began: float) -> Session | None:
        """Return a session to ask again, where the old one turned out to be dead: its daemon was
        started anew while nobody asked it anything. None where it hung, where nobody listens now,
        or where too little of the time since `began` is left."""
        if not session.is_dead:
            return None
        return self._link.renewed(began + session.timeout / 2)

    def _session(self) -> Session:
        link = self._link
        session = link.session
        if session is None or link.pid != process.pid:  # else this is the hot path
            if link.pid != process.pid:
                link = self._after_fork()
            return link.current()
        return session

    def _after_fork(self, *, connect: bool = True) -> Link:
        """In a child: connect for ourselves. What the parent's sessions were granted stays its."""
        link = Link(self._target, self._timeout, self._outages)
        own = (link, self._make_pool(), self._make_copies())
        first = self._own.setdefault(link.pid, own)  # one thread's, where several come at once
        self._link, self._pool, self._copies = first
        if first is own and connect:
            link.connect_or_retry()
        return self._link

    def _make_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="kvstore-client")

    def _make_copies(self) -> Copies:
        size = self.namespace.spec.block_bytes
        return Copies(size, self._landing_bytes)

    def _call(self, request: wire.Call, wait: float = 0.0) -> Any:
        try:
            body = self._session().ask(Connection.call, wait, wire.Op.CALL, wire.encode(request))
        except AWAY as error:
            self._outages.add_call(error)
            raise
        return wire.decode_value(body)

    def _submit(self, work: Callable[[], _Value]) -> Future[_Value]:
        if self._link.pid != process.pid:  # a child has the pool, but not its threads
            self._after_fork()
        try:
            return self._pool.submit(work)
        except RuntimeError:  # it was shut down
            raise StoreClosedError("the store is closed") from None

"""Holders: the daemons that we fetch from.

    Holder      one daemon, by address: a breaker, threads of its own, a link to its endpoint
    PeerSession a client of that daemon that proved the peers' secret, for one tenant's namespace
    HeldBlocks  a holder as one flight sees it; see `kvstore.peers.sources.Source`

A holder that hangs holds up its own threads only, and each of them for one call's deadline; then
its breaker is open, and all calls fail at once until one attempt gets through. A daemon that was
started anew has other epochs: the session to the old one is dead, and with the new one comes a new
link.
"""

from __future__ import annotations

import itertools
import logging
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from kvstore import _native, wire
from kvstore._native import Connection
from kvstore.block import BlockHashes, Namespace
from kvstore.client.breaker import Breaker
from kvstore.client.handshake import Target
from kvstore.client.session import Session
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    KVStoreError,
    PeerUnavailableError,
)
from kvstore.peers.counts import FRAMES
from kvstore.peers.sources import Held, Read, U64s
from kvstore.peers.threads import Threads
from kvstore.transport import Batch, Endpoint, EndpointInfo, Link, Status
from kvstore.transport.types import all_of

log = logging.getLogger(__name__)

CALL_SECONDS = 1.0  # that a holder has to answer, on top of what it may wait for itself
SSD_SECONDS_MAX = 2.0  # that a holder may read from its ssd for one piece
LEASE_SECONDS = 30.0  # at most; whoever dies with leases holds slots there for so long
_HOLDERS_MAX = 64
_SESSIONS_MAX = 32  # of one holder: tenants' namespaces
_THREADS_MAX = 6  # of one holder
_QUEUED_MAX = 256
_LINK_PAUSE_SECONDS = 5.0  # before another try where no mover serves both ends
_PAUSE_FIRST, _PAUSE_LONGEST = 0.1, 2.0
_GIVEN_UP = (Status.LOST, Status.LATE, Status.CANCELLED)

_generations = itertools.count(1)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Means:
    """What all holders have in common."""

    endpoint: Endpoint
    secret: bytes  # the peers'
    secret_of: Callable[[bytes], bytes]  # epoch of a daemon -> secret of its endpoint
    movers: tuple[str, ...] | None  # None: as is best
    allow_frames: bool  # payload may come over the control connection
    threads: int  # that check what came so
    tls: ssl.SSLContext | None = None  # for holders at "tls:host:port"


class PeerSession:
    """See above. Thread-safe, as `Session` is.

    Raises:
        ConfigError: the holder has nothing of this namespace.
        KVStoreError: see `kvstore.client.handshake.dial`.
    """

    def __init__(self, target: Target) -> None:
        self._session = Session(target, CALL_SECONDS, next(_generations), None, self._lost)

    def _lost(self, session: Session, _error: KVStoreError) -> None:
        session.close()  # nobody writes into its slots: we only read there

    @property
    def welcome(self) -> wire.Welcome:
        return self._session.welcome

    @property
    def is_lost(self) -> bool:
        return self._session.is_lost

    def match(self, hashes: BlockHashes, seconds: float) -> int:
        wait = min(0.0, seconds - CALL_SECONDS)
        return self._session.ask(Connection.match, wait, hashes.array, hashes.start, hashes.parent)

    def acquire(self, hashes: BlockHashes, seconds: float) -> Held:
        wait = max(0.0, min(SSD_SECONDS_MAX, seconds / 2))
        lease, offsets, _, _, checksums = self._session.ask(
            Connection.acquire,
            min(wait, seconds - CALL_SECONDS),
            min(seconds + CALL_SECONDS, LEASE_SECONDS),
            wait,
            0,
            hashes.array,
            hashes.start,
            hashes.parent,
        )
        return Held(lease, offsets, checksums, self)

    def read(self, held: Held, first: int, addresses: U64s, size: int, seconds: float) -> None:
        self._session.ask(
            Connection.read, seconds - CALL_SECONDS, held.lease, first, addresses, size
        )

    def release(self, held: Held) -> None:
        if not self.is_lost:
            self._session.ask(Connection.release, 0.0, np.array([held.lease], np.uint64))

    def report_damaged(self, block_hash: bytes) -> None:
        body = wire.encode(wire.Corrupt(block_hash))
        self._session.ask(Connection.call, 0.0, wire.Op.CALL, body)

    def close(self) -> None:
        self._session.close()


class _Unsettled:
    """A link that was given up."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def settle(self, timeout: float) -> bool:
        return self._link.close(timeout)


class Holder:
    """See above. Thread-safe: `_lock` guards the breaker and `_sessions`, `_link_lock` the link."""

    def __init__(self, address: str, means: Means) -> None:
        self.address = address
        self.means = means
        self.threads = Threads(f"kvstore-peer-{address}", _THREADS_MAX, _QUEUED_MAX)
        self.bytes_per_second = 0.0
        self._lock = threading.Lock()
        self._dialling = threading.Lock()
        self._breaker = Breaker(time.monotonic, _PAUSE_FIRST, _PAUSE_LONGEST)
        self._sessions: OrderedDict[tuple[str, bytes], PeerSession] = OrderedDict()
        self._link_lock = threading.Lock()
        self._link: Link | None = None
        self._link_epoch = 0
        self._link_after = 0.0  # monotonic: no link is tried before
        self.why_no_link = ""

    @property
    def num_sessions(self) -> int:
        with self._lock:
            return sum(not session.is_lost for session in self._sessions.values())

    @property
    def mover(self) -> str:
        """By what bytes come from it; "" while that is not known."""
        link = self._link
        return link.mover if link is not None else FRAMES if self.why_no_link else ""

    # --- sessions

    def session(self, tenant: str, namespace: Namespace) -> PeerSession:
        """
        Raises:
            PeerUnavailableError: it failed lately; or see `PeerSession`.
        """
        key = (tenant, namespace.digest)
        found = self._known(key)
        if found is not None:
            return found
        with self._dialling:
            found = self._known(key)
            if found is not None:
                return found
            with self._lock:
                if self._breaker.is_open and not self._breaker.attempt():
                    raise PeerUnavailableError(f"{self.address}: it did not answer lately")
            try:
                made = PeerSession(
                    Target(
                        self.address,
                        namespace,
                        tenant,
                        self.means.secret,
                        is_peer=True,
                        tls=self.means.tls if self.address.startswith("tls:") else None,
                    )
                )
            except ConfigError:
                self._succeeded()  # it answered
                raise
            except (KVStoreError, ValueError, LookupError, TypeError) as error:
                self.failed()
                if isinstance(error, KVStoreError):
                    raise
                raise PeerUnavailableError(f"{self.address}: {error}") from error
            self._succeeded()
        with self._lock:
            self._sessions[key] = made
            least = None
            if len(self._sessions) > _SESSIONS_MAX:
                _, least = self._sessions.popitem(last=False)
        if least is not None:
            least.close()
        return made

    def _known(self, key: tuple[str, bytes]) -> PeerSession | None:
        with self._lock:
            found = self._sessions.get(key)
            if found is None:
                return None
            if found.is_lost:
                del self._sessions[key]
                return None
            self._sessions.move_to_end(key)
            return found

    def failed(self) -> None:
        with self._lock:
            self._breaker.failed()

    def _succeeded(self) -> None:
        with self._lock:
            if self._breaker.is_open:
                self._breaker.succeeded()

    # --- link

    def link(self, welcome: wire.Welcome, seconds: float) -> Link | None:
        """Return a link to the endpoint that a Welcome told of; None where there is none."""
        if not welcome.endpoint:
            self.why_no_link = "it offers no endpoint"
            return None
        with self._link_lock:
            link = self._link
            info = EndpointInfo.decode(welcome.endpoint)
            if link is not None and link.is_alive and link.peer.epoch == info.epoch:
                return link
            self._link = None
            if link is not None:
                link.close(0.0)
            if self._link_epoch == info.epoch and time.monotonic() < self._link_after:
                return None
            self._link_epoch = info.epoch
            means = self.means
            # The secret is not sent: whoever may know it can make it.
            info = msgspec.structs.replace(info, secret=means.secret_of(welcome.epoch))
            try:
                self._link = means.endpoint.connect(
                    info, movers=means.movers, timeout=max(0.05, min(seconds, CALL_SECONDS))
                )
                self.why_no_link = ""
                log.info("%s: by %s (%s)", self.address, self._link.mover, self._link.reason)
            except KVStoreError as error:
                self._link_after = time.monotonic() + _LINK_PAUSE_SECONDS
                self.why_no_link = str(error)
                log.warning("%s: no link: %s", self.address, error)
            return self._link

    def drop_link(self, link: Link) -> None:
        """It is of no use any more; the next read makes another."""
        with self._link_lock:
            if self._link is link:
                self._link = None

    def measured(self, num_bytes: int, seconds: float) -> None:
        speed = num_bytes / max(seconds, 1e-6)
        before = self.bytes_per_second
        self.bytes_per_second = speed if before == 0 else 0.7 * before + 0.3 * speed

    def close(self, timeout: float) -> bool:
        """Return whether nothing of it writes into our memory any more."""
        with self._lock:
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            session.close()
        ended = self.threads.close(timeout)
        with self._link_lock:
            link, self._link = self._link, None
        return (link is None or link.close(timeout)) and ended


class HeldBlocks:
    """See `kvstore.peers.sources.Source`."""

    def __init__(self, holder: Holder, tenant: str, namespace: Namespace) -> None:
        self._holder = holder
        self._tenant = tenant
        self._namespace = namespace
        self._block_bytes = namespace.spec.block_bytes

    @property
    def address(self) -> str:
        return self._holder.address

    @property
    def bytes_per_second(self) -> float:
        return self._holder.bytes_per_second

    def submit(self, step: Callable[[], None]) -> bool:
        return self._holder.threads.submit(step)

    def available(self, hashes: BlockHashes, seconds: float) -> int:
        try:
            session = self._holder.session(self._tenant, self._namespace)
        except ConfigError:
            return 0  # nothing of this namespace is there
        return self._ask(lambda: session.match(hashes, seconds))

    def acquire(self, hashes: BlockHashes, seconds: float) -> Held:
        session = self._holder.session(self._tenant, self._namespace)
        return self._ask(lambda: session.acquire(hashes, seconds))

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except (PeerUnavailableError, DeadlineExceededError):
            self._holder.failed()
            raise
        except (ValueError, LookupError, TypeError) as error:
            raise PeerUnavailableError(f"{self.address}: {error}") from error

    def read(self, held: Held, places: U64s, addresses: U64s, seconds: float) -> Read:
        assert isinstance(held.session, PeerSession)
        began = time.monotonic()
        try:
            link = self._holder.link(held.session.welcome, seconds)
        except KVStoreError as error:
            log.warning("%s: no link: %s", self.address, error)
            link = None
        left = max(0.0, seconds - (time.monotonic() - began))
        began = time.monotonic()
        if link is not None:
            read = self._read_by(link, held, places, addresses, left)
        elif self._holder.means.allow_frames:
            read = self._read_frames(held.session, held, places, addresses, left)
        else:
            return Read(all_of(Status.REFUSED, len(places)), FRAMES)
        num_whole = int(np.count_nonzero(read.statuses == Status.OK))
        if num_whole == len(places):
            self._holder.measured(num_whole * self._block_bytes, time.monotonic() - began)
        return read

    def _read_by(
        self, link: Link, held: Held, places: U64s, addresses: U64s, seconds: float
    ) -> Read:
        assert isinstance(held.session, PeerSession)
        batch = Batch(addresses, held.offsets[places], self._block_bytes, held.checksums[places])
        statuses = link.read(held.session.welcome.region, batch, timeout=seconds)
        given_up = bool(np.isin(statuses, _GIVEN_UP).any())
        if given_up:
            self._holder.failed()
        if given_up and link.settles_late:
            self._holder.drop_link(link)
            return Read(statuses, link.mover, _Unsettled(link))
        return Read(statuses, link.mover)

    def _read_frames(
        self, session: PeerSession, held: Held, places: U64s, addresses: U64s, seconds: float
    ) -> Read:
        """Over the control connection: one request for each run of places."""
        statuses = all_of(Status.LOST, len(places))
        deadline = time.monotonic() + seconds
        cuts = np.flatnonzero(np.diff(places.astype(np.int64)) != 1) + 1
        try:
            for run in np.split(np.arange(len(places)), cuts):
                left = max(0.001, deadline - time.monotonic())
                session.read(held, int(places[run[0]]), addresses[run], self._block_bytes, left)
                sums = np.empty(len(run), np.uint64)
                _native.checksum_blocks(
                    addresses[run], self._block_bytes, sums, self._holder.means.threads
                )
                is_whole = sums == held.checksums[places[run]]
                statuses[run] = np.where(is_whole, Status.OK, Status.DAMAGED)
        except DeadlineExceededError:
            self._holder.failed()
            statuses[statuses == Status.LOST] = Status.LATE
        except PeerUnavailableError:
            self._holder.failed()
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            log.warning("%s: read: %s", self.address, error)
            statuses[statuses == Status.LOST] = Status.REFUSED
        return Read(statuses, FRAMES)

    def release(self, held: Held) -> None:
        if not held.lease or not isinstance(held.session, PeerSession):
            return
        try:
            held.session.release(held)
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            log.debug("%s: a lease was not released: %s", self.address, error)

    def report_damaged(self, block_hash: bytes) -> None:
        try:
            session = self._holder.session(self._tenant, self._namespace)
            session.report_damaged(block_hash)
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            log.warning("%s: it was not told of a damaged block: %s", self.address, error)


class Holders:
    """All holders by address, the least recently used leave. Thread-safe."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._lock = threading.Lock()
        self._holders: OrderedDict[str, Holder] = OrderedDict()

    def get(self, address: str) -> Holder:
        left: Holder | None = None
        with self._lock:
            found = self._holders.get(address)
            if found is None:
                found = self._holders[address] = Holder(address, self._means)
                if len(self._holders) > _HOLDERS_MAX:
                    _, left = self._holders.popitem(last=False)
            self._holders.move_to_end(address)
        if left is not None:
            left.close(0.0)
        return found

    def list(self) -> list[Holder]:
        with self._lock:
            return list(self._holders.values())

    def close(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        with self._lock:
            holders = list(self._holders.values())
            self._holders.clear()
        ended = [holder.close(max(0.0, deadline - time.monotonic())) for holder in holders]
        return all(ended)

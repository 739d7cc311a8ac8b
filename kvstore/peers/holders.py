"""Holders: the daemons that we fetch from, by address: each with a breaker, threads of its own,
sessions, and a link to its endpoint.

A holder that hangs holds up its own threads only, and each of them for one call's deadline; then
its breaker is open, and all calls fail at once until one attempt gets through. A daemon that was
started anew has other epochs: the session to the old one is dead, and with the new one comes a new
link.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from kvstore import wire
from kvstore.block import Namespace
from kvstore.client.breaker import Breaker
from kvstore.client.handshake import Target
from kvstore.errors import ConfigError, KVStoreError, PeerUnavailableError
from kvstore.peers.counts import FRAMES
from kvstore.peers.session import CALL_SECONDS, PeerSession
from kvstore.peers.threads import Threads
from kvstore.transport import Endpoint, EndpointInfo, Link

log = logging.getLogger(__name__)

_HOLDERS_MAX = 64
_SESSIONS_MAX = 32  # of one holder: tenants' namespaces
_THREADS_MAX = 6  # of one holder
_QUEUED_MAX = 256
_LINK_PAUSE_SECONDS = 5.0  # before another try where no mover serves both ends
_PAUSE_FIRST, _PAUSE_LONGEST = 0.1, 2.0


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
        self._closed = False  # no session or link is made any more

    @property
    def num_sessions(self) -> int:
        with self._lock:
            return sum(not session.is_lost for session in self._sessions.values())

    def describe(self) -> dict[str, Any]:
        """For people, see `kvstore.status.HolderStatus`."""
        link, why_not = self._link, self.why_no_link
        with self._lock:
            is_away = self._breaker.is_open
        return {
            "address": self.address,
            "is_away": is_away,
            "sessions": self.num_sessions,
            "mover": link.mover if link is not None else FRAMES if why_not else "",
            "reason": link.reason if link is not None else why_not,
            "bytes_per_second": self.bytes_per_second,
        }

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
        self._keep(key, made)
        return made

    def _keep(self, key: tuple[str, bytes], made: PeerSession) -> None:
        out: PeerSession | None = None  # which is closed
        with self._lock:
            if self._closed:
                out = made
            else:
                self._sessions[key] = made
                if len(self._sessions) > _SESSIONS_MAX:
                    _, out = self._sessions.popitem(last=False)
        if out is not None:
            out.close()
        if out is made:
            raise PeerUnavailableError(f"{self.address}: it is not asked any more")

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
            if self._closed:
                return None
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
            self._closed = True
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            session.close()
        ended = self.threads.close(timeout)
        with self._link_lock:
            link, self._link = self._link, None
        return (link is None or link.close(timeout)) and ended


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

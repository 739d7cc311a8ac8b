"""Link: the way to a daemon that may go away and come back.

There is at most one session at a time. When it is lost, calls are refused at once, while one
background thread tries to connect again, by the word of a `Breaker`, and settles lost sessions: it
closes their anchors once nobody writes into their slots, and then tells a daemon that was started
anew (which kept those slots apart) so.

A connection that is refused for good (another version, another secret) is tried for on and on too,
but more seldom: whoever runs the daemon may put it right. Each reason is logged once.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref

from kvstore import wire
from kvstore._native import Connection
from kvstore.client.breaker import Breaker
from kvstore.client.handshake import Target
from kvstore.client.mapping import ArenaMap
from kvstore.client.session import Session
from kvstore.errors import (
    DeadlineExceededError,
    KVStoreError,
    PeerUnavailableError,
    StoreClosedError,
)
from kvstore.forks import PerProcess

AWAY = (PeerUnavailableError, DeadlineExceededError)

_log = logging.getLogger(__name__)
_REFUSED_SECONDS = 1.0  # between attempts where somebody answers, and refuses us
_SETTLE_SECONDS = 0.25  # the background thread sees this often whether the link was closed
_UNSETTLED_MAX = 64  # sessions that no daemon has been told of; of older ones it learns by our end

_generations = itertools.count(1)  # in a forked child they go on from the parent's


class _Process:
    """Which process this is, without a system call for each look; and its links."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.links: weakref.WeakSet[Link] = weakref.WeakSet()

    def forked(self) -> None:
        """In a child: drop the parent's connections, so that its end is seen when it ends."""
        self.pid = os.getpid()
        links, self.links = list(self.links), weakref.WeakSet()
        for link in links:
            link.abandon()


process = _Process()
os.register_at_fork(after_in_child=process.forked)


class _Counts:
    """`lock` guards the others."""

    __slots__ = ("deadline_exceeded", "lock", "reconnects", "unavailable_calls")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.unavailable_calls = 0  # answered by a miss, a refusal or an error
        self.deadline_exceeded = 0
        self.reconnects = 0


class Outages:
    """What a client counts itself. Thread-safe. A forked child counts its own."""

    def __init__(self) -> None:
        self._counts = PerProcess(_Counts)

    def add_call(self, error: Exception) -> None:
        counts = self._counts.here()
        with counts.lock:
            counts.unavailable_calls += 1
            counts.deadline_exceeded += isinstance(error, TimeoutError)

    def add_reconnect(self) -> None:
        counts = self._counts.here()
        with counts.lock:
            counts.reconnects += 1

    def snapshot(self) -> dict[str, int]:
        counts = self._counts.here()
        with counts.lock:
            return {
                "kvstore_unavailable_calls_total": counts.unavailable_calls,
                "kvstore_deadline_exceeded_total": counts.deadline_exceeded,
                "kvstore_reconnects_total": counts.reconnects,
            }


class Link:
    """See above.

    Thread safety: all methods may be called from any thread. `_lock` guards all fields; `session`
    is read without it.
    """

    def __init__(self, target: Target, timeout: float, outages: Outages) -> None:
        self.pid = process.pid
        self.session: Session | None = None
        self._target = target
        self._timeout = timeout
        self._outages = outages
        self._lock = threading.Lock()
        self._tried = threading.Condition(self._lock)  # an attempt ended, or the link was closed
        self._closing = threading.Event()
        self._breaker = Breaker(time.monotonic)
        self._unsettled: list[Session] = []
        self._thread: threading.Thread | None = None
        self._why = ""  # the daemon is away: of an error the words only, it holds on to a session
        self._refusal = ""  # the last that was logged
        self.last: Session | None = None  # whose arena may be the next one's too
        process.links.add(self)

    def connect(self) -> Session:
        """Make the first session.

        Raises:
            KVStoreError: see `kvstore.client.handshake.dial`.
        """
        session = Session(
            self._target, self._timeout, next(_generations), self._known_arena(), self._lost
        )
        with self._lock:
            if not self._closing.is_set() and not session.is_lost:
                self.session = self.last = session
                self._refusal = ""
                # Before anybody can use the session, and find it lost: that opens it again.
                self._breaker.succeeded()
                self._tried.notify_all()
                return session
        session.close()
        raise PeerUnavailableError(f"{self._target.address}: lost at once")

    def connect_if_there(self) -> None:
        """As `connect`, but where nobody answers, go on trying in the background."""
        try:
            self.connect()
        except AWAY as error:
            _log.warning("%s; without it, all is a miss until it answers", error)
            self._try_later(error)

    def connect_or_retry(self) -> None:
        """As `connect`, but go on trying in the background, whatever the reason."""
        try:
            self.connect()
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            self._try_later(error)

    def current(self) -> Session:
        """Return the session.

        Raises:
            PeerUnavailableError: there is none at present.
            StoreClosedError: the link was closed.
        """
        session = self.session
        if session is None:
            self.require_open()
            raise PeerUnavailableError(f"the daemon is away: {self._why}")
        return session

    def renewed(self, deadline: float) -> Session | None:
        """Return the session that follows one just lost, if it is had by `deadline` (monotonic
        clock); None once the first attempt has failed."""
        with self._tried:
            while self.session is None:
                left = deadline - time.monotonic()
                if left <= 0 or self._breaker.wait_seconds() > 0 or self._closing.is_set():
                    return None
                self._tried.wait(left)
            return self.session

    def require_open(self) -> None:
        if self._closing.is_set():
            raise StoreClosedError("the store is closed")

    def close(self) -> None:
        """End the session. REQUIRES: nobody writes into its slots."""
        with self._lock:
            self._closing.set()
            session, self.session = self.session, None
            unsettled, self._unsettled = self._unsettled, []
            thread = self._thread
            self._tried.notify_all()
        for ended in [session, *unsettled]:
            if ended is not None:
                ended.close()
        if thread is not None:
            thread.join(self._timeout)

    def abandon(self) -> None:
        """In a forked child: close what was inherited. The link is the parent's."""
        for session in [self.session, *self._unsettled]:
            if session is not None:
                session.abandon()

    def _known_arena(self) -> ArenaMap | None:
        return None if self.last is None else self.last.arena

    def _try_later(self, error: Exception) -> None:
        with self._lock:
            self._why = str(error)
            self._breaker.failed()
            self._start()

    def _lost(self, session: Session, error: KVStoreError) -> None:
        with self._lock:
            if not session.retire():
                return
            self._why = str(error)
            if self.session is session:
                self.session = None
            self._unsettled.append(session)
            self._breaker.failed()
            self._start()

    def _start(self) -> None:
        """Have a background thread. REQUIRES: `_lock` is held."""
        if self._thread is None and not self._closing.is_set():
            self._thread = threading.Thread(
                target=self._work, name="kvstore-reconnect", daemon=True
            )
            self._thread.start()

    def _work(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                unsettled = list(self._unsettled)
                if self.session is not None and not unsettled:
                    self._thread = None
                    return
            if self.session is None:
                self._try_to_connect()
            for session in unsettled:
                self._settle(session)

    def _try_to_connect(self) -> None:
        with self._lock:
            pause = self._breaker.wait_seconds()
        if pause > 0:
            self._closing.wait(min(pause, _SETTLE_SECONDS))
            return
        with self._lock:
            if not self._breaker.attempt():
                return
        try:
            self.connect()
        except Exception as error:  # noqa: BLE001  whatever it is, it shall not end the trying
            why = str(error)
            is_refused = not isinstance(error, AWAY)
            with self._lock:
                self._why = why
                self._breaker.failed(_REFUSED_SECONDS if is_refused else 0.0)
                self._tried.notify_all()
                is_new = is_refused and why != self._refusal and not self._closing.is_set()
                if is_new:
                    self._refusal = why
            if is_new:
                _log.warning("%s: refused: %s", self._target.address, why)
            return
        self._outages.add_reconnect()

    def _settle(self, ended: Session) -> None:
        if not ended.settle(_SETTLE_SECONDS):
            return
        session = self.session
        if session is None:
            with self._lock:
                del self._unsettled[:-_UNSETTLED_MAX]
            return
        if ended.has_written and ended.welcome.epoch != session.welcome.epoch:
            try:
                session.ask(
                    Connection.call, 0.0, wire.Op.QUIESCED, wire.pack_u64(ended.welcome.client)
                )
            except KVStoreError:
                if session.is_lost:
                    return  # the next one is told
        with self._lock:
            if ended in self._unsettled:
                self._unsettled.remove(ended)

"""Session: one generation of being connected to a daemon.

It begins with a Hello that makes a client in the daemon, and ends for good with the first call that
fails: what it was granted is then no longer ours. Its connections:

- the *anchor* carries no requests. While it is open the daemon knows that we live, and gives slots
  that we reserved to nobody else. It stays open until nobody here writes into such slots, also when
  the daemon hangs: it might wake up.
- the others are lent to one request each, so none waits for another; idle ones are kept.

Leases and reservations get the session's `tag` into their numbers, so that those of one session are
never taken for another's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvstore._native import Connection, ProtocolError, RemoteError
from kvstore.block import BlockHashes
from kvstore.client.handshake import Target, dial, error_of, unreachable
from kvstore.client.mapping import ArenaMap, Bytes
from kvstore.control import ORPHAN, Offsets, Terms
from kvstore.errors import (
    DeadlineExceededError,
    IncompatibleError,
    KVStoreError,
    PeerUnavailableError,
    StorageError,
)

_Answer = TypeVar("_Answer")
_IDLE_MAX = 64  # connections kept for later; more are open only while so many calls are under way
_TAG_SHIFT = 64  # above the daemon's own numbers


class Writers:
    """Counts those who write into slots of one session; see `kvstore.control.SlotWriters`.

    Thread-safe. A forked child maps the arena too, but its parent's slots are not its to write: the
    parent would not know when they may be given to others.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        self._count = 0
        self._closed = False

    def begin(self) -> bool:
        if os.getpid() != self._pid:
            return False
        with self._changed:
            if self._closed:
                return False
            self._count += 1
        return True

    def end(self) -> None:
        with self._changed:
            self._count -= 1
            if self._closed and self._count == 0:
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more; who is in goes on."""
        with self._changed:
            self._closed = True

    def wait_idle(self, timeout: float) -> bool:
        """Return whether nobody writes."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout)


class Session:
    """See above. Thread safety: all methods may be called from any thread.

    `_idle` is used without a lock: appending to and popping from a list are atomic.

    Raises:
        KVStoreError: see `kvstore.client.handshake.dial`.
    """

    def __init__(
        self,
        target: Target,
        timeout: float,
        generation: int,
        known_arena: ArenaMap | None,
        on_lost: Callable[[Session, KVStoreError], None],
    ) -> None:
        self._target = target
        self.timeout = timeout
        self.tag = generation << _TAG_SHIFT
        self.writers = Writers()
        self.is_lost = False
        self.is_dead = False  # lost since the other end was closed: it does not hang
        self.has_written = False  # asked for slots of a mapped arena, granted or not
        self._on_lost = on_lost
        self._lock = threading.Lock()  # guards _open and is_lost
        self._mapping = threading.Lock()  # so that the arena is mapped once
        self._idle: list[Connection] = []
        self._anchor, self.welcome = dial(target, b"", timeout)
        self._open = {self._anchor}
        try:
            welcome = self.welcome
            self.terms = Terms(welcome.verify_always, welcome.threads, welcome.lease_seconds)
            if known_arena is not None and known_arena.arena_id == welcome.arena_id:
                self.arena = known_arena
            else:
                self.arena = ArenaMap(welcome.arena_id, welcome.arena_bytes)
            if welcome.may_map and self.arena.readable is None:
                self._attach(False)
        except BaseException:
            self.close()
            raise

    def owns(self, number: int) -> bool:
        """Return whether a lease or reservation was granted in this session."""
        return number >> _TAG_SHIFT << _TAG_SHIFT == self.tag

    def ask(self, method: Callable[..., _Answer], wait: float, *arguments: Any) -> _Answer:
        """Call a method of `_native.Connection` on a connection of our own.

        Args:
            method: unbound, such as `Connection.match`.
            wait: seconds that the daemon may take over it, on top of `timeout`.
            arguments: all but its last, the timeout.

        Raises:
            PeerUnavailableError, DeadlineExceededError: no answer; the session is over.
            KVStoreError, ValueError, ...: the daemon's own refusal.
        """
        timeout = self.timeout + wait
        try:
            connection = self._idle.pop()
        except IndexError:
            began = time.monotonic()
            connection = self._join(min(timeout, self.timeout))
            timeout = max(timeout - (time.monotonic() - began), 0.001)
        try:
            answer = method(connection, *arguments, timeout)
        except RemoteError as error:
            self._give_back(connection)
            raise error_of(error) from None
        except (OSError, ProtocolError) as error:
            self._discard(connection)
            self.is_dead |= isinstance(error, OSError) and not isinstance(error, TimeoutError)
            raise self._lose(unreachable(error)) from error
        except BaseException as error:
            if connection.fileno() >= 0:  # an argument was refused: nothing was sent
                self._give_back(connection)
            else:  # a signal's handler raised; what the daemon granted we shall never know
                self._discard(connection)
                self._lose(PeerUnavailableError(f"interrupted: {error!r}"))
            raise
        self._idle.append(connection)  # as _give_back does, without a call: this is the hot path
        if self.is_lost or len(self._idle) > _IDLE_MAX:
            self._trim()
        return answer

    def reserve(
        self, hashes: BlockHashes, wait: float
    ) -> tuple[int, Offsets, npt.NDArray[np.uint8]]:
        """Ask for slots; return the reservation, their offsets, and a status for each hash.

        Raises:
            PeerUnavailableError: also where the reply makes no sense; the session is over.
        """
        reservation, offsets, statuses = self.ask(
            Connection.reserve, wait, wait, hashes.array, hashes.start, hashes.parent
        )
        if len(statuses) != len(hashes) or np.any(statuses > ORPHAN):
            raise self._lose(IncompatibleError("reserve: a reply of no such form"))
        return reservation, offsets, statuses

    def writable_arena(self) -> Bytes:
        """The arena mapped for writing; asked for at the first put."""
        array = self.arena.writable
        if array is not None:
            return array
        with self._mapping:
            return self._attach(True) if self.arena.writable is None else self.arena.writable

    def retire(self) -> bool:
        """End the session; return False when it was over already.

        The anchor stays open until `settle`.
        """
        with self._lock:
            if self.is_lost:
                return False
            self.is_lost = True
        self.writers.close()
        self._trim()
        return True

    def settle(self, timeout: float) -> bool:
        """Close the anchor once nobody writes into our slots; return whether that is so."""
        if not self.writers.wait_idle(timeout):
            return False
        self.close()
        return True

    def close(self) -> None:
        """Close all connections but those lent; these are closed as their calls return.

        REQUIRES: nobody writes into our slots.
        """
        self.retire()
        self._discard(self._anchor)

    def abandon(self) -> None:
        """In a forked child: close what was inherited, so that only the parent's ends remain."""
        for connection in [*self._idle, self._anchor]:
            connection.close()
            self._open.discard(connection)
        # The others were lent to threads that only the parent has. Closing one would shut it down,
        # the parent's end too.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for connection in self._open:
            if connection.fileno() >= 0:
                os.dup2(null, connection.fileno(), inheritable=False)
        os.close(null)

    def _attach(self, is_writable: bool) -> Bytes:
        fd, num_bytes = self.ask(Connection.map, 0.0, is_writable)
        if num_bytes != self.arena.num_bytes:
            os.close(fd)
            raise IncompatibleError(f"arena: {num_bytes} bytes, not {self.arena.num_bytes}")
        try:
            return self.arena.attach(fd, is_writable)
        except OSError as error:  # no memory for it here
            raise StorageError(error.errno or 0, f"arena: cannot be mapped: {error}") from error

    def _join(self, timeout: float) -> Connection:
        """Return one more connection of this client."""
        if self.is_lost:
            raise PeerUnavailableError(f"{self._target.address}: the session is over")
        try:
            connection, _ = dial(self._target, self.welcome.token, timeout)
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            self.is_dead |= not isinstance(error, DeadlineExceededError)
            raise self._lose(error) from error
        with self._lock:
            self._open.add(connection)
        return connection

    def _lose(self, error: Exception) -> KVStoreError:
        """Say that the session is over; return a new error that tells a caller so.

        A new one, since an error raised from itself is a cycle: it would keep its frames, so this
        session, so a dead daemon's arena, until the garbage is collected.
        """
        is_late = isinstance(error, DeadlineExceededError)
        lost = (DeadlineExceededError if is_late else PeerUnavailableError)(str(error))
        self._on_lost(self, lost)
        return lost

    def _give_back(self, connection: Connection) -> None:
        self._idle.append(connection)
        if self.is_lost or len(self._idle) > _IDLE_MAX:
            self._trim()

    def _trim(self) -> None:
        keep = 0 if self.is_lost else _IDLE_MAX
        while len(self._idle) > keep:
            try:
                self._discard(self._idle.pop())
            except IndexError:  # taken by another thread meanwhile
                return

    def _discard(self, connection: Connection) -> None:
        connection.close()
        with self._lock:
            self._open.discard(connection)

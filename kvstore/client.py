"""A store in another process of this host: decisions over a socket, bytes through shared memory."""

from __future__ import annotations

import builtins
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from kvstore import errors
from kvstore import wire1 as wire
from kvstore.address import unix_path
from kvstore.block import BlockHashes, Namespace
from kvstore.control import ACK_LEVELS, Ack, Granted, Offsets, Reserved
from kvstore.errors import DeadlineExceededError, KVStoreError, PeerUnavailableError
from kvstore.events import Event, decode_events
from kvstore.transfer import TransferResult

_Reply = TypeVar("_Reply", bound=wire.Message)
_SLACK_SECONDS = 5.0  # beyond what a request itself may take, before the daemon counts as hung


def _chain(hashes: BlockHashes) -> wire.Chain:
    return wire.Chain(hashes.array.tobytes(), hashes.start, hashes.parent)


def _u64(packed: bytes) -> Offsets:
    return np.frombuffer(packed, np.uint64)


class _Connections:
    """The connections of one client. Each request has one to itself, so none waits for another.

    One more, the session, carries no requests: while it is open the daemon knows that we live. A
    request that fails costs its connection; were that the last one, the daemon would give our
    reserved slots to others while another thread still writes to them.
    """

    def __init__(self, path: str, namespace: Namespace) -> None:
        self._path = path
        self._namespace = namespace
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._closed = False
        self._session, first, fd = self._connect(b"")
        self.welcome = first
        assert fd is not None
        try:
            self.arena = mmap.mmap(fd, first.arena_bytes, mmap.MAP_SHARED)
        finally:
            os.close(fd)

    @property
    def closed(self) -> bool:
        return self._closed

    def _connect(self, client: bytes) -> tuple[socket.socket, wire.Welcome, int | None]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_SLACK_SECONDS)
        try:
            connection.connect(self._path)
            wire.send(connection, wire.Hello(wire.VERSION, self._namespace.describe(), client))
            reply, fd = wire.receive_welcome(connection)
        except (OSError, KVStoreError) as error:
            connection.close()
            if isinstance(error, KVStoreError):
                raise
            raise PeerUnavailableError(f"unix:{self._path}: {error}") from error
        if not isinstance(reply, wire.Welcome):
            connection.close()
            raise _error_of(reply)
        return connection, reply, fd

    @contextmanager
    def one(self, timeout: float) -> Iterator[socket.socket]:
        """Lend a connection; it is given up when the request on it failed."""
        with self._lock:
            if self._closed:
                raise errors.StoreClosedError("the store is closed")
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection, _, _ = self._connect(self.welcome.client)
        connection.settimeout(timeout + _SLACK_SECONDS)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if self._closed:
                connection.close()
            else:
                self._idle.append(connection)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in [self._session, *idle]:
            connection.close()


def _error_of(reply: wire.Reply) -> Exception:
    """Return the exception that a Failure names; anything but a Failure is a protocol error."""
    if not isinstance(reply, wire.Failure):
        return errors.IncompatibleError(f"unexpected reply {type(reply).__name__}")
    kind = getattr(errors, reply.error, None) or getattr(builtins, reply.error, None)
    if isinstance(kind, type) and issubclass(kind, (KVStoreError, ValueError, LookupError)):
        return kind(reply.message)
    return KVStoreError(f"{reply.error}: {reply.message}")


class RemoteControl:
    """See `kvstore.control.Control`. Thread-safe.

    Raises:
        PeerUnavailableError: the daemon is not there, or went away. What it had reserved or leased
            for us is released by itself.
        DeadlineExceededError: it did not answer in time.
    """

    def __init__(self, address: str, namespace: Namespace) -> None:
        self._namespace = namespace
        self._connections = _Connections(str(unix_path(address)), namespace)
        self._arena = np.frombuffer(self._connections.arena, np.uint8)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="kvstore-client")

    @property
    def welcome(self) -> wire.Welcome:
        return self._connections.welcome

    @property
    def namespace(self) -> Namespace:
        return self._namespace

    @property
    def arena(self) -> npt.NDArray[np.uint8]:
        if self._connections.closed:  # leases and reservations ended with it: others' slots now
            raise errors.StoreClosedError("the store is closed")
        return self._arena

    def _ask(self, request: wire.Message, expected: type[_Reply], timeout: float = 0.0) -> _Reply:
        try:
            with self._connections.one(timeout) as connection:
                wire.send(connection, request)
                reply = wire.receive_reply(connection)
        except TimeoutError as error:
            raise DeadlineExceededError(f"no reply within {timeout + _SLACK_SECONDS} s") from error
        except OSError as error:
            raise PeerUnavailableError(f"the daemon is gone: {error}") from error
        if not isinstance(reply, expected):
            raise _error_of(reply)
        return reply

    def _value(self, request: wire.Message, timeout: float = 0.0) -> Any:
        return self._ask(request, wire.Value, timeout).value

    def match(self, hashes: BlockHashes) -> int:
        return int(self._value(wire.Match(_chain(hashes))))

    def residency(self, hashes: BlockHashes) -> npt.NDArray[np.uint8]:
        reply = self._ask(wire.Residency(_chain(hashes)), wire.Packed)
        return np.frombuffer(reply.data, np.uint8)

    def describe(self, hashes: BlockHashes) -> bytes:
        return self._ask(wire.Describe(_chain(hashes)), wire.Packed).data

    def wait_for(self, hashes: BlockHashes, want: int, timeout: float) -> int:
        return int(self._value(wire.WaitFor(_chain(hashes), want, timeout), timeout))

    def acquire(self, hashes: BlockHashes, ttl: float | None, timeout: float) -> Granted:
        grants = self._ask(wire.Acquire(_chain(hashes), ttl, timeout), wire.Grants, timeout)
        return Granted(
            grants.lease,
            _u64(grants.offsets),
            _u64(grants.header_offsets),
            _u64(grants.sequences),
            _u64(grants.checksums),
        )

    def release(self, lease: int) -> bool:
        if self._connections.closed:
            return False
        return bool(self._value(wire.Release(lease)))

    def reserve(self, hashes: BlockHashes) -> Reserved:
        slots = self._ask(wire.Reserve(_chain(hashes)), wire.Slots)
        statuses = np.frombuffer(slots.statuses, np.uint8)
        return Reserved(slots.reservation, statuses, _u64(slots.offsets))

    def commit(
        self, reservation: int, checksums: Offsets, hashes: BlockHashes, ack: Ack
    ) -> Future[Ack] | None:
        request = wire.Commit(reservation, checksums.tobytes(), _chain(hashes), ack)
        if ack == ACK_LEVELS[0]:
            self._value(request)
            return None
        return self._pool.submit(lambda: cast(Ack, self._value(request, 60.0)))

    def abort(self, reservation: int) -> None:
        self._value(wire.Abort(reservation))

    def prefetch(self, hashes: BlockHashes) -> Future[TransferResult]:
        def fetch() -> TransferResult:
            ready = int(self._value(wire.Prefetch(_chain(hashes)), 60.0))
            return TransferResult(ready, num_missed=len(hashes) - ready)

        try:
            return self._pool.submit(fetch)
        except RuntimeError:
            raise errors.StoreClosedError("the store is closed") from None

    def remove(self, hashes: BlockHashes) -> int:
        return int(self._value(wire.Remove(_chain(hashes))))

    def report_corrupt(self, block_hash: bytes) -> None:
        self._value(wire.Corrupt(block_hash))

    def clear(self) -> None:
        self._value(wire.Clear())

    def flush(self, timeout: float) -> bool:
        return bool(self._value(wire.Flush(timeout), timeout))

    def events(self) -> Iterator[Event]:
        packed = self._ask(wire.Events(), wire.Packed).data
        return decode_events(packed, self._namespace.spec.block_tokens)

    def stats(self) -> dict[str, Any]:
        return dict(self._value(wire.Stats()))

    def close(self, timeout: float = 60.0) -> None:
        self._pool.shutdown(wait=True)
        self._connections.close()

"""Serves the tiers of this process to other processes of this host.

One thread a connection: a request is small, a batch of thousands of hashes, and most of its time is
spent in the native core without the GIL. A client may open several connections; its leases and
reservations are released when the last of them closes, however it died.

Only the user who runs the server may connect: the socket's mode is 0600 and the peer's uid is
checked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kvstore import wire1 as wire
from kvstore.address import unix_path
from kvstore.block import BlockHashes, Namespace
from kvstore.control import ACK_LEVELS
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    IncompatibleError,
    InUseError,
    KVStoreError,
    PeerUnavailableError,
    StorageError,
)
from kvstore.tiers.local import LocalControl, Tiers

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
_ACCEPT_PAUSE_SECONDS = 0.05
_TIMEOUT_SECONDS_MAX = 3600.0


@dataclass(slots=True)
class _Client:
    control: LocalControl
    num_connections: int = 0


class Server:
    """A listening socket and a thread for each connection.

    Thread safety: `_lock` guards `_clients` and `_connections`.

    Raises:
        ConfigError: the address is wrong, or something else than a socket lies there.
        InUseError: another server listens there.
        StorageError: the socket cannot be made.
    """

    def __init__(self, tiers: Tiers, address: str) -> None:
        self._tiers = tiers
        self._path = unix_path(address)
        self._lock = threading.Lock()
        self._clients: dict[bytes, _Client] = {}
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._listener = _listen(self._path)
        self._acceptor = threading.Thread(target=self._accept, name="kvstore-accept", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> str:
        return f"unix:{self._path}"

    @property
    def num_clients(self) -> int:
        with self._lock:
            return len(self._clients)

    def close(self) -> None:
        """Disconnect everybody, release what they held, remove the socket. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            connections = list(self._connections)
            clients = list(self._clients.values())
        for client in clients:
            client.control.close()  # ends waits under way
        for connection in [self._listener, *connections]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for thread in self._threads:
            thread.join()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("accept: %s", error)
                time.sleep(_ACCEPT_PAUSE_SECONDS)  # out of descriptors: some client will leave
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="kvstore-connection", daemon=True
            )
            with self._lock:
                refused = self._closing or len(self._connections) >= CONNECTIONS_MAX
                if not refused:
                    self._connections.add(connection)
                    self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            if refused or _peer_uid(connection) != os.getuid():
                with self._lock:
                    self._connections.discard(connection)
                connection.close()
                continue
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        token = b""
        try:
            token = self._greet(connection)
            control = self._clients[token].control
            while (request := wire.receive_request(connection)) is not None:
                wire.send(connection, _answer(control, request))
        except IncompatibleError as error:
            with contextlib.suppress(OSError):
                wire.send(connection, wire.Failure(type(error).__name__, str(error)))
        except (OSError, KVStoreError) as error:
            log.debug("connection ended: %s", error)
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)
            self._leave(token)

    def _greet(self, connection: socket.socket) -> bytes:
        """Answer Hello; return the client's token.

        Raises:
            PeerUnavailableError: the peer went away, or was refused.
        """
        hello = wire.receive_request(connection)
        if hello is None:
            raise PeerUnavailableError("closed before Hello")
        if not isinstance(hello, wire.Hello) or hello.version != wire.VERSION:
            raise IncompatibleError(
                f"the daemon speaks protocol {wire.VERSION} and wants Hello first"
            )
        try:
            namespace = Namespace.from_description(hello.namespace)
            token = self._join(hello.client, namespace)
        except (KVStoreError, TypeError, KeyError) as error:
            kind = error if isinstance(error, KVStoreError) else ConfigError()
            wire.send(connection, wire.Failure(type(kind).__name__, f"namespace: {error}"))
            raise PeerUnavailableError("refused") from error
        config = self._tiers.config
        welcome = wire.Welcome(
            token,
            len(self._tiers.arena),
            config.verify == "always",
            config.threads,
            config.lease_seconds,
        )
        wire.send(connection, welcome, None if hello.client else self._tiers.core.arena_fd)
        return token

    def _join(self, token: bytes, namespace: Namespace) -> bytes:
        if not token:
            token = secrets.token_bytes(16)
            control = LocalControl(self._tiers, namespace, owns_tiers=False)
            with self._lock:
                self._clients[token] = _Client(control, 1)
            return token
        with self._lock:
            client = self._clients.get(token)
            if client is None or client.control.namespace.digest != namespace.digest:
                raise IncompatibleError("no such client")
            client.num_connections += 1
        return token

    def _leave(self, token: bytes) -> None:
        with self._lock:
            client = self._clients.get(token)
            if client is None:
                return
            client.num_connections -= 1
            if client.num_connections > 0:
                return
            del self._clients[token]
        client.control.close()


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            _remove_stale(path)
        listener.bind(str(path))
        os.chmod(path, 0o600)  # before listen: until then nobody can connect
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise StorageError(error.errno or 0, f"address: unix:{path}: {error.strerror}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    if not path.is_socket():
        raise ConfigError(f"address: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise InUseError(f"address: another process listens at unix:{path}")


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


# --- requests


def _answer(control: LocalControl, request: wire.Request) -> wire.Reply:
    handler = _HANDLERS.get(type(request))
    if handler is None:
        raise IncompatibleError("Hello again")
    try:
        return handler(control, request)
    except FutureTimeoutError:
        return wire.Failure(DeadlineExceededError.__name__, "the daemon's own deadline")
    except (KVStoreError, ValueError, LookupError, TypeError) as error:
        return wire.Failure(type(error).__name__, str(error))


def _hashes(chain: wire.Chain) -> BlockHashes:
    if len(chain.hashes) % 32 or (chain.parent is not None and len(chain.parent) != 32):
        raise ConfigError("hashes: not a multiple of 32 bytes")
    array = np.frombuffer(chain.hashes, np.uint8).reshape(-1, 32)
    if chain.start < 0:
        return BlockHashes.of(array)
    return BlockHashes.chain(array, chain.start, chain.parent)


def _timeout(seconds: float) -> float:
    return min(max(seconds, 0.0), _TIMEOUT_SECONDS_MAX)


def _acquire(control: LocalControl, request: wire.Acquire) -> wire.Reply:
    granted = control.acquire(_hashes(request.chain), request.ttl, _timeout(request.timeout))
    return wire.Grants(
        granted.lease,
        granted.offsets.tobytes(),
        granted.header_offsets.tobytes(),
        granted.sequences.tobytes(),
        granted.checksums.tobytes(),
    )


def _reserve(control: LocalControl, request: wire.Reserve) -> wire.Reply:
    slots = control.reserve(_hashes(request.chain))
    return wire.Slots(slots.reservation, slots.statuses.tobytes(), slots.offsets.tobytes())


def _commit(control: LocalControl, request: wire.Commit) -> wire.Reply:
    if request.ack not in ACK_LEVELS or len(request.checksums) % 8:
        raise ConfigError(f"ack: {request.ack!r}, {len(request.checksums)} bytes of checksums")
    sums = np.frombuffer(request.checksums, np.uint64)
    ack = ACK_LEVELS[ACK_LEVELS.index(request.ack)]
    level = control.commit(request.reservation, sums, _hashes(request.chain), ack)
    return wire.Value("memory" if level is None else level.result(60.0))


def _value(ask: Callable[[LocalControl, Any], Any]) -> Callable[[LocalControl, Any], wire.Reply]:
    return lambda control, request: wire.Value(ask(control, request))


_HANDLERS: dict[type, Callable[[LocalControl, Any], wire.Reply]] = {
    wire.Acquire: _acquire,
    wire.Reserve: _reserve,
    wire.Commit: _commit,
    wire.Events: lambda c, _: wire.Packed(c.packed_events()),
    wire.Match: _value(lambda c, r: c.match(_hashes(r.chain))),
    wire.Residency: lambda c, r: wire.Packed(c.residency(_hashes(r.chain)).tobytes()),
    wire.Describe: lambda c, r: wire.Packed(c.describe(_hashes(r.chain))),
    wire.WaitFor: _value(lambda c, r: c.wait_for(_hashes(r.chain), r.want, _timeout(r.timeout))),
    wire.Release: _value(lambda c, r: c.release(r.lease)),
    wire.Abort: _value(lambda c, r: c.abort(r.reservation)),
    wire.Prefetch: _value(lambda c, r: c.prefetch(_hashes(r.chain)).result(60.0).num_blocks),
    wire.Remove: _value(lambda c, r: c.remove(_hashes(r.chain))),
    wire.Corrupt: _value(lambda c, r: c.report_corrupt(r.block_hash)),
    wire.Clear: _value(lambda c, r: c.clear()),
    wire.Flush: _value(lambda c, r: c.flush(_timeout(r.timeout))),
    wire.Stats: _value(lambda c, r: c.stats()),
}

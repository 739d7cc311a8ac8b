"""A TCP port that speaks TLS: each connection has a thread here, which encrypts, and reaches the
native server as one end of a socket pair."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable

from kvstore import _native, wire
from kvstore.daemon.sockets import address_of
from kvstore.errors import IncompatibleError
from kvstore.relay import Relay, drain
from kvstore.tls import configure, handshake, wait_for, wrap

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256  # each is a thread and its buffers
_HANDSHAKE_SECONDS = 10.0
_REFUSAL_SECONDS = 2.0  # for a peer to take why it was refused
_ACCEPT_PAUSE_SECONDS = 0.1  # out of descriptors or memory
_HANDSHAKE_RECORD = b"\x16"  # the first byte of TLS
_HEADER_BYTES = 16


class TlsPort:
    """Use `start`, then `close`. `serve` takes the descriptor of a connection, decrypted; False
    ends it. Thread-safe."""

    def __init__(
        self, listener: socket.socket, context: ssl.SSLContext, serve: Callable[[int], bool]
    ) -> None:
        self.address = address_of(listener, is_tls=True)
        self._listener = listener
        self._context = context
        self._serve = serve
        self._lock = threading.Lock()  # guards _open
        self._open: dict[socket.socket, threading.Thread] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="kvstore-tls", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Take no more connections, and end those there are. Safe to call twice."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        deadline = time.monotonic() + timeout
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._listener.close()
        with self._lock:
            threads = dict(self._open)
        for connection in threads:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except ConnectionError:
                continue
            except OSError:  # or it was closed
                self._closing.wait(_ACCEPT_PAUSE_SECONDS)
                continue
            thread = threading.Thread(
                target=self._take, args=(connection,), name="kvstore-tls-peer", daemon=True
            )
            with self._lock:
                is_one_too_many = len(self._open) >= CONNECTIONS_MAX or self._closing.is_set()
                if not is_one_too_many:
                    self._open[connection] = thread
            if is_one_too_many:
                connection.close()
                continue
            thread.start()

    def _take(self, connection: socket.socket) -> None:
        try:
            self._secure(connection)
        except TimeoutError:
            pass  # it said nothing: a probe, or too slow
        except OSError as error:
            log.info("tls: a connection was refused: %s", getattr(error, "reason", None) or error)
        except Exception:
            log.exception("tls: a connection failed")
        finally:
            with self._lock:
                self._open.pop(connection, None)
            connection.close()

    def _secure(self, connection: socket.socket) -> None:
        deadline = time.monotonic() + _HANDSHAKE_SECONDS
        configure(connection)
        connection.setblocking(False)
        wait_for(connection, select.POLLIN, deadline)
        first = connection.recv(1, socket.MSG_PEEK)
        if first != _HANDSHAKE_RECORD:
            if first:
                self._refuse(connection, deadline)
            return
        # A descriptor of its own: ours stays valid for `close`.
        secure = wrap(connection.dup(), self._context)
        try:
            handshake(secure, deadline)
        except OSError:
            drain(connection, _REFUSAL_SECONDS)  # else it might lose what OpenSSL told it
            secure.close()
            raise
        relay = Relay(secure, "")
        if self._serve(relay.take_plain_end()):
            relay.run()
        else:
            relay.close()

    def _refuse(self, connection: socket.socket, deadline: float) -> None:
        """Tell a client that does not encrypt why it is not served, in words that it knows."""
        header = b""
        while len(header) < _HEADER_BYTES:
            wait_for(connection, select.POLLIN, deadline)
            some = connection.recv(_HEADER_BYTES - len(header))
            if not some:
                return
            header += some
        error = IncompatibleError("this port speaks TLS: its address is of the form tls:host:port")
        frame = _native.refusal(header, wire.status_of(error), str(error).encode())
        if frame is not None:
            connection.send(frame)
            drain(connection, _REFUSAL_SECONDS)

"""TLS of the control channel: connections that are encrypted.

The protocol's own code knows nothing of it: it speaks through a socket pair to a `Relay`, which
encrypts. Both ends are ours, so only TLS 1.3 is spoken.
"""

from __future__ import annotations

import select
import socket
import ssl
import time

from kvstore._native import Connection
from kvstore.address import tcp_address
from kvstore.certificates import why
from kvstore.errors import DeadlineExceededError, IncompatibleError, PeerUnavailableError
from kvstore.relay import Relay

# As for plain connections, see csrc/net/socket.cc.
_SOCKET_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)


def dial(
    address: str, context: ssl.SSLContext, server_name: str, timeout: float
) -> tuple[Connection, Relay]:
    """Return a connection to "tls:host:port", which is encrypted beyond this process.

    Raises:
        PeerUnavailableError, DeadlineExceededError: nobody there, or no answer.
        IncompatibleError: no TLS there, or no certificate that we trust.
    """
    deadline = time.monotonic() + timeout
    host, port = tcp_address(address)
    try:
        plain = socket.create_connection((host, port), timeout)
    except TimeoutError as error:
        raise DeadlineExceededError(f"{address}: no connection within {timeout} s") from error
    except OSError as error:
        raise PeerUnavailableError(f"{address}: {error.strerror or error}") from error
    secure: socket.socket = plain
    try:
        configure(plain)
        secure = wrapped = wrap(plain, context, server_name=server_name or host)
        handshake(wrapped, deadline)
        relay = Relay(wrapped, f"kvstore-tls-{address}")
    except BaseException as error:
        secure.close()
        if isinstance(error, TimeoutError):
            raise DeadlineExceededError(f"{address}: no TLS within {timeout} s") from error
        if isinstance(error, ssl.SSLCertVerificationError):
            raise IncompatibleError(f"{address}: its certificate: {why(error)}") from error
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            raise IncompatibleError(f"{address}: {why(error)}") from error
        if isinstance(error, OSError):
            raise PeerUnavailableError(
                f"{address}: it closed the connection instead of speaking TLS; is it a tcp: port?"
            ) from error
        raise
    connection = Connection.over(relay.take_plain_end(), address)
    relay.start()
    return connection, relay


def configure(connection: socket.socket) -> None:
    for level, option, value in _SOCKET_OPTIONS:
        connection.setsockopt(level, option, value)


def wrap(
    connection: socket.socket, context: ssl.SSLContext, server_name: str | None = None
) -> ssl.SSLSocket:
    """Return the TLS end over a socket, before its handshake. The socket is its own from now on."""
    return context.wrap_socket(
        connection,
        server_side=server_name is None,
        server_hostname=server_name,
        do_handshake_on_connect=False,
        suppress_ragged_eofs=False,  # an end that nobody announced is a loss
    )


def handshake(secure: ssl.SSLSocket, deadline: float) -> None:
    """Shake hands until `deadline` (monotonic clock), however slowly bytes come.

    Raises:
        TimeoutError, OSError, ssl.SSLError.
    """
    secure.setblocking(False)
    while True:
        try:
            secure.do_handshake()
            return
        except ssl.SSLWantReadError:
            wait_for(secure, select.POLLIN, deadline)
        except ssl.SSLWantWriteError:
            wait_for(secure, select.POLLOUT, deadline)


def wait_for(connection: socket.socket, event: int, deadline: float) -> None:
    """
    Raises:
        TimeoutError: nothing came.
    """
    poller = select.poll()
    poller.register(connection, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError

"""Sockets that the daemon listens on."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from kvstore.errors import ConfigError, InUseError, StorageError

_BACKLOG = 128


def listen_unix(path: Path, mode: int = 0o600) -> socket.socket:
    """Listen on a Unix socket; a stale one that nobody listens on is removed.

    Raises:
        ConfigError: something else than a socket lies there.
        InUseError: somebody listens there.
        StorageError: the socket cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_symlink() or path.exists():
            _remove_stale(path)
        listener.bind(str(path))
        os.chmod(path, mode)  # before listen: until then nobody can connect
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StorageError(error.errno or 0, f"address: unix:{path}: {error.strerror}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    if path.is_symlink() or not path.is_socket():
        raise ConfigError(f"address: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except (TimeoutError, BlockingIOError):
            pass  # its queue is full: it lives, or is stopped
    raise InUseError(f"address: another process listens at unix:{path}")


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on a TCP port; port 0 takes a free one.

    Raises:
        ConfigError: no such host.
        InUseError: the port is taken.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"tcp: {host}: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InUseError(f"tcp: {host}:{port}: {error.strerror}") from error
    return listener


def address_of(listener: socket.socket, *, is_tls: bool = False) -> str:
    """Return "unix:/path", "tcp:host:port" or "tls:host:port"."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{'tls' if is_tls else 'tcp'}:{host}:{name[1]}"


def unlink_socket(address: str) -> None:
    if address.startswith("unix:"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.removeprefix("unix:"))

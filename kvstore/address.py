"""Where a daemon listens."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from kvstore.errors import ConfigError

_SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path less its terminator


def unix_path(address: str) -> Path:
    """Return the path of "unix:/path/to.sock".

    Raises:
        ConfigError: another kind of address, or a path that a socket cannot have.
    """
    kind, _, path = address.partition(":")
    if kind != "unix" or not path:
        raise ConfigError(f"address: {address!r} is not of the form unix:/path/to.sock")
    if len(path.encode()) > _SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"address: {path} is longer than the {_SOCKET_PATH_BYTES_MAX} bytes of a socket's path"
        )
    return Path(path)


def tcp_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port"; an IPv6 host stands in brackets.

    Raises:
        ConfigError: no such form, or no such port.
    """
    host, colon, port = address.removeprefix("tcp:").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"address: {address!r} is not of the form host:port")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

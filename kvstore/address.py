"""Where a daemon listens."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from kvstore.errors import ConfigError

_SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path less its terminator
HOLDERS_MAX = 16  # daemons that one fetch may name


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
    host, colon, port = address.removeprefix("tcp:").removeprefix("tls:").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"address: {address!r} is not of the form host:port")
    return host, int(port)


def checked_holders(holders: Sequence[str]) -> list[str]:
    """Return addresses of daemons, each once, in the order given.

    Raises:
        ConfigError: one is no address, or there are more than HOLDERS_MAX.
    """
    if isinstance(holders, str):
        raise ConfigError(f"holders: {holders!r} is not a list of addresses")
    found = list(dict.fromkeys(holders))
    if len(found) > HOLDERS_MAX:
        raise ConfigError(f"holders: {len(found)} are too many; {HOLDERS_MAX} can be asked at once")
    for address in found:
        kind = str(address).partition(":")[0]
        try:
            if kind in ("tcp", "tls"):
                tcp_address(address)
            else:
                unix_path(address)
        except (ConfigError, AttributeError) as error:
            raise ConfigError(
                f"holders: {address!r} is not tcp:host:port, tls:host:port or unix:/path.sock"
            ) from error
    return found


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

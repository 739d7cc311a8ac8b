"""Where a daemon listens."""

from __future__ import annotations

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

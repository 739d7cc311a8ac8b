"""SharedMemory: memory that processes of one user on this host can map."""

from __future__ import annotations

import fcntl
import os

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import ConfigError, OutOfSpaceError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """A memfd of a fixed size, allocated at once: a file that could shrink, or for which there is
    no memory, would kill whoever touches it.

    `array` has all of its bytes; memory stays mapped as long as a view of it is in use.

    Raises:
        ConfigError: num_bytes is not positive.
        OutOfSpaceError: there is no room.
    """

    __slots__ = ("address", "array", "fd", "num_bytes")

    def __init__(self, num_bytes: int, name: str = "kvstore") -> None:
        if num_bytes <= 0:
            raise ConfigError(f"num_bytes: {num_bytes} is not positive")
        self.num_bytes = num_bytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self.array: npt.NDArray[np.uint8] = _native.map_shared(self.fd, num_bytes, True)
        except OSError as error:
            os.close(self.fd)
            raise OutOfSpaceError(f"shared memory of {num_bytes} bytes: {error}") from error
        self.address: int = self.array.ctypes.data

    def close(self) -> None:
        """Close the descriptor; peers that did not map it yet cannot any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)

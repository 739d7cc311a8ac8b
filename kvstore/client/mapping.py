"""ArenaMap: a daemon's arena in this process.

Mapped once read-only, for loads: a stray write through it is a fault, not another engine's wrong
bytes. Mapped a second time, writable, from the first put on. Never unmapped while an array of it is
referenced, so what a lease's views show stays there, whatever becomes of the daemon.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import IncompatibleError

Bytes = npt.NDArray[np.uint8]


class ArenaMap:
    """One arena, by its id. Thread safety: none for `attach`; what is set stays."""

    __slots__ = ("address", "arena_id", "num_bytes", "readable", "writable", "writable_address")

    def __init__(self, arena_id: bytes, num_bytes: int) -> None:
        self.arena_id = arena_id
        self.num_bytes = num_bytes
        self.readable: Bytes | None = None
        self.address = 0
        self.writable: Bytes | None = None
        self.writable_address = 0

    def attach(self, fd: int, is_writable: bool) -> Bytes:
        """Map a descriptor that the daemon sent, and close it.

        Raises:
            IncompatibleError: it is shorter than the daemon says: touching the end would kill us.
            OSError: it cannot be mapped.
        """
        try:
            size = os.fstat(fd).st_size
            if size < self.num_bytes:
                raise IncompatibleError(f"arena: {size} bytes, not the {self.num_bytes} promised")
            # With 4 KiB pages, first reads and TLB misses would cost more than the copy's own time.
            array = _native.map_shared(fd, self.num_bytes, is_writable)
        finally:
            os.close(fd)
        if is_writable:
            self.writable_address = array.ctypes.data
            self.writable = array
        else:
            self.address = array.ctypes.data
            self.readable = array
        return array

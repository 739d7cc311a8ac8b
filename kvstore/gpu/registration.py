"""Host memory that a GPU reaches directly: registered, so pinned, with the driver of this process.

Each process registers the mapping of its own; the arena's bytes are then copied to and from GPUs
without a staging copy. Registering takes about 0.1 s for a GiB, and holds locks of the driver
meanwhile; so it is done in chunks, of which none is so long that drivers refuse it (512 GiB fail).
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError, GpuError
from kvstore.gpu.device import Addresses, Device

CHUNK_BYTES: Final = 64 << 30

Bytes = npt.NDArray[np.uint8]


class HostRegistration:
    """Thread safety: `require` from any thread; `close` once, when no copy is under way.

    Keeps the memory referenced, so mapped, while it is registered.
    """

    def __init__(
        self,
        device: Device,
        memory: Bytes,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """
        Args:
            device: any of the process: registered memory serves them all.
            memory: contiguous; read-only if the array says so.
            chunk_bytes: that are registered by one call.

        Raises:
            ConfigError: the memory is not contiguous.
            GpuError: the driver refuses; nothing is registered then.
        """
        if not memory.flags.c_contiguous or memory.nbytes == 0:
            raise ConfigError("memory: need a contiguous array with bytes in it")
        self._device = device
        self._memory: Bytes | None = memory
        self.address = int(memory.ctypes.data)
        self.num_bytes = memory.nbytes
        self.read_only = not memory.flags.writeable
        self._chunks: list[int] = []
        self._chunk_bytes = chunk_bytes
        try:
            for begin in range(0, self.num_bytes, chunk_bytes):
                size = min(chunk_bytes, self.num_bytes - begin)
                device.register(self.address + begin, size, read_only=self.read_only)
                self._chunks.append(self.address + begin)
        except GpuError as error:
            registered = len(self._chunks)
            self.close()
            raise GpuError(
                f"memory: {self.num_bytes} bytes at {self.address:#x} cannot be registered"
                f" (chunk {registered}): {error}"
            ) from error

    def require(self, addresses: Addresses, num_bytes: int) -> None:
        """
        Raises:
            ConfigError: blocks of `num_bytes` at `addresses` are not all within this memory.
        """
        if len(addresses) == 0:
            return
        first, last = int(addresses.min()), int(addresses.max())
        if first < self.address or last + num_bytes > self.address + self.num_bytes:
            raise ConfigError(f"addresses: not all within the memory at {self.address:#x}")
        if not self._chunks:
            raise ConfigError(f"addresses: the memory at {self.address:#x} is registered no more")

    def cut(
        self, ours: Addresses, theirs: Addresses, sizes: Addresses
    ) -> tuple[Addresses, Addresses, Addresses]:
        """Return the pieces so that none spans two chunks, which no single copy may.

        `ours` are in this memory. REQUIRES: no piece is longer than a chunk.
        """
        if self.num_bytes <= self._chunk_bytes:
            return ours, theirs, sizes
        room = np.uint64(self._chunk_bytes) - (ours - np.uint64(self.address)) % np.uint64(
            self._chunk_bytes
        )
        spans = sizes > room
        first = np.where(spans, room, sizes)
        rest = room[spans]
        return (
            np.concatenate((ours, ours[spans] + rest)),
            np.concatenate((theirs, theirs[spans] + rest)),
            np.concatenate((first, sizes[spans] - rest)),
        )

    def close(self) -> None:
        """REQUIRES: nothing under way uses the memory."""
        chunks, self._chunks = self._chunks, []
        for address in chunks:
            # What cannot be unregistered ends with the process; there is nothing else to do.
            with suppress(GpuError):
                self._device.unregister(address)
        self._memory = None


class Registrations:
    """The arenas that a process has mapped, each registered when it is first met.

    A client maps an arena twice, to read and to write, and another one when its daemon was started
    anew. Thread-safe.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._by_address: dict[int, HostRegistration] = {}

    def of(self, memory: Bytes) -> HostRegistration:
        """
        Raises:
            GpuError: it cannot be registered.
        """
        address = int(memory.ctypes.data)
        with self._lock:
            found = self._by_address.get(address)
            if found is None or found.num_bytes != memory.nbytes:
                found = HostRegistration(self._device, memory)
                self._by_address[address] = found
            return found

    def close(self) -> None:
        """REQUIRES: nothing under way uses them."""
        with self._lock:
            found, self._by_address = self._by_address, {}
        for registration in found.values():
            registration.close()

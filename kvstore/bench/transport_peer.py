"""Our own ways to move bytes, and memcpy, as peers of `kvstore.bench.ends`.

    python -m kvstore.bench.transport_peer serve|read

Options: `way`: "memcpy" (with `threads`), or a mover's name with `address`, where it listens,
`verified`: whether checksums are, and further `settings` of the endpoint.
"""

from __future__ import annotations

import base64
import ctypes
import sys
from typing import Any

import msgspec
import numpy as np

from kvstore import _native
from kvstore.bench.ends import AbsentError, Bytes, main, page_aligned
from kvstore.errors import KVStoreError
from kvstore.transport import (
    Batch,
    Endpoint,
    EndpointInfo,
    Link,
    SharedMemory,
    Status,
    TransportSettings,
)

_TIMEOUT = 20.0


class _Hello(msgspec.Struct):
    info: bytes
    checksums: dict[int, list[int]]  # of every block of each size that is asked for


class Peer:
    """See `kvstore.bench.ends.Peer`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._way: str = options["way"]
        self._reads = options["role"] == "read"
        self._verified: bool = options.get("verified", False)
        self._sizes: list[int] = options["sizes"]
        self._threads: int = options.get("threads", 1)
        self._source: str = options["source"]
        self._link: Link | None = None
        self.version = "one thread" if self._threads == 1 else f"{self._threads} threads"
        if self._way == "memcpy":
            return
        settings = TransportSettings(
            listen=options["address"], movers=(self._way,), **options.get("settings", {})
        )
        try:
            self._endpoint = Endpoint(settings, secret=bytes.fromhex(options["secret"]))
        except (KVStoreError, ModuleNotFoundError) as error:
            raise AbsentError(str(error)) from error

    def memory(self, num_bytes: int) -> Bytes:
        """Shared where it is served, and as an engine's own where it is read into."""
        if self._way != "shm" or self._reads:
            return page_aligned(num_bytes)
        self._shared = SharedMemory(num_bytes)
        self._shared.array[:] = 1
        return self._shared.array

    def serve(self, memory: Bytes) -> str:
        self._endpoint.register(self._shared if self._way == "shm" else memory)
        checksums = {size: _checksums(memory, size) for size in self._sizes if self._verified}
        hello = _Hello(self._endpoint.info().encode(), checksums)
        return base64.b64encode(msgspec.msgpack.encode(hello)).decode()

    def connect(self, hello: str, memory: Bytes) -> None:
        self._target = memory.ctypes.data
        if self._way == "memcpy":
            self._from = page_aligned(len(np.memmap(self._source, np.uint8, "r")))
            self._from[:] = np.memmap(self._source, np.uint8, "r")
            return
        said = msgspec.msgpack.decode(base64.b64decode(hello), type=_Hello)
        peer = EndpointInfo.decode(said.info)
        self._checksums = {size: np.array(s, np.uint64) for size, s in said.checksums.items()}
        if self._way != "shm":
            self._endpoint.register((memory.ctypes.data, memory.nbytes), writable=True)
        try:
            self._link = self._endpoint.connect(peer, movers=(self._way,), timeout=_TIMEOUT)
        except KVStoreError as error:
            raise AbsentError(str(error)) from error
        self._region = peer.regions[0].region_id
        checked = "checksums verified on arrival" if self._verified else "nothing verified"
        self.version = f"{self._link.detail}; {checked}"

    def read(self, offset: int, at: int, size: int, batch: int) -> None:
        if self._link is None:
            self._copy(offset, at, size, batch)
            return
        steps = np.arange(0, batch * size, size, dtype=np.uint64)
        first = offset // size
        sums = self._checksums[size][first : first + batch] if self._verified else None
        pieces = Batch(steps + np.uint64(self._target + at), steps + np.uint64(offset), size, sums)
        statuses = self._link.read(self._region, pieces, timeout=_TIMEOUT)
        if statuses.any():
            bad = Status(int(statuses[statuses.nonzero()][0]))
            raise RuntimeError(f"{np.count_nonzero(statuses)} of {batch} pieces: {bad.name}")

    def _copy(self, offset: int, at: int, size: int, batch: int) -> None:
        """By the C library, block for block; or shared among threads."""
        into, source = self._target + at, self._from.ctypes.data + offset
        if self._threads == 1:
            for step in range(0, size * batch, size):
                ctypes.memmove(into + step, source + step, size)
            return
        steps = np.arange(0, batch * size, size, dtype=np.uint64)
        lengths = np.full(batch, size, np.uint64)
        _native.move_pieces(
            steps + np.uint64(into),
            steps + np.uint64(source),
            lengths,
            None,
            self._threads,
            _TIMEOUT,
        )


def _checksums(memory: Bytes, size: int) -> list[int]:
    starts = range(0, len(memory) - size + 1, size)
    addresses = np.arange(len(starts), dtype=np.uint64) * np.uint64(size)
    sums = np.empty(len(starts), np.uint64)
    _native.checksum_blocks(addresses + np.uint64(memory.ctypes.data), size, sums)
    return [int(value) for value in sums]


if __name__ == "__main__":
    main(lambda: Peer, sys.argv[1])

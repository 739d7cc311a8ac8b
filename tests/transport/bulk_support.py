"""What tests of the bulk server and its links share: a server here, calls, raw frames."""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvstore import _native
from kvstore.transport import Status

SECRET = b"a secret that is long enough"
EPOCH = 77
REGION, READ_ONLY = 7, 8
SIZE = 1 << 20
BOUND_S = 20.0  # nothing passes by it
SLACK_S = 3.0
HEADER = struct.Struct("<4sBBHII")
HELLO, PROOF, INFO, READ, WRITE = 64, 65, 66, 67, 68
OK, DAMAGED, REFUSED, LOST, LATE, CANCELLED = Status

Bytes = npt.NDArray[np.uint8]


def noise(seed: int, num_bytes: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def u64s(values: Any) -> npt.NDArray[np.uint64]:
    return np.asarray(values, np.uint64)


class Served:
    """A server in this process with a writable region and a read-only one."""

    def __init__(self, size: int = SIZE, **options: Any) -> None:
        self.memory = noise(1, size)
        self.frozen = noise(2, size)
        self.regions = _native.Regions()
        self.regions.add(REGION, self.memory.ctypes.data, size, True)
        self.regions.add(READ_ONLY, self.frozen.ctypes.data, size, False)
        self.server = _native.BulkServer(self.regions, SECRET, EPOCH, **options)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
            self.server.listen(listener.fileno())

    def link(self, **options: Any) -> _native.BulkLink:
        given = {"secret": SECRET, "epoch": EPOCH, "timeout": 2.0, **options}
        return _native.BulkLink(self.address, **given)

    def wait_for(self, **counters: int) -> None:
        end = time.monotonic() + BOUND_S
        while any(self.server.counters()[name] != value for name, value in counters.items()):
            assert time.monotonic() < end, self.server.counters()
            time.sleep(0.002)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.server.stop()


@pytest.fixture
def own() -> Iterator[Served]:
    made = Served()
    yield made
    made.server.stop()


class Call:
    """One batch of a link, and what became of it."""

    def __init__(
        self,
        link: _native.BulkLink,
        here: Bytes,
        local: Any,
        remote: Any,
        lengths: Any,
        sums: Any = None,
    ) -> None:
        self._link = link
        self._rest = (
            u64s(remote),
            u64s(local) + np.uint64(here.ctypes.data),
            u64s(lengths),
            None if sums is None else u64s(sums),
        )
        self._here = here

    def read(self, region: int = REGION, timeout: float = BOUND_S, cancel: Any = None) -> list[int]:
        statuses: list[int] = self._link.read(region, *self._rest, timeout, cancel).tolist()
        return statuses

    def write(
        self, region: int = REGION, timeout: float = BOUND_S, cancel: Any = None
    ) -> list[int]:
        statuses: list[int] = self._link.write(region, *self._rest, timeout, cancel).tolist()
        return statuses


def frame(op: int, head: bytes, request_id: int = 1, *, magic: bytes = b"KVS2") -> bytes:
    covered = HEADER.pack(magic, op, 0, 0, len(head) + 8, request_id) + head
    return covered + struct.pack("<Q", _native.xxh3(np.frombuffer(covered, np.uint8)))


def take(peer: socket.socket) -> tuple[bytes, int] | None:
    """A frame's head and id; None at the end of the stream."""
    raw = b""
    while len(raw) < 16 or len(raw) < 16 + HEADER.unpack(raw[:16])[4]:
        wanted = 16 - len(raw) if len(raw) < 16 else 16 + HEADER.unpack(raw[:16])[4] - len(raw)
        more = peer.recv(wanted)
        if not more:
            return None
        raw += more
    return raw[16:-8], HEADER.unpack(raw[:16])[5]


def greeted(address: str) -> socket.socket:
    host, port = address.split(":")
    peer = socket.create_connection((host, int(port)), BOUND_S)
    hello = struct.pack("<QQ", 1, EPOCH) + bytes(32)
    peer.sendall(frame(HELLO, hello))
    challenge = take(peer)
    assert challenge is not None
    said = b"kvstore-bulk client" + hello + challenge[0] + struct.pack("<Q", EPOCH)
    peer.sendall(frame(PROOF, hmac.new(SECRET, said, hashlib.sha256).digest()))
    assert take(peer) is not None
    return peer


def request(n: int, flags: int = 0, ranges: bytes | None = None, region: int = REGION) -> bytes:
    body = struct.pack("<QQ", 0, 16) * n if ranges is None else ranges
    return struct.pack("<QII", region, n, flags) + body

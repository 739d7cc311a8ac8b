"""A native server whose tasks a thread of the test answers, and raw frames to throw at it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native

BLOCK_BYTES = 4096
WAIT_S = 60.0  # a bound for what must come: nothing passes or fails by it in time
HEADER = struct.Struct("<4sBBHII")
HELLO, AUTH, CALL, GONE = 32, 33, 34, 203
INCOMPATIBLE = 3

Hashes = npt.NDArray[np.uint8]
U64s = npt.NDArray[np.uint64]


class Daemon:
    """Admits every HELLO: with an empty body as a new client, else to the client it names."""

    def __init__(
        self,
        path: Path,
        *,
        slots: int = 64,
        tcp: bool = False,
        core: _native.StoreCore | None = None,
        **options: Any,
    ) -> None:
        chunk = 16 * (BLOCK_BYTES + 4096)
        self.core = core or _native.StoreCore(slots // 16 * chunk, chunk, False, "lru")
        self.namespace_id = 0 if core else self.core.add_namespace(BLOCK_BYTES)
        self.native = _native.NativeServer(self.core, **options)
        self.terms: dict[str, Any] = {
            "may_map": True,
            "may_map_writable": False,
            "notices": False,
            "notice_used": False,
            "label": "test",
        }
        self.writer: tuple[int, ...] = ()  # who clients write in place as: id, pid, its start
        self.tasks: list[_native.Task] = []
        self.answers: dict[int, Callable[[_native.Task], bytes]] = {CALL: lambda task: task.body}
        self.held_back: set[int] = set()  # kinds that are left unanswered
        self._next_client = 0
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._raws: list[socket.socket] = []
        self.address = f"unix:{path}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(256)
        self._listeners.append(listener)
        self.native.listen(listener.fileno(), True)
        self.tcp_address = ""
        if tcp:
            remote = socket.create_server(("127.0.0.1", 0))
            self._listeners.append(remote)
            self.native.listen(remote.fileno(), False)
            self.tcp_address = f"tcp:127.0.0.1:{remote.getsockname()[1]}"
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while (task := self.native.next_task(WAIT_S)) is not None:
            with self._lock:
                self.tasks.append(task)
            if task.kind in self.held_back or task.id == 0:
                continue
            if task.kind == HELLO:
                self.native.reply(task.id, self._admit(task))
            elif task.kind in self.answers:
                self.native.reply(task.id, self.answers[task.kind](task))
            else:
                self.native.reply(task.id, b"not answered here", 1)

    def _admit(self, task: _native.Task) -> bytes:
        if len(task.body) == 8:
            client = int.from_bytes(task.body, "little")
            self.native.join_client(task.connection, client)
            return task.body
        self._next_client += 1
        owner = self.core.new_owner(*self.writer)
        namespace_id = -1 if task.body == b"no namespace" else self.namespace_id
        if not self.native.add_client(
            task.connection, self._next_client, owner, namespace_id, **self.terms
        ):
            self.core.release_owner(owner)
        return self._next_client.to_bytes(8, "little")

    def connect(self, greeting: bytes = b"", address: str = "") -> _native.Connection:
        connection = _native.Connection(address or self.address, WAIT_S)
        connection.call(HELLO, greeting, WAIT_S)
        return connection

    def more_of(self, client: int) -> _native.Connection:
        return self.connect(client.to_bytes(8, "little"))

    def raw(self, *, greeted: bool = False) -> socket.socket:
        raw = socket.socket(socket.AF_UNIX)
        self._raws.append(raw)
        raw.connect(self.address.removeprefix("unix:"))  # waits where the backlog is full
        raw.settimeout(WAIT_S)
        if greeted:
            raw.sendall(frame(HELLO))
            assert receive_frame(raw)[1] == 0
        return raw

    def of_kind(self, kind: int) -> list[_native.Task]:
        with self._lock:
            return [task for task in self.tasks if task.kind == kind]

    def close_raws(self) -> None:
        while self._raws:
            self._raws.pop().close()

    def close(self) -> None:
        self.close_raws()
        self.native.stop()
        self._thread.join()
        for listener in self._listeners:
            listener.close()


@contextlib.contextmanager
def serving(directory: Path, **options: Any) -> Iterator[Daemon]:
    daemon = Daemon(directory / "s", **options)
    try:
        yield daemon
    finally:
        daemon.close()


def until(happened: Callable[[], Any]) -> None:
    """Poll, with a bound, until it is so."""
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def frame(
    op: int, body: bytes = b"", *, length: int | None = None, magic: bytes = b"KVS2"
) -> bytes:
    return HEADER.pack(magic, op, 0, 0, len(body) if length is None else length, 7) + body


def receive_frame(raw: socket.socket) -> tuple[int, int, bytes]:
    """Operation, status and body of the next reply."""
    magic, op, status, flags, length, request = HEADER.unpack(receive_exactly(raw, HEADER.size))
    assert (magic, flags, request) == (b"KVS2", 0, 7)
    return op, status, receive_exactly(raw, length)


def receive_exactly(raw: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = raw.recv(count - len(data))
        if not part:
            raise ConnectionError(f"closed after {len(data)} of {count} bytes")
        data += part
    return data


def is_closed(raw: socket.socket) -> bool:
    """Whether the peer has hung up, once it has; waits for it."""
    try:
        return raw.recv(1) == b""
    except ConnectionResetError:
        return True


def chain(seed: int, count: int) -> Hashes:
    """Chains of one seed share their prefix."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def packed_chain(hashes: Hashes, start: int = 0, parent: bytes | None = None) -> bytes:
    flags = 0 if parent is None else 1
    return struct.pack("<qII32s", start, flags, len(hashes), parent or b"") + hashes.tobytes()


def payload(hashes: Hashes) -> npt.NDArray[np.uint8]:
    rows = [np.random.default_rng(list(row)).integers(0, 256, BLOCK_BYTES) for row in hashes]
    return np.array(rows, np.uint8).reshape(-1, BLOCK_BYTES)


def checksums(blocks: npt.NDArray[np.uint8]) -> U64s:
    return np.array([_native.xxh3(block) for block in blocks], np.uint64)


def addresses(blocks: npt.NDArray[np.uint8]) -> U64s:
    base = blocks.ctypes.data
    return np.array([base + i * blocks.strides[0] for i in range(len(blocks))], np.uint64)


def put(connection: _native.Connection, hashes: Hashes, ack: int = 0) -> int:
    """Reserve and write through the socket; how many blocks were written."""
    reservation, _, statuses = connection.reserve(0.0, hashes, 0, None, WAIT_S)
    blocks = payload(hashes)[statuses == 0]
    _, matched = connection.write(
        reservation, ack, checksums(blocks), hashes, 0, None, addresses(blocks), BLOCK_BYTES, WAIT_S
    )
    assert matched.all()
    return len(blocks)


def load(connection: _native.Connection, hashes: Hashes) -> int:
    """Acquire, read through the socket, compare every byte and release."""
    lease, offsets, _, _, _ = connection.acquire(-1.0, 0.0, 0, hashes, 0, None, WAIT_S)
    count = len(offsets)
    room = np.zeros((count, BLOCK_BYTES), np.uint8)
    connection.read(lease, 0, addresses(room), BLOCK_BYTES, WAIT_S)
    assert (room == payload(hashes[:count])).all()
    if count:
        assert connection.release(np.array([lease], np.uint64), WAIT_S).all()
    return count

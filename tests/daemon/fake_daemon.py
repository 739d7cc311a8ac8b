"""A daemon that does as a test tells it: greets, answers from a table, hangs, or talks rubbish."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvstore import wire

Answer = Callable[[bytes], bytes | None]  # body of the request -> of the reply; None: none


class FakeDaemon:
    """Listens on a Unix socket; a thread for each connection. `requests` are the ops it got."""

    def __init__(self, path: Path, answers: Mapping[Any, Answer] | None = None) -> None:
        self.address = f"unix:{path}"
        self.epoch = secrets.token_bytes(16)
        self.requests: list[tuple[int, bytes]] = []
        self.answers: dict[int, Answer] = {
            wire.Op.HELLO: lambda _: wire.encode(self.welcome()),
            wire.Op.MATCH: lambda _: wire.pack_u64(3),
            wire.Op.QUIESCED: lambda _: wire.pack_u64(0),
        }
        self.answers.update(answers or {})
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._open = {self._listener}
        self._number = 0
        self._path = path
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def welcome(self) -> wire.Welcome:
        self._number += 1
        return wire.Welcome(
            token=secrets.token_bytes(16),
            client=self._number,
            epoch=self.epoch,
            arena_id=bytes(16),
            arena_bytes=0,
            block_bytes=4096,
            may_map=False,
            may_map_writable=False,
            verify_always=False,
            threads=1,
            lease_seconds=10.0,
        )

    def count(self, op: int) -> int:
        return sum(1 for each, _ in self.requests if each == op)

    def die(self) -> None:
        """End all connections, as the kernel does for a killed process."""
        self._path.unlink()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    @contextlib.contextmanager
    def over_tcp(self) -> Iterator[str]:
        """Listen on a loopback port too."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._open.add(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.die()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self._open.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while head := _exactly(connection, wire.HEADER.size):
                _, op, _, _, length, number = wire.HEADER.unpack(head)
                body = _exactly(connection, length)
                self.requests.append((op, body))
                answer = self.answers[op](body) if op in self.answers else b""
                if answer is not None:
                    frame = wire.HEADER.pack(wire.MAGIC, op, 0, 0, len(answer), number)
                    connection.sendall(frame + answer)
        self._open.discard(connection)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            return b""
        data += piece
    return data

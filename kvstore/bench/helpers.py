"""Processes to measure against: a bare echo, and a plain sender of bytes."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Each ends when its standard input does, so also when we are killed.
_ECHO = """
import socket, sys
sys.path[:] = {path!r}
from kvstore import _native
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
server = _native.EchoServer(listener.fileno())
print("ready", flush=True)
sys.stdin.read()
server.stop()
"""
_SENDER = """
import socket, struct, sys, threading
import numpy as np
size = int(sys.argv[1])
memory = memoryview(np.random.default_rng(0).integers(0, 256, size, np.uint8))
listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=lambda: (sys.stdin.read(), __import__("os")._exit(0)), daemon=True).start()
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
at = 0
while request := connection.recv(8):
    (count,) = struct.unpack("<Q", request)
    at = at if at + count <= size else 0
    connection.sendall(memory[at : at + count])
    at += count
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Child:
    """A Python process of ours; its first line of output says that it is ready."""

    def __init__(self, code: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.hello = self.process.stdout.readline().strip()
        if not self.hello:
            self.close()
            raise RuntimeError("a process to measure against ended while it started")

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class EchoProcess(_Child):
    """A bare C++ echo on a Unix socket, for `_native.echo_round_trips`."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kvstore-echo-")
        path = Path(self._directory.name) / "echo.sock"
        self.address = f"unix:{path}"
        super().__init__(_ECHO.format(path=sys.path), str(path))

    def __enter__(self) -> EchoProcess:
        return self

    def close(self) -> None:
        super().close()
        self._directory.cleanup()


class SenderProcess(_Child):
    """Sends as many bytes as it is asked for over plain TCP, out of `size` bytes of memory."""

    def __init__(self, size: int) -> None:
        super().__init__(_SENDER, str(size))
        self._connection = socket.create_connection(("127.0.0.1", int(self.hello)), timeout=30)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self, into: Bytes) -> None:
        """Fill the array."""
        self._connection.sendall(into.size.to_bytes(8, "little"))
        view = memoryview(into.data)
        while view:
            received = self._connection.recv_into(view)
            if received == 0:
                raise ConnectionError("the plain sender is gone")
            view = view[received:]

    def __enter__(self) -> SenderProcess:
        return self

    def close(self) -> None:
        self._connection.close()
        super().close()

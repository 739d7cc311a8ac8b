"""What every store of the comparison is: calls to put and get, and servers that end with it.

Imports nothing but numpy: it runs in each peer's own Python.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

WORKING_BYTES = 128 << 20  # larger than the caches of most machines
STORE_BYTES = 1 << 30
START_SECONDS = 20.0


class AbsentError(Exception):
    """The store is not installed here."""


def aligned(size: int) -> Bytes:
    room = np.ones(size + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    return room[start : start + size]


class Peer:
    """One store. `rows` are the blocks to put, `back` the rows to get them into."""

    version = ""

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        self.work = work
        self.source, self.target = source, target
        self.round = 0

    def use(self, size: int, batch: int) -> None:
        """Get ready for a round of calls of `batch` blocks of `size` bytes. Not timed."""
        self.size, self.batch = size, batch
        self.round += 1
        self.rows, self.back = self.source.reshape(-1, size), self.target.reshape(-1, size)
        self.calls = len(self.rows) // batch
        self.keys = [f"{self.round}:{i}" for i in range(len(self.rows))]

    def span(self, call: int) -> range:
        return range(call * self.batch, (call + 1) * self.batch)

    def put(self, call: int) -> None:
        raise NotImplementedError

    def get(self, call: int) -> None:
        raise NotImplementedError

    def lookup(self, call: int) -> None:
        """See that all blocks of the call are there; fails when one is not."""
        raise NotImplementedError

    def forget(self) -> None:
        """Remove what the round stored. Not timed."""

    def close(self) -> None:
        pass


def package_version(name: str) -> str:
    from importlib import metadata

    return metadata.version(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def knock(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=1).close()


# Before it becomes the server: a signal for when the runner dies (prctl PR_SET_PDEATHSIG, SIGTERM).
BIND_TO_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)


def start_server(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", BIND_TO_PARENT, *command],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )


def stop_server(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def wait_for(
    server: subprocess.Popen[bytes],
    probe: Callable[[], object],
    refused: type[Exception],
    seconds: float = START_SECONDS,
) -> None:
    give_up = time.monotonic() + seconds
    while True:
        try:
            probe()
            return
        except refused:
            if server.poll() is not None:
                raise RuntimeError(f"server ended with status {server.returncode}") from None
            if time.monotonic() > give_up:
                stop_server(server)
                raise
            time.sleep(0.02)

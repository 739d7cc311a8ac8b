"""A daemon as a process, and a client that speaks frames by itself: what the tests here share."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore
from kvstore import _native, wire
from kvstore.auth import is_proof, proof_of
from kvstore.daemon.processes import process_start

SPEC = kvstore.BlockSpec(1, 1, 64, 16, "float32")
SIZE = SPEC.block_bytes
SECONDS = 20.0


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def is_gone(pid: int) -> bool:
    """Whether it has ended; whoever is to reap it may be slow."""
    return process_start(pid) == 0


def chain(first: int, count: int) -> kvstore.BlockHashes:
    return kvstore.hash_blocks(list(range(first * 1000, first * 1000 + count * 16)), 16)


def content(first: int, count: int) -> npt.NDArray[np.uint8]:
    """What the blocks of `chain(first, count)` hold in these tests."""
    return np.random.default_rng(first).integers(0, 256, (count, SIZE), np.uint8)


class RawClient:
    """One connection, one client."""

    def __init__(
        self,
        address: str,
        namespace: kvstore.Namespace | None = None,
        *,
        tenant: str = "",
        token: bytes = b"",
        secret: bytes | None = None,
    ) -> None:
        self.connection = _native.Connection(address, SECONDS)
        described = (namespace or kvstore.Namespace("model", SPEC)).describe()
        self.hello = wire.encode(
            wire.Hello(wire.VERSION, described, token, tenant, os.urandom(wire.NONCE_BYTES))
        )
        try:
            self.welcome = self._greet(secret)
        except BaseException:
            self.connection.close()
            raise
        self._memory: npt.NDArray[np.uint8] | None = None

    def _greet(self, secret: bytes | None) -> wire.Welcome:
        reply = wire.decode_greeting(self.connection.call(wire.Op.HELLO, self.hello, SECONDS))
        if isinstance(reply, wire.Challenge):
            assert secret is not None, "a secret is asked for"
            assert is_proof(reply.proof, "server", secret, self.hello, reply.nonce)
            proof = wire.encode(wire.Auth(proof_of("client", secret, self.hello, reply.nonce)))
            reply = wire.decode_greeting(self.connection.call(wire.Op.AUTH, proof, SECONDS))
        assert isinstance(reply, wire.Welcome)
        return reply

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        if self._memory is None:
            fd, size = self.connection.map(True, SECONDS)
            self._memory = np.frombuffer(mmap.mmap(fd, size), np.uint8)
            os.close(fd)
        return self._memory

    def reserve(self, hashes: kvstore.BlockHashes) -> tuple[int, npt.NDArray[np.uint64]]:
        number, offsets, statuses = self.connection.reserve(
            0.0, hashes.array, hashes.start, hashes.parent, SECONDS
        )
        return number, offsets[statuses == 0]

    def fill(self, offsets: npt.NDArray[np.uint64], blocks: npt.NDArray[np.uint8]) -> None:
        for offset, block in zip(offsets.tolist(), blocks, strict=True):
            self.memory[offset : offset + SIZE] = block

    def put(self, first: int, count: int, ack: int = 0) -> int:
        hashes, blocks = chain(first, count), content(first, count)
        number, offsets = self.reserve(hashes)
        assert len(offsets) == count
        self.fill(offsets, blocks)
        sums = np.array([_native.xxh3(block) for block in blocks], np.uint64)
        return self.connection.commit(
            number, ack, sums, hashes.array, hashes.start, hashes.parent, SECONDS
        )

    def get(self, first: int, count: int, wait: float = 0.0) -> npt.NDArray[np.uint8]:
        """What leading blocks hold, read through the connection."""
        hashes = chain(first, count)
        lease, offsets, _, _, sums = self.connection.acquire(
            60.0, wait, 0, hashes.array, hashes.start, hashes.parent, SECONDS
        )
        blocks = np.empty((len(offsets), SIZE), np.uint8)
        if lease:
            addresses = blocks.ctypes.data + SIZE * np.arange(len(blocks), dtype=np.uint64)
            self.connection.read(lease, 0, addresses.astype(np.uint64), SIZE, SECONDS)
            self.connection.release(np.array([lease], np.uint64), SECONDS)
            assert [_native.xxh3(block) for block in blocks] == sums.tolist()
        return blocks

    def call(self, message: wire.Call) -> Any:
        return wire.decode_value(self.connection.call(wire.Op.CALL, wire.encode(message), SECONDS))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.call(wire.AdminStatus())
        return found

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Daemon:
    """`kvstore serve` in a process of its own."""

    def __init__(
        self, directory: Path, *flags: str, prefix: Sequence[str] = (), **environment: str
    ) -> None:
        """`prefix`: of the command line, such as what makes it run on another host."""
        self.address = f"unix:{directory}/s"
        self.state = directory / "s.state"
        arguments = ["--listen", self.address, "--http", "", "--cpu", "4MiB", "--chunk", "256KiB"]
        self.log = directory / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "kvstore", "serve", *arguments, *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ready(self) -> Daemon:
        """Wait until it serves."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(b"kvstored serves "), (line, self.log.read_text())
        return self

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> int:
        code = self.process.wait(SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def holder_pids(self) -> list[int]:
        """Processes that were started as the holder of this daemon's state directory."""
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and self._is_holder(entry)
        ]

    def _is_holder(self, entry: Path) -> bool:
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            is_ours = os.fsencode(self.state / "holder.sock") in words
            return is_ours and not is_gone(int(entry.name))
        return False


@contextlib.contextmanager
def running(directory: Path, *flags: str, **environment: str) -> Iterator[Daemon]:
    """A daemon that serves; whatever became of it, nothing of it is left behind."""
    daemon = Daemon(directory, *flags, **environment)
    try:
        yield daemon.ready()
    finally:
        clean_up(daemon)


def clean_up(daemon: Daemon) -> None:
    if daemon.process.poll() is None:
        daemon.process.kill()
    daemon.end()
    for pid in daemon.holder_pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def command(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a command of ours with --json; return its status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", *arguments, "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        timeout=60,
    )
    return done.returncode, json.loads(done.stdout)

"""Proves that operators' commands and a real daemon understand each other.

A daemon runs as a process of its own; blocks are put over a raw connection, one with bytes damaged
in the mapped arena afterwards. Commands run in process, as in test_commands.py.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore import _native, wire
from kvstore.admin import Admin
from kvstore.errors import ConfigError, DeadlineExceededError, PeerUnavailableError
from tests.ops.test_commands import run, told
from tests.store_support import BLOCK_BYTES, NAMESPACE, WAIT_S, chain, payload

HASHES = chain(7, 6)


@dataclass
class Daemon:
    address: str
    directory: Path
    process: subprocess.Popen[str]

    def told(self, *arguments: str, status: int = 0) -> Any:
        shown = run(*arguments, "--connect", self.address, "--json")
        assert shown.exit_code == status, shown.output
        return told(shown)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    # Not below tmp_path: a socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="kvstore-ops-"))
    address = f"unix:{directory}/kvstore.sock"
    command = [sys.executable, "-m", "kvstore", "serve", "--listen", address, "--http", ""]
    command += ["--cpu", "16MiB", "--scrub", "0", "--hold-seconds", "0"]
    command += ["--ssd", f"{directory}/ssd", "--ssd-capacity", "16MiB", "--ssd-segment", "1MiB"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert "serves" in process.stdout.readline()
            yield Daemon(address, directory, process)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(WAIT_S)
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def engine(daemon: Daemon) -> Iterator[_native.Connection]:
    """A client that has put HASHES."""
    connection = _native.Connection(daemon.address, WAIT_S)
    hello = wire.Hello(wire.VERSION, NAMESPACE.describe(), nonce=bytes(wire.NONCE_BYTES))
    greeting = wire.decode_greeting(connection.call(wire.Op.HELLO, wire.encode(hello), WAIT_S))
    assert isinstance(greeting, wire.Welcome)
    array = HASHES.array
    reservation, offsets, _ = connection.reserve(0.0, array, 0, None, WAIT_S)
    assert offsets.all()
    blocks = payload(HASHES)
    sums = np.array([_native.xxh3(block) for block in blocks], np.uint64)
    addresses = np.uint64(blocks.ctypes.data) + np.arange(len(array), dtype=np.uint64) * np.uint64(
        BLOCK_BYTES
    )
    connection.write(reservation, 0, sums, array, 0, None, addresses, BLOCK_BYTES, WAIT_S)
    yield connection
    connection.close()


def damage(engine: _native.Connection, block: int) -> None:
    """Flips a byte of a block in the arena, as a stray write of an engine would."""
    lease, offsets, _, _, _ = engine.acquire(-1.0, 0.0, 1, HASHES.array, 0, None, WAIT_S)
    fd, arena_bytes = engine.map(True, WAIT_S)
    try:
        with mmap.mmap(fd, arena_bytes) as arena:
            arena[int(offsets[block])] ^= 1
    finally:
        os.close(fd)
    engine.release(np.array([lease], np.uint64), WAIT_S)


def test_status_and_top_show_what_was_put(daemon: Daemon, engine: _native.Connection) -> None:
    for found in (daemon.told("status"), daemon.told("top", "--once")):
        assert found["state"] == "serving"
        assert found["tiers"][0]["blocks"] == len(HASHES)
        assert found["tiers"][0]["used_bytes"] >= len(HASHES) * BLOCK_BYTES
        assert [row["model"] for row in found["namespaces"]] == [NAMESPACE.model]
        assert found["metrics"]["kvstore_cpu_blocks"] == len(HASHES)
        assert found["pid"] == daemon.process.pid
    shown = run("status", "--connect", daemon.address)
    assert NAMESPACE.model in shown.stdout


def test_a_status_has_every_part_that_is_declared(
    daemon: Daemon, engine: _native.Connection
) -> None:
    from kvstore.status import Status, TierStatus

    found = daemon.told("status")
    assert set(Status.__annotations__) <= set(found)
    assert set(TierStatus.__annotations__) <= set(found["tiers"][0])


def test_inspect_finds_blocks_where_they_are(daemon: Daemon, engine: _native.Connection) -> None:
    namespaces = daemon.told("inspect")["namespaces"]
    assert namespaces[0]["digest"] == NAMESPACE.digest.hex()
    assert f"layout={NAMESPACE.layout}" in run("inspect", "--connect", daemon.address).stdout
    absent = "00" * 32
    found = daemon.told(
        "inspect", "--namespace", namespaces[0]["digest"][:8], *HASHES.hex(), absent
    )
    assert [block["hash"] for block in found["blocks"]] == [*HASHES.hex(), absent]
    assert all("cpu" in block["tiers"] for block in found["blocks"][:-1])
    assert found["blocks"][-1]["tiers"] == []
    assert found["blocks"][2]["depth"] == 3


def test_verify_finds_a_damaged_block_and_then_no_more(
    daemon: Daemon, engine: _native.Connection
) -> None:
    found = daemon.told("verify")
    assert found["checked_bytes"] == len(HASHES) * BLOCK_BYTES
    damage(engine, len(HASHES) - 1)
    assert daemon.told("verify", status=1)["removed_blocks"] == 1
    assert daemon.told("verify")["removed_blocks"] == 0


def test_an_offline_check_follows_once_the_daemon_is_gone(
    daemon: Daemon, engine: _native.Connection
) -> None:
    path = daemon.directory / "ssd"
    shown = run("verify", "--ssd", str(path))
    assert shown.exit_code == 1
    assert str(daemon.process.pid) in shown.stderr
    daemon.process.terminate()
    assert daemon.process.wait(WAIT_S) == 0
    shown = run("verify", "--ssd", str(path), "--json")
    assert shown.exit_code == 0, shown.stdout
    found = told(shown)
    assert found["checked_blocks"] == found["decoded_blocks"] == len(HASHES)
    shown = run("inspect", "--ssd", str(path), "--json")
    assert told(shown)["namespaces"][0]["model"] == NAMESPACE.model


def test_a_stopped_daemon_costs_one_timeout(daemon: Daemon) -> None:
    daemon.process.send_signal(signal.SIGSTOP)
    shown = run("status", "--connect", daemon.address, "--timeout", "0.2")
    assert shown.exit_code == 1
    assert "no answer in 0.2 s" in shown.stderr
    with pytest.raises(DeadlineExceededError):
        Admin(daemon.address, 0.1)
    daemon.process.send_signal(signal.SIGCONT)
    assert daemon.told("status")["state"] == "serving"


def test_a_daemon_that_ended_is_not_there(daemon: Daemon) -> None:
    daemon.process.terminate()
    daemon.process.wait(WAIT_S)
    with pytest.raises(PeerUnavailableError, match="kvstore serve"):
        Admin(daemon.address)
    checks = told(run("doctor", "--connect", daemon.address, "--json"))["checks"]
    assert next(check for check in checks if check["name"] == "daemon")["level"] == "warn"


def test_what_a_daemon_refuses_is_told_with_its_words(
    daemon: Daemon, engine: _native.Connection
) -> None:
    with Admin(daemon.address) as admin, pytest.raises(ConfigError, match="no number 99"):
        admin.call(wire.AdminInspect(99, b""))


@pytest.mark.parametrize("end", ["q", "Ctrl-C"])
def test_top_on_a_terminal_ends_when_told_to(daemon: Daemon, end: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kvstore", "top", "--connect", daemon.address]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    ) as process:
        os.close(theirs)
        shown = b""
        while b"q ends" not in shown:
            shown += os.read(ours, 65536)
        if end == "q":
            os.write(ours, b"q")
        else:
            process.send_signal(signal.SIGINT)
        again = time.monotonic() + 5.0
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while os.read(ours, 65536):
                # An interrupt is lost where it strikes while an object is deleted.
                if end != "q" and time.monotonic() > again:
                    process.send_signal(signal.SIGINT)
                    again += 5.0
        assert process.wait(WAIT_S) == 0
    os.close(ours)
    assert b"hit ratio" in shown
    assert b"Traceback" not in shown

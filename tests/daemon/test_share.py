"""What a client leaves behind when it dies: nothing.

Real processes, killed with SIGKILL while they hold leases, pins and reservations; the owner sees
the end of their connections. Also foreign peers: bytes that are no frame, frames too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import _native, wire

SPEC = kvstore.BlockSpec(1, 1, 64, 16, "float32")
SLOTS = 16
HOLDER = """
import json, sys
import kvstore
spec = kvstore.BlockSpec(1, 1, 64, 16, "float32")
store = kvstore.connect(sys.argv[1], "model", spec=spec)
old = kvstore.hash_blocks(list(range(64)), 16)
new = kvstore.hash_blocks(list(range(1000, 1096)), 16)
lease = store.acquire(old)
pinned = store.pin(old[:2])
reservation = store.reserve(new)
print(json.dumps([len(lease), pinned, int(reservation.wanted.sum())]), flush=True)
sys.stdin.read()
"""


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[kvstore.Store]:
    with kvstore.open("model", spec=SPEC, cpu="1MiB") as opened:
        yield opened


def put(store: kvstore.Store, tokens: list[int]) -> kvstore.BlockHashes:
    hashes = kvstore.hash_blocks(tokens, 16)
    blocks = np.full((len(hashes), SPEC.block_bytes), tokens[0] % 251, np.uint8)
    store.put(hashes, kvstore.ContiguousBlocks(blocks)).wait()
    return hashes


def test_a_killed_client_leaves_no_lease_pin_or_slot(store: kvstore.Store, tmp_path: Path) -> None:
    put(store, list(range(64)))
    used = store.stats()["kvstore_cpu_used_bytes"]
    with kvstore.share(store, f"unix:{tmp_path}/s") as server:
        for _ in range(5):
            client = subprocess.Popen(
                [sys.executable, "-c", HOLDER, server.address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            assert client.stdout is not None
            assert client.stdin is not None
            assert json.loads(client.stdout.readline()) == [4, 2, 6]
            stats = store.stats()
            assert stats["kvstore_leases"] == 2
            assert stats["kvstore_cpu_used_bytes"] == used + 6 * 8192
            client.send_signal(signal.SIGKILL)
            client.wait()
            client.stdin.close()
            client.stdout.close()
            wait_until(lambda: server.num_clients == 0)
            wait_until(lambda: store.stats()["kvstore_leases"] == 0)
            assert store.stats()["kvstore_cpu_used_bytes"] == used
            assert store.match(kvstore.hash_blocks(list(range(1000, 1096)), 16)) == 0


def test_closing_the_server_ends_waits_under_way(store: kvstore.Store, tmp_path: Path) -> None:
    absent = kvstore.hash_blocks(list(range(2000, 2032)), 16)
    with (
        kvstore.share(store, f"unix:{tmp_path}/s") as server,
        kvstore.connect(server.address, "model", spec=SPEC) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.wait_for, absent, timeout=600.0)
        server.close()  # would take ten minutes if it waited for the wait
        with contextlib.suppress(kvstore.KVStoreError):  # or it was cut off
            assert waiting.result(60) == 0
        assert client.match(absent) == 0


def raw(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(20)
    connection.connect(address.removeprefix("unix:"))
    return connection


def ends(connection: socket.socket) -> bool:
    """Whether the other end closes, whatever it says before."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        wire.HEADER.pack(wire.MAGIC, wire.Op.HELLO, 0, 0, (64 << 10) + 1, 1),
        wire.HEADER.pack(wire.MAGIC, wire.Op.MATCH, 0, 0, 48, 1) + bytes(48),
        wire.HEADER.pack(wire.MAGIC, 99, 0, 0, 0, 1),
    ],
    ids=["http", "too long", "before hello", "unknown operation"],
)
def test_what_is_no_frame_ends_the_connection_and_the_server_goes_on(
    store: kvstore.Store, tmp_path: Path, garbage: bytes
) -> None:
    hashes = put(store, list(range(64)))
    with kvstore.share(store, f"unix:{tmp_path}/s") as server:
        with raw(server.address) as connection:
            connection.sendall(garbage)
            assert ends(connection)
        with kvstore.connect(server.address, "model", spec=SPEC) as client:
            assert client.match(hashes) == 4


@pytest.mark.parametrize("body", [b"\xc1\xc1", b"\x81\xa2is\xa4nope", b""])
def test_a_greeting_that_is_none_is_refused_by_name(
    store: kvstore.Store, tmp_path: Path, body: bytes
) -> None:
    with kvstore.share(store, f"unix:{tmp_path}/s") as server:
        connection = _native.Connection(server.address, 20.0)
        with pytest.raises(_native.RemoteError, match="not a message of protocol 2") as caught:
            connection.call(wire.Op.HELLO, body, 20.0)
        assert wire.ERRORS[caught.value.status - 1] == "IncompatibleError"
        connection.close()


def test_a_frame_that_breaks_off_ends_the_connection(store: kvstore.Store, tmp_path: Path) -> None:
    with kvstore.share(store, f"unix:{tmp_path}/s") as server:
        with raw(server.address) as connection:
            head = wire.HEADER.pack(wire.MAGIC, wire.Op.HELLO, 0, 0, 100, 1)
            connection.sendall(head + b"half")
        with kvstore.connect(server.address, "model", spec=SPEC) as client:
            assert client.match(kvstore.hash_blocks(list(range(64)), 16)) == 0
        wait_until(lambda: server.num_clients == 0)


def test_another_version_is_refused_by_name(store: kvstore.Store, tmp_path: Path) -> None:
    with kvstore.share(store, f"unix:{tmp_path}/s") as server:
        connection = _native.Connection(server.address, 20.0)
        hello = wire.Hello(wire.VERSION + 1, store.namespace.describe())
        with pytest.raises(_native.RemoteError, match=f"protocol {wire.VERSION}"):
            connection.call(wire.Op.HELLO, wire.encode(hello), 20.0)
        connection.close()


def test_a_store_that_is_shared_is_no_daemon(store: kvstore.Store, tmp_path: Path) -> None:
    with kvstore.share(store, f"unix:{tmp_path}/s") as server:
        connection = _native.Connection(server.address, 20.0)
        connection.call(wire.Op.HELLO, wire.encode(wire.Hello(wire.VERSION, {})), 20.0)
        with pytest.raises(_native.RemoteError, match="no daemon"):
            connection.call(wire.Op.CALL, wire.encode(wire.AdminShutdown()), 20.0)
        connection.close()


def test_only_we_may_connect(store: kvstore.Store, tmp_path: Path) -> None:
    with kvstore.share(store, f"unix:{tmp_path}/s") as server:
        path = Path(server.address.removeprefix("unix:"))
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_an_address_in_use_or_not_a_socket_is_named(store: kvstore.Store, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    with (
        kvstore.share(store, address),
        pytest.raises(kvstore.InUseError, match=str(tmp_path)),
    ):
        kvstore.share(store, address)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(kvstore.ConfigError, match="not a socket"):
        kvstore.share(store, f"unix:{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "mine"
    for wrong in ("/tmp/x", "tcp:1.2.3.4", "unix:", "unix:" + "x" * 200):
        with pytest.raises(kvstore.ConfigError, match="address"):
            kvstore.connect(wrong, "model", spec=SPEC)
    with pytest.raises(kvstore.PeerUnavailableError):
        kvstore.connect(f"unix:{tmp_path}/nobody", "model", spec=SPEC)


def test_blocks_too_large_for_the_arena_are_refused(store: kvstore.Store, tmp_path: Path) -> None:
    large = kvstore.BlockSpec(32, 8, 128, 64, "float32")
    with (
        kvstore.share(store, f"unix:{tmp_path}/s") as server,
        pytest.raises(kvstore.ConfigError, match="chunk"),
    ):
        kvstore.connect(server.address, "model", spec=large)

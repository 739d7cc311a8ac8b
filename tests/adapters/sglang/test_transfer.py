"""KVStoreTransfer alone, with the methods that SGLang calls, and without SGLang.

The other end is another one in this process, or an endpoint in a process of its own, which is
killed and stopped. Bytes go over the TCP mover.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from kvstore import ConfigError, IncompatibleError, _native
from kvstore.auth import user_secret
from kvstore.config_sources import Setting, transfer_variables
from kvstore.gpu.host_device import HostDevice
from kvstore.transport import TransportSettings, checksums_of
from kvstore.transport.tcp import address_in
from kvstore_adapters.sglang import sessions, transfer
from kvstore_adapters.sglang.transfer import KVStoreTransfer, TransferSettings
from tests.transport.peer import Peer, pattern

Bytes = npt.NDArray[np.uint8]
Make = Callable[..., KVStoreTransfer]
OVER_TCP = TransferSettings(movers=("tcp",), timeout=10.0)
SLACK_S = 30.0  # of a loaded machine
SIZE = 1 << 20


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own secret is left alone."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[KVStoreTransfer] = []

    def make(settings: TransferSettings = OVER_TCP, hostname: str = "127.0.0.1") -> KVStoreTransfer:
        made.append(KVStoreTransfer(hostname, gpu_id=0, settings=settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def registered(owner: KVStoreTransfer, *pools: Bytes) -> None:
    found = owner.batch_register([pool.ctypes.data for pool in pools], [len(p) for p in pools])
    assert found == 0


class Piece(NamedTuple):
    source: Bytes
    source_offset: int
    target: Bytes
    target_offset: int
    length: int


def send(ours: KVStoreTransfer, session_id: str, pieces: list[Piece]) -> int:
    return ours.batch_transfer_sync(
        session_id,
        [piece.source.ctypes.data + piece.source_offset for piece in pieces],
        [piece.target.ctypes.data + piece.target_offset for piece in pieces],
        [piece.length for piece in pieces],
    )


def test_pieces_of_many_pools_arrive_where_they_belong(make: Make) -> None:
    prefill, decode = make(), make()
    sources = [pattern(i, SIZE) for i in range(6)]
    targets = [np.zeros(SIZE, np.uint8) for _ in range(6)]
    registered(prefill, *sources)
    registered(decode, *targets)
    generator = np.random.default_rng(7)
    pieces: list[Piece] = []
    expected = [target.copy() for target in targets]
    for _ in range(300):
        to, page = int(generator.integers(6)), len(pieces) * 3000
        length, begin = int(generator.integers(1, 3000)), int(generator.integers(SIZE - 3000))
        source, begin_there = sources[int(generator.integers(6))], page % (SIZE - 3000)
        pieces.append(Piece(source, begin, targets[to], begin_there, length))
        expected[to][begin_there : begin_there + length] = source[begin : begin + length]
    assert send(prefill, decode.get_session_id(), pieces) == 0
    assert all((a == b).all() for a, b in zip(targets, expected, strict=True))
    assert send(prefill, decode.get_session_id(), []) == 0


def test_a_pool_registered_later_is_found(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prefill, decode = make(), make()
    source, first, second = pattern(1, SIZE), np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    registered(prefill, source)
    registered(decode, first)
    assert send(prefill, decode.get_session_id(), [Piece(source, 0, first, 0, SIZE)]) == 0
    registered(decode, second)
    assert send(prefill, decode.get_session_id(), [Piece(source, 0, second, 0, SIZE)]) == 0
    assert (second == source).all()
    assert caplog.text.count(f"hand-off to {decode.get_session_id()} by tcp") == 1  # one link


def test_memory_that_nobody_registered_is_not_touched(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = make(), make()
    source, target, other = pattern(1, SIZE), np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    registered(prefill, source)
    registered(decode, target)
    session = decode.get_session_id()
    assert send(prefill, session, [Piece(source, 0, other, 0, 100)]) == -1
    assert f"refused of 1, first 100 bytes at {other.ctypes.data:#x}" in caplog.text
    assert send(prefill, session, [Piece(source, 0, target, SIZE - 99, 100)]) == -1
    # Our own side of it: not even read.
    assert prefill.batch_transfer_sync(session, [4096], [target.ctypes.data], [100]) == -1
    assert "at 0x1000 here are not registered" in caplog.text
    assert not other.any()
    assert not target.any()
    assert send(prefill, session, [Piece(source, 0, target, 0, SIZE)]) == 0


def test_memory_deregistered_takes_no_more(make: Make) -> None:
    prefill, decode = make(), make()
    source, target = pattern(1, SIZE), np.zeros(SIZE, np.uint8)
    registered(prefill, source)
    registered(decode, target)
    session, piece = decode.get_session_id(), Piece(source, 0, target, 0, SIZE)
    assert send(prefill, session, [piece]) == 0
    assert decode.batch_deregister([target.ctypes.data, 12345]) == 0
    target[:] = 0
    assert send(prefill, session, [piece]) == -1
    assert not target.any()
    # And once more, as after a change of roles; twice is once.
    registered(decode, target)
    registered(decode, target)
    assert send(prefill, session, [piece]) == 0
    assert prefill.batch_deregister([source.ctypes.data]) == 0
    assert send(prefill, session, [piece]) == -1


def test_nobody_writes_into_a_prefill_server(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode, prefill = make(), make()
    source, target = pattern(1, SIZE), np.zeros(SIZE, np.uint8)
    registered(decode, source)
    monkeypatch.setattr(transfer, "_is_prefill", lambda: True)
    registered(prefill, target)
    assert send(decode, prefill.get_session_id(), [Piece(source, 0, target, 0, 100)]) == -1
    assert "refused" in caplog.text
    assert not target.any()


@pytest.fixture
def reserved() -> Iterator[int]:
    """Addresses at which there is nothing for a CPU, as those of a GPU."""
    with mmap.mmap(-1, 1 << 16, prot=0):
        yield next(
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "---s" in line and "zero" in line
        )


def test_nobody_could_write_into_device_memory(make: Make, reserved: int) -> None:
    with pytest.raises(IncompatibleError, match=f"{reserved:#x} are not host.*receive-threshold 0"):
        make().batch_register([reserved], [4096])


def test_device_memory_is_sent_through_the_host(
    make: Make, reserved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = make(), make()
    device = HostDevice()
    in_device, in_host = pattern(1, SIZE), pattern(2, SIZE)
    device.adopt(in_device)
    target = np.zeros(2 * SIZE, np.uint8)
    registered(decode, target)

    def has(_: object, address: int, num_bytes: int) -> bool:
        return address != in_device.ctypes.data

    monkeypatch.setattr(transfer, "_device", lambda ordinal: device)
    monkeypatch.setattr(transfer._HostMemory, "has", has)
    monkeypatch.setattr(transfer, "_is_prefill", lambda: True)
    registered(prefill, in_device, in_host)
    pieces = [Piece(in_host, 0, target, 0, SIZE), Piece(in_device, 0, target, SIZE, SIZE)]
    assert send(prefill, decode.get_session_id(), pieces) == 0
    assert (target == np.concatenate([in_host, in_device])).all()


def test_senders_go_on_after_a_drain(make: Make) -> None:
    prefill, decode = make(), make()
    source, target = pattern(1, SIZE), np.zeros(SIZE, np.uint8)
    registered(prefill, source)
    registered(decode, target)
    piece = Piece(source, 0, target, 0, SIZE)
    assert send(prefill, decode.get_session_id(), [piece]) == 0
    assert decode.drain()
    assert send(prefill, decode.get_session_id(), [piece]) == 0


def test_bytes_changed_on_the_way_are_not_said_to_have_arrived(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = make(), make()
    source, target = pattern(1, SIZE), np.zeros(SIZE, np.uint8)
    registered(prefill, source)
    registered(decode, target)
    checksums = checksums_of

    def before_a_change(
        addresses: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64]
    ) -> object:
        sums = checksums(addresses, lengths)
        source[SIZE // 2] ^= 1
        return sums

    monkeypatch.setattr(sessions, "checksums_of", before_a_change)
    pieces = [Piece(source, 0, target, 0, 100), Piece(source, 0, target, 4096, SIZE - 4096)]
    assert send(prefill, decode.get_session_id(), pieces) == -1
    assert "1 pieces damaged of 2" in caplog.text


def test_another_secret_is_refused_by_name(
    make: Make, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = runtime / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    settings = TransferSettings(token_file=str(token), timeout=10.0, movers=("tcp",))
    prefill, decode, same = make(), make(settings), make(settings)
    source, target = pattern(1, SIZE), np.zeros(SIZE, np.uint8)
    registered(prefill, source)
    registered(same, source)
    registered(decode, target)
    piece = Piece(source, 0, target, 0, SIZE)
    assert send(prefill, decode.get_session_id(), [piece]) == -1
    assert "secret" in caplog.text
    assert not target.any()
    assert prefill.send_probe(decode.get_session_id()) == -1
    assert same.send_probe(decode.get_session_id()) == 0
    assert send(same, decode.get_session_id(), [piece]) == 0


def test_many_threads_share_a_session(make: Make) -> None:
    prefill, decode = make(), make()
    source, target = pattern(1, 8 * SIZE), np.zeros(8 * SIZE, np.uint8)
    registered(prefill, source)
    registered(decode, target)
    session = decode.get_session_id()
    results: list[int] = []

    def one(place: int) -> None:
        piece = Piece(source, place * SIZE, target, place * SIZE, SIZE)
        results.extend(send(prefill, session, [piece]) for _ in range(4))

    threads = [threading.Thread(target=one, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0] * 32
    assert (target == source).all()


# --- a peer in another process


@pytest.fixture
def peer(runtime: Path) -> Iterator[Peer]:
    secret, _ = user_secret("sglang-transfer")
    other = Peer(TransportSettings(movers=("tcp",)), secret)
    yield other
    other.close()


def session_of(peer: Peer) -> str:
    return address_in(peer.info().movers["tcp"])


def test_a_killed_peer_is_found_and_another_takes_its_place(make: Make, peer: Peer) -> None:
    prefill, source = make(), pattern(1, SIZE)
    registered(prefill, source)
    region, session = peer.register(SIZE, writable=True), session_of(peer)

    def to(session: str, address: int) -> int:
        return prefill.batch_transfer_sync(session, [source.ctypes.data], [address], [SIZE])

    assert prefill.send_probe(session) == 0
    assert to(session, region.address) == 0
    assert peer.contents(region.region_id) == _native.xxh3(source)
    peer.kill()
    began = time.monotonic()
    assert to(session, region.address) == -1
    assert prefill.send_probe(session) == -1
    assert time.monotonic() - began < SLACK_S

    second = Peer(TransportSettings(movers=("tcp",)), user_secret("sglang-transfer")[0])
    try:
        region = second.register(SIZE, writable=True)
        assert to(session_of(second), region.address) == 0
        assert second.contents(region.region_id) == _native.xxh3(source)
    finally:
        second.close()


def test_memory_that_is_not_shared_goes_by_tcp_and_nothing_stays_open(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """On one host the pointer mover comes first, finds a pool that is no shared memory, and is let
    go again."""
    caplog.set_level(logging.INFO)
    prefill = make(TransferSettings(timeout=10.0, movers=("shm", "tcp")))
    secret = user_secret("sglang-transfer")[0]
    decode = Peer(TransportSettings(movers=("shm", "tcp")), secret)
    try:
        decode.register(SIZE, writable=True, shared=False)
        session = session_of(decode)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            prefill._forget(session)
            assert prefill.send_probe(session) == 0
        assert len(os.listdir("/proc/self/fd")) < before + 10
        assert "by tcp" in caplog.text
    finally:
        decode.close()


def test_a_hung_peer_costs_the_timeout(make: Make, peer: Peer) -> None:
    prefill = make(TransferSettings(movers=("tcp",), timeout=0.5))
    source = pattern(1, 64 * SIZE)  # more than sockets hold
    registered(prefill, source)
    region, session = peer.register(64 * SIZE, writable=True), session_of(peer)
    assert prefill.send_probe(session) == 0
    peer.stop()
    began = time.monotonic()
    found = prefill.batch_transfer_sync(
        session, [source.ctypes.data], [region.address], [64 * SIZE]
    )
    assert found == -1
    assert time.monotonic() - began < 0.5 + SLACK_S
    peer.go_on()
    deadline = time.monotonic() + SLACK_S
    while prefill.transfer_sync(session, source.ctypes.data, region.address, SIZE) != 0:
        assert time.monotonic() < deadline


# --- settings and secrets


def test_without_a_token_file_it_listens_to_nobody_else(
    make: Make, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ours = make(hostname="192.0.2.7")
    assert ours.get_session_id().startswith("127.0.0.1:")
    assert "it listens on 127.0.0.1, not on 192.0.2.7" in caplog.text
    file = runtime / "kvstore-secrets" / "sglang-transfer"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        make()


def test_with_a_token_file_it_listens_where_sglang_says(make: Make, runtime: Path) -> None:
    token = runtime / "token"
    token.write_text("short")
    token.chmod(0o600)
    settings = TransferSettings(token_file=str(token), movers=("tcp",))
    with pytest.raises(ConfigError, match="KVSTORE_TRANSFER_TOKEN_FILE"):
        make(settings)
    token.write_text(secrets.token_hex(16))
    assert make(settings, "127.0.0.2").get_session_id().startswith("127.0.0.2:")
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7"):
        make(settings, "192.0.2.7")  # not of this host


def test_processes_that_start_at_once_share_one_secret(runtime: Path) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(user_secret("shared")[0])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [path.name for path in (runtime / "kvstore-secrets").iterdir()] == ["shared"]


@pytest.mark.parametrize("text", ["0", "30", "soon", "-1", "nan"])
def test_a_wrong_timeout_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="KVSTORE_TRANSFER_TIMEOUT"):
        TransferSettings.of({"timeout": Setting(text, "KVSTORE_TRANSFER_TIMEOUT")})


def test_settings_of_the_environment() -> None:
    variables = {
        "KVSTORE_TRANSFER_TOKEN_FILE": "/secret",
        "KVSTORE_TRANSFER_TIMEOUT": "7.5",
        "KVSTORE_TRANSFER_MOVERS": "ucx, tcp",
        "KVSTORE_CPU": "1GiB",
    }
    found = TransferSettings.of(transfer_variables(variables))
    assert found == TransferSettings("/secret", 7.5, ("ucx", "tcp"))
    assert TransferSettings.of(transfer_variables({})) == TransferSettings()

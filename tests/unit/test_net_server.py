"""The native server against peers that speak the protocol badly, slowly, or not at all.

A thread of the test plays the daemon's Python (tests/net_support.py). Raw sockets send what no
client of ours would; after each of them a well-behaved client must still be served, and at the end
nothing may be leased or reserved.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import ContiguousBlocks, _native
from tests.net_support import (
    AUTH,
    BLOCK_BYTES,
    CALL,
    GONE,
    HELLO,
    INCOMPATIBLE,
    WAIT_S,
    Daemon,
    addresses,
    chain,
    checksums,
    frame,
    is_closed,
    load,
    packed_chain,
    payload,
    put,
    receive_frame,
    serving,
    until,
)

MATCH, ACQUIRE, RESERVE, COMMIT, WAIT_FOR, READ, WRITE, MAP, PING = 1, 4, 6, 7, 9, 10, 11, 12, 13
CONFIG, IN_USE, STORE_CLOSED, UNAVAILABLE = 2, 4, 5, 9
NO_SPACE = 3


def free_slots(core: _native.StoreCore) -> int:
    """How many blocks could be put."""
    owner = core.new_owner()
    _, statuses, _ = core.reserve(owner, 0, chain(99, 1000), 0, None, False)
    core.release_owner(owner)
    return int((statuses == 0).sum())


def receive_all(raw: socket.socket) -> bool:
    """True once the peer has hung up, whatever it said before."""
    try:
        while raw.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with serving(tmp_path, tcp=True) as daemon:
        yield daemon
        daemon.close_raws()
        client = daemon.connect()  # whatever happened, the next one is served
        assert client.ping(b"alive", WAIT_S) == b"alive"
        client.close()
        until(lambda: daemon.native.stats()["connections"] == 0)
        stats = daemon.core.stats()
        assert (stats["leases"], stats["reservations"]) == (0, 0)


# --- what a good client sees


@pytest.mark.parametrize("is_local", [True, False])
def test_blocks_written_over_the_socket_are_read_back(daemon: Daemon, is_local: bool) -> None:
    client = daemon.connect(address=daemon.address if is_local else daemon.tcp_address)
    hashes = chain(1, 12)
    assert put(client, hashes) == 12
    assert client.lookup(0, hashes, 0, None, WAIT_S) == (12, 12)
    assert client.match(hashes, 0, None, WAIT_S) == 12
    assert client.residency(hashes, 0, None, WAIT_S).tolist() == [1] * 12
    assert load(client, hashes) == 12
    stats = daemon.native.stats()
    assert stats["stored_bytes"] == stats["loaded_bytes"] == 12 * BLOCK_BYTES
    assert (stats["queried_blocks"], stats["hit_cpu_blocks"], stats["missed_blocks"]) == (12, 12, 0)
    uses = [(first, blocks) for _, first, _, blocks in daemon.native.hot_prefixes()]
    assert uses == [(hashes[0].tobytes(), 12)]
    counts, _ = daemon.native.latencies()["acquire"]
    assert sum(counts) == 1
    assert len(counts) == len(_native.LATENCY_BOUNDS) + 1
    client.close()


def test_eight_thousand_hashes_fit_in_one_call(daemon: Daemon) -> None:
    client = daemon.connect()
    hashes = chain(1, 8192)
    put(client, hashes[:4])
    assert client.lookup(0, hashes, 0, None, WAIT_S) == (4, 4)
    lease, offsets, _, _, _ = client.acquire(5.0, 0.0, 0, hashes, 0, None, WAIT_S)
    assert len(offsets) == 4
    assert client.release(np.array([lease, lease], np.uint64), WAIT_S).tolist() == [True, False]
    _, _, statuses = client.reserve(0.0, hashes, 0, None, WAIT_S)
    assert statuses[0] == 1
    assert statuses[-1] == NO_SPACE
    client.close()


def test_misses_are_told_apart(daemon: Daemon) -> None:
    client = daemon.connect()
    pending = chain(1, 2)
    client.reserve(0.0, pending, 0, None, WAIT_S)
    client.acquire(5.0, 0.0, 0, pending, 0, None, WAIT_S)
    client.acquire(5.0, 0.0, 0, chain(2, 3), 0, None, WAIT_S)
    client.acquire(5.0, 0.0, 1, chain(2, 3), 0, None, WAIT_S)  # a pin is no use, and not counted
    stats = daemon.native.stats()
    assert (stats["missed_pending_blocks"], stats["missed_absent_blocks"]) == (2, 3)
    assert stats["missed_blocks"] == stats["queried_blocks"] == 5
    client.close()


def test_map_gives_a_descriptor_that_cannot_be_written_through(daemon: Daemon) -> None:
    client = daemon.connect()
    hashes = chain(1, 1)
    put(client, hashes)
    fd, size = client.map(False, WAIT_S)
    try:
        assert size == daemon.core.arena_bytes
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        with pytest.raises(PermissionError):
            mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        arena = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        _, offsets, _, _, _ = client.acquire(-1.0, 0.0, 0, hashes, 0, None, WAIT_S)
        at = int(offsets[0])
        assert arena[at : at + BLOCK_BYTES] == payload(hashes)[0].tobytes()
        arena.close()
    finally:
        os.close(fd)
    with pytest.raises(_native.RemoteError, match="may not map") as refused:
        client.map(True, WAIT_S)
    assert refused.value.status == CONFIG
    client.close()


def test_writable_map_is_for_those_who_may(tmp_path: Path) -> None:
    with serving(tmp_path, tcp=True) as daemon:
        daemon.terms["may_map_writable"] = True
        client = daemon.connect()
        fd, _ = client.map(True, WAIT_S)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        os.close(fd)
        remote = daemon.connect(address=daemon.tcp_address)
        with pytest.raises(_native.RemoteError, match="may not map"):
            remote.map(False, WAIT_S)
        client.close()
        remote.close()


def test_client_without_a_namespace_may_only_call(daemon: Daemon) -> None:
    client = daemon.connect(b"no namespace")
    assert client.call(CALL, b"status", WAIT_S) == b"status"
    with pytest.raises(_native.RemoteError, match="no namespace"):
        client.match(chain(1, 1), 0, None, WAIT_S)
    client.close()


def test_who_connected_is_known(daemon: Daemon) -> None:
    client = daemon.connect()
    number = daemon.native.clients()[0]["client"]
    second = daemon.more_of(number)
    (shown,) = daemon.native.clients()
    assert (shown["pid"], shown["uid"], shown["label"]) == (os.getpid(), os.getuid(), "test")
    assert shown["connections"] == 2
    hello = daemon.of_kind(HELLO)[0]
    assert (hello.peer_pid, hello.peer_uid, hello.is_local) == (os.getpid(), os.getuid(), True)
    client.close()
    second.close()


# --- lifetimes


def test_last_connection_frees_what_the_client_held(daemon: Daemon) -> None:
    client = daemon.connect()
    number = daemon.native.clients()[0]["client"]
    second = daemon.more_of(number)
    put(client, chain(1, 4))
    client.acquire(-1.0, 0.0, 0, chain(1, 4), 0, None, WAIT_S)
    client.reserve(0.0, chain(2, 4), 0, None, WAIT_S)
    client.close()
    until(lambda: daemon.native.clients()[0]["connections"] == 1)
    assert daemon.core.stats()["leases"] == daemon.core.stats()["reservations"] == 1
    assert daemon.of_kind(GONE) == []
    second.close()
    until(lambda: daemon.of_kind(GONE))
    assert daemon.core.stats()["leases"] == daemon.core.stats()["reservations"] == 0
    assert [task.client for task in daemon.of_kind(GONE)] == [number]


def test_reply_to_a_client_that_is_gone_is_dropped(daemon: Daemon) -> None:
    daemon.held_back.add(CALL)
    raw = daemon.raw(greeted=True)
    raw.sendall(frame(CALL, b"slow"))
    until(lambda: daemon.of_kind(CALL))
    raw.close()
    until(lambda: daemon.of_kind(GONE))
    (task,) = daemon.of_kind(CALL)
    assert not daemon.native.reply(task.id, b"too late")
    assert not daemon.native.add_client(
        task.connection, 99, daemon.core.new_owner(), 0, **daemon.terms
    )
    assert not daemon.native.join_client(task.connection, 1)


def test_hang_up_comes_after_the_reply(daemon: Daemon) -> None:
    def answer(task: _native.Task) -> bytes:
        return b"bye"

    daemon.held_back.add(CALL)
    raw = daemon.raw(greeted=True)
    raw.sendall(frame(CALL))
    until(lambda: daemon.of_kind(CALL))
    (task,) = daemon.of_kind(CALL)
    assert daemon.native.reply(task.id, answer(task))
    daemon.native.hang_up(task.connection)
    assert receive_frame(raw) == (CALL, 0, b"bye")
    assert is_closed(raw)


def test_write_keeps_its_slots_while_other_connections_end_the_reservation(daemon: Daemon) -> None:
    raw = daemon.raw(greeted=True)
    other = daemon.more_of(daemon.native.clients()[0]["client"])
    hashes = chain(1, 2)
    blocks = payload(hashes)
    reservation, _, _ = other.reserve(0.0, hashes, 0, None, WAIT_S)
    sums = checksums(blocks)
    head = struct.pack("<QQQ", reservation, 0, 2) + sums.tobytes() + packed_chain(hashes)
    body = head + blocks.tobytes()
    raw.sendall(frame(WRITE, body)[: 16 + len(head) + 100])
    until(lambda: daemon.native.stats()["written_bytes"] == 100)
    with pytest.raises(_native.RemoteError, match="another connection") as refused:
        other.abort(reservation, WAIT_S)
    assert refused.value.status == IN_USE
    with pytest.raises(_native.RemoteError, match="another connection"):
        other.commit(reservation, 0, sums, hashes, 0, None, WAIT_S)
    raw.sendall(frame(WRITE, body)[16 + len(head) + 100 :])
    assert receive_frame(raw) == (WRITE, 0, struct.pack("<QBB", 0, 1, 1))
    assert load(other, hashes) == 2
    raw.close()
    other.close()


def test_commit_does_not_publish_what_others_left_in_the_slots(daemon: Daemon) -> None:
    """Who may not write in place has written nothing that a COMMIT could publish."""
    victim, thief = daemon.connect(), daemon.connect()
    put(victim, chain(1, 64))
    daemon.core.clear(daemon.namespace_id)
    hashes = chain(2, 2)
    reservation, _, _ = thief.reserve(0.0, hashes, 0, None, WAIT_S)
    with pytest.raises(_native.RemoteError, match="may not write in place") as refused:
        thief.commit(reservation, 0, np.zeros(2, np.uint64), hashes, 0, None, WAIT_S)
    assert refused.value.status == CONFIG
    assert thief.match(hashes, 0, None, WAIT_S) == 0
    blocks = payload(hashes)
    thief.write(
        reservation, 0, checksums(blocks), hashes, 0, None, addresses(blocks), BLOCK_BYTES, WAIT_S
    )
    assert load(thief, hashes) == 2
    victim.close()
    thief.close()


def test_a_read_under_way_keeps_its_blocks_whatever_the_client_releases(tmp_path: Path) -> None:
    """Else it would go on with what others have put there since."""
    with serving(tmp_path, slots=1024) as daemon:
        raw = daemon.raw(greeted=True)
        client = daemon.more_of(daemon.native.clients()[0]["client"])
        hashes = chain(1, 1000)  # 4 MB: more than any socket here buffers
        put(client, hashes)
        lease, offsets, _, _, _ = client.acquire(-1.0, 0.0, 0, hashes, 0, None, WAIT_S)
        raw.sendall(frame(READ, struct.pack("<QQQ", lease, 0, len(offsets))))
        until(lambda: daemon.core.stats()["leases"] == 2)
        guesses = np.arange(1, lease + 100, dtype=np.uint64)
        assert client.release(guesses, WAIT_S).sum() == 1  # its own
        reservation, _, statuses = client.reserve(0.0, chain(2, 3000), 0, None, WAIT_S)
        assert 0 < (statuses == 0).sum() < 1000
        client.abort(reservation, WAIT_S)
        assert receive_frame(raw) == (READ, 0, payload(hashes).tobytes())
        raw.close()
        client.close()


@pytest.mark.parametrize("ends_by", ["stop", "hang up", "bad frame"])
def test_slots_of_a_writer_that_we_hang_up_on_are_kept_from_others(
    tmp_path: Path, ends_by: str
) -> None:
    with serving(tmp_path) as daemon:
        daemon.terms["may_map_writable"] = True
        daemon.writer = (7, os.getpid(), 1)
        raw = daemon.raw(greeted=True)
        hashes = chain(1, 3)
        raw.sendall(frame(RESERVE, struct.pack("<d", 0.0) + packed_chain(hashes)))
        assert receive_frame(raw)[:2] == (RESERVE, 0)
        if ends_by == "stop":
            daemon.native.stop()
        elif ends_by == "hang up":
            daemon.native.hang_up(daemon.of_kind(HELLO)[0].connection)
        else:
            raw.sendall(frame(200))
        assert receive_all(raw)
        until(lambda: daemon.core.quarantine() == [(7, os.getpid(), 1, 3)])
        assert daemon.core.stats()["reservations"] == 0
        assert daemon.core.match(daemon.namespace_id, hashes, 0) == 0
        num_slots = free_slots(daemon.core)
        after = _native.StoreCore.adopt(daemon.core.arena_fd, "lru")
        after.add_namespace(BLOCK_BYTES)
        assert after.recover({0: 0})["quarantined"] == 3
        del after
        assert daemon.core.release_quarantine(7) == 3
        assert free_slots(daemon.core) == num_slots + 3
        assert daemon.core.tenant_stats(0)["cpu_used_bytes"] == 0
        daemon.writer = ()


def test_slots_of_a_writer_that_left_are_free(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        daemon.terms["may_map_writable"] = True
        daemon.writer = (7, os.getpid(), 1)
        client = daemon.connect()
        client.reserve(0.0, chain(1, 3), 0, None, WAIT_S)
        client.close()
        until(lambda: daemon.core.stats()["reservations"] == 0)
        assert daemon.core.quarantine() == []
        assert daemon.core.tenant_stats(0)["cpu_used_bytes"] == 0


def test_disconnect_in_the_middle_of_a_write_leaves_no_block(daemon: Daemon) -> None:
    client = daemon.connect()
    number = daemon.native.clients()[0]["client"]
    hashes = chain(1, 2)
    blocks = payload(hashes)
    reservation, _, _ = client.reserve(0.0, hashes, 0, None, WAIT_S)
    raw = daemon.raw()
    raw.sendall(frame(HELLO, number.to_bytes(8, "little")))
    receive_frame(raw)
    head = struct.pack("<QQQ", reservation, 0, 2) + checksums(blocks).tobytes()
    body = head + packed_chain(hashes) + blocks.tobytes()
    raw.sendall(frame(WRITE, body)[:-1])
    until(lambda: daemon.native.stats()["written_bytes"] == 2 * BLOCK_BYTES - 1)
    raw.close()
    until(lambda: daemon.native.clients()[0]["connections"] == 1)
    assert client.match(hashes, 0, None, WAIT_S) == 0
    client.abort(reservation, WAIT_S)  # still the client's, who may try again or give up
    assert daemon.core.stats()["reservations"] == 0
    client.close()


def test_disconnect_in_the_middle_of_a_read_ends_its_pin(tmp_path: Path) -> None:
    with serving(tmp_path, slots=1024) as daemon:
        raw = daemon.raw(greeted=True)
        client = daemon.more_of(daemon.native.clients()[0]["client"])
        hashes = chain(1, 1000)  # 4 MB: more than any socket here buffers
        put(client, hashes)
        lease, offsets, _, _, _ = client.acquire(-1.0, 0.0, 0, hashes, 0, None, WAIT_S)
        raw.sendall(frame(READ, struct.pack("<QQQ", lease, 0, len(offsets))))
        until(lambda: daemon.core.stats()["leases"] == 2)
        # The lease ends while its blocks are being sent: they stay where they are.
        assert client.release(np.array([lease], np.uint64), WAIT_S).all()
        assert daemon.core.stats()["leases"] == 1
        raw.close()
        until(lambda: daemon.core.stats()["leases"] == 0)
        client.close()


def test_stop_ends_clients_and_waiters(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "s")
    client = daemon.connect()
    put(client, chain(1, 3))
    client.acquire(-1.0, 0.0, 0, chain(1, 3), 0, None, WAIT_S)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            client.wait_for(WAIT_S, 2, chain(9, 2), 0, None, WAIT_S)
        except ConnectionError as error:
            failures.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    until(lambda: daemon.native.stats()["parked_requests"] == 1)
    daemon.close()
    waiter.join()
    assert len(failures) == 1
    assert daemon.core.stats()["leases"] == 0
    daemon.native.stop()
    assert daemon.native.next_task(0.0) is None


# --- refusals


def test_a_long_adopted_chain_is_checked_to_its_end(tmp_path: Path) -> None:
    """In turns: it has more bytes than one look at it checks."""
    core = _native.StoreCore(110 << 20, 2 << 20, False, "lru")
    core.add_namespace(BLOCK_BYTES)
    hashes = chain(1, 20_000)
    row = np.arange(BLOCK_BYTES, dtype=np.uint32).astype(np.uint8).reshape(1, BLOCK_BYTES)
    plan = ContiguousBlocks(row).plan
    ids = np.zeros(len(hashes), np.int64)
    assert core.put(core.new_owner(), 0, hashes, 0, None, plan, ids, 1)[1] == len(hashes)
    core = _native.StoreCore.adopt(core.arena_fd, "lru")
    core.add_namespace(BLOCK_BYTES)
    assert core.recover({0: 0})["adopted"] == len(hashes)
    with serving(tmp_path, core=core, threads=1) as daemon:
        client = daemon.connect()
        held = len(client.acquire(-1.0, 0.0, 0, hashes, 0, None, WAIT_S)[1])
        assert held == len(hashes)
        assert core.stats()["unverified"] == 0
        assert daemon.native.stats()["parked_requests"] == 0
        client.close()


def test_write_with_a_wrong_checksum_is_not_stored(daemon: Daemon) -> None:
    client = daemon.connect()
    hashes = chain(1, 3)
    blocks = payload(hashes)
    reservation, _, _ = client.reserve(0.0, hashes, 0, None, WAIT_S)
    sums = checksums(blocks)
    sums[1] ^= np.uint64(1)
    level, matched = client.write(
        reservation, 0, sums, hashes, 0, None, addresses(blocks), BLOCK_BYTES, WAIT_S
    )
    assert (level, matched.tolist()) == (0, [True, False, True])
    assert client.match(hashes, 0, None, WAIT_S) == 1
    stats = daemon.native.stats()
    assert (stats["integrity_failures"], stats["stored_bytes"]) == (1, 2 * BLOCK_BYTES)
    assert daemon.core.stats()["reservations"] == 0
    assert load(client, hashes) == 1
    client.close()


def test_stale_leases_and_reservations_are_refused_and_the_connection_goes_on(
    daemon: Daemon,
) -> None:
    client = daemon.connect()
    hashes = chain(1, 2)
    put(client, hashes)
    lease, _, _, _, _ = client.acquire(-1.0, 0.0, 0, hashes, 0, None, WAIT_S)
    room = np.zeros((2, BLOCK_BYTES), np.uint8)
    with pytest.raises(_native.RemoteError, match="lease") as refused:
        client.read(lease, 1, addresses(room), BLOCK_BYTES, WAIT_S)
    assert refused.value.status == STORE_CLOSED
    client.release(np.array([lease], np.uint64), WAIT_S)
    with pytest.raises(_native.RemoteError, match="lease"):
        client.read(lease, 0, addresses(room), BLOCK_BYTES, WAIT_S)
    assert not room.any()
    blocks = payload(hashes)  # to be kept: the client is given its address only
    sums = checksums(blocks)
    with pytest.raises(_native.RemoteError, match="no reservation"):
        client.commit(12345, 0, sums, hashes, 0, None, WAIT_S)
    with pytest.raises(_native.RemoteError, match="no reservation") as refused:
        client.write(12345, 0, sums, hashes, 0, None, addresses(blocks), BLOCK_BYTES, WAIT_S)
    assert refused.value.status == STORE_CLOSED
    client.abort(12345, WAIT_S)
    assert client.match(hashes, 0, None, WAIT_S) == 2
    client.close()


def test_more_leases_than_a_client_may_have_are_not_released_one_by_one(daemon: Daemon) -> None:
    client = daemon.connect()
    assert not client.release(np.arange(1 << 20, dtype=np.uint64), WAIT_S).any()
    with pytest.raises(_native.RemoteError, match="more leases than") as refused:
        client.release(np.arange((1 << 20) + 1, dtype=np.uint64), WAIT_S)
    assert refused.value.status == CONFIG
    assert client.ping(b"on", WAIT_S) == b"on"
    client.close()


def test_another_clients_lease_and_reservation_are_not_ours(daemon: Daemon) -> None:
    owner, thief = daemon.connect(), daemon.connect()
    hashes = chain(1, 2)
    put(owner, hashes)
    lease, _, _, _, _ = owner.acquire(-1.0, 0.0, 0, hashes, 0, None, WAIT_S)
    reservation, _, _ = owner.reserve(0.0, chain(2, 2), 0, None, WAIT_S)
    room = np.zeros((1, BLOCK_BYTES), np.uint8)
    with pytest.raises(_native.RemoteError):
        thief.read(lease, 0, addresses(room), BLOCK_BYTES, WAIT_S)
    assert not thief.release(np.array([lease], np.uint64), WAIT_S)[0]
    with pytest.raises(_native.RemoteError):
        thief.commit(reservation, 0, np.zeros(2, np.uint64), chain(2, 2), 0, None, WAIT_S)
    thief.abort(reservation, WAIT_S)
    assert daemon.core.stats()["reservations"] == 1
    owner.close()
    thief.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        frame(HELLO, magic=b"KVS1"),
        bytes(16),
        b"\xff" * 4096,
    ],
)
def test_foreign_bytes_end_the_connection(daemon: Daemon, sent: bytes) -> None:
    raw = daemon.raw()
    raw.sendall(sent)
    assert is_closed(raw)
    assert daemon.native.stats()["protocol_errors"] == 1


@pytest.mark.parametrize(
    ("greeted", "sent", "message"),
    [
        (False, frame(MATCH, packed_chain(chain(1, 1))), "not admitted"),
        (False, frame(CALL), "not admitted"),
        (False, frame(HELLO, length=(64 << 10) + 1), "at most 65536"),
        (True, frame(HELLO), "admitted already"),
        (True, frame(AUTH), "admitted already"),
        (True, frame(MATCH, length=(64 << 20) + 1), "at most 67108864"),
        (True, frame(PING, length=(64 << 10) + 1), "at most 65536"),
        (True, frame(99), "operation 99"),
        (True, frame(0), "operation 0"),
        (True, frame(MATCH, packed_chain(chain(1, 2))[:-1]), "no such request"),
        (True, frame(MATCH, packed_chain(chain(1, 2)) + b"x"), "no such request"),
        (True, frame(MATCH, packed_chain(chain(1, 2), 5)), "no such request"),
        (True, frame(ACQUIRE, struct.pack("<ddQ", float("nan"), 0, 0)), "no such request"),
        (True, frame(WRITE, bytes(24)), "do not fit"),
        (True, frame(WRITE, struct.pack("<QQQ", 1, 0, 1 << 61), length=1 << 31), "do not fit"),
        (
            True,
            frame(WRITE, struct.pack("<QQQ", 0, 0, 0) + packed_chain(chain(1, 1)), length=105),
            "payload",
        ),
    ],
)
def test_requests_out_of_order_get_a_reason_and_are_hung_up_on(
    daemon: Daemon, greeted: bool, sent: bytes, message: str
) -> None:
    raw = daemon.raw(greeted=greeted)
    raw.sendall(sent)
    _, status, body = receive_frame(raw)
    assert status == INCOMPATIBLE
    assert message in body.decode()
    assert is_closed(raw)
    assert daemon.native.stats()["protocol_errors"] == 1


def test_greetings_are_counted(daemon: Daemon) -> None:
    daemon.held_back.add(HELLO)
    raw = daemon.raw()
    for i in range(4):
        raw.sendall(frame(HELLO))
        until(functools.partial(lambda count: len(daemon.of_kind(HELLO)) == count, i + 1))
        daemon.native.reply(daemon.of_kind(HELLO)[i].id, b"challenge")
        assert receive_frame(raw) == (HELLO, 0, b"challenge")
    raw.sendall(frame(HELLO))
    assert receive_frame(raw)[1] == INCOMPATIBLE
    assert is_closed(raw)
    daemon.held_back.clear()


# --- slow and greedy peers


def test_a_frame_may_come_byte_by_byte_and_two_in_one(daemon: Daemon) -> None:
    raw = daemon.raw()
    for byte in frame(HELLO) + frame(PING, b"slow"):
        raw.sendall(bytes([byte]))
    assert receive_frame(raw)[0] == HELLO
    assert receive_frame(raw) == (PING, 0, b"slow")
    raw.sendall(b"".join(frame(PING, b"%d" % i) for i in range(500)))
    assert [receive_frame(raw)[2] for _ in range(500)] == [b"%d" % i for i in range(500)]
    raw.close()


def test_half_frames_and_silence_hold_up_nobody(daemon: Daemon) -> None:
    halves = [daemon.raw(greeted=i % 2 == 0) for i in range(20)]
    for i, raw in enumerate(halves):
        raw.sendall(frame(HELLO if i % 2 else WRITE, length=60_000)[: 4 + i])
    client = daemon.connect()
    put(client, chain(1, 2))
    assert load(client, chain(1, 2)) == 2
    client.close()
    for raw in halves:
        raw.close()


def test_a_peer_that_never_reads_is_not_read_from(daemon: Daemon) -> None:
    raw = daemon.raw(greeted=True)
    raw.setblocking(False)
    pings = frame(PING, bytes(60_000)) * 280  # 16 MB
    sent = 0
    # What is taken and not given back fits in the sockets' buffers and one frame. The server is
    # given time to take more if it did: it has answered somebody else meanwhile.
    for _ in range(50):
        with contextlib.suppress(BlockingIOError):
            while sent < len(pings):
                sent += raw.send(memoryview(pings)[sent:])
        other = daemon.connect()
        other.close()
    assert sent < 1 << 23
    client = daemon.connect()
    assert client.ping(b"x", WAIT_S) == b"x"
    client.close()
    raw.close()


def test_thousands_of_connects(daemon: Daemon) -> None:
    for i in range(2000):
        raw = daemon.raw()
        if i % 3 == 0:
            raw.sendall(frame(HELLO))
        raw.close()
    until(lambda: daemon.native.stats()["accepted_connections"] == 2000)


def test_connections_beyond_the_bound_are_closed_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, connections_max=3) as daemon:
        held = [daemon.raw(greeted=True) for _ in range(3)]
        assert is_closed(daemon.raw())
        until(lambda: daemon.native.stats()["connections_refused"] == 1)
        held.pop().close()
        until(lambda: daemon.native.stats()["connections"] == 2)
        daemon.connect().close()


def test_out_of_descriptors_accepts_again_later(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        daemon.connect().close()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raw = socket.socket(socket.AF_UNIX)
        raw.settimeout(WAIT_S)
        spare = os.dup(0)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        try:
            raw.connect(daemon.address.removeprefix("unix:"))
            raw.sendall(frame(HELLO))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert receive_frame(raw)[0] == HELLO
        raw.close()


def test_busy_daemon_says_so_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, tasks_max=2) as daemon:
        clients = [daemon.connect() for _ in range(8)]
        stuck = threading.Event()
        daemon.answers[CALL] = lambda task: b"done" if stuck.wait(WAIT_S) else b""
        replies: list[bytes | _native.RemoteError] = []

        def call(client: _native.Connection) -> None:
            try:
                replies.append(client.call(CALL, b"", WAIT_S))
            except _native.RemoteError as error:
                replies.append(error)

        threads = [threading.Thread(target=call, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        until(lambda: daemon.native.stats()["refused_busy"] == 5)  # one is answered, two wait
        until(lambda: len(replies) == 5)
        assert all(isinstance(r, _native.RemoteError) and r.status == UNAVAILABLE for r in replies)
        stuck.set()
        for thread in threads:
            thread.join()
        assert replies.count(b"done") == 3
        for client in clients:
            client.close()


# --- waiting


def test_wait_for_ends_when_the_blocks_are_there(daemon: Daemon) -> None:
    waiting, writing = daemon.connect(), daemon.connect()
    hashes = chain(1, 4)
    seen: list[int] = []
    waiter = threading.Thread(
        target=lambda: seen.append(waiting.wait_for(WAIT_S, 4, hashes, 0, None, WAIT_S))
    )
    waiter.start()
    until(lambda: daemon.native.stats()["parked_requests"] == 1)
    put(writing, hashes[:2])
    put(writing, hashes)
    waiter.join()
    assert seen == [4]
    assert waiting.wait_for(0.0, 4, chain(2, 4), 0, None, WAIT_S) == 0
    assert waiting.wait_for(0.01, 4, chain(2, 4), 0, None, WAIT_S) == 0
    assert daemon.native.stats()["parked_requests"] == 0
    waiting.close()
    writing.close()


def test_reserve_waits_for_room(daemon: Daemon) -> None:
    holding, waiting = daemon.connect(), daemon.connect()
    capacity = 1000
    hashes = chain(1, capacity)
    reservation, _, statuses = holding.reserve(0.0, hashes, 0, None, WAIT_S)
    assert statuses[-1] == NO_SPACE
    got: list[list[int]] = []
    other = chain(2, 8)

    def reserve() -> None:
        mine, _, statuses = waiting.reserve(WAIT_S, other, 0, None, WAIT_S)
        got.append(statuses.tolist())
        waiting.abort(mine, WAIT_S)

    waiter = threading.Thread(target=reserve)
    waiter.start()
    until(lambda: daemon.native.stats()["parked_requests"] == 1)
    holding.abort(reservation, WAIT_S)
    waiter.join()
    assert got == [[0] * 8]
    holding.close()
    waiting.close()


def test_reserve_that_waits_in_vain_gets_what_there_is(daemon: Daemon) -> None:
    client = daemon.connect()
    reservation, _, statuses = client.reserve(0.02, chain(1, 1000), 0, None, WAIT_S)
    assert statuses[0] == 0
    assert statuses[-1] == NO_SPACE
    client.abort(reservation, WAIT_S)
    client.close()


def test_waiter_that_disconnects_is_forgotten(daemon: Daemon) -> None:
    raw = daemon.raw(greeted=True)
    raw.sendall(frame(WAIT_FOR, struct.pack("<dQ", WAIT_S, 2) + packed_chain(chain(1, 2))))
    until(lambda: daemon.native.stats()["parked_requests"] == 1)
    raw.close()
    until(lambda: daemon.native.stats()["parked_requests"] == 0)


def test_drain_refuses_reservations_and_waits_for_open_ones(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        client = daemon.connect()
        reservation, _, _ = client.reserve(0.0, chain(1, 2), 0, None, WAIT_S)
        assert not daemon.native.drain(0.01)
        none, _, statuses = client.reserve(5.0, chain(2, 2), 0, None, WAIT_S)
        assert (none, statuses.tolist()) == (0, [NO_SPACE, NO_SPACE])
        client.abort(reservation, WAIT_S)
        assert daemon.native.drain(WAIT_S)
        client.close()


# --- what reaches Python


def test_slow_acquire_becomes_a_task_and_fast_ones_do_not(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        daemon.terms["notices"] = True
        client = daemon.connect()
        hashes = chain(1, 4)
        put(client, hashes[:2])
        _, offsets, _, _, _ = client.acquire(5.0, WAIT_S, 0, hashes, 0, None, WAIT_S)
        assert len(offsets) == 2  # nothing more is available anywhere: no task
        assert daemon.of_kind(ACQUIRE) == []
        until(lambda: daemon.of_kind(200))
        (stored,) = daemon.of_kind(200)
        assert stored.body == packed_chain(hashes[:2])
        client.close()


def test_acknowledged_commit_is_committed_before_python_sees_it(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        daemon.terms["notices"] = True
        daemon.answers[COMMIT] = daemon.answers[WRITE] = lambda task: struct.pack("<Q", 2)
        client = daemon.connect()
        hashes = chain(1, 2)
        blocks = payload(hashes)
        reservation, _, _ = client.reserve(0.0, hashes, 0, None, WAIT_S)
        level, matched = client.write(
            reservation, 1, checksums(blocks), hashes, 0, None, addresses(blocks), 4096, WAIT_S
        )
        assert (level, matched.tolist()) == (2, [True, True])
        (task,) = daemon.of_kind(WRITE)
        expected = struct.pack("<QQQ", 0, 1, 2) + checksums(blocks).tobytes()
        assert task.body == expected + packed_chain(hashes)
        assert client.match(hashes, 0, None, WAIT_S) == 2
        # All there already: nothing reserved, the level is still asked for.
        assert client.commit(0, 2, np.zeros(0, np.uint64), hashes, 0, None, WAIT_S) == 2
        client.close()


def test_uses_and_prefetches_leave_notices(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        daemon.terms["notices"] = daemon.terms["notice_used"] = True
        client = daemon.connect()
        hashes = chain(1, 3)
        put(client, hashes[:2])
        client.acquire(5.0, 0.0, 0, hashes, 0, None, WAIT_S)
        client.lookup(1, hashes, 0, None, WAIT_S)  # all that is available is in DRAM already
        until(lambda: daemon.of_kind(202))
        assert [task.body for task in daemon.of_kind(202)] == [packed_chain(hashes[:2])]
        assert daemon.of_kind(201) == []
        client.close()


# --- the client's side


@pytest.fixture
def fake_peer() -> Iterator[tuple[socket.socket, _native.Connection]]:
    """A peer that the test plays itself, and a connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = _native.Connection(f"tcp:127.0.0.1:{listener.getsockname()[1]}", WAIT_S)
        peer, _ = listener.accept()
        yield peer, connection
        peer.close()
        connection.close()


def _reply(op: int, body: bytes, request: int = 1, status: int = 0) -> bytes:
    return struct.pack("<4sBBHII", b"KVS2", op, status, 0, len(body), request) + body


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        _reply(MATCH, bytes(8), request=2),
        _reply(PING, bytes(8)),
        _reply(MATCH, bytes(7)),
        _reply(MATCH, bytes(9)),
        _reply(MATCH, bytes(8)) + b"more",
        struct.pack("<4sBBHII", b"KVS2", MATCH, 0, 0, 0xFFFFFFFF, 1),
    ],
)
def test_client_refuses_what_is_no_reply(
    fake_peer: tuple[socket.socket, _native.Connection], reply: bytes
) -> None:
    peer, connection = fake_peer
    peer.sendall(reply)
    with pytest.raises(_native.ProtocolError):
        connection.match(chain(1, 1), 0, None, WAIT_S)
    assert connection.fileno() == -1
    with pytest.raises(ConnectionError, match="closed"):
        connection.ping(b"", WAIT_S)


def test_client_gives_up_at_its_deadline_however_slowly_bytes_drip(
    fake_peer: tuple[socket.socket, _native.Connection],
) -> None:
    peer, connection = fake_peer
    stop = threading.Event()

    def drip() -> None:
        peer.sendall(_reply(PING, bytes(60_000))[:16])
        while not stop.wait(0.002):
            try:
                peer.sendall(b"x")
            except OSError:
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(TimeoutError):
        connection.ping(bytes(60_000), 0.1)
    stop.set()
    dripping.join()
    assert connection.fileno() == -1


def test_client_sees_a_peer_that_goes_away(
    fake_peer: tuple[socket.socket, _native.Connection],
) -> None:
    peer, connection = fake_peer
    peer.sendall(_reply(PING, b"abc")[:-1])
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError):
        connection.ping(b"abc", WAIT_S)


def test_close_from_another_thread_ends_the_call(
    fake_peer: tuple[socket.socket, _native.Connection],
) -> None:
    peer, connection = fake_peer
    failures: list[BaseException] = []

    def call() -> None:
        try:
            connection.ping(b"", WAIT_S)
        except ConnectionError as error:
            failures.append(error)

    calling = threading.Thread(target=call)
    calling.start()
    peer.recv(16)
    with pytest.raises(RuntimeError, match="another thread"):
        connection.ping(b"", WAIT_S)
    connection.close()
    calling.join()
    assert len(failures) == 1
    assert connection.fileno() == -1


def test_nobody_there_is_a_connection_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        _native.Connection(f"unix:{tmp_path}/nothing", 1.0)
    with socket.socket(socket.AF_UNIX) as bound:  # bound, but nobody listens
        bound.bind(str(tmp_path / "s"))
        with pytest.raises(ConnectionError):
            _native.Connection(f"unix:{tmp_path}/s", 1.0)
    for address in ("", "unix:", "tcp:host", "tcp::1", "http://x", "unix:" + "x" * 200):
        with pytest.raises(ValueError, match="address"):
            _native.Connection(address, 1.0)


def test_full_backlog_ends_at_the_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        waiting: list[_native.Connection] = []
        with contextlib.suppress(TimeoutError):
            while len(waiting) < 8:
                waiting.append(_native.Connection(f"unix:{tmp_path}/s", 0.05))
        assert len(waiting) < 8


@given(
    hashes=st.lists(st.binary(min_size=32, max_size=32), max_size=20),
    start=st.integers(-5, 2**32 - 21),
    parent=st.none() | st.binary(min_size=32, max_size=32),
)
def test_chains_arrive_as_they_were_sent(
    round_trip: Daemon, hashes: list[bytes], start: int, parent: bytes | None
) -> None:
    if start > 0 and parent is None:
        return
    array = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    client = round_trip.connect()
    # WRITE with nothing reserved and an ack hands the chain to Python as it was received.
    before = len(round_trip.of_kind(WRITE))
    none = np.zeros(0, np.uint64)
    client.write(0, 1, none, array, start, parent, none, BLOCK_BYTES, WAIT_S)
    task = round_trip.of_kind(WRITE)[before]
    assert task.body[:24] == struct.pack("<QQQ", 0, 1, 0)
    assert task.body[24:] == packed_chain(array, start, parent)
    client.close()


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with serving(tmp_path_factory.mktemp("net")) as daemon:
        daemon.terms["notices"] = True
        daemon.answers[WRITE] = lambda task: struct.pack("<Q", 1)
        yield daemon

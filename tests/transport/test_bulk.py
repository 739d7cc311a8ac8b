"""The bulk server and its links, natively, over loopback: exact bytes or an honest status.

Every batch is compared with numpy, byte for byte; greetings and requests that are wrong are written
by hand. Nothing may hang: every wait has a bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import _native
from tests.transport.bulk_support import (
    BOUND_S,
    DAMAGED,
    EPOCH,
    HEADER,
    HELLO,
    OK,
    PROOF,
    READ,
    READ_ONLY,
    REFUSED,
    REGION,
    SECRET,
    SIZE,
    WRITE,
    Call,
    Served,
    frame,
    greeted,
    noise,
    request,
    take,
)
from tests.transport.bulk_support import own as own
from tests.transport.bulk_support import served as served


def test_bytes_and_checksums_are_exact_both_ways(own: Served) -> None:
    link = own.link()
    here = np.zeros(SIZE, np.uint8)
    sizes = [1, 63, 64, 65, 240, 241, 4096, 4097, 300_001, 0, 256 << 10]
    at = np.cumsum([0, *sizes[:-1]])
    back = SIZE - at - sizes
    sums = [_native.xxh3(own.memory[o : o + n]) for o, n in zip(back, sizes, strict=True)]
    assert Call(link, here, at, back, sizes, sums).read() == [OK] * len(sizes)
    for i, size in enumerate(sizes):
        assert np.array_equal(here[at[i] :][:size], own.memory[back[i] :][:size])
    mine = noise(3, SIZE)
    sums = [_native.xxh3(mine[o : o + n]) for o, n in zip(at, sizes, strict=True)]
    assert Call(link, mine, at, back, sizes, sums).write() == [OK] * len(sizes)
    for i, size in enumerate(sizes):
        assert np.array_equal(mine[at[i] :][:size], own.memory[back[i] :][:size])
    assert own.server.counters()["written_bytes"] == sum(sizes)
    assert link.close()


def test_a_wrong_checksum_is_damage_of_that_piece_only(served: Served) -> None:
    link = served.link()
    here = np.zeros(3 * 5000, np.uint8)
    good = [_native.xxh3(served.memory[i * 5000 :][:5000]) for i in range(3)]
    at = [0, 5000, 10_000]
    call = Call(link, here, at, at, [5000] * 3, [good[0], good[1] ^ 1, good[2]])
    assert call.read() == [OK, DAMAGED, OK]
    before = served.server.counters()["damaged_pieces"]
    here[:] = served.memory[: 3 * 5000]
    assert call.write() == [OK, DAMAGED, OK]
    assert served.server.counters()["damaged_pieces"] == before + 1
    assert link.is_alive()


def test_what_is_not_in_a_region_costs_only_itself(served: Served) -> None:
    link = served.link()
    here = np.zeros(4096, np.uint8)
    beyond = 2**64 - 1
    remote = [0, SIZE - 99, SIZE, beyond, beyond - 99, 0, 100]
    lengths = [100, 100, 1, 1, 100, SIZE + 1, 100]
    call = Call(link, here, [0] * 7, remote, lengths)
    expected = [OK, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, OK]
    big = np.zeros(SIZE + 1, np.uint8)
    assert Call(link, big, [0] * 7, remote, lengths).read() == expected
    assert call.read(region=99) == [REFUSED] * 7
    # A length that no memory has is refused here.
    absurd = Call(link, here, [0] * 3, [0, 0, 0], [10, 2**63, 10])
    assert absurd.read() == [OK, REFUSED, OK]
    frozen = served.frozen.copy()
    assert Call(link, big, [0] * 2, [0, 5], [100, 100]).write(region=READ_ONLY) == [REFUSED] * 2
    assert np.array_equal(frozen, served.frozen)
    memory = served.memory.copy()
    big[:] = 0
    wrote = Call(link, big, [0, 0, 0], [0, SIZE - 10, 300], [100, 11, 100]).write()
    assert wrote == [OK, REFUSED, OK]
    memory[:100] = memory[300:400] = 0
    assert np.array_equal(memory, served.memory)
    served.memory[:] = noise(1, SIZE)
    assert link.is_alive()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_batches_are_as_numpy_has_them(served: Served, data: st.DataObject) -> None:
    pieces = data.draw(
        st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 70_000)), max_size=9)
    )
    pieces = pieces * data.draw(st.sampled_from([1, 1, 1, 150]))
    lengths = [min(length, 900) if len(pieces) > 100 else length for _, length in pieces]
    offsets = [offset for offset, _ in pieces]
    at = np.cumsum([0, *lengths])
    here = noise(len(pieces), max(1, int(at[-1])))
    inside = [o + n <= SIZE for o, n in zip(offsets, lengths, strict=True)]
    with contextlib.closing(served.link(connections=data.draw(st.integers(1, 3)))) as link:
        call = Call(link, here, at[:-1], offsets, lengths)
        if data.draw(st.booleans()):
            expected = here.copy()
            for i, n in enumerate(lengths):
                if inside[i]:
                    expected[at[i] :][:n] = served.memory[offsets[i] :][:n]
            assert call.read() == [OK if fits else REFUSED for fits in inside]
            assert np.array_equal(here, expected)
        else:
            expected = served.memory.copy()
            for i, n in enumerate(lengths):
                if inside[i]:
                    expected[offsets[i] :][:n] = here[at[i] :][:n]
            assert call.write() == [OK if fits else REFUSED for fits in inside]
            assert np.array_equal(served.memory, expected)


def test_a_large_batch_is_shared_among_connections() -> None:
    size = 32 << 20
    served = Served(size)
    try:
        link = served.link(connections=3)
        here = np.zeros(size, np.uint8)
        at = np.arange(0, size, 1 << 20)
        sums = [_native.xxh3(served.memory[o:][: 1 << 20]) for o in at]
        call = Call(link, here, at, at, [1 << 20] * len(at), sums)
        assert set(call.read()) == {OK}
        assert np.array_equal(here, served.memory)
        assert served.server.counters()["connections"] == 3
        here ^= 255
        assert set(Call(link, here, at, at, [1 << 20] * len(at)).write()) == {OK}
        assert np.array_equal(here, served.memory)
    finally:
        served.server.stop()


def test_threads_move_at_a_time(served: Served) -> None:
    link = served.link()
    failures: list[object] = []

    def work(seed: int) -> None:
        here = np.zeros(200_000, np.uint8)
        rng = np.random.default_rng(seed)
        for _ in range(20):
            offset, length = int(rng.integers(0, SIZE // 2)), int(rng.integers(1, 200_000))
            statuses = Call(link, here, [0], [offset], [length]).read(region=READ_ONLY)
            if statuses != [OK] or (here[:length] != served.frozen[offset:][:length]).any():
                failures.append((seed, offset, length, statuses))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert not failures


# --- greetings


def test_another_secret_or_epoch_is_refused_clearly(own: Served) -> None:
    with pytest.raises(_native.RemoteError, match="the secret is another one"):
        own.link(secret=b"x" * 32)
    with pytest.raises(_native.RemoteError, match="epoch 77, not 78"):
        own.link(epoch=EPOCH + 1)
    own.wait_for(refused_greetings=2, connections=0)
    own.server.set_info(b"who I am")
    link = own.link(epoch=0)
    assert link.info(BOUND_S) == b"who I am"
    assert link.close()
    with pytest.raises(ValueError, match="secret"):
        own.link(secret=b"short")


def test_a_server_that_cannot_prove_the_secret_is_not_believed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def lie() -> None:
            peer, _ = listener.accept()
            with peer:
                said = take(peer)
                assert said is not None
                peer.sendall(frame(HELLO, bytes(32), said[1]))
                said = take(peer)
                assert said is not None
                peer.sendall(frame(PROOF, struct.pack("<Q", EPOCH) + bytes(32), said[1]))

        thread = threading.Thread(target=lie)
        thread.start()
        with pytest.raises(_native.ProtocolError, match="did not prove"):
            _native.BulkLink(address, SECRET, EPOCH, 5.0)
        thread.join(BOUND_S)


def test_an_answer_that_comes_before_its_request_was_sent_is_none() -> None:
    """The rest of the request is still to be sent from its memory."""
    pieces, size = 1024, 16 << 10
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def lie() -> None:
            peer, _ = listener.accept()
            with peer:
                welcome(peer)
                assert peer.recv(1)
                peer.sendall(frame(WRITE, bytes([OK]) * 128, 3))
                while peer.recv(1 << 20):
                    pass

        thread = threading.Thread(target=lie)
        thread.start()
        link = _native.BulkLink(address, SECRET, EPOCH, 2.0)
        here = np.zeros(pieces * size, np.uint8)
        places = np.arange(pieces) * size
        call = Call(link, here, places, places, [size] * pieces)
        # The first 128 may be with the kernel by then: that lie cannot be told from an answer.
        assert OK not in call.write(timeout=5.0)[128:]
        link.close()
        thread.join(BOUND_S)
        assert not thread.is_alive()


def welcome(peer: socket.socket) -> None:
    """Greet a client as a server does that knows the secret."""
    hello = take(peer)
    assert hello is not None
    challenge = bytes(32)
    peer.sendall(frame(HELLO, challenge, hello[1]))
    proof = take(peer)
    assert proof is not None
    said = b"kvstore-bulk server" + hello[0] + challenge + struct.pack("<Q", EPOCH)
    sealed = struct.pack("<Q", EPOCH) + hmac.new(SECRET, said, hashlib.sha256).digest()
    peer.sendall(frame(PROOF, sealed, proof[1]))


def test_strangers_do_not_keep_peers_out() -> None:
    served = Served(connections_max=3)
    host, port = served.address.split(":")
    strangers = []
    try:
        link = served.link()
        for _ in range(8):
            strangers.append(socket.create_connection((host, int(port)), BOUND_S))
        served.wait_for(accepted_connections=9)
        other = served.link()
        here = np.zeros(100, np.uint8)
        for each in (link, other):
            assert Call(each, here, [0], [0], [100]).read() == [OK]
            each.close()
    finally:
        for stranger in strangers:
            stranger.close()
        served.server.stop()


def test_connections_beyond_the_most_are_closed() -> None:
    served = Served(connections_max=2)
    try:
        links = [served.link(), served.link()]
        with pytest.raises(ConnectionError):
            served.link()
        assert served.server.counters()["refused_connections"] >= 1
        assert links[0].close()
        served.wait_for(connections=1)
        served.link().close()
    finally:
        served.server.stop()


BAD = {
    "no frame": b"\xff" * 200,
    "another magic": frame(READ, request(1), magic=b"KVS1"),
    "an unknown operation": frame(200, request(1)),
    "a greeting again": frame(HELLO, bytes(48)),
    "an operation of the daemon": frame(1, bytes(40)),
    "no pieces": frame(READ, request(0, ranges=bytes(16))),
    "more pieces than there are": frame(READ, request(1000, ranges=bytes(16))),
    "more pieces than allowed": HEADER.pack(b"KVS2", READ, 0, 0, 2**31, 1) + bytes(64),
    "fewer pieces than there are": frame(READ, request(1, ranges=bytes(32))),
    "unknown flags": frame(WRITE, request(1, flags=2)),
    "checksums of a read": frame(READ, request(1, flags=1) + bytes(8)),
    "a length of no memory": frame(WRITE, request(1, ranges=struct.pack("<QQ", 0, 2**49))),
    "a damaged sum": frame(READ, request(1))[:-1] + b"\0",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_request_ends_its_connection_only(own: Served, name: str) -> None:
    link = own.link()
    with greeted(own.address) as peer:
        peer.sendall(BAD[name])
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(1) == b""
    own.wait_for(protocol_errors=1, connections=1)
    here = np.zeros(100, np.uint8)
    assert Call(link, here, [0], [0], [100]).read() == [OK]


@pytest.mark.parametrize("sent", [1, 15, 16, 55, 56, 71, 80])
def test_half_a_request_leaves_nothing_behind(own: Served, sent: int) -> None:
    with greeted(own.address) as peer:
        peer.sendall((frame(WRITE, request(2)) + bytes(32))[:sent])
    own.wait_for(connections=0)
    assert own.regions.remove(REGION, BOUND_S)


def test_nobody_gets_anything_before_the_greeting(own: Served) -> None:
    host, port = own.address.split(":")
    with socket.create_connection((host, int(port)), BOUND_S) as peer:
        peer.sendall(frame(READ, request(1)))
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(1) == b""
    own.wait_for(protocol_errors=1, read_bytes=0)


# --- the limit


def test_the_limit_holds_for_all_connections_together() -> None:
    rate = 16 << 20
    served = Served(4 << 20, bytes_per_second=rate)
    try:
        here = np.zeros((2, 4 << 20), np.uint8)
        began = time.monotonic()
        threads = [
            threading.Thread(
                target=lambda row: Call(served.link(), row, [0], [0], [4 << 20]).read(),
                args=(row,),
            )
            for row in here
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND_S)
        assert time.monotonic() - began > 0.9 * (8 << 20) / rate
        assert np.array_equal(here[0], served.memory)
        assert np.array_equal(here[1], served.memory)
    finally:
        served.server.stop()

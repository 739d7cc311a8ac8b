"""The bulk protocol when things go wrong: peers are killed, frozen, cut off and replaced, moves are
cancelled, regions removed under them, and a proxy damages what passes through it.

A piece that is OK is right, byte for byte, and nothing hangs: every wait has a bound.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import _native
from tests.transport.bulk_support import (
    BOUND_S,
    CANCELLED,
    DAMAGED,
    EPOCH,
    LATE,
    LOST,
    OK,
    READ,
    REFUSED,
    REGION,
    SECRET,
    SIZE,
    SLACK_S,
    WRITE,
    Call,
    Served,
    frame,
    greeted,
    noise,
    request,
)
from tests.transport.bulk_support import own as own
from tests.transport.bulk_support import served as served

# --- peers that go, stop, or are in the way


CHILD = """
import socket, sys
import numpy as np
from kvstore import _native
memory = np.zeros(int(sys.argv[1]), np.uint8)
regions = _native.Regions()
regions.add(7, memory.ctypes.data, memory.nbytes, True)
server = _native.BulkServer(regions, b"a secret that is long enough", 77,
                            bytes_per_second=int(sys.argv[2]))
with socket.create_server(("127.0.0.1", int(sys.argv[3]))) as listener:
    server.listen(listener.fileno())
    print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


class Child:
    """A server in a process of its own, slow enough to be caught in the middle of a move."""

    def __init__(self, num_bytes: int, bytes_per_second: int, port: int = 0) -> None:
        arguments = [str(num_bytes), str(bytes_per_second), str(port)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.address = f"127.0.0.1:{self.port}"

    def link(self, timeout: float = 2.0) -> _native.BulkLink:
        return _native.BulkLink(self.address, SECRET, EPOCH, timeout)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def child(num_bytes: int = 16 << 20, bytes_per_second: int = 8 << 20) -> Iterator[Child]:
    made = Child(num_bytes, bytes_per_second)
    try:
        yield made
    finally:
        made.kill()
        made.process.communicate()


class Moving:
    """16 pieces of 1 MiB, from or to a child whose memory is all 0; here it is all 1."""

    def __init__(self, peer: Child, timeout: float = 2.0) -> None:
        self.link = peer.link(timeout)
        self.here = np.ones(16 << 20, np.uint8)
        at = np.arange(0, 16 << 20, 1 << 20)
        self.call = Call(self.link, self.here, at, at, [1 << 20] * 16)

    def run(self, act: Callable[[], None], write: bool = False, **options: Any) -> list[int]:
        acted: list[float] = []

        def watch() -> None:
            end = time.monotonic() + BOUND_S
            while not write and self.here[0] and time.monotonic() < end:
                time.sleep(0.001)
            acted.append(time.monotonic())
            act()

        thread = threading.Thread(target=watch)
        thread.start()
        statuses = (self.call.write if write else self.call.read)(**options)
        ended = time.monotonic()
        thread.join(BOUND_S)
        self.took = ended - acted[0]
        return statuses

    def check(self, statuses: list[int], other: int) -> None:
        """What is OK came whole; and something did not."""
        assert set(statuses) <= {OK, other}
        assert other in statuses
        for i, status in enumerate(statuses):
            if status == OK:
                assert not self.here[i << 20 : (i + 1) << 20].any()


@pytest.mark.parametrize("write", [False, True])
def test_a_killed_peer_is_noticed_at_once(write: bool) -> None:
    with child() as peer:
        moving = Moving(peer)
        statuses = moving.run(peer.process.kill, write)
        if not write:
            moving.check(statuses, LOST)
        assert LOST in statuses
        assert moving.took < SLACK_S
        assert not moving.link.is_alive()
        assert set(moving.call.read()) == {LOST}


def test_a_peer_killed_between_moves_is_known_to_be_gone() -> None:
    with child() as peer:
        link = peer.link()
        assert link.is_alive()
        peer.kill()
        end = time.monotonic() + BOUND_S
        while link.is_alive():
            assert time.monotonic() < end
            time.sleep(0.002)


@pytest.mark.parametrize("write", [False, True])
def test_a_frozen_peer_costs_no_more_than_the_deadline(write: bool) -> None:
    with child() as peer:
        moving = Moving(peer, timeout=5.0)
        freeze = lambda: os.kill(peer.process.pid, signal.SIGSTOP)  # noqa: E731
        began = time.monotonic()
        statuses = moving.run(freeze, write, timeout=0.7)
        assert time.monotonic() - began < 0.7 + SLACK_S
        assert LATE in statuses
        assert set(statuses) <= {OK, LATE}
        os.kill(peer.process.pid, signal.SIGCONT)
        # Not gone: the next move reaches it by another connection.
        here = np.ones(1000, np.uint8)
        assert Call(moving.link, here, [0], [0], [1000]).read() == [OK]
        assert moving.link.is_alive()
        # A write that was given up without the peer's word may have left bytes behind.
        assert moving.link.is_settled() != write
        # It is closed until the peer, which runs again, has hung up.
        end = time.monotonic() + BOUND_S
        while not moving.link.close():
            assert write
            assert time.monotonic() < end
            time.sleep(0.002)
        assert moving.link.is_settled()


def test_a_write_is_not_settled_before_a_frozen_peer_is_dead() -> None:
    with child() as peer:
        moving = Moving(peer, timeout=0.5)
        freeze = lambda: os.kill(peer.process.pid, signal.SIGSTOP)  # noqa: E731
        assert LOST in moving.run(freeze, True, timeout=30.0)
        assert not moving.link.close()
        peer.kill()
        end = time.monotonic() + BOUND_S
        while not moving.link.close():
            assert time.monotonic() < end
            time.sleep(0.002)


def test_a_peer_that_is_silent_for_too_long_is_taken_for_gone() -> None:
    with child() as peer:
        moving = Moving(peer, timeout=0.5)
        statuses = moving.run(lambda: os.kill(peer.process.pid, signal.SIGSTOP), timeout=30.0)
        moving.check(statuses, LOST)
        assert moving.took < 0.5 + SLACK_S
        assert not moving.link.is_alive()
        os.kill(peer.process.pid, signal.SIGCONT)
        here = np.ones(1000, np.uint8)
        assert Call(moving.link, here, [0], [0], [1000]).read() == [OK]
        assert moving.link.is_alive()


@pytest.mark.parametrize("write", [False, True])
def test_a_cancelled_move_ends_at_once_and_is_settled(write: bool) -> None:
    with child() as peer:
        moving = Moving(peer)
        flag = _native.CancelFlag()
        statuses = moving.run(flag.set, write, cancel=flag)
        assert set(statuses) <= {OK, CANCELLED}
        assert CANCELLED in statuses
        assert moving.took < SLACK_S
        held = moving.here.copy()
        assert moving.link.is_alive()
        assert Call(moving.link, np.ones(9, np.uint8), [0], [0], [9]).read() == [OK]
        assert np.array_equal(held, moving.here)
        assert set(moving.call.read(cancel=flag)) == {CANCELLED}


def test_who_came_back_is_reached_again_unless_it_is_another() -> None:
    with child() as peer:
        link = peer.link()
        strict = _native.BulkLink(peer.address, SECRET, EPOCH, 2.0)
        peer.kill()
        here = np.ones(10, np.uint8)
        assert Call(link, here, [0], [0], [10]).read() == [LOST]
        again = Child(4096, 0, peer.port)
        try:
            assert Call(link, here, [0], [0], [10]).read() == [OK]
            assert link.is_alive()
        finally:
            again.kill()
            again.process.communicate()
        regions = _native.Regions()
        other = _native.BulkServer(regions, SECRET, EPOCH + 1)
        with socket.create_server(("127.0.0.1", peer.port)) as listener:
            other.listen(listener.fileno())
        try:
            assert Call(strict, here, [0], [0], [10]).read() == [REFUSED]
            assert not strict.is_alive()
            assert Call(strict, here, [0], [0], [10]).read() == [REFUSED]
        finally:
            other.stop()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TimeoutError):  # accepted by nobody
            _native.BulkLink(address, SECRET, EPOCH, 0.2)
        assert time.monotonic() - began < SLACK_S
    with pytest.raises(ConnectionError):
        _native.BulkLink(address, SECRET, EPOCH, 2.0)


def test_a_closed_link_loses_everything(served: Served) -> None:
    link = served.link()
    assert link.close()
    assert link.close()
    assert not link.is_alive()
    assert Call(link, np.zeros(9, np.uint8), [0], [0], [9]).read() == [LOST]


# --- removal


def test_removal_waits_for_moves_under_way() -> None:
    served = Served(16 << 20, bytes_per_second=32 << 20)
    try:
        link = served.link()
        here = np.zeros(16 << 20, np.uint8)
        at = np.arange(0, 16 << 20, 1 << 20)
        results: list[int] = []
        call = Call(link, here, at, at, [1 << 20] * 16)
        thread = threading.Thread(target=lambda: results.extend(call.read()))
        thread.start()
        end = time.monotonic() + BOUND_S
        while not here[:4096].any() and time.monotonic() < end:
            time.sleep(0.001)
        assert served.regions.remove(REGION, BOUND_S)
        served.memory[:] = 0  # nobody reads it any more
        thread.join(BOUND_S)
        assert set(results) == {OK, REFUSED}
        for i, status in enumerate(results):
            if status == OK:
                assert np.array_equal(
                    here[at[i] :][: 1 << 20], noise(1, 16 << 20)[at[i] :][: 1 << 20]
                )
        assert served.server.counters()["cut_connections"] == 0
    finally:
        served.server.stop()


@pytest.mark.parametrize("write", [False, True])
def test_removal_cuts_off_who_is_stuck(own: Served, write: bool) -> None:
    """Neither a peer that takes nothing nor one that sends nothing holds a region for long."""
    with greeted(own.address) as peer:
        ranges = struct.pack("<QQ", 0, SIZE) * 64
        peer.sendall(frame(WRITE if write else READ, request(64, ranges=ranges)))
        if not write:
            assert peer.recv(16)
        began = time.monotonic()
        end = began + BOUND_S
        removed = own.regions.remove(REGION, 1.0)
        while not removed and time.monotonic() < end:
            removed = own.regions.remove(REGION, 1.0)
        assert removed
        assert time.monotonic() - began < 1.0 + SLACK_S
    own.wait_for(connections=0)
    assert Call(own.link(), np.zeros(9, np.uint8), [0], [0], [9]).read() == [REFUSED]
    own.regions.add(REGION, own.memory.ctypes.data, SIZE, True)
    assert Call(own.link(), np.zeros(9, np.uint8), [0], [0], [9]).read() == [OK]


def test_a_region_has_its_id_alone(own: Served) -> None:
    with pytest.raises(ValueError, match="there is a region 7"):
        own.regions.add(REGION, own.memory.ctypes.data, SIZE, True)
    assert own.regions.remove(12345, 0.0)
    assert len(own.regions) == 2
    with pytest.raises(ValueError, match="address"):
        own.regions.add(3, 0, 10, False)
    with pytest.raises(ValueError, match="num_bytes"):
        own.regions.add(3, 2**64 - 5, 10, False)


# --- damage on the way


class Proxy:
    """Passes bytes on, with one bit flipped at one place of one direction."""

    def __init__(self, address: str, direction: int, place: int) -> None:
        host, port = address.split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flip = (direction, place)
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            for direction, (a, b) in enumerate([(client, server), (server, client)]):
                threading.Thread(target=self._pass, args=(direction, a, b), daemon=True).start()

    def _pass(self, direction: int, source: socket.socket, to: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                place = self._flip[1] - passed
                if direction == self._flip[0] and 0 <= place < len(data):
                    data[place] ^= 0x10
                passed += len(data)
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()
        for each in self._sockets:
            each.close()


GREETING = {0: 72 + 56, 1: 56 + 64}  # bytes each way


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("direction", [0, 1])
@settings(max_examples=12, deadline=None)
@given(place=st.integers(0, 40_000))
def test_damaged_bytes_are_never_taken_for_good(
    served: Served, write: bool, direction: int, place: int
) -> None:
    served.memory[:] = noise(1, SIZE)
    here = noise(9, 16_384)
    mine = here.copy()
    at = [0, 4096, 8192, 12_288]
    source = mine if write else served.memory
    sums = [_native.xxh3(source[o : o + 4096]) for o in at]
    proxy = Proxy(served.address, direction, GREETING[direction] + place % 17_000)
    try:
        link = _native.BulkLink(proxy.address, SECRET, EPOCH, 0.5, 1)
        call = Call(link, here, at, at, [4096] * 4, sums)
        statuses = call.write(timeout=0.3) if write else call.read(timeout=0.3)
        link.close()
    finally:
        proxy.close()
    there, back = (served.memory, mine) if write else (here, served.memory)
    for o, status in zip(at, statuses, strict=True):
        if status == OK:
            assert np.array_equal(there[o : o + 4096], back[o : o + 4096])
        assert status in (OK, DAMAGED, LOST, LATE)
    # What no piece named was not touched.
    assert np.array_equal(served.memory[16_384:], noise(1, SIZE)[16_384:])

"""Moments at which a client could be left waiting, or holding what nobody frees.

Each test brings about by hand the one order of events that is rare by itself. Proved: a session
that is lost the moment it is made is replaced all the same; slots that were granted in an answer
which never came are reported like those that did; a daemon over TCP proves itself for each further
connection too; a load of many pieces ends with its deadline, however slowly each is answered; a
forked child inherits no lock, no count and no thread that it would wait for, and no right to write
into its parent's slots.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import wire
from kvstore.client import RemoteControl
from kvstore.client.handshake import Target, dial
from kvstore.client.link import Link, Outages
from kvstore.client.session import Session
from kvstore.client.session import Writers as SlotWriters
from kvstore.control import Granted, Terms
from kvstore.errors import IncompatibleError, PeerUnavailableError
from kvstore.reservation import Writers
from tests.daemon.daemon_support import wait_until
from tests.daemon.fake_daemon import FakeDaemon
from tests.store_support import NAMESPACE, WAIT_S, buffers_of, chain

SECRET = "a secret that is long enough"


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    # pytest's own directories have names too long for a socket.
    with tempfile.TemporaryDirectory(prefix="kv-") as path, FakeDaemon(Path(path) / "s") as made:
        yield made


def control_of(store: kvstore.Store) -> RemoteControl:
    control = store.control
    assert isinstance(control, RemoteControl)
    return control


def test_a_session_that_is_lost_the_moment_it_is_made_is_replaced(
    fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Link.connect
    num_lost = 0

    def lost_at_once(link: Link) -> Any:
        """A call of another thread fails before whoever connected has taken note of it."""
        nonlocal num_lost
        session = made(link)
        if threading.current_thread().name == "kvstore-reconnect" and num_lost < 3:
            num_lost += 1
            link._lost(session, PeerUnavailableError("cut off"))
        return session

    monkeypatch.setattr(Link, "connect", lost_at_once)
    with kvstore.connect(fake.address, NAMESPACE) as store:
        link = control_of(store)._link
        assert link.session is not None
        link._lost(link.session, PeerUnavailableError("cut off"))
        wait_until(lambda: link.session is not None and link._thread is None)
        assert num_lost == 3
        assert store.match(chain(1, 6)) == 3


def test_slots_granted_in_an_answer_that_never_came_are_reported(fake: FakeDaemon) -> None:
    with kvstore.connect(fake.address, NAMESPACE) as store:
        control = control_of(store)
        session = control._session()
        session.welcome.may_map_writable = True
        session.arena.writable = np.zeros(4096, np.uint8)

        def cut_off(_: bytes) -> None:
            fake.epoch = os.urandom(
                16
            )  # whoever answers next was started anew, and kept them apart
            raise OSError  # the fake closes the connection

        fake.answers[wire.Op.RESERVE] = cut_off
        assert control.reserve(chain(1, 2)).reservation == 0
        wait_until(lambda: fake.count(wire.Op.QUIESCED) == 1)
        told = [body for op, body in fake.requests if op == wire.Op.QUIESCED]
        assert told == [wire.pack_u64(session.welcome.client)]


def test_every_connection_over_tcp_wants_proof(fake: FakeDaemon) -> None:
    """Whoever listens on the port once the daemon is dead gets no reads of an open session."""
    with fake.over_tcp() as address:
        target = Target.of(address, NAMESPACE, token=SECRET)
        with pytest.raises(IncompatibleError, match="did not prove"):
            dial(target, bytes(16), WAIT_S)


class _Slow:
    """A control that has everything, in pieces of one block, and takes `seconds` over each."""

    namespace = NAMESPACE
    piece_blocks = 1
    terms = Terms(verify_always=False, threads=1, lease_seconds=1.0)

    def __init__(self, clock: list[float], seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self.num_asked = 0
        size = NAMESPACE.spec.block_bytes
        self._arena = np.zeros(size + 8, np.uint8)

    def acquire(self, hashes: kvstore.BlockHashes, ttl: float | None, timeout: float) -> Granted:
        self.num_asked += 1
        self._clock[0] += self._seconds
        size = NAMESPACE.spec.block_bytes
        zero = np.zeros(1, np.uint64)
        at = np.array([size], np.uint64)
        address = self._arena.ctypes.data
        return Granted(1, zero, at, zero, zero, self._arena, address)

    def release(self, lease: int) -> bool:
        return True

    def require_open(self) -> None: ...
    def close(self, timeout: float = 60.0) -> None: ...


def test_a_load_of_many_pieces_ends_with_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("kvstore.store.time.monotonic", lambda: clock[0])
    control: Any = _Slow(clock, 0.4)
    store = kvstore.Store(control, call_seconds=1.0)
    hashes = chain(1, 100)
    loaded = store.load(hashes, buffers_of(hashes), timeout=2.0).wait().num_blocks
    assert clock[0] - 100.0 <= 2.0 + 0.5  # the piece under way when it came
    assert loaded == control.num_asked >= 5

    fast: Any = _Slow(clock, 0.0)
    store = kvstore.Store(fast, call_seconds=1.0)
    assert store.load(hashes, buffers_of(hashes), timeout=0.0).wait().num_blocks == 100


# --- forks


def in_child(work: Any) -> int:
    """Return how a forked child ended that did `work`; it is killed where it hangs."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + WAIT_S / 2
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


def test_a_child_does_not_wait_for_puts_of_its_parents_threads() -> None:
    writers = Writers()
    with writers:
        assert in_child(writers.close) == 0
    with writers._counts.here().changed:
        assert in_child(writers.close) == 0  # somebody was just counting
    writers.close()
    with pytest.raises(kvstore.StoreClosedError), writers:
        pass


def test_a_child_may_not_write_into_its_parents_slots() -> None:
    writers = SlotWriters()

    def work() -> None:
        assert not writers.begin()

    assert in_child(work) == 0
    with writers._changed:
        assert in_child(work) == 0
    assert writers.begin()
    writers.end()


def test_a_child_counts_its_own_outages() -> None:
    outages = Outages()
    outages.add_call(PeerUnavailableError("away"))

    def work() -> None:
        outages.add_call(PeerUnavailableError("away"))
        assert outages.snapshot()["kvstore_unavailable_calls_total"] == 1

    with outages._counts.here().lock:
        assert in_child(work) == 0


def test_a_child_may_begin_with_a_prefetch_or_close(fake: FakeDaemon) -> None:
    fake.answers[wire.Op.CALL] = lambda _: wire.encode(3)
    with kvstore.connect(fake.address, NAMESPACE, timeout=WAIT_S) as store:
        assert store.prefetch(chain(1, 3)).wait(WAIT_S).num_blocks == 3

        def prefetch() -> None:
            assert store.prefetch(chain(1, 3)).wait(WAIT_S).num_blocks == 3

        assert in_child(prefetch) == 0
        assert in_child(store.close) == 0
        with control_of(store)._link._lock:
            assert in_child(store.close) == 0
        assert store.match(chain(1, 6)) == 3
        assert control_of(store)._outages.snapshot()["kvstore_reconnects_total"] == 0


def test_a_put_is_refused_where_the_arena_cannot_be_mapped(
    fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon has no descriptor left, or this process no memory."""

    def fail(*_: object) -> Any:
        raise OSError(12, "no memory")

    with kvstore.connect(fake.address, NAMESPACE) as store:
        session = control_of(store)._session()
        session.welcome.may_map_writable = True
        monkeypatch.setattr(type(session.arena), "attach", fail)
        monkeypatch.setattr(Session, "ask", lambda *_: (0, session.arena.num_bytes))
        hashes = chain(1, 2)
        assert store.put(hashes, buffers_of(hashes)).wait(WAIT_S).num_unavailable == 2
        monkeypatch.undo()
        assert store.match(hashes) == 3  # all else goes on

"""What a client does while its daemon is dead, hangs, or talks rubbish, and once it is back.

Real serving processes, stopped and killed by signals, and a fake daemon where a test must choose
what is answered when. Proved: one deadline is spent, then every call misses or refuses at once;
what must not be pretended raises; the client recovers by itself, also with another arena; no byte
is wrong, no thread or descriptor is left; slots are given free only when nobody writes to them; the
read map cannot be written; parent and forked child share no connection.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import wire
from kvstore.client import RemoteControl
from kvstore.errors import DeadlineExceededError, PeerUnavailableError
from tests.daemon.fake_daemon import FakeDaemon
from tests.store_support import (
    BLOCK_BYTES,
    NAMESPACE,
    WAIT_S,
    assert_exact,
    buffers_of,
    bytes_of,
    chain,
    load,
    payload,
    put,
)

TIMEOUT = 0.5
SERVE = """
import sys
import kvstore
from tests.store_support import open_store
with open_store() as store, kvstore.share(store, sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


class Serving:
    """A process that shares a store of 15 slots."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture
def sockets() -> Iterator[Path]:
    # pytest's own directories have names too long for a socket.
    with tempfile.TemporaryDirectory(prefix="kv-") as path:
        yield Path(path)


@pytest.fixture
def serving(sockets: Path) -> Iterator[Serving]:
    started = Serving(sockets / "s")
    yield started
    started.kill()


def connect(address: str, **options: Any) -> kvstore.Store:
    return kvstore.connect(address, NAMESPACE, **{"timeout": TIMEOUT, **options})


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def own(store: kvstore.Store, name: str) -> int:
    """A counter of the client's own, whether the daemon is there or not."""
    control = store.control
    assert isinstance(control, RemoteControl)
    return control._outages.snapshot()[f"kvstore_{name}_total"]


def assert_away(store: kvstore.Store) -> None:
    """Every call misses, refuses or says that nobody is there; none gives a wrong answer."""
    hashes, new = chain(1, 6), chain(2, 3)
    assert store.match(hashes) == 0
    assert store.lookup(hashes) == kvstore.Hit(0, 0, 0)
    assert store.lookup(hashes, prefetch=True).num_blocks == 0
    assert store.wait_for(hashes, timeout=WAIT_S) == 0
    assert load(store, hashes) == 0
    assert len(store.acquire(hashes)) == 0
    assert store.pin(hashes) == 0
    store.unpin(hashes)
    assert store.prefetch(hashes).wait(WAIT_S).num_missed == 6
    for ack in ("memory", "ssd", "durable"):
        refused = put(store, new, ack=ack, wait=WAIT_S)
        assert (refused.num_unavailable, refused.num_blocks, refused.num_stored) == (3, 0, 0)
        assert refused.ack == ""
    with store.reserve(new) as reservation:
        assert not reservation.wanted.any()
        assert reservation.commit().wait(WAIT_S).num_unavailable == 3
    for ask in (
        lambda: store.remove(hashes),
        store.clear,
        store.flush,
        lambda: store.describe(hashes),
        store.events,
    ):
        with pytest.raises((PeerUnavailableError, DeadlineExceededError)):
            ask()
    stats = store.stats()
    assert set(stats) == {
        "kvstore_unavailable_calls_total",
        "kvstore_deadline_exceeded_total",
        "kvstore_reconnects_total",
    }


# --- stopped


def test_a_stopped_daemon_costs_one_deadline_and_is_found_again(serving: Serving) -> None:
    hashes = chain(1, 6)
    with connect(serving.address) as store:
        put(store, hashes)
        assert load(store, hashes) == 6
        serving.signal(signal.SIGSTOP)
        assert load(store, hashes, timeout=0.1) == 0
        assert own(store, "deadline_exceeded") == 1
        for _ in range(3):
            assert_away(store)
        assert own(store, "deadline_exceeded") == 1  # nobody waited for it again
        serving.signal(signal.SIGCONT)
        wait_until(lambda: store.match(hashes) == 6)
        assert load(store, hashes) == 6
        assert put(store, chain(2, 3)).num_stored == 3
        assert own(store, "reconnects") == 1
        wait_until(lambda: store.stats()["kvstore_leases"] == 0)


def test_calls_under_way_when_the_daemon_stops_end_with_their_own_deadlines(
    serving: Serving,
) -> None:
    hashes = chain(1, 6)
    with connect(serving.address) as store, ThreadPoolExecutor(8) as threads:
        put(store, hashes)
        serving.signal(signal.SIGSTOP)
        calls = [threads.submit(store.match, hashes) for _ in range(4)]
        calls += [threads.submit(load, store, hashes, timeout=0.1) for _ in range(4)]
        assert [call.result(WAIT_S) for call in calls] == [0] * 8
        serving.signal(signal.SIGCONT)
        wait_until(lambda: store.match(hashes) == 6)


def test_what_a_call_held_when_the_daemon_stopped_is_freed(serving: Serving) -> None:
    held, new = chain(1, 6), chain(2, 5)
    with connect(serving.address) as store:
        put(store, held)
        lease = store.acquire(held)
        reservation = store.reserve(new)
        assert store.pin(held) == 6
        serving.signal(signal.SIGSTOP)
        assert store.match(held) == 0
        # The arena is still mapped, and the daemon cannot give these slots away.
        room = np.zeros((6, BLOCK_BYTES), np.uint8)
        assert lease.load(kvstore.ContiguousBlocks(room), np.arange(6)) == 6
        assert_exact(held, room, 6)
        reservation.write(buffers_of(new), np.arange(5))
        assert reservation.commit().wait(WAIT_S).num_unavailable == 5
        lease.release()
        serving.signal(signal.SIGCONT)
        wait_until(lambda: store.match(held) == 6)
        wait_until(lambda: store.stats()["kvstore_cpu_used_bytes"] == 6 * BLOCK_BYTES)
        wait_until(lambda: store.stats()["kvstore_leases"] == 0)
        assert store.match(new) == 0
        assert put(store, new).num_stored == 5


# --- killed


def test_a_killed_daemon_is_a_miss_until_another_listens(serving: Serving) -> None:
    hashes = chain(1, 6)
    with connect(serving.address) as store:
        put(store, hashes)
        serving.kill()
        for _ in range(5):
            assert_away(store)
        assert own(store, "deadline_exceeded") == 0  # its end is seen at once
        serving.start()
        wait_until(lambda: put(store, hashes).num_stored == 6)
        assert load(store, hashes) == 6


def test_leases_of_a_dead_daemon_read_what_they_held(serving: Serving) -> None:
    """The new daemon has another arena; the old one lives for as long as it is looked at."""
    hashes, other = chain(1, 6), chain(3, 9)
    with connect(serving.address) as store:
        put(store, hashes)
        lease = store.acquire(hashes)
        view = lease.block(2)
        serving.kill()
        serving.start()
        wait_until(lambda: put(store, other).num_stored == 9)
        assert load(store, hashes) == 0
        room = np.zeros((6, BLOCK_BYTES), np.uint8)
        assert lease.load(kvstore.ContiguousBlocks(room), np.arange(6)) == 6
        assert_exact(hashes, room, 6)
        assert np.array_equal(view, bytes_of(hashes[2]))
        lease.release()  # ends no lease of the new daemon
        with store.acquire(other) as held:
            assert len(held) == 9
            assert store.stats()["kvstore_leases"] == 1


def test_a_reservation_of_a_dead_daemon_touches_nothing_of_the_next(serving: Serving) -> None:
    new, other = chain(1, 4), chain(2, 15)
    with connect(serving.address) as store:
        old = store.reserve(new)
        serving.kill()
        serving.start()
        wait_until(lambda: put(store, other).num_stored == 15)
        with store.reserve(chain(3, 4)) as reservation:  # the same number, maybe
            source = buffers_of(new)
            old.write(source, np.arange(4))
            assert old.commit().wait(WAIT_S).num_unavailable == 4
            old.abort()
            reservation.write(buffers_of(chain(3, 4)), np.arange(4))
            assert reservation.commit().wait(WAIT_S).num_stored == 4
        assert load(store, chain(3, 4)) == 4
        assert store.match(new) == 0


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_outages_leave_no_thread_and_no_descriptor(serving: Serving) -> None:
    hashes = chain(1, 6)

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with connect(serving.address) as store:

        def outage() -> None:
            serving.kill()
            with ThreadPoolExecutor(4) as threads:
                assert not any(threads.map(store.match, [hashes] * 16))
            serving.start()
            wait_until(lambda: put(store, hashes).num_blocks == 6)
            assert load(store, hashes) == 6
            wait_until(lambda: store.control._link._thread is None)  # type: ignore[attr-defined]

        outage()
        num_files, num_threads = open_files(), threading.active_count()
        for _ in range(3):
            outage()
        # Fewer than one an outage: of arenas only the last is mapped, without the help of the
        # garbage collector; a connection more there may be, where two were in use at once.
        assert open_files() < num_files + 3
        assert threading.active_count() <= num_threads


def test_close_does_not_wait_for_a_daemon_that_hangs(serving: Serving) -> None:
    store = connect(serving.address)
    put(store, chain(1, 6))
    serving.signal(signal.SIGSTOP)
    assert store.match(chain(1, 6)) == 0
    store.close(timeout=TIMEOUT)
    with pytest.raises(kvstore.StoreClosedError):
        store.match(chain(1, 6))


def test_close_while_reconnecting_leaves_no_thread(serving: Serving) -> None:
    before = threading.active_count()
    store = connect(serving.address)
    serving.kill()
    assert store.match(chain(1, 6)) == 0
    store.close()
    wait_until(lambda: threading.active_count() <= before)


# --- at connect time


def test_at_connect_time_errors_are_raised(sockets: Path) -> None:
    with pytest.raises(PeerUnavailableError, match="nobody"):
        connect(f"unix:{sockets}/nobody")
    with pytest.raises(PeerUnavailableError, match=r"127\.0\.0\.1:9"):
        connect("tcp:127.0.0.1:9")
    for wrong in ("/tmp/x", "unix:", "unix:" + "x" * 200, "tcp:nowhere", "tcp:h:x"):
        with pytest.raises(kvstore.ConfigError, match="address"):
            connect(wrong)
    for timeout in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(kvstore.ConfigError, match="timeout"):
            connect(f"unix:{sockets}/nobody", timeout=timeout)
    with pytest.raises(kvstore.ConfigError, match="token"):
        connect("tcp:127.0.0.1:9", token="short")
    before = threading.active_count()
    mute = FakeDaemon(sockets / "mute", {wire.Op.HELLO: lambda _: None})
    with mute, pytest.raises(DeadlineExceededError):
        connect(mute.address, timeout=0.05)
    odd = FakeDaemon(sockets / "odd", {wire.Op.HELLO: lambda _: b"\xc1 rubbish"})
    with odd, pytest.raises(kvstore.IncompatibleError):
        connect(odd.address)
    wait_until(lambda: threading.active_count() <= before)


def test_a_daemon_over_tcp_that_proves_nothing_gets_no_secret(sockets: Path) -> None:
    with FakeDaemon(sockets / "s") as fake, fake.over_tcp() as address:
        with pytest.raises(kvstore.IncompatibleError, match="did not prove"):
            connect(address, token="a secret that is long enough")
        with connect(address) as store:  # no secret, no proof asked for
            assert store.match(chain(1, 6)) == 3


# --- fakes


def test_rubbish_is_a_miss(sockets: Path) -> None:
    answers = {wire.Op.MATCH: lambda _: b"not eight"}
    with FakeDaemon(sockets / "s", answers) as fake, connect(fake.address) as store:
        assert store.match(chain(1, 6)) == 0
        assert own(store, "unavailable_calls") == 1
        fake.answers[wire.Op.MATCH] = lambda _: wire.pack_u64(3)
        wait_until(lambda: store.match(chain(1, 6)) == 3)


def test_a_connection_cut_in_the_middle_of_a_call_is_a_miss(sockets: Path) -> None:
    gone = threading.Event()
    asked = threading.Event()

    def cut(_: bytes) -> None:
        asked.set()
        assert gone.wait(WAIT_S)

    with (
        FakeDaemon(sockets / "s", {wire.Op.WAIT_FOR: cut}) as fake,
        connect(fake.address) as store,
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(store.wait_for, chain(1, 6), timeout=600.0)
        assert asked.wait(WAIT_S)
        fake.die()
        assert waiting.result(WAIT_S) == 0
        gone.set()
        with FakeDaemon(sockets / "s"):
            wait_until(lambda: store.match(chain(1, 6)) == 3)


@pytest.mark.parametrize("restarted", [True, False])
def test_a_new_daemon_is_told_when_nobody_writes_any_more(sockets: Path, restarted: bool) -> None:
    """Slots that we were writing to when the daemon died are kept apart until we say so."""
    with FakeDaemon(sockets / "s") as first, connect(first.address) as store:
        control = store.control
        assert isinstance(control, RemoteControl)
        session = control._session()
        session.has_written = True
        assert session.writers.begin()
        first.die()
        assert store.match(chain(1, 6)) == 0
        assert not session.writers.begin()  # nobody else begins
        with FakeDaemon(sockets / "s") as second:
            if not restarted:  # the same daemon, which cut us off
                second.epoch = first.epoch
            wait_until(lambda: store.match(chain(1, 6)) == 3)
            assert second.count(wire.Op.QUIESCED) == 0
            assert session._anchor.fileno() >= 0
            session.writers.end()
            wait_until(lambda: control._link._thread is None)
            assert session._anchor.fileno() < 0
            told = [body for op, body in second.requests if op == wire.Op.QUIESCED]
            assert told == ([wire.pack_u64(session.welcome.client)] if restarted else [])


# --- memory and processes


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=WAIT_S,
        check=False,
    )


WRITER = """
import ctypes, sys
import kvstore
from tests.store_support import NAMESPACE, chain
store = kvstore.connect(sys.argv[1], NAMESPACE)
lease = store.acquire(chain(1, 2))
view = lease.block(0)
try:
    view.flags.writeable = True
except ValueError:
    print("refused", flush=True)
ctypes.memset(view.ctypes.data, 0, 1)
print("written", flush=True)
"""


def test_writing_through_a_view_is_a_fault(serving: Serving) -> None:
    with connect(serving.address) as store:
        put(store, chain(1, 2))
        done = run(WRITER, serving.address)
        assert done.returncode == -signal.SIGSEGV
        assert done.stdout == "refused\n"
        assert load(store, chain(1, 2)) == 2


FORKER = """
import os, sys
import kvstore
from tests.store_support import NAMESPACE, SLOTS, chain, load, put
store = kvstore.connect(sys.argv[1], NAMESPACE)
hashes = chain(1, 4)
assert put(store, hashes).num_stored == 4
lease = store.acquire(hashes)
reservation = store.reserve(chain(5, 2))
child = os.fork()
if child == 0:
    status = 1
    try:
        assert load(store, hashes) == 4
        assert put(store, chain(2, 3)).num_stored == 3
        assert put(store, chain(3, 2), background=True).num_stored == 2
        assert put(store, chain(4, 1), ack="ssd").num_stored == 1
        lease.release()  # is the parent's
        assert reservation.commit is not None
        reservation.abort()
        assert store.stats()["kvstore_leases"] == 1
        store.close()
        status = 0
    finally:
        os._exit(status)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert store.stats()["kvstore_leases"] == 1
assert reservation.wanted.all()
from tests.store_support import buffers_of
reservation.write(buffers_of(chain(5, 2)), [0, 1])
assert reservation.commit().wait().num_stored == 2
assert load(store, chain(2, 3)) == 3 and load(store, chain(5, 2)) == 2
lease.release()
assert store.stats()["kvstore_leases"] == 0
assert store.stats()["kvstore_reconnects_total"] == 0
store.close()
print("parent and child are done", flush=True)
"""


def test_a_forked_child_connects_for_itself(serving: Serving) -> None:
    done = run(FORKER, serving.address)
    assert done.stdout == "parent and child are done\n", done.stderr


def test_threads_through_outages_see_only_exact_bytes(serving: Serving) -> None:
    chains = [chain(seed, 1 + seed % 6) for seed in range(8)]
    sources = [payload(hashes) for hashes in chains]
    over = threading.Event()

    def work(seed: int) -> int:
        dice = np.random.default_rng(seed)
        loaded = 0
        while not over.is_set():
            which = int(dice.integers(len(chains)))
            if dice.integers(2):
                store.put(chains[which], kvstore.ContiguousBlocks(sources[which])).wait(WAIT_S)
            else:
                loaded += load(store, chains[which])
        return loaded

    with connect(serving.address) as store, ThreadPoolExecutor(3) as threads:
        works = [threads.submit(work, seed) for seed in range(3)]
        for turn in range(4):
            wait_until(lambda: store.match(chains[1]) > 0)
            if turn % 2:
                serving.kill()
                serving.start()
            else:
                serving.signal(signal.SIGSTOP)
                wait_until(lambda turn=turn: own(store, "deadline_exceeded") > 0)  # type: ignore[misc]
                serving.signal(signal.SIGCONT)
        wait_until(lambda: store.match(chains[1]) > 0)
        over.set()
        assert sum(each.result(WAIT_S) for each in works) > 0
        assert own(store, "reconnects") >= 2

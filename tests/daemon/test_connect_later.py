"""A store may be had before its daemon is there.

Real daemons, started after their client, stopped, killed and started again, and a fake one where
attempts are counted. Proved: `connect(required=False)` returns whether nobody listens or whoever
does hangs; all is a miss until a daemon answers, and then as if it had been there from the start,
also by what it tells its clients; who is refused hears of it at once if the daemon is there, else
in one line of the log; a forked child finds the daemon for itself; a restart between two calls is
no miss.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import wire
from kvstore.client import RemoteControl
from kvstore.control import Terms
from kvstore.daemon.server import Server
from kvstore.daemon.sockets import listen_tcp, listen_unix
from kvstore.daemon.tenants import Tenants
from kvstore.tiers.local import LocalControl
from tests import store_support
from tests.daemon.daemon_support import SIZE, SPEC, Daemon, chain, clean_up, content, wait_until
from tests.daemon.fake_daemon import FakeDaemon
from tests.daemon.test_client_races import in_child

LARGE = kvstore.BlockSpec.of_bytes(64 << 20)  # larger than the daemons' arenas here


@pytest.fixture
def directory() -> Iterator[Path]:
    # pytest's own directories have names too long for a socket.
    with tempfile.TemporaryDirectory(prefix="kv-") as path:
        yield Path(path)


def connect(address: str, spec: kvstore.BlockSpec = SPEC, timeout: float = 5.0) -> kvstore.Store:
    return kvstore.connect(address, "model", spec=spec, timeout=timeout, required=False)


def put(store: kvstore.Store, first: int, count: int) -> int:
    blocks = kvstore.ContiguousBlocks(content(first, count))
    return store.put(chain(first, count), blocks).wait().num_blocks


def load(store: kvstore.Store, first: int, count: int) -> int:
    room = np.zeros((count, SIZE), np.uint8)
    loaded = store.load(chain(first, count), kvstore.ContiguousBlocks(room)).wait().num_blocks
    assert np.array_equal(room[:loaded], content(first, count)[:loaded])
    return loaded


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "refused" in each.getMessage()]


def test_a_daemon_that_comes_later_is_found_and_found_again(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"unix:{directory}/s"
    flags = ("--verify", "always", "--threads", "3", "--lease-seconds", "7")
    with ExitStack() as ends:
        store = ends.enter_context(connect(address))
        large = ends.enter_context(connect(address, LARGE))
        assert put(store, 1, 4) == load(store, 1, 4) == store.match(chain(1, 4)) == 0
        assert not store.contains(chain(1, 4)).any()
        assert store.stats()["kvstore_unavailable_calls_total"] > 0
        first = Daemon(directory, *flags)
        ends.callback(clean_up, first)
        first.ready()
        wait_until(lambda: put(store, 1, 4) == 4)
        assert load(store, 1, 4) == 4
        assert store.control.terms == Terms(True, 3, 7.0)
        assert store.control.piece_blocks is None  # in place
        wait_until(lambda: len(refusals(caplog)) == 1)
        assert "block" in refusals(caplog)[0]
        assert large.match(chain(1, 4)) == 0
        first.kill()
        assert load(store, 1, 4) == 0
        second = Daemon(directory)
        ends.callback(clean_up, second)
        second.ready()
        wait_until(lambda: load(store, 1, 4) == 4)  # its holder kept them
        assert store.control.terms.lease_seconds == 60.0
        assert len(refusals(caplog)) == 1


def test_a_daemon_that_hangs_or_refuses_when_it_is_connected_to(directory: Path) -> None:
    daemon = Daemon(directory)
    try:
        daemon.ready()
        with pytest.raises(kvstore.ConfigError, match="block"):
            connect(daemon.address, LARGE)
        daemon.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WNOWAIT)
        with connect(daemon.address, timeout=0.2) as store:
            assert store.match(chain(1, 4)) == 0
            daemon.process.send_signal(signal.SIGCONT)
            wait_until(lambda: put(store, 1, 4) == 4)
            assert load(store, 1, 4) == 4
    finally:
        daemon.process.send_signal(signal.SIGCONT)
        clean_up(daemon)


def test_who_is_refused_says_so_once_and_does_not_insist(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.client.link._REFUSED_SECONDS", 3600.0)
    with connect(f"unix:{directory}/s") as store:
        assert [each.levelno for each in caplog.records] == [logging.WARNING]  # nobody is there
        rubbish = {wire.Op.HELLO: lambda _: b"\xc1 rubbish"}
        with FakeDaemon(directory / "s", rubbish) as odd:
            wait_until(lambda: len(refusals(caplog)) == 1)
            control = store.control
            assert isinstance(control, RemoteControl)
            assert control._link._breaker.wait_seconds() > 3000
            assert store.match(chain(1, 4)) == 0
            assert odd.count(wire.Op.HELLO) == 1


def test_each_reason_of_a_refusal_is_logged_once(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.client.link._REFUSED_SECONDS", 0.0)
    with connect(f"unix:{directory}/s") as store:
        rubbish = {wire.Op.HELLO: lambda _: b"\xc1 rubbish"}
        with FakeDaemon(directory / "s", rubbish) as odd:
            wait_until(lambda: odd.count(wire.Op.HELLO) >= 4)
        assert len(refusals(caplog)) == 1
        with FakeDaemon(directory / "s"):
            wait_until(lambda: store.match(chain(1, 4)) == 3)


def test_a_child_of_who_found_nobody_finds_the_daemon_for_itself(directory: Path) -> None:
    with connect(f"unix:{directory}/s") as store:

        def work() -> None:
            assert store.match(chain(1, 4)) == 0
            with FakeDaemon(directory / "s"):
                wait_until(lambda: store.match(chain(1, 4)) == 3)

        assert in_child(work) == 0


def test_a_store_without_its_daemon_closes_and_leaves_no_thread(directory: Path) -> None:
    with connect(f"unix:{directory}/s") as store:
        control = store.control
        assert isinstance(control, RemoteControl)
        thread = control._link._thread
        assert thread is not None
    assert not thread.is_alive()
    with pytest.raises(kvstore.StoreClosedError):
        store.match(chain(1, 4))


# --- the first call after a restart that nobody noticed


LOOKS = {
    "match": lambda store: store.match(chain(1, 4)) == 3,
    "lookup": lambda store: store.lookup(chain(1, 4)).num_blocks == 3,
    "contains": lambda store: store.contains(chain(1, 4)).all(),
}
ANSWERS = {
    wire.Op.LOOKUP: lambda _: wire.pack_u64(3) + wire.pack_u64(3),
    wire.Op.RESIDENCY: lambda _: b"\1\1\1\1",
}


LOOK_OPS = (wire.Op.MATCH, *ANSWERS)


def cut_off(_: bytes) -> None:
    raise OSError  # the fake closes the connection


def unavailable(store: kvstore.Store) -> int:
    control = store.control
    assert isinstance(control, RemoteControl)
    return control._outages.snapshot()["kvstore_unavailable_calls_total"]


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_restart_while_nobody_asked_costs_no_miss(
    directory: Path, look: Callable[[kvstore.Store], bool]
) -> None:
    with FakeDaemon(directory / "s", ANSWERS) as first, connect(first.address) as store:
        assert look(store)
        first.die()
        with FakeDaemon(directory / "s", ANSWERS) as second:
            assert look(store)
            assert unavailable(store) == 0
            # Who fails again soon after is asked no more than once.
            second.answers.update(dict.fromkeys(LOOK_OPS, cut_off))
            assert not look(store)
            assert 2 <= sum(second.count(op) for op in LOOK_OPS) <= 3


def load_each(store: kvstore.Store, hashes: kvstore.BlockHashes) -> int:
    room = store_support.buffers_of(hashes)
    return int(np.count_nonzero(store.load_each(hashes, room)))


@pytest.mark.parametrize("call", [store_support.load, load_each])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_load_that_comes_first_after_a_restart_hits(
    directory: Path, kind: str, call: Callable[[kvstore.Store, kvstore.BlockHashes], int]
) -> None:
    hashes, secret = store_support.chain(1, 4), "a secret of this test's own"
    tenants = Tenants({}, {"": secret.encode()}, os.getuid())
    with store_support.open_store() as kept:
        control = kept.control
        assert isinstance(control, LocalControl)

        def serve(port: int = 0) -> Server:
            tcp = kind == "tcp"
            listener = listen_tcp("127.0.0.1", port) if tcp else listen_unix(directory / "s")
            return Server(control.tiers, [listener], tenants=tenants)

        server = serve()
        token = secret if kind == "tcp" else None
        with kvstore.connect(server.address, store_support.NAMESPACE, token=token) as store:
            assert store_support.put(store, hashes).num_stored == 4
            server.close()
            server = serve(int(server.address.rpartition(":")[2]) if kind == "tcp" else 0)
            assert call(store, hashes) == 4
            assert unavailable(store) == 0
        server.close()


def test_who_takes_the_place_of_a_dead_daemon_and_hangs_costs_no_more_than_the_deadline(
    directory: Path,
) -> None:
    with FakeDaemon(directory / "s") as first, connect(first.address, timeout=0.2) as store:
        assert store.match(chain(1, 4)) == 3
        first.die()
        with FakeDaemon(directory / "s", {wire.Op.HELLO: lambda _: None}):
            assert store.match(chain(1, 4)) == 0
            assert unavailable(store) == 1

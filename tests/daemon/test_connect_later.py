"""A store may be had before its daemon is there.

Real daemons, started after their client, stopped, killed and started again, and a fake one where
attempts are counted. Proved: `connect(required=False)` returns whether nobody listens or whoever
does hangs; all is a miss until a daemon answers, and then as if it had been there from the start,
also by what it tells its clients; who is refused hears of it at once if the daemon is there, else
in one line of the log; a forked child finds the daemon for itself.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import wire
from kvstore.client import RemoteControl
from kvstore.control import Terms
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

"""The daemon's life: it starts, survives kill -9 with its DRAM content, and leaves nothing.

Real processes, started as users start them; a client that speaks frames by itself puts blocks and
reads them back byte for byte.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import _native, wire
from kvstore.config import DaemonConfig
from kvstore.daemon.service import Service
from tests.daemon.daemon_support import (
    SECONDS,
    Daemon,
    RawClient,
    chain,
    clean_up,
    command,
    content,
    is_gone,
    running,
    wait_until,
)


def memfds() -> int:
    """Arenas of this process; those of objects that refer to each other are freed first."""
    gc.collect()
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += "memfd" in os.readlink(entry)
        except FileNotFoundError:
            continue
    return found


def has_memory(pid: int) -> bool:
    try:
        return any("memfd" in os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return False


def test_start_and_stop_leave_nothing(tmp_path: Path) -> None:
    config = DaemonConfig(
        cpu="4MiB", chunk="256KiB", listen=f"unix:{tmp_path}/s", http="127.0.0.1:0",
        tcp="127.0.0.1:0", ssd=str(tmp_path / "ssd"), ssd_capacity="16MiB", ssd_segment="4MiB",
    )  # fmt: skip
    with Service(config):  # what is made once a process, such as loggers
        pass
    memory = memfds()
    fds, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(2):
        with Service(config) as service:
            holder = service.holder_pid
            assert not is_gone(holder)
            assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
            assert (tmp_path / "s.state").stat().st_mode & 0o777 == 0o700
            with RawClient(config.listen) as client:
                client.put(1, 4)
                assert service.status()["state"] == "serving"
                del client._memory
        del service
        wait_until(lambda: is_gone(holder))  # noqa: B023
        assert not (tmp_path / "s").exists()
        assert os.listdir(tmp_path / "s.state") == ["lock"]
    assert memfds() == memory
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= threads)
    assert len(os.listdir("/proc/self/fd")) <= fds


def test_blocks_outlive_kill_9(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        with RawClient(daemon.address) as client:
            client.put(1, 8)
            client.put(2, 3)
            before = client.status()
            daemon.kill()
        again = Daemon(tmp_path, "--adopt")
        try:
            again.ready()
            with RawClient(again.address) as client:
                status = client.status()
                assert status["adopted"]["adopted"] == 11
                assert status["epoch"] != before["epoch"]
                assert status["quarantined_slots"] == 0
                assert np.array_equal(client.get(1, 8), content(1, 8))
                assert np.array_equal(client.get(2, 3), content(2, 3))
                assert client.put(3, 2) == 0
            assert again.stop() == 0
            assert again.holder_pids() == []
        finally:
            clean_up(again)


def test_slots_of_a_writer_that_lives_wait_until_it_says_so(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, RawClient(daemon.address) as writer:
        writer.put(1, 2)
        _, offsets = writer.reserve(chain(2, 3))
        dead = subprocess.run(  # another writer, which dies with the daemon
            [sys.executable, "-c",
             "import sys\nfrom tests.daemon.daemon_support import *\n"
             "client = RawClient(sys.argv[1]); client.reserve(chain(3, 2))\n"
             "os.kill(int(sys.argv[2]), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)",
             daemon.address, str(daemon.pid)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
        )  # fmt: skip
        assert dead.returncode == -signal.SIGKILL
        daemon.end()
        with running(tmp_path) as again, RawClient(again.address) as client:
            wait_until(lambda: client.status()["quarantined_slots"] == len(offsets))
            reply = client.connection.call(
                wire.Op.QUIESCED, wire.pack_u64(writer.welcome.client), SECONDS
            )
            assert reply == wire.pack_u64(len(offsets))
            assert client.status()["quarantined_slots"] == 0
            assert np.array_equal(client.get(1, 2), content(1, 2))
            assert len(client.get(2, 3)) == 0


def test_restart_keeps_content_and_process(tmp_path: Path) -> None:
    with running(tmp_path, "--fresh") as daemon:
        with RawClient(daemon.address) as client:
            client.put(1, 8)
            epoch = client.welcome.epoch
        code, done = command("restart", "--connect", daemon.address)
        assert (code, done["pid"], done["blocks_kept"]) == (0, daemon.pid, 8)
        with RawClient(daemon.address) as client:
            assert client.welcome.epoch != epoch
            assert np.array_equal(client.get(1, 8), content(1, 8))
            epoch = client.welcome.epoch
        descriptors = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: epoch_of(daemon.address) not in (b"", epoch))
        with RawClient(daemon.address) as client:
            assert np.array_equal(client.get(1, 8), content(1, 8))
        # Those of a client that has just left may still be there.
        wait_until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= descriptors)
        assert len(daemon.holder_pids()) == 1
        assert daemon.stop() == 0
        assert daemon.holder_pids() == []


def epoch_of(address: str) -> bytes:
    try:
        with RawClient(address) as client:
            return client.welcome.epoch
    except (ConnectionError, TimeoutError, _native.RemoteError):
        return b""


def serves_anew(address: str, before: bytes) -> bool:
    return epoch_of(address) not in (b"", before)


@pytest.mark.slow
def test_restart_keeps_content_that_is_not_to_outlive_a_crash(tmp_path: Path) -> None:
    with running(tmp_path, "--hold-seconds", "0") as daemon:
        assert daemon.holder_pids() == []
        with RawClient(daemon.address) as client:
            client.put(1, 8)
        code, done = command("restart", "--connect", daemon.address)
        assert (code, done["blocks_kept"]) == (0, 8)
        with RawClient(daemon.address) as client:
            assert np.array_equal(client.get(1, 8), content(1, 8))
        daemon.kill()
        wait_until(lambda: daemon.holder_pids() == [])


def test_a_second_daemon_is_refused_by_name(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        second = Daemon(tmp_path)
        assert second.end() == 1
        assert f"process {daemon.pid}" in second.log.read_text()
        with RawClient(daemon.address) as client:
            assert client.put(1, 1) == 0


@pytest.mark.slow
def test_adopt_wants_content_and_fresh_drops_it(tmp_path: Path) -> None:
    nothing = Daemon(tmp_path, "--adopt")
    assert nothing.end() == 2
    assert "adopt: no holder" in nothing.log.read_text()
    with running(tmp_path) as daemon:
        with RawClient(daemon.address) as client:
            client.put(1, 2)
        daemon.kill()
        with running(tmp_path, "--fresh") as fresh, RawClient(fresh.address) as client:
            assert client.status()["adopted"] is None
            assert len(client.get(1, 2)) == 0


@pytest.mark.slow
def test_content_that_does_not_fit_the_settings_is_dropped_or_refused(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        daemon.kill()
        larger = Daemon(tmp_path, "--adopt", "--cpu", "5MiB")
        assert larger.end() == 1
        assert "arena: it was made with 4194304" in larger.log.read_text()
        with running(tmp_path, "--cpu", "5MiB") as again, RawClient(again.address) as client:
            status = client.status()
            assert status["adopted"] is None
            assert status["tiers"][0]["capacity_bytes"] >= 5 << 20
            assert any("dropped" in each["message"] for each in status["recent_errors"])


@pytest.mark.slow
def test_a_killed_holder_is_replaced_and_still_keeps_the_content(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        with RawClient(daemon.address) as client:
            client.put(1, 2)
        (first,) = daemon.holder_pids()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: any(has_memory(pid) for pid in daemon.holder_pids() if pid != first))
        daemon.kill()
        with running(tmp_path, "--adopt") as again, RawClient(again.address) as client:
            assert np.array_equal(client.get(1, 2), content(1, 2))


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, RawClient(daemon.address) as client:
        client.reserve(chain(1, 2))  # a write under way, which the first signal waits for
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.status()["state"] == "draining")
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.end() == 1
        wait_until(lambda: daemon.holder_pids() == [])


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [False, True])
def test_signals_that_come_early_or_twice_are_heard(tmp_path: Path, stuck: bool) -> None:
    """It is told to start again and at once to stop, from the moment on that it can be reached."""
    with running(tmp_path) as daemon:
        (holder,) = daemon.holder_pids()
        if stuck:
            os.kill(holder, signal.SIGSTOP)
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.end() == 0  # the holder says nothing: it ends all the same
            assert "does not answer" in daemon.log.read_text()
            return
        for _ in range(3):
            with RawClient(daemon.address) as client:
                epoch = client.welcome.epoch
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(partial(serves_anew, daemon.address, epoch))
            daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: epoch_of(daemon.address) != b"")
        assert daemon.stop() == 0
        wait_until(lambda: daemon.holder_pids() == [])
        assert not list(tmp_path.glob("s"))


def test_who_comes_during_the_start_is_answered_as_soon_as_it_serves(tmp_path: Path) -> None:
    config = DaemonConfig(
        cpu="1MiB", chunk="128KiB", listen=f"unix:{tmp_path}/s", http="", hold_seconds=0
    )
    asked: list[Future[bytes]] = []

    def come(*_: object) -> None:
        asked.append(pool.submit(greet, config.listen))
        wait_until(asked[0].running)

    def greet(address: str) -> bytes:
        with RawClient(address) as client:
            assert client.status()["state"] == "serving"
            return client.welcome.epoch

    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "_keep_arena", come)
        with Service(config) as service:
            assert asked[0].result(SECONDS) == service.epoch
    assert not (tmp_path / "s").exists()


def test_a_start_that_fails_leaves_no_socket(tmp_path: Path) -> None:
    config = DaemonConfig(
        cpu="1MiB", chunk="128KiB", listen=f"unix:{tmp_path}/s", http="", hold_seconds=0
    )
    with pytest.raises(kvstore.ConfigError, match="adopt"):
        Service(config, adopt="must")
    assert not (tmp_path / "s").exists()
    with Service(config):
        pass


def test_a_service_manager_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(SECONDS)
        with running(tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")) as daemon:
            assert told.recv(100) == b"READY=1"
            daemon.stop()
            assert told.recv(100) == b"STOPPING=1"


@pytest.mark.slow
def test_logs_are_lines_of_json_when_asked_for(tmp_path: Path) -> None:
    import json

    with running(tmp_path, "--log-format", "json") as daemon:
        daemon.stop()
        lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
        assert any("kvstored serves" in line["message"] for line in lines)
        assert {"level", "logger", "timestamp"} <= set(lines[0])


def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    config = DaemonConfig(
        cpu="4MiB", listen=f"unix:{tmp_path}/s", state=str(tmp_path / "open"), http=""
    )
    with pytest.raises(kvstore.ConfigError, match=r"state: .* mode 0755"):
        Service(config)

"""The holder keeps a descriptor as long as it was told to, for its own user only, and goes away.

Real holder processes. What is asked: the memory comes back after the daemon's end, it is freed
when nobody comes, and neither strange packets nor other users get anything.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.daemon.holding import SOCKET_NAME, Holding
from kvstore.errors import ConfigError, InUseError, StorageError


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def memory(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def content_of(fd: int) -> bytes:
    return os.pread(fd, 100, 0)


def is_gone(pid: int) -> bool:
    """Whether it has ended; whoever is to reap it may be slow."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[Holding]:
    made = Holding(tmp_path, 60.0)
    yield made
    made.drop()
    pid = made.pid
    made.close()
    if pid:
        wait_until(lambda: is_gone(pid))


def test_what_was_put_comes_back_on_another_connection(holding: Holding, tmp_path: Path) -> None:
    assert holding.get() is None
    fd = memory(b"blocks")
    holding.put(fd, "g1")
    os.close(fd)
    other = Holding(tmp_path, 60.0)
    got = other.get()
    assert got is not None
    assert (content_of(got[0]), got[1]) == (b"blocks", "g1")
    assert not os.get_inheritable(got[0])
    os.close(got[0])
    other.close()
    fd = memory(b"newer")
    holding.put(fd, "g2")
    os.close(fd)
    again = holding.get()
    assert again is not None
    assert (content_of(again[0]), again[1]) == (b"newer", "g2")
    os.close(again[0])


def test_a_relative_directory_is_left_without_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    holding = Holding(Path(), 60.0)
    fd = memory(b"x")
    holding.put(fd, "g")
    os.close(fd)
    pid = holding.pid
    holding.drop()
    holding.close()
    wait_until(lambda: is_gone(pid))
    assert not (tmp_path / SOCKET_NAME).exists()


def test_it_keeps_nothing_but_what_it_was_given(holding: Holding) -> None:
    with open(os.devnull) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        fd = memory(b"x")
        holding.put(fd, "g")
        os.close(fd)
    proc = Path(f"/proc/{holding.pid}")
    names = [os.readlink(entry) for entry in (proc / "fd").iterdir()]
    assert sum("memfd" in name for name in names) == 1
    assert sum("/dev/null" in name for name in names) == 3
    assert len(names) == 4 + 3  # and: listener, our connection, epoll
    assert os.readlink(proc / "cwd") == "/"
    assert os.getsid(holding.pid) != os.getsid(0)  # a Ctrl-C does not reach it
    assert (proc / "status").read_text().count("kB") > 0
    mode = Path(holding._path).stat().st_mode
    assert mode & 0o777 == 0o600


def test_it_frees_the_memory_when_nobody_comes_back(tmp_path: Path) -> None:
    holding = Holding(tmp_path, 0.2)
    fd = memory(b"x")
    holding.put(fd, "g")
    os.close(fd)
    pid = holding.pid
    holding.close()
    wait_until(lambda: is_gone(pid))
    assert not (tmp_path / SOCKET_NAME).exists()


def test_it_stays_while_a_daemon_lives(tmp_path: Path) -> None:
    holding = Holding(tmp_path, 0.0)
    fd = memory(b"x")
    holding.put(fd, "g")
    os.close(fd)
    for _ in range(50):
        assert not holding.check()
    pid = holding.pid
    holding.drop()
    assert not is_gone(pid)
    holding.close(10.0)
    wait_until(lambda: is_gone(pid))


def test_a_killed_holder_is_started_again_with_the_memory(holding: Holding) -> None:
    fd = memory(b"blocks")
    holding.put(fd, "g")
    os.close(fd)
    first = holding.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: is_gone(first))
    assert holding.check()
    assert holding.pid not in (0, first)
    got = holding.get()
    assert got is not None
    assert content_of(got[0]) == b"blocks"
    os.close(got[0])
    assert not holding.check()


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"put",
        b"put g 1",
        b"put g -1",
        b"get nan",
        b"get",
        b"get 1e99",
        b"\xff\xfe",
        b"x" * 999,
    ],
)
def test_strange_packets_end_their_connection_only(holding: Holding, packet: bytes) -> None:
    fd = memory(b"blocks")
    holding.put(fd, "g")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(10)
        peer.connect(str(holding._path))
        extra = [fd, fd] if packet == b"put g 1" else []
        socket.send_fds(peer, [packet], extra)
        assert peer.recv(100) == b""
    os.close(fd)
    got = holding.get()
    assert got is not None
    os.close(got[0])
    names = [os.readlink(p) for p in Path(f"/proc/{holding.pid}/fd").iterdir()]
    assert sum("memfd" in name for name in names) == 1


def test_one_that_does_not_answer_is_named(
    holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = memory(b"x")
    holding.put(fd, "g")
    os.close(fd)
    pid = holding.pid
    holding.close()
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr("kvstore.daemon.holding._ANSWER_SECONDS", 0.1)
    try:
        with pytest.raises(InUseError, match=str(pid)):
            holding.get()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_errors_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="state"):
        Holding(tmp_path / ("x" * 120), 1.0)
    holding = Holding(tmp_path / "missing", 1.0)
    fd = memory(b"x")
    with pytest.raises(StorageError, match="missing"):
        holding.put(fd, "g")
    os.close(fd)
    holding.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_another_user_gets_nothing(holding: Holding, tmp_path: Path) -> None:
    fd = memory(b"secret")
    holding.put(fd, "g")
    os.close(fd)
    os.chmod(holding._path, 0o666)  # so that only the check of the peer is in the way
    for part in (tmp_path, *tmp_path.parents):
        os.chmod(part, part.stat().st_mode | 0o011) if part != Path("/") else None
    code = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "peer.settimeout(10); peer.connect(sys.argv[1])\n"
        "try:\n"
        "    peer.send(b'get 1'); sys.exit(1 if peer.recv(100) else 0)\n"
        "except ConnectionError:\n"
        "    sys.exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(holding._path)], check=False)
    assert done.returncode == 0

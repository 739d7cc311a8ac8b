"""Two hosts are what tests of transports take them for: apart, joined by a cable that can be cut,
lose packets and be slow, and gone afterwards. Datagrams and a stream are sent between sockets that
threads of this process have on either host."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvstore.bench.two_hosts import Host, HostsUnavailableError, TwoHosts

PORT = 7000
WAIT_S = 20.0
NAMES = Path("/run/netns")


def datagrams(host: Host) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((host.address, PORT))
    made.settimeout(WAIT_S)
    return made


@pytest.fixture
def sockets(two_hosts: TwoHosts) -> tuple[socket.socket, socket.socket]:
    return (
        two_hosts.a.call(datagrams, two_hosts.a),
        two_hosts.b.call(datagrams, two_hosts.b),
    )


def arrived(sender: socket.socket, receiver: socket.socket, count: int) -> int:
    """How many of `count` datagrams arrive; those that do have arrived when sendto returns, and
    the first one may wait for the address to be resolved."""
    for _ in range(count):
        with contextlib.suppress(OSError):
            sender.sendto(b"x", receiver.getsockname())
    seen = 0
    receiver.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        while True:
            receiver.recv(16)
            seen += 1
    return seen


def test_hosts_reach_each_other_and_nothing_else(
    two_hosts: TwoHosts, sockets: tuple[socket.socket, socket.socket]
) -> None:
    with sockets[0] as a, sockets[1] as b:
        assert arrived(a, b, 50) == 50
        with pytest.raises(OSError, match="unreachable"):
            a.sendto(b"x", ("192.0.2.1", PORT))
    shown = two_hosts.a.run(["ls", "/sys/class/net"], stdout=subprocess.PIPE).stdout.split()
    assert sorted(set(shown) & {"lo", "veth0", "eth0"}) == ["lo", "veth0"]


def test_a_cut_and_loss_strike_until_healed(
    two_hosts: TwoHosts, sockets: tuple[socket.socket, socket.socket]
) -> None:
    with sockets[0] as a, sockets[1] as b:
        assert arrived(a, b, 20) == 20
        two_hosts.cut()
        assert arrived(a, b, 20) == 0
        two_hosts.heal()
        two_hosts.lose(0.5)
        some = arrived(a, b, 400)
        assert 100 < some < 300  # 200 +- 10 deviations
        two_hosts.heal()
        assert arrived(a, b, 20) == 20


def test_a_limit_makes_a_stream_slow(two_hosts: TwoHosts) -> None:
    listener = two_hosts.b.call(socket.create_server, (two_hosts.b.address, PORT))
    sender = two_hosts.a.call(socket.create_connection, (two_hosts.b.address, PORT))
    receiver, _ = listener.accept()
    rate = 4 << 20
    two_hosts.limit(rate)
    with listener, sender, receiver:
        receiver.settimeout(WAIT_S)
        sender.setblocking(False)
        begin, got = time.monotonic(), 0
        while got < 1 << 20:
            with contextlib.suppress(BlockingIOError):
                sender.send(bytes(64 << 10))
            got += len(receiver.recv(256 << 10))
        assert time.monotonic() - begin > 0.5 * (1 << 20) / rate


def test_a_python_on_a_host_and_leftovers_end_with_it(two_hosts: TwoHosts) -> None:
    process = two_hosts.a.start_python("time", "sleep", 600)
    give_up = time.monotonic() + WAIT_S
    while process.pid not in two_hosts.a.processes() and time.monotonic() < give_up:
        time.sleep(0.01)
    two_hosts.close()
    assert process.wait(WAIT_S) != 0
    assert not [path for path in NAMES.iterdir() if path.name == two_hosts.a.name]


DIE = """
import os
from kvstore.bench.two_hosts import TwoHosts
print(TwoHosts().a.name, flush=True)
os._exit(1)
"""


def test_hosts_of_a_run_that_died_are_swept(two_hosts: TwoHosts) -> None:
    died = subprocess.run(
        [sys.executable, "-c", DIE],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    left = died.stdout.strip()
    assert left
    with TwoHosts():  # makes hosts of its own, and so sweeps
        names = {path.name for path in NAMES.iterdir()}
    assert left not in names
    assert two_hosts.a.name in names


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    with pytest.raises(HostsUnavailableError, match="need root"):
        TwoHosts()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(HostsUnavailableError, match="iproute2"):
        TwoHosts()

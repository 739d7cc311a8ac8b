"""`kvstore bench transport` compares ways to move bytes that take turns, each of two processes:
what is not installed is absent with how to get it, wrong bytes and deaths end one way and not the
run, and nothing is left running. A peer of our own, in a file as foreign ones are, moves bytes
through a file; a raw socket program is built and run between two hosts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.bench import contenders, transport
from kvstore.bench.contenders import Contender, End
from kvstore.cli import build_app
from kvstore.errors import ConfigError
from tests.transport.netns import TwoHosts

pytestmark = pytest.mark.slow  # it starts some thirty processes
KIB = 1 << 10
PEER = """
import os, time
import numpy as np

class Peer:
    version = "by a file"
    def __init__(self, options):
        self.options = options
        if options.get("needs"):
            __import__(options["needs"])
    def memory(self, num_bytes):
        return np.ones(num_bytes, np.uint8)
    def serve(self, memory):
        memory.tofile(self.options["through"])
        return self.options["through"]
    def connect(self, hello, memory):
        self.source, self.target = np.fromfile(hello, np.uint8), memory
    def read(self, offset, at, size, batch):
        fault = self.options.get("fault", "")
        if fault == "dies":
            os._exit(3)
        if fault == "hangs":
            time.sleep(600)
        end = size * batch - (fault == "short")
        self.target[at : at + size * batch] = 0
        self.target[at : at + end] = self.source[offset : offset + end]
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SOURCE_BYTES", 1 << 20)
    monkeypatch.setattr(transport, "WORKLOADS", (transport.Workload("4KiB", 4096, 16, 2),))
    monkeypatch.setattr(transport, "SIZES", [4096])


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    file = tmp_path / "peer.py"
    file.write_text(PEER)
    (tmp_path / "source").write_bytes(os.urandom(256 * KIB))
    return file


def contender(peer: Path, **options: str) -> Contender:
    both = {
        "source": str(peer.parent / "source"),
        "through": str(peer.parent / "through"),
        **options,
    }
    return Contender(End.python(str(peer), "serve", both), End.python(str(peer), "read", both))


def turned(made: Contender) -> Contender:
    made.start()
    try:
        for number in range(2):
            made.turn("4KiB", 4096, 4, 3, number)
    finally:
        made.stop()
    return made


def test_a_way_of_two_processes_is_timed_and_compared(peer: Path) -> None:
    one, other = turned(contender(peer)), turned(contender(peer))
    assert one.absent == ""
    assert one.version == "by a file"
    assert 0 < one.median("4KiB") < 10
    assert one.speedup(other, "4KiB") * other.speedup(one, "4KiB") > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"needs": "no_such_module"}, "No module named 'no_such_module'"),
        ({"fault": "short"}, "4KiB: what came is not what was sent"),
        ({"fault": "dies"}, "4KiB: ended with status 3"),
    ],
)
def test_what_fails_is_absent_and_says_why(peer: Path, options: dict[str, str], why: str) -> None:
    assert turned(contender(peer, **options)).absent.startswith(why)


def test_a_way_that_hangs_is_ended(peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_TURN_SECONDS", 0.5)
    assert "no answer within 0.5 s" in turned(contender(peer, fault="hangs")).absent


def test_memcpy_and_shared_memory_are_measured() -> None:
    figures = {f.name: f for f in transport.run(only=["shm"], quick=True)}
    assert set(figures) == {"memcpy_4KiB", "shm_4KiB"}
    assert "verified on arrival" in str(figures["shm_4KiB"].against)
    assert (figures["shm_4KiB"].ratio or 0) > 0


def test_peers_are_absent_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_PEERS", Path("/nonexistent"))
    figures = transport.run(only=["raw_tcp", "nixl", "mooncake_tcp"], quick=True)
    absent = {f.name: f.against for f in figures if f.unit == "absent"}
    assert set(absent) == {"raw_tcp_4KiB", "nixl_4KiB", "mooncake_tcp_4KiB"}
    assert all("checkout" in str(why) for why in absent.values())


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_raw_socket_program_runs_between_two_hosts(two_hosts: TwoHosts) -> None:
    two_hosts.close()  # it makes its own; this one told that there can be some
    figures = transport.run(hosts=2, only=["raw_tcp"], quick=True)
    raw = next(figure for figure in figures if figure.name == "raw_tcp_4KiB")
    assert raw.unit == "GB/s", raw.against
    assert "connection" in str(raw.against)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="only: 'smoke_signals' is none of memcpy"):
        transport.run(only=["smoke_signals"])


def test_the_command_prints_one_object() -> None:
    result = CliRunner().invoke(
        build_app([]), ["bench", "transport", "--only", "memcpy", "--quick", "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [figure["name"] for figure in report["figures"]] == ["memcpy_4KiB"]
    assert report["quick"] is True

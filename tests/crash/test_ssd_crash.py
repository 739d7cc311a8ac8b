"""kill -9 of a writer: everything it acknowledged is read back exactly, nothing else is wrong.

One directory lives through many writers. A cycle starts a writer, lets it acknowledge a few
batches, kills it (at a random moment, or at the entry of a chosen system call by strace), opens the
directory and compares every byte.
"""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.ssd_outcome import Promises
from tests.ssd_support import KINDS

pytestmark = [pytest.mark.crash]

CALLS = [
    "pwrite64",
    "io_uring_enter",
    "fdatasync",
    "fsync",
    "rename",
    "unlink",
    "fallocate",
    "msync,fdatasync",
    "write",
]


def start(path: Path, kind: str, seed: int, prefix: list[str]) -> "subprocess.Popen[str]":
    command = [*prefix, sys.executable, "-m", "tests.crash.ssd_writer", str(path), kind, str(seed)]
    return subprocess.Popen(
        [*command, str(seed % 2)],
        stdout=subprocess.PIPE,
        text=True,
    )


def hear_out(writer: "subprocess.Popen[str]") -> str:
    """All that it still said. Not communicate(): that would skip what readline() has buffered."""
    assert writer.stdout is not None
    with writer.stdout:
        said = writer.stdout.read()
    writer.wait()
    return said


def kill_at_random(path: Path, kind: str, seed: int) -> str:
    dice = random.Random(seed)
    writer = start(path, kind, seed, [])
    assert writer.stdout is not None
    heard = ""
    # Counting lines and not seconds keeps the kill inside the writer's work on any machine.
    for _ in range(dice.choice([0, 1, 2, 5, 20, 60])):
        heard += writer.stdout.readline()
    for _ in range(dice.randrange(20_000)):
        pass
    writer.send_signal(signal.SIGKILL)
    heard += hear_out(writer)
    assert writer.returncode == -signal.SIGKILL
    return heard


def kill_at_call(path: Path, kind: str, seed: int) -> str:
    dice = random.Random(seed)
    calls = CALLS[seed % len(CALLS)]
    # The first calls belong to opening; later ones to segments, commits and reclaims.
    when = dice.choice([1, 2, 3, 5, 8, 13, 40, 90])
    inject = f"inject={calls}:signal=KILL:when={when}"
    writer = start(
        path, kind, seed, ["strace", "-f", "-o", "/dev/null", "--seccomp-bpf", "-e", inject]
    )
    return hear_out(writer)


def run(tmp_path: Path, kind: str, how: str, cycles: int, first_seed: int) -> None:
    if how == "call" and shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    path = tmp_path / "ssd"
    promises = Promises()
    checked = 0
    for seed in range(first_seed, first_seed + cycles):
        kill = kill_at_call if how == "call" else kill_at_random
        promises.hear(kill(path, kind, seed))
        checked += promises.check(path, kind)
    assert checked > 0


@pytest.mark.parametrize("how", ["random", "call"])
def test_a_few_kills(tmp_path: Path, how: str) -> None:
    run(tmp_path, "auto", how, 3, 1000)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["random", "call"])
def test_many_kills(tmp_path: Path, kind: str, how: str) -> None:
    run(tmp_path, kind, how, 60, 0)

"""kill -9 of a process with a whole store, and power loss: what was acknowledged is read back.

A cycle starts a writer, lets it acknowledge a few puts, and ends it: at a random moment, at the
entry of a chosen system call (by strace), or with the power of its disk. Then the directory is
opened and every chain is loaded: each block that comes must be exact, and each that was
acknowledged must come (unless the writer also removed blocks or ran out of room).
"""

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore import ContiguousBlocks
from tests.crash.store_writer import NUM_CHAINS, SPEC, chain_of, open_at
from tests.crash.test_ssd_crash import CALLS
from tests.crash.test_ssd_powerloss import Disk
from tests.crash.test_ssd_powerloss import disk as disk
from tests.store_support import payload

pytestmark = [pytest.mark.crash]

LIFE = 12  # writers that a directory lives through: then most chains are complete, and new begin


def start(path: Path, seed: int, ack: str, mode: str, prefix: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *prefix,
            sys.executable,
            "-m",
            "tests.crash.store_writer",
            str(path),
            str(seed),
            ack,
            mode,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def hear(writer: "subprocess.Popen[str]", num_lines: int) -> str:
    assert writer.stdout is not None
    return "".join(writer.stdout.readline() for _ in range(num_lines))


def kill_at_random(path: Path, seed: int, ack: str, mode: str) -> str:
    dice = random.Random(seed)
    writer = start(path, seed, ack, mode, [])
    # Lines, not seconds, keep the kill inside the writer's work on any machine.
    heard = hear(writer, dice.choice([1, 2, 3, 6, 15, 40]))
    for _ in range(dice.randrange(50_000)):
        pass
    writer.send_signal(signal.SIGKILL)
    rest, errors = writer.communicate()
    assert writer.returncode == -signal.SIGKILL, errors
    return heard + rest


def kill_at_call(path: Path, seed: int, ack: str, mode: str) -> str:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    dice = random.Random(seed)
    when = dice.choice([1, 2, 3, 5, 8, 13, 40, 90])
    inject = f"inject={CALLS[seed % len(CALLS)]}:signal=KILL:when={when}"
    strace = ["strace", "-f", "-o", "/dev/null", "--seccomp-bpf", "-e", inject]
    writer = start(path, seed, ack, mode, strace)
    heard, errors = writer.communicate()
    assert "Traceback" not in errors, errors
    return heard


def acknowledged(heard: str) -> dict[int, int]:
    found: dict[int, int] = {}
    for line in heard.splitlines(keepends=True):
        if line.endswith("\n") and line.startswith("a "):
            number, count = map(int, line.split()[1:])
            found[number] = max(count, found.get(number, 0))
    return found


def check(path: Path, promised: dict[int, int], mode: str) -> int:
    with open_at(path, mode) as store:
        for number in range(NUM_CHAINS):
            hashes = chain_of(number)
            room = np.zeros((len(hashes), SPEC.block_bytes), np.uint8)
            count = store.load(hashes, ContiguousBlocks(room)).wait(60.0).num_blocks
            expected = payload(hashes[:count], SPEC.block_bytes)
            assert np.array_equal(room[:count], expected), f"chain {number} is wrong"
            assert mode == "churn" or count >= promised.get(number, 0), f"chain {number} lost"
        assert store.stats()["kvstore_ssd_read_failures_total"] == 0
        assert store.stats()["kvstore_leases"] == 0
    return sum(promised.values())


def run(directory: Path, how: str, mode: str, seeds: range) -> None:
    checked = 0
    promised: dict[int, int] = {}
    path = directory / "ssd-0"
    for turn, seed in enumerate(seeds):
        if turn % LIFE == 0:
            path, promised = directory / f"ssd-{turn // LIFE}", {}
        kill = kill_at_call if how == "call" else kill_at_random
        for number, count in acknowledged(kill(path, seed, "ssd", mode)).items():
            promised[number] = max(count, promised.get(number, 0))
        checked += check(path, promised, mode)
    assert checked > 0


@pytest.mark.parametrize("how", ["random", "call"])
@pytest.mark.parametrize("mode", ["keep", "churn"])
def test_a_few_kills_of_a_store(tmp_path: Path, how: str, mode: str) -> None:
    run(tmp_path, how, mode, range(2000, 2002))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", ["random", "call"])
@pytest.mark.parametrize("mode", ["keep", "churn"])
def test_many_kills_of_a_store(tmp_path: Path, how: str, mode: str) -> None:
    run(tmp_path, how, mode, range(36))


def cut_power(disk: Disk, seeds: range) -> Iterator[int]:
    promised: dict[int, int] = {}
    path = disk.mounted_at / "ssd"
    for seed in seeds:
        writer = start(path, seed, "durable", "keep", [])
        heard = hear(writer, random.Random(seed).choice([2, 3, 8, 20]))
        disk.cut_power()
        writer.kill()
        heard += writer.communicate()[0]  # said before the power went, or written to a dead disk
        disk.unmount()
        disk.mount()
        for number, count in acknowledged(heard).items():
            promised[number] = max(count, promised.get(number, 0))
        yield check(path, promised, "keep")


@pytest.mark.powerloss
def test_a_power_cut_under_a_store(disk: Disk) -> None:
    assert sum(cut_power(disk, range(3000, 3002))) > 0


@pytest.mark.slow
@pytest.mark.powerloss
@pytest.mark.timeout(600)
def test_many_power_cuts_under_a_store(disk: Disk) -> None:
    assert sum(cut_power(disk, range(12))) > 0

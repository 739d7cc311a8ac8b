"""kill -9 of a process with an arena, again and again: the next one finds what was committed.

The test keeps the arena's descriptor, as a holder does, and looks at the arena itself after each
kill: each block that is found has its bytes; the latest chains that were acknowledged, which no
eviction can have reached, are found whole; nothing is in use but what is found.
"""

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys

import pytest

from kvstore import _native
from tests.core_support import View, memory, rows
from tests.crash.adoption_writer import LONGEST, NUM_CHAINS, SIZE, blocks_of

pytestmark = [pytest.mark.crash]

SLOT = 8192
RECENT_PUTS = 6  # of 12 blocks: in an arena of 112 slots, none of them can have been evicted


def run_and_kill(keep: int | None, seed: int) -> tuple[int, list[str]]:
    """Returns the arena's descriptor and what the writer said."""
    dice = random.Random(seed)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if keep is None:
            ours.send(b"x")
        else:
            socket.send_fds(ours, [b"x"], [keep])
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.adoption_writer", str(theirs.fileno()), str(seed)],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        if keep is None:
            _, (keep,), _, _ = socket.recv_fds(ours, 1, 1)
        assert writer.stdout is not None
        # Lines, not seconds, keep the kill inside the writer's work on any machine.
        said = [writer.stdout.readline() for _ in range(dice.choice([2, 9, 40, 150]))]
        for _ in range(dice.randrange(20_000)):
            pass
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        lines = [*said, *rest.splitlines(keepends=True)]
        return keep, [line for line in lines if line.endswith("\n")]


def copy_of(fd: int) -> int:
    copy = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    with memory(fd) as arena:
        os.write(copy, arena[:])
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return copy


@pytest.mark.parametrize("seed", range(2))
def test_next_process_finds_what_was_committed(seed: int) -> None:
    keep: int | None = None
    for life in range(4):
        keep, said = run_and_kill(keep, seed * 1000 + life)
        # A copy is looked at, so that the next writer adopts what the killed one left.
        fd = copy_of(keep)
        core = _native.StoreCore.adopt(fd, "lru")
        core.add_namespace(SIZE)
        found = core.recover({0: 0})
        assert found["quarantined"] == 0
        view = View(core, fd)
        there = {number: view.load(blocks_of(number)) for number in range(NUM_CHAINS)}
        assert sum(there.values()) == found["adopted"]
        stats = core.stats()
        assert stats["damaged"] == 0
        assert stats["cpu_used_bytes"] == found["adopted"] * SLOT
        removed: set[int] = set()
        recent: dict[int, int] = {}
        puts = 0
        for line in reversed(said):
            act, *words = line.split()
            number, *counts = map(int, words)
            if act == "r":
                removed.add(number)
            if act != "a" or puts == RECENT_PUTS:
                continue
            puts += 1
            if number not in removed and counts[0] == counts[1]:  # not older than this line
                recent.setdefault(number, counts[0])
        for number, n in recent.items():
            assert there[number] >= n
        # And it goes on: the whole arena can be written.
        for number in range(NUM_CHAINS):
            assert view.put(blocks_of(number)) >= LONGEST - there[number]
        os.close(view.die())
        assert core.match(0, rows(blocks_of(NUM_CHAINS - 1)), 0) == LONGEST
    assert keep is not None
    os.close(keep)

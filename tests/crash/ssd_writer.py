"""The writer that the crash and power-loss tests kill: small blocks, acknowledged on stdout.

    python -m tests.crash.ssd_writer PATH KIND SEED DURABLE

A line "a N..." acknowledges the blocks N; "f N..." says that they are about to be forgotten or may
be dropped, so that either outcome is right. Lines are written whole and unbuffered.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.tiers.ssd import Records
from tests.ssd_support import hashes_of, open_tier, write

SIZES = [1, 700, 4096, 6000]
SETTINGS = {"segment_bytes": 128 << 10, "capacity_bytes": 768 << 10, "io_depth": 8}


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def say(kind: str, numbers: list[int]) -> None:
    os.write(1, (kind + " " + " ".join(map(str, numbers)) + "\n").encode())


def main() -> None:
    path, kind, seed, durable = sys.argv[1:5]
    dice = random.Random(int(seed))
    tier = open_tier(Path(path), kind, **SETTINGS)
    namespace = tier.register_namespace(b"crash", b"")

    def survivors(found: Records) -> npt.NDArray[np.bool_]:
        numbers = [int.from_bytes(h[:8].tobytes(), "big") for h in found.hash]
        chosen = np.array([dice.random() < 0.5 for _ in numbers], bool)
        # Some of the chosen may not fit either.
        say("f", numbers)
        return chosen

    say("o", [])
    for _ in range(400):  # where the chosen call never comes
        size = dice.choice(SIZES)
        first = dice.randrange(100_000)
        numbers = [n for n in range(first, first + 60) if size_of(n) == size]
        while tier.needs_reclaim(len(numbers) * 8192):
            done = tier.reclaim(survivors)
            if done is not None:
                say("a", [int.from_bytes(h[:8].tobytes(), "big") for h in done.moved.hash])
        at = write(tier, numbers, size, durable=durable == "1", namespace=namespace)
        say("a", numbers[: int(at.ok.sum())])
        if dice.random() < 0.2:
            say("f", numbers[:5])
            tier.forget(np.full(len(numbers[:5]), namespace, np.uint32), hashes_of(numbers[:5]))
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()

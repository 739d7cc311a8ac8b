"""The writer that the store's crash tests kill: a whole store, acknowledged on stdout.

    python -m tests.crash.store_writer PATH SEED ACK MODE

A line "a CHAIN N" says that the first N blocks of a chain were acknowledged at ACK. In mode "keep"
nothing is removed and all fits, so what was acknowledged must be there; in mode "churn" blocks are
removed and the ssd is small, so they may be gone.
"""

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np

import kvstore
from kvstore import BlockHashes, BlockSpec, ContiguousBlocks, Namespace, Store
from tests.store_support import chain, payload

SPEC = BlockSpec(num_layers=2, num_kv_heads=1, head_dim=32, block_tokens=16, dtype="float32")
NAMESPACE = Namespace("crash", SPEC)
NUM_CHAINS = 60
PREFIX = chain(1, 3)
CAPACITY = {"keep": "64MiB", "churn": "1MiB"}


def chain_of(number: int) -> BlockHashes:
    """Every other chain shares a prefix; they have 4 to 12 blocks of 8 KiB."""
    tail = 4 + number % 9
    return PREFIX + chain(100 + number, tail, PREFIX) if number % 2 else chain(100 + number, tail)


def open_at(path: Path, mode: str, codec: str = "none") -> Store:
    return kvstore.open(
        NAMESPACE,
        cpu="1MiB",
        chunk="256KiB",
        ssd=str(path),
        ssd_capacity=CAPACITY[mode],
        ssd_segment="256KiB",
        codec=codec,
    )


def main() -> None:
    path, seed, ack, mode = sys.argv[1:5]
    dice = random.Random(int(seed))
    store = open_at(Path(path), mode, dice.choice(["none", "zstd"]))
    os.write(1, b"o\n")
    for _ in range(200):
        running = []
        for _ in range(dice.choice([1, 1, 3])):
            number = dice.randrange(NUM_CHAINS)
            hashes = chain_of(number)
            hashes = hashes[: dice.randrange(1, len(hashes) + 1)]
            source = ContiguousBlocks(payload(hashes, SPEC.block_bytes))
            level = cast(Any, dice.choice([ack, ack, "memory"]))
            background = dice.random() < 0.3
            running.append((number, store.put(hashes, source, ack=level, background=background)))
        for number, transfer in running:
            result = transfer.wait(60.0)
            if result.ack == ack:
                os.write(1, f"a {number} {result.num_blocks}\n".encode())
        other = chain_of(dice.randrange(NUM_CHAINS))
        choice = dice.random()
        if choice < 0.2:
            room = ContiguousBlocks(np.zeros((len(other), SPEC.block_bytes), np.uint8))
            store.load(other, room)
        elif choice < 0.4 and mode == "churn":
            store.remove(other[dice.randrange(len(other)) :])
        elif choice < 0.42 and mode == "churn":
            store.clear()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()

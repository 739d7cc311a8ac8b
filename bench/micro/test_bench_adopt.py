"""How long does a new process take to have an old one's blocks again, from the arena alone?

    python -m pytest bench/micro/test_bench_adopt.py --benchmark-enable

Blocks of 4 KiB in chains of 256, so that the time is that of headers and index, not of payload.
"""

import os

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvstore import ContiguousBlocks, _native

BLOCK_BYTES = 4096
CHAIN = 256
CHUNK = 4 << 20


def filled(num_blocks: int) -> int:
    """The descriptor of an arena with that many blocks; its core is gone."""
    per_chunk = CHUNK // (BLOCK_BYTES + 128) - 1
    core = _native.StoreCore((num_blocks // per_chunk + 1) * CHUNK, CHUNK, False, "lru")
    core.add_namespace(BLOCK_BYTES)
    owner, dice = core.new_owner(), np.random.default_rng(0)
    blocks = np.ones((CHAIN, BLOCK_BYTES), np.uint8)
    plan = ContiguousBlocks(blocks).plan  # holds addresses only
    for _ in range(num_blocks // CHAIN):
        hashes = dice.integers(0, 256, (CHAIN, 32), np.uint8)
        core.put(owner, 0, hashes, 0, None, plan, np.arange(CHAIN), 1)
    core.set_metadata(b"one namespace")
    return os.dup(core.arena_fd)


@pytest.mark.parametrize("num_blocks", [100 * 1024, 1000 * 1024])
def test_adopt(benchmark: BenchmarkFixture, num_blocks: int) -> None:
    fd = filled(num_blocks)

    def adopt() -> int:
        core = _native.StoreCore.adopt(fd, "lru")
        core.add_namespace(BLOCK_BYTES)
        return core.recover({0: 0})["adopted"]

    assert benchmark.pedantic(adopt, rounds=5) == num_blocks  # type: ignore[no-untyped-call]
    os.close(fd)

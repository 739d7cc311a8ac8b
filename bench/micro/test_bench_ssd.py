"""What do writes, reads and recovery of the SSD tier cost? bench/ssd_limit.py has the limits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore import _native
from kvstore.tiers.ssd import Locations, SsdConfig, SsdTier
from tests.ssd_support import Memory

COUNT = 32


@pytest.fixture(params=["uring", "threads"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SsdTier]:
    with SsdTier(SsdConfig(tmp_path / "ssd", 1 << 30, 64 << 20, io=request.param)) as tier:
        yield tier


def store(tier: SsdTier, memory: Memory, seed: int) -> Locations:
    n, size = memory.count, memory.size
    hashes = np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)
    sizes = np.full(n, size, np.uint32)
    while tier.needs_reclaim(n * (size + 4096)):
        tier.reclaim(lambda found: np.zeros(len(found), bool))
    return tier.write(
        tier.register_namespace(b"bench", b""),
        hashes,
        hashes,
        np.zeros(n, np.uint32),
        memory.addrs,
        sizes,
        _native.io_checksum_at(memory.addrs, sizes.astype(np.uint64)),
        durable=False,
    )


@pytest.mark.parametrize("size", [64 << 10, 1 << 20])
def test_write(benchmark: Any, tier: SsdTier, size: int) -> None:
    memory = Memory(COUNT, size)
    seeds = iter(range(1_000_000))
    assert benchmark(lambda: store(tier, memory, next(seeds))).ok.all()


@pytest.mark.parametrize("size", [64 << 10, 1 << 20])
def test_read(benchmark: Any, tier: SsdTier, size: int) -> None:
    memory = Memory(COUNT, size)
    at = store(tier, memory, 0)
    order = np.random.default_rng(1).permutation(COUNT)
    columns = (
        at.segments[order],
        at.pages[order],
        at.stored_bytes[order],
        at.stored_checksums[order],
    )
    assert benchmark(tier.read, *columns, memory.addrs).all()


def test_open_and_recover_10k_blocks(benchmark: Any, tmp_path: Path) -> None:
    config = SsdConfig(tmp_path / "ssd", 1 << 30, 64 << 20)
    with SsdTier(config) as tier:
        store(tier, Memory(10_000, 4096), 0)

    def recover() -> int:
        with SsdTier(config) as tier:
            return sum(len(batch) for batch in tier.recover())

    assert benchmark(recover) == 10_000

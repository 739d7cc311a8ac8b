"""What do look-ups, puts and loads of the embedded store cost, in DRAM?

    python -m pytest bench/micro/test_bench_store.py --benchmark-enable

`kvstore bench` has the ratios to memcpy, on memory out of the caches; here blocks may stay in them.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import kvstore
from kvstore.block import BlockHashes, BlockSpec

KIB = 1 << 10
# One call moves 16 MiB or one block; layers make the size.
SIZES = [(64 * KIB, 1), (64 * KIB, 256), (1024 * KIB, 1), (1024 * KIB, 16)]


def chain(count: int, seed: int = 0) -> BlockHashes:
    return BlockHashes.chain(np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8))


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[1]}x{size[0] // KIB}KiB")
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    block_bytes, count = request.param
    return block_bytes, count


@pytest.fixture
def store(size: tuple[int, int]) -> Iterator[kvstore.Store]:
    spec = BlockSpec(size[0] // (64 * KIB), 8, 128, 16, "float16")
    with kvstore.open(spec, cpu="160MiB", threads=1) as store:
        yield store


def test_put_into_a_full_store(
    benchmark: BenchmarkFixture, store: kvstore.Store, size: tuple[int, int]
) -> None:
    benchmark.group = f"put {size[1]} x {size[0] // KIB} KiB"
    buffers = kvstore.ContiguousBlocks(np.ones((size[1], size[0]), np.uint8))
    seeds = iter(range(1 << 30))

    def fresh() -> tuple[tuple[BlockHashes, object], dict[str, object]]:
        return (chain(size[1], next(seeds)), buffers), {}

    for _ in range((200 << 20) // (size[0] * size[1])):
        store.put(*fresh()[0])  # type: ignore[arg-type]
    done = benchmark.pedantic(store.put, setup=fresh, rounds=50)  # type: ignore[no-untyped-call]
    assert done.wait().num_stored == size[1]


def test_load(benchmark: BenchmarkFixture, store: kvstore.Store, size: tuple[int, int]) -> None:
    benchmark.group = f"load {size[1]} x {size[0] // KIB} KiB"
    buffers = kvstore.ContiguousBlocks(np.ones((size[1], size[0]), np.uint8))
    hashes = chain(size[1])
    store.put(hashes, buffers)
    assert benchmark(store.load, hashes, buffers).wait().num_blocks == size[1]


@pytest.mark.parametrize("resident", [0, 1, 4096, 8191, 8192])
@pytest.mark.parametrize("linked", [True, False], ids=["linked", "unlinked"])
def test_match_8192(benchmark: BenchmarkFixture, resident: int, linked: bool) -> None:
    benchmark.group = "longest prefix of 8192"
    hashes = chain(8192)
    spec = BlockSpec(1, 1, 16, 16, "int8")
    with kvstore.open(spec, cpu="96MiB") as store:
        if resident:
            rows = np.zeros((resident, spec.block_bytes), np.uint8)
            store.put(hashes[:resident], kvstore.ContiguousBlocks(rows))
        asked = hashes if linked else BlockHashes.of(hashes.array)
        assert benchmark(store.match, asked) == resident


def test_acquire_and_release_128(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "lease of 128 blocks"
    hashes = chain(128)
    spec = BlockSpec(1, 1, 16, 16, "int8")
    with kvstore.open(spec, cpu="4MiB") as store:
        store.put(hashes, kvstore.ContiguousBlocks(np.zeros((128, spec.block_bytes), np.uint8)))
        benchmark(lambda: store.acquire(hashes).release())

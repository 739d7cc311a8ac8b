"""What does a request cost each eviction policy, at a capacity that makes most blocks leave?

    python -m pytest bench/micro/test_bench_eviction.py --benchmark-enable

bench/eviction.py has what they find. Requests continue shared prefixes drawn by popularity.
"""

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvstore import _native

BLOCKS_A_REQUEST = 64


def requests(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shared = random.zipf(1.2, count) % 500  # which conversation
    kept = random.integers(8, BLOCKS_A_REQUEST, count)  # how much of it the request repeats
    made = []
    for number in range(count):
        first = int(shared[number]) * BLOCKS_A_REQUEST
        ids = np.arange(first, first + BLOCKS_A_REQUEST, dtype=np.uint64)
        ids[kept[number] :] += np.uint64((number + 1) << 32)
        made.append(ids)
    return made


@pytest.mark.parametrize("policy", _native.eviction_policy_names())
def test_1000_requests_of_64_blocks(benchmark: BenchmarkFixture, policy: str) -> None:
    benchmark.group = "1000 requests of 64 blocks, 5000 fit"
    trace = requests(1000)

    def replay() -> int:
        simulator = _native.PolicySimulator(policy, 5000)
        return sum(simulator.request(ids) for ids in trace)

    assert benchmark(replay) > 0

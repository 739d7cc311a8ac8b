"""What does hashing a prompt cost, by chain, by kind of token array, and when a prompt grows?

python -m pytest bench/micro/test_bench_hashing.py --benchmark-enable
"""

from array import array
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import kvstore
from kvstore.block import CHAIN_ALGORITHMS

TOKENS = np.random.default_rng(0).integers(0, 150_000, 131_072, np.int32)
FORMS: dict[str, Any] = {
    "int32": TOKENS,
    "int64": TOKENS.astype(np.int64),
    "array": array("q", TOKENS.tolist()),
    "list": TOKENS.tolist(),
}


@pytest.mark.parametrize("algorithm", CHAIN_ALGORITHMS)
def test_hash_128k_tokens(benchmark: BenchmarkFixture, algorithm: str) -> None:
    benchmark.group = "128k tokens, by chain"
    assert len(benchmark(kvstore.hash_blocks, TOKENS, 16, algorithm=algorithm)) == 8192


@pytest.mark.parametrize("form", FORMS)
def test_hash_128k_tokens_given_as(benchmark: BenchmarkFixture, form: str) -> None:
    benchmark.group = "128k tokens, by what they are given as"
    assert len(benchmark(kvstore.hash_blocks, FORMS[form], 16)) == 8192


@pytest.mark.parametrize("block_tokens", [16, 64, 256])
def test_hash_128k_tokens_in_blocks_of(benchmark: BenchmarkFixture, block_tokens: int) -> None:
    benchmark.group = "128k tokens, by block size"
    benchmark(kvstore.hash_blocks, TOKENS, block_tokens)


def test_hash_one_more_block(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "one block more"
    before = kvstore.hash_blocks(TOKENS, 16)
    more = benchmark(kvstore.hash_blocks, TOKENS[:16], 16, parent=before)
    assert more.start == 8192

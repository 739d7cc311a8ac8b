"""Prefixes of hybrid models: what several pools can restore together, with SGLang's policies.

Real pools and a real daemon; the pages that a pool has are put one by one. The oracle is the
definition, and SGLang's own file backend where it knows the policy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")
pytest.importorskip("torch")

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheFile,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)

from kvstore.bench.serving import PrivateDaemon
from tests.adapters.sglang import support
from tests.adapters.sglang.support import PAGE_TOKENS, keys

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]

WINDOW, INDEX, BLOCKS = PoolName.SWA, PoolName.INDEXER, PoolName.DEEPSEEK_V4_C4


@pytest.fixture(scope="module", autouse=True)
def _published() -> None:
    support.publish()


class Hybrid:
    """A backend with side pools, and SGLang's file backend that is told the same."""

    def __init__(self, address: str, model: str, directory: Path) -> None:
        self.pool = support.mha_pool("page_first")
        self.sides = {name: support.mha_pool("page_first", heads=1) for name in (WINDOW, INDEX)}
        self.sides[BLOCKS] = support.mha_pool("page_first", layers=1)
        self.backend = support.make_backend(
            support.storage_config(address, model), self.pool, self.sides
        )
        file_config = support.storage_config(address, model)
        file_config.extra_config = {"file_storage_path": str(directory)}
        self.oracle: Any = HiCacheFile(file_config)
        for name, pool in {PoolName.KV: self.pool, **self.sides}.items():
            self.oracle.register_mem_host_pool_v2(pool, name)
        self.slots = torch.arange(PAGE_TOKENS)

    def put(self, name: PoolName, key: str) -> None:
        transfer = PoolTransfer(name, host_indices=self.slots, keys=[key])
        for backend in (self.backend, self.oracle):
            assert backend.batch_set_v2([transfer]) == {name: [True]}

    def found(self, names: list[str], transfers: list[PoolTransfer]) -> tuple[Any, ...]:
        result = self.backend.batch_exists_v2(names, transfers, None)
        hits = {str(pool): count for pool, count in result.extra_pool_hit_pages.items()}
        return result.kv_hit_pages, hits, result.restorable_prefix_pages


@pytest.fixture
def hybrid(
    daemon: PrivateDaemon, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Hybrid]:
    made = Hybrid(daemon.address, request.node.name, tmp_path)
    yield made
    made.backend.close()


def test_a_missing_page_of_a_required_pool_ends_the_prefix(hybrid: Hybrid) -> None:
    names = keys(4)
    for name in names:
        hybrid.put(PoolName.KV, name)
    for name in (*names[:2], names[3]):
        hybrid.put(INDEX, name)
    found = hybrid.found(names, [PoolTransfer(INDEX, keys=names)])
    assert found == (2, {"kv": 4, "indexer": 2}, [1, 2])


def test_a_window_allows_the_lengths_at_which_it_is_whole(hybrid: Hybrid) -> None:
    """A window of two pages that is stored at 2 and at 5: neither 3 nor 4 can be restored."""
    names = keys(6)
    for name in names[:5]:
        hybrid.put(PoolName.KV, name)
    for name in (names[0], names[1], names[3], names[4]):
        hybrid.put(WINDOW, name)
    window = PoolTransfer(WINDOW, keys=names[-2:], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    assert hybrid.found(names, [window]) == (5, {"kv": 5, "swa": 5}, [1, 2, 5])


def test_pools_restrict_each_other(hybrid: Hybrid) -> None:
    """Each pool alone would allow some length, both together none of them but the common."""
    names = keys(4)
    for name in names:
        hybrid.put(PoolName.KV, name)
    for name in names[:3]:
        hybrid.put(INDEX, name)
    for name in (names[1], names[3]):
        hybrid.put(WINDOW, name)
    window = PoolTransfer(WINDOW, keys=names[-1:], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    index = PoolTransfer(INDEX, keys=names)
    assert hybrid.found(names, [index, window]) == (2, {"kv": 4, "indexer": 3, "swa": 4}, [2])


def test_groups_of_blocks_report_and_never_restrict(hybrid: Hybrid) -> None:
    names = keys(7)
    for name in names[:6]:
        hybrid.put(PoolName.KV, name)
    for name in (names[1], names[3]):  # the last page of each block of two
        hybrid.put(BLOCKS, name)
    blocks = PoolTransfer(
        BLOCKS,
        keys=names,
        hit_policy=PoolHitPolicy.BLOCK_GROUPS,
        block_pages=2,
        group_pages=1,
    )
    expected = (6, {"kv": 6, "deepseek_v4_c4": 4}, [1, 2, 3, 4, 5, 6])
    assert hybrid.found(names, [blocks]) == expected


def test_nothing_is_found_without_the_main_pool(hybrid: Hybrid) -> None:
    hybrid.put(INDEX, keys(1)[0])
    assert hybrid.found(keys(1), [PoolTransfer(INDEX, keys=keys(1))]) == (0, {}, [])


def test_a_pool_that_is_not_registered_holds_nothing(hybrid: Hybrid) -> None:
    hybrid.put(PoolName.KV, keys(1)[0])
    unknown = PoolTransfer(PoolName.MAMBA, keys=keys(1), host_indices=hybrid.slots)
    assert hybrid.found(keys(1), [unknown]) == (0, {"kv": 1}, [])
    assert hybrid.backend.batch_get_v2([unknown]) == {PoolName.MAMBA: [False]}
    assert hybrid.backend.batch_set_v2([unknown]) == {PoolName.MAMBA: [False]}
    without = PoolTransfer(INDEX, keys=None)
    assert hybrid.backend.batch_get_v2([without]) == {INDEX: []}
    assert hybrid.backend.batch_set_v2([PoolTransfer(INDEX, keys=keys(2))]) == {
        INDEX: [False, False]
    }


@pytest.mark.parametrize("seed", range(8))
def test_random_holes_are_judged_as_sglangs_file_backend_does(hybrid: Hybrid, seed: int) -> None:
    chance = random.Random(seed)
    names = keys(8, 100 * seed)
    for pool, share in ((PoolName.KV, 0.95), (INDEX, 0.9), (WINDOW, 0.7)):
        for name in names:
            if chance.random() < share:
                hybrid.put(pool, name)
    for size in (1, 2, 3):
        transfers = [
            PoolTransfer(INDEX, keys=names),
            PoolTransfer(WINDOW, keys=names[:size], hit_policy=PoolHitPolicy.TRAILING_PAGES),
        ]
        ours = hybrid.backend.batch_exists_v2(names, transfers, None)
        theirs = hybrid.oracle.batch_exists_v2(names, transfers, None)
        assert ours.kv_hit_pages == theirs.kv_hit_pages
        assert ours.restorable_prefix_pages == theirs.restorable_prefix_pages
        # The file backend stops at a pool that leaves nothing, so later pools have no verdict.
        assert theirs.extra_pool_hit_pages.items() <= ours.extra_pool_hit_pages.items()


def test_states_of_each_rank_beside_a_replicated_main_pool(daemon: PrivateDaemon) -> None:
    """MLA with side pools that are cut by rank (states, draft heads): every rank writes its own."""
    ranks = []
    for rank in (0, 1):
        main, heads = support.mla_pool("page_first"), support.mha_pool("page_first")
        config = support.storage_config(
            daemon.address, "sharded-sides", tp_rank=rank, tp_size=2, is_mla_model=True
        )
        backend = support.make_backend(config, main, {PoolName.DRAFT: heads})
        support.fill(heads, rank)
        ranks.append((backend, heads))
    slots = torch.arange(PAGE_TOKENS)
    transfer = PoolTransfer(PoolName.DRAFT, host_indices=slots, keys=keys(1))
    for backend, _ in ranks:
        assert backend.batch_set_v2([transfer]) == {PoolName.DRAFT: [True]}
    other = PoolTransfer(PoolName.DRAFT, host_indices=slots + PAGE_TOKENS, keys=keys(1))
    for backend, heads in ranks:
        assert backend.batch_get_v2([other]) == {PoolName.DRAFT: [True]}
        assert torch.equal(support.content(heads, 1), support.content(heads, 0))
        backend.close()

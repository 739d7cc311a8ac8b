"""SGLang's own Mooncake backend on kvstore: nothing of SGLang is changed but what `mooncake` is.

SGLang's loader makes its `mooncake` storage backend over real host pools, in every layout that this
backend knows. Pages are stored, found and read back as its controller does it, by a second backend
too, which holds nothing in memory.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.storage import StorageBackendFactory

from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.mooncake import MooncakeDistributedStore, shim
from tests.adapters.sglang import support
from tests.adapters.sglang.support import Engine, keys

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]

Make = Callable[..., Engine]
PAGES = 6

# Of MHA pools it takes only those in which K and V of a page are one piece each.
POOLS = [
    *[(support.mha_pool, layout) for layout in ("page_first", "page_first_direct", "page_head")],
    *[(support.mla_pool, layout) for layout in ("layer_first", "page_first", "page_first_direct")],
]


@pytest.fixture(autouse=True)
def _shim(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    support.publish()
    monkeypatch.syspath_prepend(shim.PATH)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mooncake"]:
        del sys.modules[name]


def make_engine(address: str, pool: Any, model: str, **extra: Any) -> Engine:
    """`extra` comes after what all engines are configured with."""
    config = support.storage_config(
        address,
        model,
        is_mla_model=not hasattr(pool, "head_num"),
        is_page_first_layout=pool.layout.startswith("page_first"),
    )
    settings = {"master_server_address": address, "client_server_address": address, **extra}
    config.extra_config.clear()
    config.extra_config.update(settings)
    backend = StorageBackendFactory.create_backend("mooncake", config, pool)
    assert isinstance(backend.store, MooncakeDistributedStore)
    backend.register_mem_pool_host(pool)
    backend.register_mem_host_pool_v2(pool, PoolName.KV)
    return Engine(pool, backend)


@pytest.fixture
def make(daemon: PrivateDaemon, request: pytest.FixtureRequest) -> Iterator[Make]:
    engines: list[Engine] = []

    def make_one(pool: Any, **extra: Any) -> Engine:
        engines.append(make_engine(daemon.address, pool, request.node.name, **extra))
        return engines[-1]

    yield make_one
    for engine in engines:
        engine.backend.store.close()


@pytest.mark.parametrize(("pool_of", "layout"), POOLS)
def test_pages_come_back_in_another_engine_too(
    make: Make, pool_of: Callable[[str], Any], layout: str
) -> None:
    first, second = make(pool_of(layout)), make(pool_of(layout))
    source, target = first.slots(PAGES), second.slots(PAGES)
    support.fill(first.pool, 1)
    support.fill(second.pool, 2)
    wanted, names = first.contents(source), keys(PAGES)
    assert first.backend.batch_exists(names) == 0
    assert first.put(names[:4], source[: 4 * support.PAGE_TOKENS])
    assert second.backend.batch_exists(names) == 4
    assert second.get(names, target) == [True] * 4 + [False] * 2
    for page, found in enumerate(second.contents(target)[:4]):
        assert torch.equal(found, wanted[page])
    assert first.put(names, source)  # again, and two more
    assert second.get(names, target) == [True] * PAGES
    assert all(map(torch.equal, second.contents(target), wanted))


def test_the_newer_calls_with_pools(make: Make) -> None:
    """batch_set_v2, batch_exists_v2, batch_get_v2."""
    engine = make(support.mla_pool("page_first"))
    side = support.mla_pool("page_first")
    engine.backend.register_mem_host_pool_v2(side, PoolName.INDEXER)
    support.fill(side, 3)
    source = side.alloc(PAGES * support.PAGE_TOKENS)
    target = side.alloc(PAGES * support.PAGE_TOKENS)
    wanted, names = support.contents(side, source), keys(PAGES)

    def transfer(slots: Any) -> list[PoolTransfer]:
        return [PoolTransfer(name=PoolName.INDEXER, keys=names, host_indices=slots)]

    assert engine.backend.batch_set_v2(transfer(source)) == {PoolName.INDEXER: [True] * PAGES}
    assert engine.backend.batch_get_v2(transfer(target)) == {PoolName.INDEXER: [True] * PAGES}
    assert all(map(torch.equal, support.contents(side, target), wanted))


def test_standalone_storage_over_memory_of_our_allocator(make: Make) -> None:
    """What SGLang calls standalone: setup_dummy, and host pools from Mooncake's allocator."""
    pool = support.mha_pool("page_first", allocator_type="mooncake")
    engine = make(pool, standalone_storage=True)
    source, target = engine.slots(2), engine.slots(2)
    support.fill(pool, 5)
    wanted = engine.contents(source)
    assert engine.put(keys(2), source)
    assert engine.get(keys(2), target) == [True, True]
    assert all(map(torch.equal, engine.contents(target), wanted))


def test_clearing(make: Make) -> None:
    engine = make(support.mha_pool("page_first"))
    assert engine.put(keys(2), engine.slots(2))
    engine.backend.clear()
    assert engine.backend.batch_exists(keys(2)) == 0


def test_group_semantics_have_no_effect(make: Make) -> None:
    engine = make(support.mha_pool("page_first"), enable_group_semantics=True)
    assert engine.put(keys(2), engine.slots(2))
    assert engine.backend.batch_exists(keys(2)) == 2


def test_without_the_daemon_pages_miss(tmp_path: Path) -> None:
    with PrivateDaemon(tmp_path, cpu="16MiB") as daemon:
        daemon.start()
        engine = make_engine(daemon.address, support.mha_pool("page_first"), "model")
        slots = engine.slots(2)
        assert engine.put(keys(2), slots)
        os.kill(daemon.pid, signal.SIGKILL)
        assert not engine.put(keys(2, 10), slots)
        assert engine.backend.batch_exists(keys(2)) == 0
        assert engine.get(keys(2), slots) == [False, False]
        engine.backend.store.close()

"""LMCache's own Mooncake connector on kvstore: nothing of LMCache is changed.

Its connector stores chunks from its CPU pool and reads them back into it, in both of its ways: with
a chunk's metadata in the value (put_parts, batch_get_buffer), and without (batch_put_from,
batch_get_into at addresses in its pool, which it registers). Needs LMCache beside kvstore.
"""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    pytest.importorskip("lmcache.v1.storage_backend.connector.mooncakestore_connector")

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector.mooncakestore_connector import (
    MooncakestoreConnector,
)
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

from kvstore_adapters.mooncake import MooncakeDistributedStore, shim
from tests.adapters.mooncake.support import shared

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHAPE = (2, 4, 16, 128)  # K and V, layers, tokens of a chunk, heads and dimensions
COUNT = 6


@pytest.fixture(params=[True, False], ids=["with metadata", "without metadata"])
def connector(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    monkeypatch.syspath_prepend(shim.PATH)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mooncake"]:
        monkeypatch.delitem(sys.modules, name)
    with shared(tmp_path, cpu="16MiB") as address:
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=SHAPE[2],
            max_local_cpu_size=0.05,
            extra_config={
                "save_chunk_meta": request.param,
                "local_hostname": "localhost",
                "metadata_server": "P2PHANDSHAKE",
                "master_server_address": address,
                "mooncake_timeout": "10",
            },
        )
        metadata = LMCacheMetadata(
            "model", 1, 1, 0, 0, torch.bfloat16, (4, 2, SHAPE[2], 2, 64), chunk_size=SHAPE[2]
        )
        pool = LocalCPUBackend(config, metadata, dst_device="cpu")
        loop = asyncio.new_event_loop()
        made = MooncakestoreConnector(loop, pool, config)
        assert isinstance(made.store, MooncakeDistributedStore)
        yield made
        asyncio.run(made.close())
        loop.close()
        pool.memory_allocator.close()


def chunk(connector: Any, seed: int) -> Any:
    made = connector.local_cpu_backend.allocate(
        [torch.Size(SHAPE)], [torch.bfloat16], MemoryFormat.KV_2LTD
    )
    made.tensor.copy_(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))
    return made


def test_chunks_come_back(connector: Any) -> None:
    keys = [CacheEngineKey("model", 1, 0, number, torch.bfloat16) for number in range(COUNT)]
    chunks = [chunk(connector, number) for number in range(COUNT - 1)]
    assert not connector.exists_sync(keys[0])
    asyncio.run(connector.batched_put(keys[:-1], chunks))
    assert asyncio.run(connector.batched_async_contains("lookup", keys)) == COUNT - 1
    found = asyncio.run(connector.batched_get(keys))
    assert found[-1] is None
    for got, put in zip(found[:-1], chunks, strict=True):
        assert got.tensor.data_ptr() != put.tensor.data_ptr()
        assert torch.equal(got.tensor, put.tensor)

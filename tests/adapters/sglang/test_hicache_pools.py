"""Every kind of host pool is stored, and nothing lies between its memory and the daemon's.

Pools that are neither plain MHA nor MLA are SGLang's own classes on tiny device pools; what a page
of theirs holds is read at the addresses, or through the copies, that the pool itself gives out.
That a page is copied once is shown by what may not happen meanwhile: no call of SGLang's copying
methods, no tensor and no Python memory of a page's size.
"""

from __future__ import annotations

import ctypes
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")
pytest.importorskip("torch")

import torch
from sglang.srt.mem_cache.device_pool_info import (
    MambaStateBufferInfo,
    MLABufferInfo,
    MLASplitBuffers,
)
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import MHATokenToKOnlyPool, MHATokenToKVPool
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool
from sglang.srt.mem_cache.pool_host.common import get_allocator_type
from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost
from sglang.srt.mem_cache.pool_host.host_pool_decl import HostPoolStorageInfo
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import (
    AsymmetricMHATokenToKVPoolHost,
    MHATokenToKOnlyPoolHost,
)
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from torch.utils._python_dispatch import TorchDispatchMode

from kvstore import ConfigError
from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.sglang.pools import pages_of
from tests.adapters.sglang import support
from tests.adapters.sglang.radix_support import extra_config
from tests.adapters.sglang.support import HEAD_DIM, HEADS, LAYERS, PAGE_TOKENS, TOKENS, keys

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def _published() -> None:
    support.publish()


def asymmetric_pool(layout: str) -> Any:
    device = MHATokenToKVPool(
        size=TOKENS,
        page_size=PAGE_TOKENS,
        dtype=torch.bfloat16,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM // 2,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    return AsymmetricMHATokenToKVPoolHost(
        device._mha_buffer_info(),
        1.0,
        0,
        PAGE_TOKENS,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=LAYERS,
    )


def split_latent_pool(layout: str) -> Any:
    """K, V and index of a latent cache in buffers of their own, as on Ascend."""
    buffers = MLASplitBuffers(
        k=None,
        v=None,
        index_k=torch.zeros(2, 1),
        index_scales=torch.zeros(2, 1),
        index_layer_indices=(0, 2),
        k_width=support.LORA_RANK,
        v_width=support.ROPE_DIM,
        index_width=32,
    )
    info = MLABufferInfo(
        buffers=buffers,
        data_ptrs=None,
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE_TOKENS,
        kv_lora_rank=support.LORA_RANK,
        qk_rope_head_dim=support.ROPE_DIM,
        kv_cache_dim=support.LORA_RANK + support.ROPE_DIM,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return MLATokenToKVPoolHost(
        info,
        1.0,
        0,
        PAGE_TOKENS,
        layout,
        pin_memory=False,
        device_capacity_tokens=TOKENS,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
    )


def keys_only_pool(layout: str) -> Any:
    device = MHATokenToKOnlyPool(
        TOKENS, PAGE_TOKENS, torch.bfloat16, HEADS, HEAD_DIM, LAYERS, "cpu", False
    )
    return MHATokenToKOnlyPoolHost(device, support.mha_pool(layout), layout, pin_memory=False)


def indexer_pool(layout: str) -> Any:
    info = HostPoolStorageInfo(bytes_per_token_per_layer=36, dtype=torch.uint8)
    device = SimpleNamespace(
        store_dtype=torch.uint8,
        start_layer=0,
        end_layer=LAYERS,
        layer_num=LAYERS,
        layer_shard_enabled=False,
        device="cpu",
        index_k_with_scale_buffer=[torch.zeros(4, 36 * PAGE_TOKENS)] * LAYERS,
    )
    decl = SimpleNamespace(storage_info=info, device_pool=device, owned_device_layers=None)
    return DSAIndexerPoolHost(decl, support.mla_pool(layout), pin_memory=False)


def state_pool(layout: str, has_side_state: bool = False) -> Any:
    info = MambaStateBufferInfo(
        temporal=torch.zeros(LAYERS, 20, 2, 16, 16, dtype=torch.float32),
        conv=(torch.zeros(LAYERS, 20, 64, 3, dtype=torch.bfloat16),),
        extra_checkpoint_buffers=(torch.zeros(20, 24),) if has_side_state else (),
    )
    return MambaPoolHost(info, 1.0, 0, device_capacity=20, pin_memory=False, layout=layout)


def state_pool_with_side_state(layout: str) -> Any:
    return state_pool(layout, has_side_state=True)


def memory_of(pool: Any) -> list[torch.Tensor]:
    """All tensors of a pool that hold pages, as bytes."""
    names = [
        "kv_buffer",
        "k_buffer",
        "v_buffer",
        "index_k_buffer",
        "index_k_scale_buffer",
        "index_k_with_scale_buffer",
        "temporal_buffer",
        "conv_buffer",
        "slot_state_buffers",
    ]
    found: dict[int, torch.Tensor] = {}
    for name in names:
        value = getattr(pool, name, None)
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if tensor is not None:
                found[tensor.data_ptr()] = tensor.view(torch.uint8).view(-1)
    return list(found.values())


def page_content(pool: Any, page: int) -> bytes:
    slots = torch.arange(page * pool.page_size, (page + 1) * pool.page_size)
    try:
        addresses, sizes = pool.get_page_buffer_meta(slots)
        return b"".join(map(ctypes.string_at, addresses, sizes))
    except (ValueError, NotImplementedError):
        flat = pool.get_data_page(page * pool.page_size)
        return bytes(flat.view(torch.uint8).numpy())


OTHER_POOLS = [
    pytest.param(asymmetric_pool, "page_first", False, id="asymmetric-page_first"),
    pytest.param(asymmetric_pool, "page_first_direct", False, id="asymmetric-page_first_direct"),
    pytest.param(split_latent_pool, "page_first_kv_split", False, id="latent-page_first_kv_split"),
    pytest.param(keys_only_pool, "layer_first", False, id="keys_only-layer_first"),
    pytest.param(keys_only_pool, "page_first", False, id="keys_only-page_first"),
    pytest.param(indexer_pool, "layer_first", False, id="indexer-layer_first"),
    pytest.param(indexer_pool, "page_first", False, id="indexer-page_first"),
    pytest.param(state_pool, "page_first", False, id="state-page_first"),
    # SGLang gives no addresses of states with side states.
    pytest.param(state_pool_with_side_state, "page_first", True, id="side_state-page_first"),
]


@pytest.mark.parametrize(("pool_of", "layout", "is_staged"), OTHER_POOLS)
def test_pools_of_other_kinds(
    daemon: PrivateDaemon,
    request: pytest.FixtureRequest,
    pool_of: Callable[[str], Any],
    layout: str,
    is_staged: bool,
) -> None:
    pool = pool_of(layout)
    generator = torch.Generator().manual_seed(1)
    for memory in memory_of(pool):
        memory.copy_(torch.randint(0, 256, memory.shape, generator=generator, dtype=torch.uint8))
    pages = pages_of(pool)
    assert [part.buffers is None for part in pages] == [is_staged]
    main = support.mha_pool("page_first")
    config = support.storage_config(daemon.address, request.node.name)
    backend = support.make_backend(config, main, {PoolName.INDEXER: pool})
    size = pool.page_size
    slots = torch.arange(12 * size).view(12, size)
    source, target = slots[[7, 0, 3]].reshape(-1), slots[[2, 11, 5]].reshape(-1)
    wanted = [page_content(pool, page) for page in (7, 0, 3)]
    put = PoolTransfer(PoolName.INDEXER, host_indices=source, keys=keys(3))
    assert backend.batch_set_v2([put]) == {PoolName.INDEXER: [True] * 3}
    before = [page_content(pool, page) for page in range(12)]
    get = PoolTransfer(PoolName.INDEXER, host_indices=target, keys=[*keys(2), keys(1, 99)[0]])
    assert backend.batch_get_v2([get]) == {PoolName.INDEXER: [True, True, False]}
    before[2], before[11] = wanted[0], wanted[1]
    assert [page_content(pool, page) for page in range(12)] == before
    backend.close()


def test_the_pieces_of_a_page_are_all_of_it() -> None:
    """Of a pool in pieces the plan covers exactly what a token takes times the page."""
    for param in OTHER_POOLS:
        pool_of, layout, _ = param.values
        pool = pool_of(layout)  # type: ignore[operator]
        (pages,) = pages_of(pool)
        assert pages.spec.block_bytes == pool.size_per_token * pool.page_size


def test_pools_of_one_size_and_other_dtypes_are_apart(daemon: PrivateDaemon) -> None:
    backends = []
    for dtype in (torch.float16, torch.bfloat16):
        info = MambaStateBufferInfo(
            temporal=torch.zeros(2, 8, 4, dtype=dtype), conv=(torch.zeros(2, 8, 4, 3),)
        )
        pool = MambaPoolHost(info, 1.0, 0, device_capacity=8, pin_memory=False, layout="page_first")
        config = support.storage_config(daemon.address, "state-dtypes")
        main = support.mha_pool("page_first")
        backends.append(support.make_backend(config, main, {PoolName.MAMBA: pool}))
    states = PoolTransfer(
        PoolName.MAMBA,
        host_indices=torch.arange(1),
        keys=keys(1),
        hit_policy=PoolHitPolicy.TRAILING_PAGES,
    )
    for backend in backends:
        slots = backend.mem_pool_host.alloc(PAGE_TOKENS)
        assert backend.batch_set_v1(keys(1), slots) == [True]
    assert backends[0].batch_set_v2([states]) == {PoolName.MAMBA: [True]}
    found = [backend.batch_exists_v2(keys(1), [states]).kv_hit_pages for backend in backends]
    assert found == [1, 0]
    for backend in backends:
        backend.close()


def test_a_main_pool_that_only_hands_out_slots(daemon: PrivateDaemon) -> None:
    """As with DeepSeek V4: other pools hold the data, and say how far a prefix goes."""
    anchor = LogicalHostPool(TOKENS, PAGE_TOKENS)
    side = support.mla_pool("page_first")
    config = support.storage_config(daemon.address, "logical", is_mla_model=True)
    backend = support.make_backend(config, anchor, {PoolName.DEEPSEEK_V4_C4: side})
    slots = side.alloc(3 * PAGE_TOKENS)
    transfer = PoolTransfer(PoolName.DEEPSEEK_V4_C4, host_indices=slots, keys=keys(3))
    assert backend.batch_set_v1(keys(3), slots) == [True] * 3
    assert backend.batch_exists(keys(3)) == 0
    assert backend.batch_exists_v2(keys(3), [transfer]).kv_hit_pages == 0
    assert backend.batch_set_v2([transfer]) == {PoolName.DEEPSEEK_V4_C4: [True] * 3}
    found = backend.batch_exists_v2(keys(5), [transfer])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (3, [1, 2, 3])
    assert backend.batch_get_v1(keys(3), slots) == [True] * 3
    assert backend.batch_exists_v2(keys(5), []).kv_hit_pages == 0
    backend.close()


def test_pools_whose_pages_move_fail_the_attach() -> None:
    pool = support.mha_pool("page_first")
    pool.shared_allocation_domain = object()
    with pytest.raises(ConfigError, match="move"):
        pages_of(pool)


# --- one copy


class _NoTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails for any torch operation whose result is as large as `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            size = result.numel() * result.element_size()
            assert size < self._limit, f"{func} makes a tensor of {size} bytes"
        return result


@pytest.fixture
def shm_pools() -> Iterator[Callable[[str], Any]]:
    """Host pools as SGLang allocates them with `"allocator": "shm"`."""
    support.publish(
        hicache_storage_backend="dynamic",
        hicache_storage_backend_extra_config=extra_config("unix:/x", allocator="shm"),
    )
    assert get_allocator_type() == "shm"
    yield lambda layout: support.mha_pool(
        layout, page_tokens=64, allocator_type=get_allocator_type()
    )
    support.publish()


def mapping_of(address: int) -> tuple[int, int, str]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return begin, end, name
    raise AssertionError(f"{address:#x} is mapped nowhere")


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_a_page_is_copied_once_between_sglangs_memfd_and_the_daemons_arena(
    daemon: PrivateDaemon,
    shm_pools: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    pool = shm_pools(layout)
    assert "memfd" in os.readlink(f"/proc/self/fd/{pool.fd}")
    model = f"one-copy-{layout}"
    engine = support.make_engine(daemon.address, model, pool, extra={"allocator": "shm"})
    support.fill(pool, 1)
    store = engine.backend._pools["kv"]
    page_bytes = store.page_bytes

    # What the copy plan reads and writes lies in the memfd, and is the page, each byte once.
    begin, end, _ = mapping_of(pool.kv_buffer.data_ptr())
    assert begin <= pool.kv_buffer.data_ptr()
    assert pool.kv_buffer.data_ptr() + pool.kv_buffer.nbytes <= end
    plan = store.pages.buffers.plan
    assert plan.num_blocks == pool.page_num
    assert sum(run[5] * run[6] for run in plan.runs) == page_bytes
    for base, page_stride, stride, _, _, count, size in plan.runs.tolist():
        last = base + (plan.num_blocks - 1) * page_stride + (count - 1) * stride + size
        assert begin <= base <= last <= end

    # The client copies in place: its own landing memory is not in use.
    names, source, target = keys(4), engine.slots(4), engine.slots(4)
    wanted = engine.contents(source)
    assert store._parts[0][1].control.piece_blocks is None

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("SGLang's own copy of a page was asked for")

    for method in ("get_data_page", "get_dummy_flat_data_page", "set_from_flat_data_page"):
        monkeypatch.setattr(pool, method, forbidden)
    engine.put(keys(1, 99), engine.slots(1))  # what Python keeps after a first call is no copy
    tracemalloc.start()
    try:
        with _NoTensors(page_bytes):
            assert engine.put(names, source)
            assert engine.get(names, target) == [True] * 4
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < page_bytes  # numpy's arrays are traced too
    assert all(map(torch.equal, engine.contents(target), wanted))

    # Whoever has SGLang's memfd sees the pages that were loaded.
    offset = pool.kv_buffer.data_ptr() - begin
    raw = os.pread(pool.fd, pool.kv_buffer.nbytes, offset)
    assert raw == bytes(pool.kv_buffer.view(torch.uint8).view(-1).numpy())
    engine.backend.close()

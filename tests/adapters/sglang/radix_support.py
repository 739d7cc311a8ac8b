"""SGLang's whole cache on a CPU: its radix tree, its controller and threads, and our backend.

The steps (insert, back up, prefetch, load back) are those of SGLang's own test kit. Copies between
device and host pages are torch's instead of CUDA kernels; nothing of ours is replaced.
"""

from __future__ import annotations

import json
import time
import unittest
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler  # noqa: F401  before patches
import sglang.test.kits.unified_radix_cache.fixtures as kit
import torch
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang.test.kits.unified_radix_cache.storage import UnifiedRadixCacheStorageFixtures

from tests.adapters.sglang.cpu import plugin
from tests.adapters.sglang.support import LOADER

WAIT_S = 60.0  # a bound for what must come
_POLL_S = 0.002

FULL = CacheConfig(
    page_size=16,
    components=(ComponentType.FULL,),
    num_layers=4,
    kv_size=512,
    head_num=2,
    head_dim=64,
)
WINDOW = CacheConfig(
    page_size=16,
    components=(ComponentType.FULL, ComponentType.SWA),
    num_layers=4,
    full_attention_layer_ids=(1, 3),
    sliding_window_size=32,
    kv_size=512,
)
STATE = CacheConfig(
    page_size=4,
    components=(ComponentType.FULL, ComponentType.MAMBA),
    num_layers=4,
    full_attention_layer_ids=(1, 3),
    enable_mamba_extra_buffer=True,
    mamba_cache_size=60,
)


def use_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host pools that are not pinned, and copies to and from them by torch."""
    monkeypatch.setattr(kit, "get_device", lambda *_: "cpu")
    for pool in (MHATokenToKVPoolHost, MambaPoolHost):
        original = pool.__init__

        def unpinned(self: Any, *args: Any, _original: Any = original, **named: Any) -> None:
            _original(self, *args, **{**named, "pin_memory": False})

        monkeypatch.setattr(pool, "__init__", unpinned)
    monkeypatch.setattr(MHATokenToKVPoolHost, "backup_from_device_all_layer", plugin._backup)
    monkeypatch.setattr(MHATokenToKVPoolHost, "load_to_device_per_layer", plugin._load)
    monkeypatch.setattr(MambaPoolHost, "backup_from_device_all_layer", _backup_states)
    monkeypatch.setattr(MambaPoolHost, "load_to_device_per_layer", _load_states)


def _states(pool: MambaPoolHost) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Host buffers `[slot, layer, 1, ...]` of a state pool, and the device's of each layer."""
    yield pool.temporal_buffer, pool.temporal_device_layers
    yield from zip(pool.conv_buffer, pool.conv_device_layers, strict=True)


def _backup_states(
    pool: Any, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str = ""
) -> None:
    for host, layers in _states(pool):
        for layer, device in enumerate(layers):
            host[host_indices, layer, 0] = device[device_indices]


def _load_states(
    pool: Any,
    device_pool: Any,
    host_indices: Any,
    device_indices: Any,
    layer_id: int,
    io_backend: str = "",
    *,
    is_draft: bool = False,
) -> None:
    for host, layers in _states(pool):
        layers[layer_id][device_indices] = host[host_indices, layer_id, 0]


class Radix(UnifiedRadixCacheStorageFixtures, unittest.TestCase):
    """One engine's cache. `close` when done."""

    __test__ = False  # a TestCase only for the kit's sake

    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.cfg = config
        self.cache, self.allocator, self.requests = kit.build_fixture(config)
        self._count = 0

    def close(self) -> None:
        self.doCleanups()

    def start(self, layout: str, address: str, **extra: Any) -> None:
        """Start HiCache as the scheduler does; without an address, with no storage. `extra`: into
        the storage's configuration; `model` there says whose KV this is."""
        topology = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        topology.__enter__()
        self.addCleanup(topology.__exit__, None, None, None)
        args = ServerArgs(
            model_path="dummy",
            page_size=self.cfg.page_size,
            device="cpu",
            hicache_io_backend="direct" if layout == "page_first_direct" else "kernel",
            hicache_mem_layout=layout,
            hicache_write_policy="write_through",
            hicache_storage_backend="dynamic" if address else None,
            hicache_storage_backend_extra_config=extra_config(address, **extra),
            hicache_storage_prefetch_policy="wait_complete",
        )
        args._mamba_cache_chunk_size = max(64, self.cfg.page_size)
        set_global_server_args_for_scheduler(args)
        self.cache.init_hicache(args, self.cache.cache_init_params)
        self.addCleanup(kit.drop_hicache_atexit_pin, self.cache)
        self.addCleanup(self.cache.release_host_resources)
        self.addCleanup(self.cache.cache_controller._stop_storage_threads)
        self.cache.write_through_threshold = 1 << 30  # the test says when
        self.cache.load_back_threshold = 0
        self.allow_prefetch()

    def allow_prefetch(self) -> None:
        """Host and device pools of the kit are equal, which would leave no room for prefetches."""
        controller = self.cache.cache_controller
        controller.prefetch_capacity_limit = controller.mem_pool_host.size

    @property
    def backend(self) -> Any:
        return self.cache.cache_controller.storage_backend

    def compute(self, tokens: Sequence[int], seed: int) -> list[torch.Tensor]:
        """Insert a prompt whose KV and state are random; return them as `kv_of` does."""
        self._insert(self.cache, self.allocator, self.requests, list(tokens))
        generator = torch.Generator().manual_seed(seed)
        for buffer, slots in self._parts(tokens):
            shape = (len(slots), *buffer.shape[1:])
            buffer[slots] = torch.randn(shape, generator=generator).to(buffer.dtype)
        return self.kv_of(tokens)

    def kv_of(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """What the device has of a prompt: K and V of each layer, of a window pool the last window
        only, of a state pool the state after the last token."""
        return [buffer[slots].clone() for buffer, slots in self._parts(tokens)]

    def _parts(self, tokens: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Device buffers, and the slots of each that belong to a prompt."""
        leaf = kit.match_prefix(self.cache, list(tokens)).last_device_node
        slots = self.cache.path_device_indices(leaf)
        pool = self.allocator.get_kvcache()
        full = getattr(pool, "full_kv_pool", pool)
        for buffer in (*full.k_buffer, *full.v_buffer):
            yield buffer, slots
        if self.cfg.has_swa:
            last = slots[-self.cfg.sliding_window_size :]
            for buffer in (*pool.swa_kv_pool.k_buffer, *pool.swa_kv_pool.v_buffer):
                yield buffer, self.allocator.full_to_swa_index_mapping[last]
        if self.cfg.has_mamba:
            state = kit.node_device_value(self.cache, leaf, ComponentType.MAMBA)
            (host,) = (
                entry.host_pool
                for entry in self.cache.cache_controller.mem_pool_host.entries
                if isinstance(entry.host_pool, MambaPoolHost)
            )
            for _, layers in _states(host):
                for buffer in layers:
                    yield buffer, state

    def write(self, tokens: Sequence[int]) -> None:
        """Back the prompt up to the host pool and from there to storage; wait for both."""
        leaf = kit.match_prefix(self.cache, list(tokens)).last_device_node
        self._backup_node(self.cache, leaf)
        self._write_path_to_l3(self.cache, leaf)
        self.wait(lambda: not self._ongoing_l3_backups(self.cache))

    def prefetch(self, tokens: Sequence[int]) -> int:
        """Prefetch from storage into the host pool; return how many tokens came."""
        self._count += 1
        request = CacheRequestHandle(f"request-{self._count}", 0)
        self.cache.prefetch_from_storage(
            request, self.cache.root_node_handle(), array("q", tokens), None, None
        )
        self.wait(lambda: bool(self.cache.check_prefetch_progress(request)))
        return int(self.cache.pop_prefetch_loaded_tokens(request))

    def load_back(self, tokens: Sequence[int]) -> int:
        """Load what the host pool has into the device pool; return the prompt's tokens there."""
        match = kit.match_prefix(self.cache, list(tokens))
        self._load_back_node(self.cache, match.best_match_node)
        return int(kit.match_prefix(self.cache, list(tokens)).device_prefix_len)

    def wait(self, is_done: Callable[[], bool]) -> None:
        give_up = time.monotonic() + WAIT_S
        while True:
            self.cache.check_hicache_events()
            if is_done():
                return
            assert time.monotonic() < give_up, "SGLang's threads did not get done"
            time.sleep(_POLL_S)


def extra_config(address: str, **extra: Any) -> str | None:
    values = {**LOADER, "address": address, "prefetch_threshold": 1, **extra}
    return json.dumps(values) if address else None


def prompt(config: CacheConfig, num_pages: int, start: int = 1) -> list[int]:
    return list(range(start, start + num_pages * config.page_size))

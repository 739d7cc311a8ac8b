"""Real pools of SGLang on a CPU, backends by its own loader, and oracles of what a page holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

PAGE_TOKENS, LAYERS, HEADS, HEAD_DIM = 16, 4, 2, 64
LORA_RANK, ROPE_DIM = 48, 16
TOKENS = 512  # of a device pool; host pools have as many and a page more
MHA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head", "page_unified")
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_unified")
LOADER = {
    "backend_name": "kvstore",
    "module_path": "kvstore_adapters.sglang.hicache",
    "class_name": "KVStoreHiCache",
    "interface_v1": 1,
}


def publish(**changes: Any) -> ServerArgs:
    """Server arguments as SGLang's processes publish them."""
    args = ServerArgs(
        **{"model_path": "dummy", "page_size": PAGE_TOKENS, "device": "cpu", **changes}
    )
    set_global_server_args_for_scheduler(args)
    return args


def mha_pool(
    layout: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = HEADS,
    page_tokens: int = PAGE_TOKENS,
    layers: int = LAYERS,
    first_layer: int = 0,
    **options: Any,
) -> MHATokenToKVPoolHost:
    device = MHATokenToKVPool(
        size=TOKENS,
        page_size=page_tokens,
        dtype=dtype,
        head_num=heads,
        head_dim=HEAD_DIM,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )
    return MHATokenToKVPoolHost(
        device._mha_buffer_info(),
        1.0,
        0,
        page_tokens,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=device.size,
        start_layer=first_layer,
        end_layer=first_layer + layers,
        **options,
    )


def mla_pool(
    layout: str, *, dtype: torch.dtype = torch.bfloat16, page_tokens: int = PAGE_TOKENS
) -> MLATokenToKVPoolHost:
    device = MLATokenToKVPool(
        size=TOKENS,
        page_size=page_tokens,
        dtype=dtype,
        kv_lora_rank=LORA_RANK,
        qk_rope_head_dim=ROPE_DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    return MLATokenToKVPoolHost(
        device._mla_buffer_info(),
        1.0,
        0,
        page_tokens,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
    )


def fill(pool: Any, seed: int) -> None:
    """Every byte of the pool random, so that no two pages are alike."""
    generator = torch.Generator().manual_seed(seed)
    flat = pool.kv_buffer.view(torch.uint8).view(-1)
    flat.copy_(torch.randint(0, 256, flat.shape, generator=generator, dtype=torch.uint8))


def content(pool: Any, page: int) -> torch.Tensor:
    """The bytes of a page as `[layer, part, token, head, bytes of dim]`, read by plain indexing."""
    buffer, layout, size = pool.kv_buffer, pool.layout, pool.page_size
    slots = slice(page * size, (page + 1) * size)
    if isinstance(pool, MLATokenToKVPoolHost):
        inside = {
            "layer_first": lambda: buffer[:, slots, 0],
            "page_first": lambda: buffer[slots, :, 0].transpose(0, 1),
            "page_first_direct": lambda: buffer[page, :, :, 0],
            "page_unified": lambda: buffer[page],
        }[layout]()
    else:
        inside = {
            "layer_first": lambda: buffer[:, :, slots].permute(1, 0, 2, 3, 4),
            "page_first": lambda: buffer[:, slots].permute(2, 0, 1, 3, 4),
            "page_first_direct": lambda: buffer[:, page].permute(1, 0, 2, 3, 4),
            "page_head": lambda: buffer[:, page].permute(3, 0, 2, 1, 4),
            "page_unified": lambda: buffer[page, 0],
        }[layout]()
    copied: torch.Tensor = inside.contiguous().view(torch.uint8).clone()
    return copied


def contents(pool: Any, slots: torch.Tensor) -> list[torch.Tensor]:
    return [content(pool, int(slot) // pool.page_size) for slot in slots[:: pool.page_size]]


def keys(count: int, start: int = 0) -> list[str]:
    """Names like SGLang's."""
    return [f"{number:064x}" for number in range(start, start + count)]


def storage_config(address: str, model: str, **changes: Any) -> HiCacheStorageConfig:
    extra = {**LOADER, "address": address, "timeout": 2.0, **changes.pop("extra", {})}
    values = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": model,
        "extra_config": extra,
    }
    return HiCacheStorageConfig(**{**values, **changes})


def make_backend(config: HiCacheStorageConfig, pool: Any, side_pools: Any = None) -> Any:
    """A backend as SGLang's controller makes one, with the pools registered in its order."""
    backend = StorageBackendFactory.create_backend("dynamic", config, pool)
    backend.register_mem_pool_host(pool)
    for name, registered in {PoolName.KV: pool, **(side_pools or {})}.items():
        backend.register_mem_host_pool_v2(registered, name)
    backend.on_host_pools_registered()
    return backend


@dataclass
class Engine:
    """A host pool and its backend, used as SGLang's controller uses them."""

    pool: Any
    backend: Any
    is_v1: bool = True

    def put(self, names: Sequence[str], slots: torch.Tensor) -> bool:
        if self.is_v1:
            return all(self.backend.batch_set_v1(names, slots))
        pages = [self.pool.get_data_page(slot) for slot in slots[:: self.pool.page_size]]
        return bool(self.backend.batch_set(names, pages))

    def get(self, names: Sequence[str], slots: torch.Tensor) -> list[bool]:
        if self.is_v1:
            return list(self.backend.batch_get_v1(names, slots))
        room = [self.pool.get_dummy_flat_data_page() for _ in names]
        pages = self.backend.batch_get(names, room)
        for slot, page in zip(slots[:: self.pool.page_size], pages, strict=True):
            if page is not None:
                self.pool.set_from_flat_data_page(slot, page)
        return [page is not None for page in pages]

    def slots(self, num_pages: int) -> torch.Tensor:
        slots: torch.Tensor | None = self.pool.alloc(num_pages * self.pool.page_size)
        assert slots is not None
        return slots

    def contents(self, slots: torch.Tensor) -> list[torch.Tensor]:
        return contents(self.pool, slots)


def make_engine(address: str, model: str, pool: Any, **changes: Any) -> Engine:
    """`changes` are of the storage configuration."""
    config = storage_config(address, model, **changes)
    is_v1 = bool(config.extra_config["interface_v1"])
    return Engine(pool, make_backend(config, pool), is_v1)

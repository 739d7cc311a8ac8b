"""SGLang's device pools of one engine as the linker moves them.

SGLang 0.5.23 describes the pools of hybrid models for linkers, and refuses plain MHA and MLA models
and those with sliding windows (its own host cache serves them); for them the description is made
here, from the same parts.
"""

from __future__ import annotations

import hashlib
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import (
    DevicePoolEntry,
    DevicePoolGroup,
    resolve_hybrid_device_pool_group,
)
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import get_parallel

from kvstore import BlockSpec, ConfigError
from kvstore_adapters.sglang.device_pages import Pieces
from kvstore_adapters.sglang.keys import Rank
from kvstore_adapters.sglang.pools import CANONICAL_LAYOUT, Pages

_DTYPES = ("float32", "float16", "bfloat16", "int8", "uint8")


def pool_group(params: Any, components: set[Any]) -> DevicePoolGroup:
    """The pools of the engine that `params` (CacheInitParams) describes.

    Raises:
        ConfigError: pages of this model cannot be moved by a linker.
    """
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    entries: list[DevicePoolEntry | None] = [None]
    if not params.sidecar_draft_device_pools and not params.mtp_draft_device_pools:
        entries = _plain_entries(pool, components, params.page_size)
    known = [entry for entry in entries if entry is not None]
    if len(known) == len(entries):
        num_layers = 1 + max(max(entry.layer_mapping) for entry in known)
        is_latent = all(type(entry.device_pool) is _plain_types()[1] for entry in known)
        return DevicePoolGroup(known, num_layers, params.page_size, rank_replicated=is_latent)
    try:
        return resolve_hybrid_device_pool_group(
            kvcache=pool, page_size=params.page_size, params=params, components=components
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"model: SGLang gives a linker no access to a {type(pool).__name__}: {error}"
            " (use HiCache with kvstore as its storage instead)"
        ) from error


def rank_of(params: Any, is_replicated: bool) -> Rank:
    """This process's place in the deployment, as HiCache would describe it to its storage."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled

    parallel = get_parallel()
    is_dp = is_dp_attention_enabled()
    dcp_size = parallel.attn_dcp_size
    return Rank(
        tp_rank=parallel.attn_tp_rank if is_dp else parallel.tp_rank,
        tp_size=parallel.attn_tp_size if is_dp else parallel.tp_size,
        pp_rank=params.pp_rank,
        pp_size=params.pp_size,
        cp_rank=params.attn_cp_rank,
        cp_size=params.attn_cp_size,
        dcp_rank=parallel.attn_dcp_rank if dcp_size > 1 else 0,
        dcp_size=dcp_size,
        is_replicated=is_replicated,
        num_splits=1,
    )


def is_alone() -> bool:
    """Whether this process decides by itself: no other rank has to say the same."""
    parallel = get_parallel()
    return bool(parallel.tp_size == parallel.pp_size == 1)


def block_of(entry: Any, pieces: Pieces) -> Pages:
    """What a page of a pool is to a namespace: a canonical block where we know its inside."""
    pool, page_tokens = entry.device_pool, int(entry.page_size)
    dtype = str(getattr(pool, "store_dtype", "")).removeprefix("torch.")
    if type(pool) in _plain_types() and _layout(pool) == "nhd" and dtype in _DTYPES:
        is_latent = type(pool) is _plain_types()[1]
        spec = BlockSpec(
            num_layers=len(pieces.layers),
            num_kv_heads=1 if is_latent else int(pool.head_num),
            head_dim=int(pool.kv_cache_dim if is_latent else pool.head_dim),
            block_tokens=page_tokens,
            dtype=dtype,
            kind="latent" if is_latent else "kv",
        )
        if pieces.are_even and spec.block_bytes == pieces.page_bytes:
            layout = CANONICAL_LAYOUT
            if pool.dtype != pool.store_dtype:
                layout += f";dtype={pool.dtype}"
            return Pages(pool, page_tokens, spec, layout, None)
    shape = ",".join(str(piece.shape[1]) for piece in pieces.all)
    digest = hashlib.sha256(shape.encode()).hexdigest()[:16]
    kind = f"{type(pool).__name__}-{_layout(pool)}"
    layout = f"sglang-device-{kind};dtype={dtype};tokens={page_tokens};pieces={digest}"
    return Pages(pool, page_tokens, BlockSpec.of_bytes(pieces.page_bytes), layout, None)


def _plain_entries(
    pool: Any, components: set[Any], page_tokens: int
) -> list[DevicePoolEntry | None]:
    """The pools of a model of plain attention, or of plain and sliding windows; None for each that
    is something else."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    if components == {ComponentType.FULL}:
        layers = {layer: layer for layer in range(pool.layer_num)}
        return [_plain_entry(PoolName.KV, pool, layers, page_tokens)]
    if components == {ComponentType.FULL, ComponentType.SWA} and type(pool) is SWAKVPool:
        full, window = (
            {
                layer - pool.start_layer: own
                for layer, (own, is_window) in pool.layers_mapping.items()
                if is_window == wanted
            }
            for wanted in (False, True)
        )
        return [
            _plain_entry(PoolName.KV, pool.full_kv_pool, full, page_tokens),
            _plain_entry(PoolName.SWA, pool.swa_kv_pool, window, page_tokens),
        ]
    return [None]


def _plain_entry(
    name: PoolName, pool: Any, layers: dict[int, int], page_tokens: int
) -> DevicePoolEntry | None:
    """A pool of one K and V tensor, or one latent tensor, a layer; None for any other. `layers`: of
    the model, and of the pool."""
    mha, mla = _plain_types()
    if type(pool) is mha and _layout(pool) in ("nhd", "hnd", "vectorized_5d"):
        if pool.k_scale_buffer is not None or pool.native_k_scale_buffer is not None:
            raise ConfigError("kv_cache_dtype: KV with scales of its own is not supported")
        buffers = [*pool.k_buffer, *pool.v_buffer]
        mapping: dict[int, Any] = {
            layer: (own, pool.layer_num + own) for layer, own in layers.items()
        }
    elif type(pool) is mla:
        buffers, mapping = list(pool.kv_buffer), dict(layers)
    else:
        return None
    return DevicePoolEntry(
        name=name,
        indices_from_pool=name,
        device_pool=pool,
        components=[buffers],
        layer_mapping=mapping,
        page_size=page_tokens,
        rows_are_pages=_layout(pool) != "nhd",
    )


def _plain_types() -> tuple[Any, Any]:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    return MHATokenToKVPool, MLATokenToKVPool


def _layout(pool: Any) -> str:
    """How the rows of a pool are ordered; a latent pool has slots as rows, and one order."""
    return str(getattr(pool, "kv_cache_layout", "nhd"))

"""SGLang's device pools of one engine as the linker moves them.

SGLang 0.5.23 describes the pools of hybrid models for linkers, and refuses plain MHA and MLA models
(its own host cache serves those); for them the description is made here, from the same parts.
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
    entry = None
    if components == {ComponentType.FULL} and not params.sidecar_draft_device_pools:
        entry = _plain_entry(pool, params.page_size)
    if entry is not None:
        is_latent = len(entry.components[0]) == pool.layer_num
        return DevicePoolGroup([entry], pool.layer_num, params.page_size, rank_replicated=is_latent)
    try:
        return resolve_hybrid_device_pool_group(
            kvcache=pool, page_size=params.page_size, params=params, components=components
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"model: SGLang gives a linker no access to a {type(pool).__name__}: {error}"
            " (use HiCache with kvstore as its storage instead)"
        ) from error


def rank_of(is_replicated: bool) -> Rank:
    """This process's place in the deployment, as HiCache would describe it to its storage."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled

    parallel = get_parallel()
    is_dp = is_dp_attention_enabled()
    return Rank(
        tp_rank=parallel.attn_tp_rank if is_dp else parallel.tp_rank,
        tp_size=parallel.attn_tp_size if is_dp else parallel.tp_size,
        pp_rank=parallel.pp_rank,
        pp_size=parallel.pp_size,
        cp_rank=parallel.attn_cp_rank,
        cp_size=parallel.attn_cp_size,
        dcp_rank=parallel.attn_dcp_rank,
        dcp_size=parallel.attn_dcp_size,
        is_replicated=is_replicated,
        num_splits=1,
    )


def is_alone() -> bool:
    """Whether this process decides by itself: no other rank has to say the same."""
    parallel = get_parallel()
    return bool(parallel.tp_size == parallel.pp_size == 1)


def block_of(name: str, entry: Any, pieces: Pieces) -> Pages:
    """What a page of a pool is to a namespace: a canonical block where we know its inside."""
    pool, page_tokens = entry.device_pool, int(entry.page_size)
    dtype = str(getattr(pool, "store_dtype", "")).removeprefix("torch.")
    is_plain = name == "kv" and type(pool) in _plain_types() and _layout(pool) == "nhd"
    if is_plain and dtype in _DTYPES and pieces.are_even:
        is_kv = len(pieces.layers[0]) == 2
        spec = BlockSpec(
            num_layers=len(pieces.layers),
            num_kv_heads=int(pool.head_num) if is_kv else 1,
            head_dim=int(pool.head_dim if is_kv else pool.kv_cache_dim),
            block_tokens=page_tokens,
            dtype=dtype,
            kind="kv" if is_kv else "latent",
        )
        if spec.block_bytes == pieces.page_bytes:
            layout = CANONICAL_LAYOUT
            if str(pool.dtype) != str(pool.store_dtype):
                layout += f";dtype={pool.dtype}"
            return Pages(pool, page_tokens, spec, layout, None)
    shape = ",".join(str(piece.shape[1]) for piece in pieces.all)
    kind = f"{type(pool).__name__}-{_layout(pool)}"
    digest = hashlib.sha256(shape.encode()).hexdigest()[:16]
    layout = f"sglang-device-{kind};dtype={dtype};tokens={page_tokens};pieces={digest}"
    return Pages(pool, page_tokens, BlockSpec.of_bytes(pieces.page_bytes), layout, None)


def _plain_entry(pool: Any, page_tokens: int) -> DevicePoolEntry | None:
    """A pool of one K and V tensor, or one latent tensor, a layer; None for any other."""
    mha, mla = _plain_types()
    layers = range(pool.layer_num)
    if type(pool) is mha and _layout(pool) in ("nhd", "hnd", "vectorized_5d"):
        if pool.k_scale_buffer is not None or pool.native_k_scale_buffer is not None:
            raise ConfigError("kv_cache_dtype: KV with scales of its own is not supported")
        buffers = [*pool.k_buffer, *pool.v_buffer]
        mapping: dict[int, Any] = {layer: (layer, pool.layer_num + layer) for layer in layers}
    elif type(pool) is mla:
        buffers = list(pool.kv_buffer)
        mapping = {layer: layer for layer in layers}
    else:
        return None
    return DevicePoolEntry(
        name=PoolName.KV,
        indices_from_pool=PoolName.KV,
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

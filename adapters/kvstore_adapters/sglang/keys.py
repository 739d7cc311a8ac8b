"""What names a page of SGLang in the store: a namespace for all that must match, and its hash.

SGLang names a page by a chained SHA-256 of its tokens; salt and LoRA start the chain, pairs of
tokens (EAGLE) make other hashes. The hash knows nothing else, so the namespace has the model,
dtype, page size, layout, and which heads and layers a rank holds. Ranks that hold the same bytes
(MLA) have one namespace; so have ranks of different sizes of tensor parallelism that cut the heads
in the same `tp_lcm_size` groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore import BlockHashes, Namespace
from kvstore_adapters.sglang.pools import Pages, is_sharded

_HEX_DIGITS = 64


@dataclass(frozen=True, slots=True)
class Rank:
    """Where in the deployment a rank stands, as far as its pages depend on it."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dcp_rank: int
    dcp_size: int
    is_replicated: bool  # every rank of tensor parallelism has the same main pool
    num_splits: int  # in how many groups a rank's heads are stored

    @classmethod
    def of(cls, config: Any) -> Rank:
        """The rank that SGLang's HiCacheStorageConfig describes."""
        splits = 1
        if config.tp_lcm_size and not config.is_mla_model:
            splits = config.tp_lcm_size // config.tp_size
        return cls(
            tp_rank=config.tp_rank,
            tp_size=config.tp_size,
            pp_rank=config.pp_rank,
            pp_size=config.pp_size,
            cp_rank=config.attn_cp_rank,
            cp_size=config.attn_cp_size,
            dcp_rank=config.dcp_rank,
            dcp_size=config.dcp_size,
            is_replicated=config.is_mla_model,
            num_splits=splits,
        )


@dataclass(frozen=True, slots=True)
class Model:
    """What of the model SGLang's hashes leave out."""

    name: str
    revision: str
    kv_dtype: str  # of quantised pages, which are only bytes to their pool
    draft: str  # the model whose layers lie behind the main model's, or in pools of their own


def namespace_of(name: str, pages: Pages, rank: Rank, model: Model, split: int = 0) -> Namespace:
    """The namespace of group `split` of the heads of a pool that SGLang calls `name`."""
    pool = pages.pool
    has_heads = not rank.is_replicated or is_sharded(pool)
    splits = rank.num_splits if pages.is_split else 1
    layout = [pages.layout]
    if name != "kv":
        layout.append(f"pool={name}")
    if pages.spec.dtype_bytes == 1:
        layout.append(f"kv_cache_dtype={model.kv_dtype}")
    first = int(getattr(pool, "start_layer", 0) or 0)
    if rank.pp_size > 1 or first:
        layout.append(f"layers={first}+{getattr(pool, 'layer_num', 0)}")
    if name.startswith("draft") or _has_draft_layers(pool):
        layout.append(f"draft={model.draft}")
    if rank.cp_size > 1:
        layout.append(f"cp={rank.cp_rank}/{rank.cp_size}")
    if rank.dcp_size > 1:
        layout.append(f"dcp={rank.dcp_rank}/{rank.dcp_size}")
    return Namespace(
        model=model.name,
        spec=pages.spec,
        revision=model.revision,
        layout=";".join(layout),
        tp_rank=rank.tp_rank * splits + split if has_heads else 0,
        tp_size=rank.tp_size * splits if has_heads else 1,
        pp_rank=rank.pp_rank,
        pp_size=rank.pp_size,
        hash_algorithm="sglang_sha256",
    )


def _has_draft_layers(pool: Any) -> bool:
    layers = getattr(pool, "layer_num", 0)
    return bool(getattr(pool, "target_layer_num", layers) != layers)


def block_hashes(keys: Sequence[str]) -> BlockHashes:
    """SGLang's keys as block hashes, each by itself.

    They are chained, but what SGLang asks for often begins in the middle of a chain whose beginning
    only its own tiers have; linked blocks would be refused then.
    """
    try:
        has_digits = set(map(len, keys)) <= {_HEX_DIGITS}
        packed = bytes.fromhex("".join(keys)) if has_digits else b""
    except ValueError:
        packed = b""
    if len(packed) * 2 != len(keys) * _HEX_DIGITS:
        packed = b"".join(hashlib.sha256(b"sglang key\0" + key.encode()).digest() for key in keys)
    return BlockHashes.of(np.frombuffer(packed, np.uint8).reshape(-1, 32))

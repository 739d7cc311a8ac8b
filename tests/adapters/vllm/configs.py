"""vLLM's own configuration objects, as an engine would make them, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

BLOCK_TOKENS, HEADS, HEAD_DIM, LAYERS, NUM_BLOCKS = 32, 2, 64, 3, 16


def vllm_config(model: Path, layout: str = "LBHNC") -> VllmConfig:
    config = VllmConfig(
        model_config=ModelConfig(model=str(model), dtype="float32", max_model_len=1024, seed=0),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=1024,
            max_model_len=1024,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        cache_config=CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
    )
    config.cache_config.kv_cache_layout = layout
    config.cache_config.num_gpu_blocks_override = NUM_BLOCKS
    return config


def full(heads: int = HEADS, **fields: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=heads,
        head_size=HEAD_DIM,
        dtype=torch.float32,
        **fields,
    )


def window(tokens: int = 128, **fields: Any) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=HEADS,
        head_size=HEAD_DIM,
        dtype=torch.float32,
        sliding_window=tokens,
        **fields,
    )


def cache_config(config: VllmConfig, specs: Sequence[Any] = (), layers: int = LAYERS) -> Any:
    """A KVCacheConfig with a group for each spec, placed in memory by vLLM itself."""
    groups = [
        KVCacheGroupSpec([f"group{i}.layer{k}" for k in range(layers)], spec)
        for i, spec in enumerate(specs or [full()])
    ]
    made = get_kv_cache_config_from_groups(config, groups, available_memory=1 << 30)
    made.kv_cache_layout = config.cache_config.kv_cache_layout
    made.hash_block_size = BLOCK_TOKENS
    return made


def allocated(
    config: VllmConfig, caches: Any, kernel_tokens: int | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that vLLM would register."""
    layout = KVCacheLayout[config.cache_config.kv_cache_layout]
    sizes = [kernel_tokens] * len(caches.kv_cache_groups) if kernel_tokens else None
    tensors: dict[str, torch.Tensor] = allocate_kv_cache(caches, torch.device("cpu"), layout, sizes)
    return tensors

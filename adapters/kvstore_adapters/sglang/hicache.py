"""KVStoreHiCache: kvstore as the storage behind SGLang's hierarchical cache.

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvstore", "interface_v1": 1,
        "module_path": "kvstore_adapters.sglang.hicache", "class_name": "KVStoreHiCache"}'

SGLang's controller calls from its own threads: one that asks what is stored, one that loads, one
that writes, and the scheduler's. A page is one block, K and V together, so it is there whole or not
at all; the copy runs on several threads in native code. Whatever goes wrong here is a miss or a
failed write: SGLang computes the page, and its threads see no exception.

Pages are copied once, between SGLang's host pool and the daemon's arena, which is mapped in here.
The other way round, with `"allocator": "shm"`, SGLang's pool is a memfd that a daemon could map. It
would be one copy as well, and a client that truncates its memfd would kill the daemon (SIGBUS) and
with it the cache of all others.

Thread safety: all methods may be called from any thread; registering and closing are SGLang's
control path and run alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolTransfer,
    PoolTransferResult,
)

from kvstore_adapters.compat import check_release
from kvstore_adapters.daemon_start import ensure_daemon
from kvstore_adapters.planning.notices import Notices
from kvstore_adapters.planning.shards import Shards
from kvstore_adapters.sglang import hit_policies
from kvstore_adapters.sglang.keys import Rank, block_hashes, namespace_of
from kvstore_adapters.sglang.pool_store import PoolStore
from kvstore_adapters.sglang.pools import is_logical, is_sharded, pages_of
from kvstore_adapters.sglang.runtime import TransferMetrics, model_of, settings_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KV = "kv"  # SGLang's name of the main pool
_CLOSE_SECONDS = 5.0


class KVStoreHiCache(HiCacheStorage):
    """See SGLang's `HiCacheStorage`; made by its `dynamic` loader.

    Raises:
        ConfigError: a setting is wrong; the message names it.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any]) -> None:
        check_release("sglang")
        extra = dict(storage_config.extra_config or {})
        self._settings = settings_of(extra)
        ensure_daemon(self._settings)
        self._is_flat = not extra.get("interface_v1")
        self._rank = Rank.of(storage_config)
        self._is_writer = storage_config.is_storage_writer
        self._model = model_of(storage_config.model_name, self._settings)
        self._pools: dict[str, PoolStore] = {}
        self._logical: set[str] = set()
        self._metrics = TransferMetrics(storage_config.enable_storage_metrics)
        self._notices = Notices(logger)

    # --- pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(_KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(_name(host_pool_name), host_pool)

    def _register(self, name: str, pool: Any) -> None:
        """Open the pool's stores, once: SGLang registers its main pool by both methods.

        Raises:
            ConfigError: its pages cannot be stored. That fails the attach, with a clear message.
        """
        if is_logical(pool):
            self._logical.add(name)
            return
        known = self._pools.get(name)
        if known is not None and known.pages.pool is pool:
            return
        is_flat = self._is_flat and name == _KV
        groups = pages_of(pool, self._rank.num_splits, only_flat=is_flat)
        namespaces = {
            (split, 0): namespace_of(name, pages, self._rank, self._model, split)
            for split, pages in enumerate(groups)
        }
        shards = Shards(namespaces, self._settings)
        try:
            shards.connect_all()
        except BaseException:  # SGLang can be asked to attach again, any number of times
            shards.close(0.0)
            raise
        self._pools[name] = PoolStore(name, groups, shards, self._settings.load_deadline)
        if known is not None:
            known.close(_CLOSE_SECONDS)
        logger.info(
            "pool %s: %s pages of %d bytes, layout %s, namespace %s",
            name,
            "unstaged" if groups[0].buffers is not None else "staged",
            self._pools[name].page_bytes,
            groups[0].layout,
            namespaces[0, 0].digest.hex()[:16],
        )

    # --- what is stored

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(
        self, keys: Sequence[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        return self._try(_KV, lambda pool: pool.match(block_hashes(keys)), 0)

    def batch_exists_v2(
        self,
        keys: Sequence[str],
        pool_transfers: Sequence[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        transfers = pool_transfers or ()
        num_kv = self.batch_exists(keys)
        if _KV in self._logical and any(map(_gates, transfers)):
            num_kv = len(keys)  # it holds nothing itself: the other pools say how far one can go
        hits: dict[Any, int] = {_KV: num_kv} if num_kv else {}
        restorable = np.ones(num_kv, np.bool_)
        for transfer in transfers if num_kv else ():
            present = self._contains(_name(transfer.name), keys[:num_kv])
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                boundary = hit_policies.block_groups(
                    present, transfer.block_pages, transfer.group_pages
                )
            else:
                served = _served(present, transfer)
                restorable &= served
                boundary = int(np.flatnonzero(served)[-1]) + 1 if served.any() else 0
            if boundary:
                hits[transfer.name] = boundary
        lengths = (np.flatnonzero(restorable) + 1).tolist()
        return PoolTransferResult(lengths[-1] if lengths else 0, hits, lengths)

    def _contains(self, name: str, keys: Sequence[str]) -> hit_policies.Flags:
        nothing = np.zeros(len(keys), np.bool_)
        return self._try(name, lambda pool: pool.contains(block_hashes(keys)), nothing)

    # --- pages by their place in a host pool

    def batch_get_v1(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._load(_KV, keys, host_indices)

    def batch_set_v1(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._put(_KV, keys, host_indices)

    def batch_get_v2(
        self,
        transfers: Sequence[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[Any, list[bool]]:
        return {t.name: self._load(_name(t.name), t.keys or (), t.host_indices) for t in transfers}

    def batch_set_v2(
        self,
        transfers: Sequence[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[Any, list[bool]]:
        return {t.name: self._put(_name(t.name), t.keys or (), t.host_indices) for t in transfers}

    def _load(
        self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None
    ) -> list[bool]:
        if name in self._logical:
            return [True] * len(keys)
        if host_indices is None or not keys:
            return [False] * len(keys)
        began = time.perf_counter()
        arrived = self._try(
            name, lambda pool: pool.load(block_hashes(keys), host_indices), _none(keys)
        )
        self._count(self._metrics.add_load, name, arrived, began)
        return _bools(arrived)

    def _put(self, name: str, keys: Sequence[str], host_indices: torch.Tensor | None) -> list[bool]:
        if name in self._logical or self._is_written_by_others(name):
            return [True] * len(keys)
        if host_indices is None or not keys:
            return [False] * len(keys)
        began = time.perf_counter()
        stored = self._try(
            name, lambda pool: pool.put(block_hashes(keys), host_indices), _none(keys)
        )
        self._count(self._metrics.add_put, name, stored, began)
        return _bools(stored)

    def _is_written_by_others(self, name: str) -> bool:
        """Whether all ranks have the same pages in this pool, and another one writes them."""
        pool = self._pools.get(name)
        return not self._is_writer and pool is not None and not is_sharded(pool.pages.pool)

    # --- pages as tensors

    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        targets = None if target_location is None else [target_location]
        return self.batch_get([key], targets)[0]

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Flat pages, copied into `target_locations` where given; None where there is none."""

        def load(pool: PoolStore) -> list[torch.Tensor | None]:
            arrived, stack = pool.load_flat(block_hashes(keys))
            pages: list[torch.Tensor | None] = [None] * len(keys)
            for row in np.flatnonzero(arrived).tolist():
                pages[row] = stack[row]
                if target_locations is not None:
                    pages[row] = target_locations[row].copy_(stack[row])
            return pages

        nothing: list[torch.Tensor | None] = [None] * len(keys)
        return self._try(_KV, load, nothing) if keys else []

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: Sequence[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        if self._is_written_by_others(_KV) or not keys:
            return True
        if values is None or any(value is None for value in values):
            return False
        stored = self._try(_KV, lambda pool: pool.put_flat(block_hashes(keys), values), _none(keys))
        return bool(stored.all())

    # --- administration

    def clear(self) -> bool:
        """Remove this model's pages from the store, those of other engines too."""
        return all(self._try(name, _cleared, False) for name in list(self._pools))

    def get_stats(self) -> Any:
        """For SGLang's metrics, on each step of the scheduler: the daemon is not asked."""
        return self._metrics.take()

    def close(self) -> None:
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close(_CLOSE_SECONDS)

    def _try(self, name: str, work: Callable[[PoolStore], T], otherwise: T) -> T:
        """What `work` returns for the pool, or `otherwise` where there is none or it fails."""
        pool = self._pools.get(name)
        if pool is None:
            return otherwise
        try:
            return work(pool)
        except Exception as error:  # noqa: BLE001  whatever it was, SGLang's threads shall go on
            self._notices.warn(f"pool {name}: a call failed and counts as a miss", repr(error))
            return otherwise

    def _count(
        self,
        add: Callable[[int, int, float], None],
        name: str,
        done: hit_policies.Flags,
        began: float,
    ) -> None:
        pool = self._pools.get(name)
        if pool is not None:
            count = int(np.count_nonzero(done))
            add(count, count * pool.page_bytes, time.perf_counter() - began)


def _name(pool_name: Any) -> str:
    """SGLang names pools by strings that are enums, or by plain strings."""
    return str(getattr(pool_name, "value", pool_name))


def _none(keys: Sequence[str]) -> hit_policies.Flags:
    return np.zeros(len(keys), np.bool_)


def _bools(flags: hit_policies.Flags) -> list[bool]:
    return [bool(flag) for flag in flags]


def _cleared(pool: PoolStore) -> bool:
    pool.clear()
    return True


def _gates(transfer: PoolTransfer) -> bool:
    return bool(transfer.hit_policy != PoolHitPolicy.BLOCK_GROUPS)


def _served(present: hit_policies.Flags, transfer: PoolTransfer) -> hit_policies.Flags:
    """For n = 1, 2, ...: whether the pool has what a prefix of n pages needs of it."""
    if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
        return hit_policies.trailing_pages(present, max(1, len(transfer.keys or ())))
    return hit_policies.all_pages(present)

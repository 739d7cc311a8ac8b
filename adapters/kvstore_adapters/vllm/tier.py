"""KVStoreTier: kvstore below the CPU tier of vLLM's own OffloadingConnector.

    "secondary_tiers": [{"type": "KVStoreTier", "module_path": "kvstore_adapters.vllm.tier",
                         "address": "unix:/run/kvstore/kvstore.sock"}]

vLLM keeps a pool of pinned chunks and says which of its rows to store here or to fill from here; a
row holds a chunk of all ranks. A row is one block of ours, copied straight between the pool and the
daemon's arena.

Everything here runs in the scheduler's process. Its thread only looks into dictionaries and queues:
vLLM's AsyncLookupManager asks for chunks on a thread, and a thread each loads and stores. A chunk
that is not there, damaged, or late is a failed promotion of that chunk, which vLLM computes anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm import __version__ as vllm_version
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.metrics.cache_hit_source import CacheHitSource

import kvstore
from kvstore_adapters.daemon_start import ensure_daemon
from kvstore_adapters.planning.shards import Shards
from kvstore_adapters.settings import AdapterSettings
from kvstore_adapters.vllm.namespaces import model_of

logger = logging.getLogger(__name__)

_MARGIN_SECONDS = 5.0  # for what calls take besides waiting

_Flags = npt.NDArray[np.bool_]
_Jobs = queue.Queue[TransferJob | None]


class _Finished(NamedTuple):
    job: TransferJob
    done: _Flags  # by chunk
    seconds: float
    num_waiting: int  # chunks that had waited to be stored


def namespace_of(
    config: OffloadingConfig, chunk_bytes: int, model: tuple[str, str], backend: str = ""
) -> kvstore.Namespace:
    """What must match for a chunk to be of use to another engine. Groups are in the keys too, but
    what a group is, only here.

    Args:
        model: name and revision.
        backend: the attention backend, where the user named one.
    """
    parallel = config.parallel
    layout = {
        "vllm": vllm_version,
        "device": current_platform.device_type,
        "backend": backend,
        "dtype": config.model.dtype,
        "groups": [(g.group_id, g.tokens_per_block, g.layer_names) for g in config.groups],
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "world": (parallel.world_size, parallel.pcp_size, parallel.dcp_size),
        "layout": (config.kv_cache_layout, config.canonical_layout, config.replicated_layout),
    }
    digest = hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()
    return kvstore.Namespace(
        model=model[0],
        revision=model[1],
        spec=kvstore.BlockSpec.of_bytes(chunk_bytes),
        layout=f"vllm-tier-1-{digest[:32]}",
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
        hash_algorithm="external",
    )


def _engine_config(engine_id: str) -> Any:
    """The VllmConfig of the engine that is being built, from who called us; None without one.

    vLLM tells a tier the model's path, and not its revision, quantization or overrides, which make
    other KV of the same tokens.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        found = frame.f_locals.get("vllm_config")
        transfer = getattr(found, "kv_transfer_config", None)
        if getattr(transfer, "engine_id", None) == engine_id:
            return found
    return None


def _identity(config: OffloadingConfig, settings: AdapterSettings) -> tuple[tuple[str, str], str]:
    """The model's name and revision, and the attention backend that the user named."""
    engine = _engine_config(config.engine_id)
    if engine is not None:
        return model_of(engine, settings), str(engine.attention_config.backend or "")
    if settings.model:
        return (settings.model, ""), ""
    raise kvstore.ConfigError(
        f"model: of {config.model.name} only the path is known here, not what changes its KV; "
        "give it a name of your own"
    )


def names_of(keys: Iterable[OffloadKey]) -> kvstore.BlockHashes:
    """The blocks of vLLM's keys (a hash of any length and the group), each by itself."""
    return kvstore.BlockHashes.of([hashlib.sha256(key).digest() for key in keys])


class _Lookups(AsyncLookupManager):
    def __init__(self, store: kvstore.Store, tier_type: str) -> None:
        self._store = store
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> list[bool]:
        found: list[bool] = self._store.contains(names_of(keys)).tolist()
        return found


class KVStoreTier(SecondaryTierManager):
    """A secondary tier on a kvstore daemon.

    Args:
        locality: "LOCAL" or "REMOTE", for requests that say which tiers they load from.
        settings: of `AdapterSettings`: `address`, `start_daemon`, `timeout`, `load_deadline`,
            `tenant`, `token_file`, `model`, and `max_pinned_fraction`, here of vLLM's pool.

    Raises:
        ConfigError, IncompatibleError: a setting is wrong, or a daemon is there and refuses us.
    """

    medium: ClassVar[Medium] = Medium.STORAGE
    cache_hit_source: ClassVar[CacheHitSource] = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        locality: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = None if locality is None else Locality(locality)
        self._settings = AdapterSettings.of(settings)
        # None after `shutdown`: the pool cannot be unmapped while we have its address.
        self._buffers: kvstore.BlockBuffers | None = kvstore.ContiguousBlocks(primary_kv_view)
        model, backend = _identity(offloading_spec.config, self._settings)
        namespace = namespace_of(offloading_spec.config, self._buffers.block_bytes, model, backend)
        ensure_daemon(self._settings)
        self._shards = Shards({(0, 0): namespace}, self._settings)
        self._store = self._shards.store(0, 0)
        self._lookups = _Lookups(self._store, tier_type)
        self._asked: dict[str, float] = {}  # when a request asked first
        # Chunks that wait to be stored are lost to vLLM's pool meanwhile.
        share = self._settings.max_pinned_fraction
        self._max_waiting = int(share * self._buffers.num_blocks)
        self._num_waiting = 0
        self._closing = threading.Event()
        self._finished: queue.SimpleQueue[_Finished] = queue.SimpleQueue()
        self._loads: _Jobs = queue.Queue()
        self._stores: _Jobs = queue.Queue()
        self._threads = [
            threading.Thread(target=self._work, args=(jobs, move), name=name, daemon=True)
            for name, jobs, move in (
                ("kvstore-tier-load", self._loads, self._load),
                ("kvstore-tier-store", self._stores, self._put),
            )
        ]
        for thread in self._threads:
            thread.start()

    # --- looking

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._lookups.lookup(key, req_context)
        if found is not None:
            return LookupResult.HIT if found else LookupResult.MISS
        now = time.monotonic()
        waited = now - self._asked.setdefault(req_context.req_id, now)
        return LookupResult.RETRY if waited < self._settings.load_deadline else LookupResult.MISS

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._asked.pop(req_context.req_id, None)
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    # --- moving

    def submit_store(self, job_metadata: TransferJob) -> None:
        num_chunks = len(job_metadata.keys)
        # A batch of any size is taken where none waits.
        if self._num_waiting and self._num_waiting + num_chunks > self._max_waiting:
            self._finished.put(_Finished(job_metadata, np.zeros(num_chunks, bool), 0.0, 0))
            return
        self._num_waiting += num_chunks
        self._stores.put(job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._loads.put(job_metadata)

    def get_finished_jobs(self) -> list[JobResult]:
        results = []
        while not self._finished.empty():
            job, done, seconds, num_waiting = self._finished.get()
            self._num_waiting -= num_waiting
            keys = list(job.keys)
            arrived = [key for key, is_done in zip(keys, done, strict=True) if is_done]
            if job.is_promotion and len(arrived) < len(keys):
                # Until these requests end, or vLLM asks for the same chunks again and again.
                self._lookups.mark_miss(set(keys) - set(arrived))
            results.append(
                JobResult(
                    job.job_id,
                    success=len(arrived) == len(keys),
                    successful_keys=arrived,
                    transfer_time=seconds,
                    transfer_bytes=len(arrived) * self.block_size_bytes,
                )
            )
        return results

    def _work(self, jobs: _Jobs, move: Callable[[TransferJob], _Flags]) -> None:
        while (job := jobs.get()) is not None:
            began = time.monotonic()
            try:
                done = np.zeros(len(job.keys), bool) if self._closing.is_set() else move(job)
            except Exception:  # a job that never ends would hold its chunks and requests for ever
                logger.exception("tier: job %d of %d chunks failed", job.job_id, len(job.keys))
                done = np.zeros(len(job.keys), bool)
            num_waiting = 0 if job.is_promotion else len(job.keys)
            self._finished.put(_Finished(job, done, time.monotonic() - began, num_waiting))
            jobs.task_done()

    def _load(self, job: TransferJob) -> _Flags:
        assert self._buffers is not None
        return self._store.load_each(
            names_of(job.keys),
            self._buffers,
            job.chunk_ids,
            timeout=self._settings.load_deadline,
        )

    def _put(self, job: TransferJob) -> _Flags:
        assert self._buffers is not None
        return self._store.put_each(names_of(job.keys), self._buffers, job.chunk_ids)

    # --- ending

    def drain_jobs(self) -> None:
        self._loads.join()
        self._stores.join()

    def shutdown(self) -> None:
        """Raises RuntimeError when a copy goes on, so that vLLM leaves the pool where it is."""
        self._closing.set()
        for jobs in (self._loads, self._stores):
            jobs.put(None)
        # No call outlives these two by much.
        patience = self._settings.timeout + self._settings.load_deadline + _MARGIN_SECONDS
        give_up = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            raise RuntimeError(f"tier {self.tier_type}: a transfer did not end")
        self._lookups.shutdown()
        self._shards.close()
        self._buffers = None

"""SchedulerSide: the connector in vLLM's scheduler: what to load, what to save, what to pin.

Translates between vLLM's requests and the planner; see `planning/planner.py` for the rules. Used by
the scheduler's thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

from kvstore import KVStoreError, Namespace
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.lookups import Lookups
from kvstore_adapters.planning.pins import EndedSave
from kvstore_adapters.planning.planner import Planner
from kvstore_adapters.planning.shards import Shards
from kvstore_adapters.planning.tracking import PlannerSettings, ScheduledRequest
from kvstore_adapters.settings import AdapterSettings

from .events import SaveEvents
from .metadata import PlanMetadata, ReportMetadata
from .namespaces import groups_of, namespaces_of, namespaces_told
from .stats import KVStoreStats
from .worker_side import tells_blocks

_LOG = logging.getLogger(__name__)


class SchedulerSide:
    """See above."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, settings: AdapterSettings) -> None:
        """
        Raises:
            ConfigError, IncompatibleError: the configuration cannot work; the message says why.
        """
        transfer = vllm_config.kv_transfer_config
        groups = groups_of(kv_cache_config)
        namespaces = namespaces_of(vllm_config, kv_cache_config, settings)
        forced = _why_async(vllm_config, groups, len(kv_cache_config.kv_cache_groups))
        self._is_async = settings.load == "async" or forced is not None
        if transfer.is_kv_consumer and transfer.kv_load_failure_policy == "fail":
            _LOG.warning(_POLICY)
        if settings.load == "sync" and forced is not None:
            _LOG.warning("load: sync is not possible with %s; async is used", forced)
        drop_blocks = _blocks_to_drop(vllm_config)
        can_load = bool(transfer.is_kv_consumer)
        if can_load and drop_blocks and any(group.kind == "window" for group in groups):
            # With a block less the window begins earlier, where the store need not have it.
            _LOG.warning("speculative decoding of this model: blocks are saved, but not loaded")
            can_load = False
        self._shards = Shards(namespaces, settings)
        self._lookups = Lookups(self._shards, groups, settings.timeout)
        parallel = vllm_config.parallel_config
        self._planner = Planner(
            groups,
            int(resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1]),
            self._lookups,
            PlannerSettings(
                num_ranks=int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size),
                can_load=can_load,
                can_save=bool(transfer.is_kv_producer),
                save_decode=settings.save_decode,
                is_async=self._is_async,
                max_pinned_blocks=int(settings.max_pinned_fraction * kv_cache_config.num_blocks),
                lookup_wait=settings.lookup_wait,
                pd_wait=settings.pd_wait,
                drop_blocks=drop_blocks,
                source=_source(namespaces),
                push_targets=tuple(settings.push_targets),
                holder=settings.holder,
                holders=settings.holders,
            ),
        )
        events = vllm_config.kv_events_config
        self._events = SaveEvents(groups) if events and events.enable_kv_cache_events else None
        self._manager: Any = None
        self._pool: Any = None
        self._requests: dict[str, Any] = {}
        # Saves that were under way when the store was cleared, and may bring back blocks of before.
        self._stale_saves: set[int] = set()

    def adopt(self, namespaces: Mapping[tuple[int, int], Namespace]) -> None:
        """Take the namespaces that workers told."""
        if namespaces:
            self._shards.adopt(namespaces)
            self._planner.source = _source(namespaces)

    def bind(self, manager: Any) -> None:
        """Take vLLM's manager of KV caches, whose blocks our saves hold."""
        self._manager = manager
        self._pool = manager.block_pool

    # --- requests

    def arrived(self, request: Any) -> None:
        request_id = request.request_id
        self._requests[request_id] = request
        self._planner.arrive(
            request_id, request.block_hashes, request.num_prompt_tokens, request.kv_transfer_params
        )

    def match(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._stale_saves:
            return 0, False
        tokens = self._planner.match(
            request.request_id, request.block_hashes, request.num_tokens, num_computed_tokens
        )
        return tokens, bool(tokens) and self._is_async

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self._planner.allocated(request.request_id, num_external_tokens, _tables(blocks))

    def finished(self, request: Any) -> dict[str, Any] | None:
        self._requests.pop(request.request_id, None)
        return self._planner.finished(
            request.request_id, request.num_computed_tokens, request.block_hashes
        )

    # --- steps

    def plan(self, output: Any) -> PlanMetadata:
        due = () if self._planner.is_full else self._to_save(output)
        plan = self._planner.step(due, output.preempted_req_ids or ())
        if plan.saves:
            # A reference of our own: the blocks stay as they are whatever becomes of the request.
            blocks = self._pool.blocks
            self._pool.touch([blocks[block] for block in self._planner.take_pinned()])
            if self._events is not None:
                for job in plan.saves:
                    self._events.planned(job, self._requests[job.request_id])
        return PlanMetadata(plan)

    def _to_save(self, output: Any) -> Sequence[ScheduledRequest]:
        """Return the step's requests that come so far in it that they have blocks to save."""
        planner = self._planner
        requests, manager = self._requests, self._manager
        at_of = planner.save_at.get
        due: list[ScheduledRequest] = []
        for request_id, count in output.num_scheduled_tokens.items():
            at = at_of(request_id)
            if at is None:
                continue
            request = requests[request_id]
            computed = request.num_computed_tokens + count
            if computed >= at:
                # As `output.kv_connector_block_state`, which would copy the whole table.
                tables = _tables(manager.get_blocks(request_id))
                due.append(ScheduledRequest(request_id, computed, request.block_hashes, tables))
        return due

    def reported(self, metadata: object) -> None:
        if not isinstance(metadata, ReportMetadata):
            return
        if metadata.names is not None:
            self.adopt(namespaces_told({(0, 0): metadata.names}))
        ended = self._planner.report(metadata.report)
        if not ended:
            return
        self._unpin(ended)
        if self._stale_saves:
            self._stale_saves.difference_update(save.job.job_id for save in ended)
            if not self._stale_saves:
                self._clear_store()

    def _unpin(self, ended: Sequence[EndedSave]) -> None:
        blocks = self._pool.blocks
        # The last block first, as vLLM frees: the end of a prefix is the first to be reused.
        self._pool.free_blocks(
            blocks[block] for save in ended for block in reversed(save.block_ids)
        )
        if self._events is not None:
            for save in ended:
                self._events.ended(save)

    @property
    def has_saves(self) -> bool:
        return self._planner.num_saves > 0

    @property
    def can_free_blocks(self) -> bool:
        """Whether blocks come free with the saves under way: those that nobody else holds."""
        blocks = self._pool.blocks
        return any(blocks[block].ref_cnt == 1 for block in self._planner.pinned_blocks())

    def take_events(self) -> Iterable[Any]:
        return self._events.take() if self._events is not None else ()

    def stats(self) -> KVStoreStats | None:
        return KVStoreStats.of(self._planner.take_counters())

    # --- ending

    def clear(self) -> bool:
        """Remove all blocks of this model from the store, for every engine that shares it."""
        self._planner.clear()
        # Nothing is loaded before these have ended and the store was cleared once more. Other
        # saves, of what is computed from now on, do not put that off.
        self._stale_saves = set(self._planner.saves_under_way())
        return self._clear_store()

    def _clear_store(self) -> bool:
        try:
            self._shards.clear()
        except KVStoreError as error:
            _LOG.warning("the store was not cleared: %s", error)
            return False
        _LOG.info("all blocks of this model were removed from the store")
        return True

    def close(self) -> None:
        self._lookups.close()
        self._shards.close()


_POLICY = (
    'kv_load_failure_policy is "fail": a request whose cached blocks turn out to be gone ends in '
    'an error. Set it to "recompute" beside kv_connector.'
)


class _Table:
    """A request's blocks in one group, of which few are asked for."""

    __slots__ = ("_blocks",)

    def __init__(self, blocks: Sequence[Any]) -> None:
        self._blocks = blocks

    def __getitem__(self, at: slice, /) -> list[int]:
        return [block.block_id for block in self._blocks[at]]


def _tables(blocks: Any) -> list[_Table]:
    """By group, of vLLM's KVCacheBlocks."""
    return [_Table(group) for group in blocks.blocks]


def _why_async(vllm_config: Any, groups: Sequence[Group], num_engine_groups: int) -> str | None:
    """Return what forbids loads that a step waits for, if anything does."""
    if num_engine_groups > 1 or not tells_blocks(groups):
        return "several groups or a window: vLLM cannot be told that such a load failed"
    if vllm_config.max_concurrent_batches > 1:
        # The next step would save what it computed on top of a load that failed.
        return "steps that are scheduled before the one before has ended"
    return None


def _blocks_to_drop(vllm_config: Any) -> int:
    """A drafter such as EAGLE wants the last block of a hit computed anew."""
    speculative = vllm_config.speculative_config
    return 1 if speculative is not None and speculative.use_eagle_block_drop() else 0


def _source(namespaces: Mapping[tuple[int, int], Namespace]) -> str:
    """Name a set of namespaces, for promises between instances."""
    return namespaces[min(namespaces)].digest.hex()[:16]

"""KVStoreConnector: kvstore as vLLM's KV connector.

vLLM makes one in each worker and one in the scheduler, often in different processes. This class
only hands vLLM's calls on: to `SchedulerSide`, which decides, or `WorkerSide`, which moves bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.distributed.kv_transfer.kv_transfer_state import (
    get_kv_transfer_group,
    has_kv_transfer_group,
)
from vllm.platforms import current_platform
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore import ConfigError, Namespace
from kvstore_adapters.daemon_start import ensure_daemon
from kvstore_adapters.planning.plan import StepPlan
from kvstore_adapters.settings import AdapterSettings

from .idle import IdleSchedulerSide, IdleWorkerSide
from .metadata import PlanMetadata, ReportMetadata
from .namespaces import ShardNames, groups_of, is_writer, namespaces_of, namespaces_told, own_rank
from .pages import pages_of, recorder
from .scheduler_side import SchedulerSide
from .stats import KVStorePromMetrics, KVStoreStats
from .worker_side import WorkerSide

_LOG = logging.getLogger(__name__)


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """See above. Settings: `AdapterSettings`, from `kv_connector_extra_config`."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """
        Raises:
            ConfigError: a setting is wrong, or the way the model runs is not supported.
            IncompatibleError: the daemon is there and refuses us.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = AdapterSettings.of(self._kv_transfer_config.kv_connector_extra_config)
        self._scheduler: SchedulerSide | IdleSchedulerSide | None = None
        self._worker: WorkerSide | IdleWorkerSide | None = None
        self._namespaces: dict[tuple[int, int], Namespace] = {}  # once caches are registered
        self._has_told_names = False
        is_scheduler = role == KVConnectorRole.SCHEDULER
        try:
            self._groups = groups_of(kv_cache_config)
        except ConfigError as error:
            # The model is what it is: it is served as if we were not there.
            self._groups = ()
            if is_scheduler:
                _LOG.warning("kvstore keeps nothing of this model: %s", error)
                self._scheduler = IdleSchedulerSide()
            else:
                self._worker = IdleWorkerSide()
            return
        ensure_daemon(self._settings)
        if is_scheduler:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, self._settings)

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that was not saved is a miss to come, not an error."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """On GPUs all layers of a block in one piece, which is one copy a block. Heads before
        tokens: so all backends have it that have a block-outermost layout at all."""
        return "BLHNC" if current_platform.is_cuda_alike() else None

    # --- scheduler

    @property
    def _deciding(self) -> SchedulerSide | IdleSchedulerSide:
        assert self._scheduler is not None, "this is a worker's connector"
        return self._scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._deciding.bind(kv_cache_manager)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._deciding.adopt(
            namespaces_told({(0, rank): names for rank, names in metadata.items()})
        )

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._deciding.adopt(namespaces_told(metadata))

    def on_new_request(self, request: Any) -> None:
        self._deciding.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._deciding.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._deciding.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._deciding.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._deciding.reported(connector_output.kv_connector_worker_meta)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        # Saves under way hold references of their own: nothing has to wait for them.
        return False, self._deciding.finished(request)

    def has_pending_push_work(self) -> bool:
        return self._deciding.has_saves

    def has_pending_block_frees(self) -> bool:
        return self._deciding.can_free_blocks

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return tuple(group.group_id for group in self._groups)

    def take_events(self) -> Iterable[Any]:
        return self._deciding.take_events()

    def reset_cache(self) -> bool | None:
        return self._scheduler.clear() if self._scheduler is not None else None

    # --- worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if not self._groups:
            return
        config, caches = self._vllm_config, self._kv_cache_config
        rank = own_rank(config)
        self._namespaces = namespaces_of(config, caches, self._settings)
        self._worker = WorkerSide(
            rank,
            self._groups,
            self._namespaces,
            pages_of(kv_caches, caches, self._groups),
            self._settings,
            recorder(kv_caches),
            is_writer=is_writer(caches, config, rank),
            has_other_groups=len(caches.kv_cache_groups) > len(self._groups),
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        # Of several connectors the first that tells something is told to all, and others refuse
        # what is ours. The first report tells it as well.
        if has_kv_transfer_group() and get_kv_transfer_group() is not self:
            return None
        return self._names()

    def _names(self) -> ShardNames:
        return ShardNames.of(self._namespaces, own_rank(self._vllm_config))

    @property
    def _moving(self) -> WorkerSide | IdleWorkerSide:
        assert self._worker is not None, "no KV caches were registered"
        return self._worker

    @property
    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, PlanMetadata)
        return metadata.plan

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._moving.start_loads(self._plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are of whole blocks: those that a step waits for have ended before it began."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Saves are of whole blocks, after the step."""

    def wait_for_save(self) -> None:
        self._moving.start_saves(self._plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self.get_transfer_results(finished_req_ids).finished_recving or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        finished, failed = self._moving.finished_loads()
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._moving.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._moving.report()
        names = None
        if not self._has_told_names:
            self._has_told_names = True
            names = self._names()
        return ReportMetadata(report, names) if report or names is not None else None

    # --- both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._scheduler is not None:
            return self._scheduler.stats()
        return KVStoreStats.of(self._worker.counters()) if self._worker is not None else None

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return KVStoreStats(data=data if data is not None else {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return KVStorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

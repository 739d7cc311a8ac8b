"""What the connector moved, for vLLM's log line and for Prometheus.

Workers count, vLLM adds up over ranks and over time: a request whose KV lies on two ranks is two
loads.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

from kvstore_adapters.planning.counters import TransferCounters
from kvstore_adapters.planning.tracking import PlannerCounters

_Metric = TypeVar("_Metric")

# Name in TransferCounters or PlannerCounters, and of the metric, to its help.
_COUNTERS = {
    "loads": "Loads of a request's blocks from kvstore, by rank",
    "loads_failed": "Loads of which blocks did not come, so that tokens were computed",
    "load_blocks": "Blocks loaded from kvstore",
    "load_bytes": "Bytes loaded from kvstore",
    "load_seconds": "Seconds that loads took, without waiting for a thread",
    "saves": "Jobs that save a step's new blocks, by rank",
    "save_blocks": "Blocks copied into kvstore",
    "save_bytes": "Bytes copied into kvstore",
    "save_seconds": "Seconds that saves took",
    "dropped_blocks": "Blocks that were to be saved and are not in kvstore",
    "lookups": "Requests whose prompt was looked up in kvstore",
    "lookup_tokens": "Tokens of those prompts",
    "hit_tokens": "Of those, tokens that kvstore has",
}

# Looked up once: this is asked in every step.
_NAMES = {
    kind: tuple(declared.name for declared in fields(kind))
    for kind in (TransferCounters, PlannerCounters)
}


class KVStoreStats(KVConnectorStats):
    """Sums of TransferCounters and PlannerCounters by name; empty where nothing happened."""

    @classmethod
    def of(cls, counters: TransferCounters | PlannerCounters) -> KVStoreStats | None:
        """Return None where nothing happened: then vLLM sends nothing."""
        data = {name: getattr(counters, name) for name in _NAMES[type(counters)]}
        return cls(data=data) if any(data.values()) else None

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what vLLM's log line says of an interval."""
        data = self.data
        said: dict[str, int | float] = {}
        for way in ("load", "save"):
            if data.get(f"{way}s"):
                gigabytes = data.get(f"{way}_bytes", 0) / 1e9
                seconds = data.get(f"{way}_seconds", 0.0)
                said[f"{way}s"] = data[f"{way}s"]
                said[f"{way} blocks"] = data.get(f"{way}_blocks", 0)
                said[f"{way} GB"] = round(gigabytes, 3)
                said[f"{way} GB/s"] = round(gigabytes / seconds, 2) if seconds else 0.0
        if data.get("lookup_tokens"):
            said["hit %"] = round(100 * data.get("hit_tokens", 0) / data["lookup_tokens"], 1)
        for name, key in (("failed loads", "loads_failed"), ("dropped blocks", "dropped_blocks")):
            if data.get(key):
                said[name] = data[key]
        return said


class KVStorePromMetrics(KVConnectorPromMetrics):
    """Counters `kvstore_connector_<name>`, one a name above."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[_Metric], type[_Metric]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kind: Any = metric_types[Counter]  # type: ignore[index]
        self._counters = {
            name: create_metric_per_engine(
                kind(f"kvstore_connector_{name}", help, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, help in _COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self._counters and value:
                self._counters[name][engine_idx].inc(value)

"""What the connector's two halves tell each other, as vLLM carries it between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstore_adapters.planning.plan import StepPlan, StepReport

from .namespaces import ShardNames


@dataclass
class PlanMetadata(KVConnectorMetadata):
    """From the scheduler to every worker, once a step."""

    plan: StepPlan = field(default_factory=StepPlan)


@dataclass
class ReportMetadata(KVConnectorWorkerMetadata):
    """From a worker to the scheduler, where there is something to say. `names` comes once: other
    ways to tell them are not open to a connector that is one of several."""

    report: StepReport = field(default_factory=StepReport)
    names: ShardNames | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ReportMetadata:
        assert isinstance(other, ReportMetadata)
        shards = [*_shards(self.names), *_shards(other.names)]
        return ReportMetadata(
            self.report.merge(other.report), ShardNames(shards) if shards else None
        )


def _shards(names: ShardNames | None) -> list[tuple[int, int, dict[str, object]]]:
    return names.shards if names is not None else []

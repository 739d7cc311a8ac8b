"""Both halves of the connector for a model whose layers cannot be kept: they do nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvstore_adapters.planning.counters import TransferCounters
from kvstore_adapters.planning.plan import StepPlan, StepReport

from .metadata import PlanMetadata


class IdleSchedulerSide:
    """As `SchedulerSide`: nothing is found and nothing saved."""

    has_saves = False
    can_free_blocks = False

    def adopt(self, namespaces: object) -> None:
        pass

    def bind(self, manager: object) -> None:
        pass

    def arrived(self, request: object) -> None:
        pass

    def match(self, request: object, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def allocated(self, request: object, blocks: object, num_external_tokens: int) -> None:
        pass

    def plan(self, output: object) -> PlanMetadata:
        return PlanMetadata()

    def reported(self, metadata: object) -> None:
        pass

    def finished(self, request: object) -> dict[str, Any] | None:
        return None

    def take_events(self) -> Iterable[Any]:
        return ()

    def stats(self) -> None:
        return None

    def clear(self) -> bool:
        return True

    def close(self) -> None:
        pass


class IdleWorkerSide:
    """As `WorkerSide`: plans are empty."""

    def start_loads(self, plan: StepPlan) -> None:
        pass

    def start_saves(self, plan: StepPlan) -> None:
        pass

    def finished_loads(self) -> tuple[set[str], set[str]]:
        return set(), set()

    def failed_blocks(self) -> set[int]:
        return set()

    def report(self) -> StepReport:
        return StepReport()

    def counters(self) -> TransferCounters:
        return TransferCounters()

    def close(self) -> None:
        pass

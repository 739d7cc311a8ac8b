"""WorkerSide: what the connector does on one rank: moves blocks as the scheduler's plans say.

Per step, in the order in which vLLM calls: `start_loads` (before the forward where a load is sync,
else behind it), `start_saves` behind the forward, then `finished_loads`, `failed_blocks`, `stats`
and `report`. Nothing here waits for the store, but a sync load, and nothing raises for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvstore import ConfigError, Namespace
from kvstore_adapters.planning.counters import TransferCounters
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.pages import Pages
from kvstore_adapters.planning.plan import StepPlan, StepReport
from kvstore_adapters.planning.shards import Shards
from kvstore_adapters.planning.transfers import Transfers
from kvstore_adapters.settings import AdapterSettings


class WorkerSide:
    """One rank's transfers. Used from the engine's thread only."""

    def __init__(
        self,
        rank: int,
        groups: Sequence[Group],
        namespaces: Mapping[tuple[int, int], Namespace],
        pages: Mapping[int, Pages],
        settings: AdapterSettings,
        record: Callable[[], Callable[[], None]] | None = None,
        *,
        is_writer: bool = True,
        has_other_groups: bool = False,
    ) -> None:
        """
        Args:
            rank: this worker's, among `namespaces`.
            namespaces: by (rank, group); those of other ranks are left alone.
            pages: by group, from `vllm.pages.pages_of`.
            record: marks the device's work so far; what it returns waits until that is done.
            is_writer: False: another rank holds and saves the same blocks.
            has_other_groups: the engine has groups besides ours.

        Raises:
            ConfigError: blocks have other sizes here than the namespaces say, or the daemon
                refuses us. IncompatibleError: as `Shards.connect_all`.
        """
        own = {key: name for key, name in namespaces.items() if key[0] == rank}
        _check_sizes(own, pages)
        self._tells_blocks = tells_blocks(groups) and not has_other_groups
        self._record = record
        self._is_writer = is_writer
        self._shards = Shards(own, settings)
        self._shards.connect_all()
        self._transfers = Transfers(
            groups,
            lambda group_id: self._shards.store(rank, group_id),
            lambda target, group_id: self._shards.push_store(target, rank, group_id),
            pages,
            settings,
        )
        self._failed_blocks: set[int] = set()
        self._sync: set[str] = set()  # requests whose load the step waited for

    def start_loads(self, plan: StepPlan) -> None:
        """Start the loads of a step; those that are sync have ended when this returns."""
        if not plan.loads:
            return
        # The engine may have been told to zero the blocks that we load into.
        ready = self._recorded()
        for job in plan.loads:
            if not job.is_async:
                self._sync.add(job.request_id)
            self._transfers.load(job, ready)

    def start_saves(self, plan: StepPlan) -> None:
        """Queue the saves of a step, whose blocks the forward before has been told to compute."""
        if not plan.saves:
            return
        if not self._is_writer:
            for job in plan.saves:
                self._transfers.skip(job)
            return
        ready = self._recorded()
        for job in plan.saves:
            self._transfers.save(job, ready)

    def finished_loads(self) -> tuple[set[str], set[str]]:
        """Return the requests whose async load ended now, and those of them whose load failed.

        Where all layers are in one group of full attention, failures are told by block instead, see
        `failed_blocks`. Elsewhere vLLM has no way to hear of a sync load that failed, so none are
        planned.
        """
        finished: set[str] = set()
        failed: set[str] = set()
        for request_id, outcome in self._transfers.take_loaded().items():
            is_sync = request_id in self._sync
            self._sync.discard(request_id)
            if not is_sync:
                finished.add(request_id)
            if outcome.is_complete:
                continue
            if self._tells_blocks:
                self._failed_blocks.update(outcome.failed_block_ids)
            elif not is_sync:
                failed.add(request_id)
        return finished, failed

    def failed_blocks(self) -> set[int]:
        """Return the engine blocks that loads which `finished_loads` has told of left unfilled."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _recorded(self) -> Callable[[], None] | None:
        return self._record() if self._record is not None else None

    def report(self) -> StepReport:
        """Return what the scheduler side is to know of the transfers that ended."""
        return self._transfers.take_report()

    def counters(self) -> TransferCounters:
        """Return what was moved since the last call."""
        return self._transfers.take_counters()

    def close(self, timeout: float = 5.0) -> None:
        """Give queued saves `timeout` seconds, and release all. Safe to call twice."""
        self._transfers.close(timeout)
        self._shards.close(timeout)


def tells_blocks(groups: Sequence[Group]) -> bool:
    """Whether vLLM can be told which blocks did not come, and keeps those before them. Of several
    groups it cannot tell blocks apart; and of a window it would keep a beginning whose blocks were
    never loaded, as the whole prefix did not need them."""
    return len(groups) == 1 and groups[0].kind == "full"


def _check_sizes(
    namespaces: Mapping[tuple[int, int], Namespace], pages: Mapping[int, Pages]
) -> None:
    for (rank, group_id), namespace in namespaces.items():
        if group_id not in pages:
            raise ConfigError(f"group {group_id}: its layers' KV caches were not registered")
        here, named = pages[group_id].block_bytes, namespace.spec.block_bytes
        if here != named:
            raise ConfigError(
                f"group {group_id} of rank {rank}: a block has {here} bytes in the registered KV "
                f"caches, and {named} by the configuration"
            )

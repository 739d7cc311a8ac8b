"""WorkerSide: what one rank does with the scheduler's plans, in the order of vLLM's calls, on real
stores and on tensors that vLLM allocated.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what vLLM imports
    pytest.importorskip("vllm.v1.worker.utils")

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

import kvstore
from kvstore import BlockSpec, ConfigError, Namespace
from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.planning.chains import Chain
from kvstore_adapters.planning.counters import TransferCounters
from kvstore_adapters.planning.plan import BlockMove, LoadJob, SaveJob, StepPlan, StepReport
from kvstore_adapters.settings import AdapterSettings
from kvstore_adapters.vllm.namespaces import groups_of, namespaces_of
from kvstore_adapters.vllm.pages import pages_of
from kvstore_adapters.vllm.stats import KVStorePromMetrics, KVStoreStats
from kvstore_adapters.vllm.worker_side import WorkerSide
from tests.adapters.planning.planning_support import hashes, wait_until
from tests.adapters.vllm.configs import (
    BLOCK_TOKENS,
    NUM_BLOCKS,
    allocated,
    cache_config,
    full,
    vllm_config,
    window,
)

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


class Rank:
    """A worker with its tensors; blocks hold random bytes."""

    def __init__(
        self, model: Path, address: str, specs: Sequence[Any] = (), **options: Any
    ) -> None:
        config = vllm_config(model)
        self.caches = cache_config(config, specs)
        self.tensors = allocated(config, self.caches)
        for tensor in self.tensors.values():
            tensor.copy_(torch.randn(tensor.shape))
        self.groups = groups_of(self.caches)
        settings = AdapterSettings(address=address, **options.pop("settings", {}))
        self.side = WorkerSide(
            0,
            self.groups,
            namespaces_of(config, self.caches, settings),
            pages_of(self.tensors, self.caches, self.groups),
            settings,
            **options,
        )

    def block(self, block_id: int, group_id: int = 0) -> torch.Tensor:
        layers = self.caches.kv_cache_groups[group_id].layer_names
        return torch.stack([self.tensors[name][block_id] for name in layers])

    def move(
        self, seed: int, block_ids: Sequence[int], group_id: int = 0, begin: int = 0
    ) -> BlockMove:
        chain = Chain(BLOCK_TOKENS)
        chain.extend(hashes(seed, NUM_BLOCKS))
        blocks = chain.blocks(self.groups[group_id], begin, begin + len(block_ids))
        return BlockMove.of(group_id, begin, blocks, list(block_ids))

    def save(self, number: int, *moves: BlockMove) -> StepReport:
        self.side.start_saves(StepPlan(saves=[SaveJob(number, "r", list(moves))]))
        report = StepReport()

        def is_reported() -> bool:
            nonlocal report
            report = report.merge(self.side.report())
            return number in report.saved

        wait_until(is_reported)
        return report

    def load(self, name: str, *moves: BlockMove, is_async: bool = True) -> None:
        self.side.start_loads(StepPlan(loads=[LoadJob(name, list(moves), is_async)]))

    def loaded(self, name: str) -> tuple[bool, set[int]]:
        """Step until a load has ended; return whether it failed, and the blocks that did."""
        seen: dict[str, bool] = {}
        blocks: set[int] = set()

        def is_over() -> bool:
            finished, failed = self.side.finished_loads()
            assert failed <= finished
            seen.update({request: request in failed for request in finished})
            blocks.update(self.side.failed_blocks())
            return name in seen

        wait_until(is_over)
        return seen[name], blocks


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    where = f"unix:{tmp_path}/s"
    with kvstore.open(BlockSpec.of_bytes(64), cpu="8MiB") as store, kvstore.share(store, where):
        yield where


@pytest.fixture
def rank(model: Path, address: str) -> Iterator[Rank]:
    made = Rank(model, address)
    yield made
    made.side.close()


def test_saved_blocks_come_back_into_other_blocks(rank: Rank) -> None:
    expected = [rank.block(i).clone() for i in (3, 5)]
    assert rank.save(1, rank.move(1, [3, 5])) == StepReport({1: 1}, {1: 2})
    rank.load("a", rank.move(1, [8, 2]))
    assert rank.loaded("a") == (False, set())
    assert all(map(torch.equal, (rank.block(8), rank.block(2)), expected))
    assert rank.side.report() == StepReport()


def test_a_sync_load_has_copied_when_it_returns_and_is_not_told_as_finished(rank: Rank) -> None:
    expected = rank.block(3).clone()
    rank.save(1, rank.move(1, [3]))
    rank.load("a", rank.move(1, [8]), is_async=False)
    assert torch.equal(rank.block(8), expected)
    assert rank.side.finished_loads() == (set(), set())
    assert rank.side.failed_blocks() == set()


def test_in_a_single_group_the_blocks_that_failed_are_told(rank: Rank) -> None:
    rank.save(1, rank.move(1, [3]))
    rank.load("sync", rank.move(1, [8, 9]), is_async=False)
    assert rank.side.finished_loads() == (set(), set())
    assert rank.side.failed_blocks() == {9}
    rank.load("async", rank.move(1, [10, 11, 12]))
    assert rank.loaded("async") == (False, {11, 12})
    assert rank.side.failed_blocks() == set()  # told once
    assert rank.side.report().failed == {"sync": BLOCK_TOKENS, "async": BLOCK_TOKENS}


def test_with_several_groups_the_requests_that_failed_are_told(model: Path, address: str) -> None:
    rank = Rank(model, address, [full(), window(64)])
    expected = rank.block(4).clone(), rank.block(5, 1).clone()
    rank.save(1, rank.move(1, [4]), rank.move(1, [5], group_id=1))
    rank.load("whole", rank.move(1, [8]), rank.move(1, [9], group_id=1))
    assert rank.loaded("whole") == (False, set())
    assert all(map(torch.equal, (rank.block(8), rank.block(9, 1)), expected))
    rank.load("part", rank.move(1, [8]), rank.move(1, [10, 11], group_id=1))
    assert rank.loaded("part") == (True, set())
    assert rank.side.report().failed == {"part": 0}
    rank.side.close()


def test_a_rank_that_is_no_writer_reports_and_stores_nothing(model: Path, address: str) -> None:
    reader, writer = Rank(model, address, is_writer=False), Rank(model, address)
    assert reader.save(1, reader.move(1, [3])) == StepReport({1: 1}, {})
    reader.load("a", reader.move(1, [8]))
    assert reader.loaded("a") == (False, {8})
    merged = reader.save(2, reader.move(1, [3])).merge(writer.save(2, writer.move(1, [3])))
    assert merged == StepReport({2: 2}, {2: 1}, {"a": 0})
    reader.side.close()
    writer.side.close()


def test_a_devices_work_is_waited_for_before_blocks_are_read_or_written(
    model: Path, address: str
) -> None:
    waits: list[str] = []

    def record() -> Callable[[], None]:
        waits.append("recorded")
        return lambda: waits.append("waited")

    rank = Rank(model, address, record=record)
    rank.side.start_loads(StepPlan())
    rank.side.start_saves(StepPlan())
    assert waits == []
    rank.save(1, rank.move(1, [3]))
    assert waits == ["recorded", "waited"]
    rank.load("a", rank.move(1, [8]))
    rank.loaded("a")
    assert waits == ["recorded", "waited"] * 2
    rank.side.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_its_daemon_a_worker_goes_on(model: Path, tmp_path: Path, number: int) -> None:
    settings = {"timeout": 0.2, "load_deadline": 0.3}
    with PrivateDaemon(tmp_path, cpu="16MiB") as daemon:
        daemon.start()
        rank = Rank(model, daemon.address, settings=settings)
        rank.save(1, rank.move(1, [3]))
        os.kill(daemon.pid, number)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        rank.load("async", rank.move(1, [8]))
        assert rank.loaded("async") == (False, {8})
        rank.load("sync", rank.move(1, [9]), is_async=False)
        rank.side.finished_loads()
        assert rank.side.failed_blocks() == {9}
        assert rank.save(2, rank.move(2, [4])).stored == {2: 0}
        rank.side.close()
        if number == signal.SIGSTOP:
            os.kill(daemon.pid, signal.SIGCONT)


def test_a_daemon_that_is_not_there_at_the_start_is_no_error(model: Path, tmp_path: Path) -> None:
    rank = Rank(model, f"unix:{tmp_path}/none")
    rank.load("a", rank.move(1, [8]))
    assert rank.loaded("a") == (False, {8})
    rank.side.close()


def test_caches_that_are_not_what_the_configuration_says_are_refused(rank: Rank) -> None:
    pages = pages_of(rank.tensors, rank.caches, rank.groups)
    wrong = {(0, 0): Namespace("m", BlockSpec.of_bytes(100))}
    settings = AdapterSettings(address="unix:/nowhere/s")
    with pytest.raises(ConfigError, match=rf"group 0 of rank 0.*{pages[0].block_bytes}.*100"):
        WorkerSide(0, rank.groups, wrong, pages, settings)
    with pytest.raises(ConfigError, match=r"group 0: .*not registered"):
        WorkerSide(0, rank.groups, wrong, {}, settings)


# --- statistics


def test_what_is_counted_reaches_the_log_line_and_prometheus(rank: Rank) -> None:
    rank.save(1, rank.move(1, [3, 5]))
    rank.load("a", rank.move(1, [8, 2, 4]))
    rank.loaded("a")
    stats = KVStoreStats.of(rank.side.counters())
    assert stats is not None
    assert not stats.is_empty()
    # What crosses to vLLM's frontend is `data`.
    again = KVStoreStats(data=dict(stats.data)).aggregate(KVStoreStats(data=dict(stats.data)))
    said = again.reduce()
    assert (said["loads"], said["load blocks"], said["failed loads"]) == (2, 4, 2)
    assert (said["saves"], said["save blocks"]) == (2, 4)
    assert "dropped blocks" not in said

    registry = CollectorRegistry()
    kinds: Any = {
        kind: lambda name, help, labelnames, kind=kind: kind(
            name, help, labelnames, registry=registry
        )
        for kind in (Counter, Gauge, Histogram)
    }
    config: Any = type("Config", (), {"kv_transfer_config": None})
    prom = KVStorePromMetrics(config, kinds, ["engine"], {0: ["0"], 1: ["1"]})
    prom.observe(stats.data, 1)
    prom.observe(stats.data, 1)
    found = registry.get_sample_value("kvstore_connector_load_blocks_total", {"engine": "1"})
    assert found == 4
    seconds = registry.get_sample_value("kvstore_connector_load_seconds_total", {"engine": "1"})
    assert seconds is not None
    assert seconds > 0
    assert registry.get_sample_value("kvstore_connector_loads_total", {"engine": "0"}) == 0


def test_where_nothing_moved_nothing_is_sent(rank: Rank) -> None:
    assert KVStoreStats.of(rank.side.counters()) is None
    stats = KVStoreStats.of(TransferCounters(loads=1))
    assert stats is not None
    stats.reset()
    assert stats.is_empty()
    assert stats.reduce() == {}

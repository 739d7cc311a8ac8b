"""Transfers: every load ends exactly once with the bytes it says, saves keep their order, and a
store that is gone, full or damaged costs time and never a wrong byte.

Against real stores: one shared in this process, and a daemon that is killed and stopped. Where a
test must decide when a copy ends, the pages wait for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import kvstore
from kvstore import BlockHashes, BlockSpec, ContiguousBlocks, Store, TransferResult
from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.pages import BlockIds, HostPages
from kvstore_adapters.planning.plan import StepReport
from kvstore_adapters.planning.transfers import LoadOutcome, Transfers
from kvstore_adapters.settings import AdapterSettings

from .planning_support import (
    BLOCK_BYTES,
    FULL,
    HYBRID,
    WINDOW,
    Bytes,
    Worker,
    chain_of,
    load_job,
    move,
    namespaces,
    save_job,
    served,
    settings,
    wait_until,
)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with served(tmp_path) as where:
        yield where


@pytest.fixture
def worker(address: str) -> Iterator[Worker]:
    with Worker(settings(address)) as made:
        yield made


def outcome(worker: Worker, name: str) -> LoadOutcome:
    """Wait until a load ended."""
    taken: dict[str, LoadOutcome] = {}

    def is_there() -> bool:
        taken.update(worker.transfers.take_loaded())
        return name in taken

    wait_until(is_there)
    return taken[name]


def test_what_was_saved_is_loaded_into_other_blocks(worker: Worker) -> None:
    chain = chain_of(1, 8)
    assert worker.save(1, move(FULL, chain, 0, 8)) == 8
    wanted = move(FULL, chain, 0, 8, at=20)
    worker.transfers.load(load_job("a", wanted))
    ended = outcome(worker, "a")
    assert ended == LoadOutcome(8 * 16)
    assert ended.is_complete
    assert worker.memory[0].holds(wanted)
    assert worker.transfers.take_report() == StepReport()


def test_a_sync_load_has_ended_when_it_returns(worker: Worker) -> None:
    chain = chain_of(1, 3)
    worker.save(1, move(FULL, chain, 0, 3))
    wanted = move(FULL, chain, 0, 3, at=9)
    worker.transfers.load(load_job("a", wanted, is_async=False))
    assert worker.transfers.take_loaded() == {"a": LoadOutcome(48)}
    assert worker.memory[0].holds(wanted)


def test_leading_blocks_of_a_partial_load_count_and_the_others_are_named(worker: Worker) -> None:
    chain = chain_of(2, 6)
    worker.save(1, move(FULL, chain, 0, 4))
    worker.transfers.load(load_job("a", move(FULL, chain, 2, 6, at=30)))
    assert outcome(worker, "a") == LoadOutcome(2 * 16, [32, 33])
    assert worker.transfers.take_report().failed == {"a": 32}
    assert worker.transfers.take_report().failed == {}


def test_the_report_of_a_failed_load_comes_with_its_end_and_not_before(worker: Worker) -> None:
    worker.transfers.load(load_job("a", move(FULL, chain_of(3, 2), 0, 2), is_async=False))
    assert worker.transfers.take_report().failed == {}
    assert worker.transfers.take_loaded() == {"a": LoadOutcome(0, [1, 2])}
    assert worker.transfers.take_report().failed == {"a": 0}


def test_with_a_window_all_groups_arrive_or_none_counts(address: str) -> None:
    chain = chain_of(4, 6)
    with Worker(settings(address), HYBRID) as worker:
        saved = [move(FULL, chain, 0, 6), move(WINDOW, chain, 4, 6)]
        assert worker.save(1, *saved) == 8
        whole = [move(FULL, chain, 0, 6, at=20), move(WINDOW, chain, 4, 6, at=20)]
        worker.transfers.load(load_job("whole", *whole))
        assert outcome(worker, "whole").is_complete
        assert all(worker.memory[part.group_id].holds(part) for part in whole)

        short = [move(FULL, chain, 0, 5, at=30), move(WINDOW, chain, 3, 5, at=30)]
        worker.transfers.load(load_job("short", *short))
        assert outcome(worker, "short") == LoadOutcome(0, [30, 31, 32, 33, 34, 30, 31])


def test_of_several_full_groups_the_shortest_counts(address: str) -> None:
    other = Group(1, 16, "full")
    chain = chain_of(5, 6)
    with Worker(settings(address), (FULL, other)) as worker:
        worker.save(1, move(FULL, chain, 0, 6), move(other, chain, 0, 2))
        worker.transfers.load(load_job("a", move(FULL, chain, 0, 4), move(other, chain, 0, 4)))
        assert outcome(worker, "a") == LoadOutcome(32, [3, 4, 3, 4])


def test_saves_are_stored_in_the_order_given(worker: Worker) -> None:
    """Block i + 1 is stored only after block i: any other order would leave orphans."""
    chain = chain_of(6, 40)
    for i in range(40):
        part = move(FULL, chain, i, i + 1, at=i + 1)
        worker.memory[0].fill(part)
        worker.transfers.save(save_job(i, part))
    report = StepReport()
    while len(report.saved) < 40:
        report = report.merge(worker.transfers.take_report())
    assert report.stored == dict.fromkeys(range(40), 1)
    assert worker.shards.store(0, 0).match(chain.blocks(FULL, 0, 40)) == 40


def test_blocks_are_read_only_once_they_are_said_to_be_computed(worker: Worker) -> None:
    chain, computed = chain_of(7, 2), threading.Event()
    part = move(FULL, chain, 0, 2)

    def compute() -> None:
        worker.memory[0].fill(part)
        computed.set()

    worker.transfers.save(save_job(1, part), compute)
    wait_until(lambda: 1 in worker.transfers.take_report().saved)
    assert computed.is_set()
    wanted = move(FULL, chain, 0, 2, at=10)
    worker.transfers.load(load_job("a", wanted, is_async=False))
    assert worker.transfers.take_loaded()["a"].is_complete
    assert worker.memory[0].holds(wanted)


def test_a_save_whose_blocks_cannot_be_waited_for_is_reported_and_not_stored(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise RuntimeError("the device is gone")

    worker.transfers.save(save_job(1, move(FULL, chain_of(8, 2), 0, 2)), fails)
    wait_until(lambda: worker.transfers.take_report() == StepReport({1: 1}, {1: 0}))
    assert worker.transfers.take_counters().dropped_blocks == 2
    assert "the device is gone" in caplog.text
    assert worker.shards.store(0, 0).match(chain_of(8, 2).blocks(FULL, 0, 2)) == 0


def test_blocks_are_pushed_to_a_named_target_and_kept_here(tmp_path: Path, address: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    chain = chain_of(9, 3)
    with served(other) as there:
        chosen = settings(address, push_targets={"decode": there})
        with Worker(chosen) as worker, Worker(settings(there)) as decode:
            assert worker.save(1, move(FULL, chain, 0, 3), push_to="decode") == 3
            wanted = move(FULL, chain, 0, 3, at=40)
            decode.transfers.load(load_job("a", wanted, is_async=False))
            assert decode.transfers.take_loaded()["a"].is_complete
            assert decode.memory[0].holds(wanted)


def test_a_target_that_is_unknown_does_not_keep_blocks_from_our_own_store(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    assert worker.save(1, move(FULL, chain_of(9, 3), 0, 3), push_to="nowhere") == 3
    assert "nowhere" in caplog.text


def test_what_is_moved_is_counted_once(worker: Worker) -> None:
    chain = chain_of(10, 4)
    worker.save(1, move(FULL, chain, 0, 4))
    worker.save(2, move(FULL, chain, 0, 4))  # there already: not copied
    worker.transfers.load(load_job("a", move(FULL, chain, 0, 4), is_async=False))
    worker.transfers.load(load_job("b", move(FULL, chain_of(11, 1), 0, 1), is_async=False))
    counted = worker.transfers.take_counters()
    assert (counted.loads, counted.loads_failed, counted.load_blocks) == (2, 1, 4)
    assert (counted.saves, counted.save_blocks, counted.dropped_blocks) == (2, 4, 0)
    assert counted.load_bytes == counted.save_bytes == 4 * BLOCK_BYTES
    assert counted.load_seconds > 0
    assert not worker.transfers.take_counters()


# --- faults


def test_blocks_that_went_between_lookup_and_load_are_not_loaded(worker: Worker) -> None:
    chain = chain_of(12, 5)
    worker.save(1, move(FULL, chain, 0, 5))
    store = worker.shards.store(0, 0)
    assert store.lookup(chain.blocks(FULL, 0, 5)).num_blocks == 5
    store.remove(chain.blocks(FULL, 2, 5))
    wanted = move(FULL, chain, 0, 5, at=20)
    worker.transfers.load(load_job("a", wanted))
    assert outcome(worker, "a") == LoadOutcome(32, [22, 23, 24])
    assert worker.memory[0].holds(wanted, 2)


def test_a_damaged_block_ends_a_load_before_it(tmp_path: Path) -> None:
    chain = chain_of(13, 4)
    with served(tmp_path, verify="always") as address, Worker(settings(address)) as worker:
        worker.save(1, move(FULL, chain, 0, 2))
        control = worker.shards.store(0, 0).control
        third = chain.blocks(FULL, 2, 3)
        reserved = control.reserve(third)
        # Its bytes are not those of its checksum, as if memory had failed since.
        control.commit(reserved.reservation, np.array([12345], np.uint64), third, "memory")
        worker.save(2, move(FULL, chain, 3, 4))
        assert worker.shards.store(0, 0).match(chain.blocks(FULL, 0, 4)) == 4
        worker.transfers.load(load_job("a", move(FULL, chain, 0, 4, at=20)))
        assert outcome(worker, "a") == LoadOutcome(32, [22, 23])
        # It is gone: nobody meets it again.
        assert worker.shards.store(0, 0).match(chain.blocks(FULL, 0, 4)) == 2


class InterruptedPages(HostPages):
    """What is called in the middle of each load, between two of its pieces."""

    def __init__(self, rows: Bytes, interrupt: Callable[[], object]) -> None:
        super().__init__(ContiguousBlocks(rows))
        self.interrupt = interrupt

    def load(
        self,
        store: Store,
        chain: BlockHashes,
        block_ids: BlockIds,
        deadline: float,
        holders: Sequence[str] = (),
    ) -> int:
        half = len(chain) // 2
        count = super().load(store, chain[:half], block_ids[:half], deadline)
        if count < half:
            return count
        self.interrupt()
        return half + super().load(store, chain[half:], block_ids[half:], deadline)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_daemon_that_goes_in_mid_load_costs_its_deadline_and_no_request(
    tmp_path: Path, number: int
) -> None:
    chain = chain_of(14, 8)
    rows = np.zeros((64, BLOCK_BYTES), np.uint8)

    def interrupt() -> None:
        os.kill(daemon.pid, number)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    with PrivateDaemon(tmp_path, cpu="4MiB", chunk="256KiB") as daemon:
        daemon.start()
        chosen = settings(daemon.address, timeout=0.6, load_deadline=0.9, threads=1)
        pages = InterruptedPages(rows, interrupt)
        with Worker(chosen, pages={0: pages}) as worker:
            worker.memory[0].rows = rows
            worker.save(1, move(FULL, chain, 0, 8))
            wanted = move(FULL, chain, 0, 8, at=20)
            worker.transfers.load(load_job("interrupted", wanted))
            worker.transfers.load(load_job("later", move(FULL, chain, 0, 8, at=30)))
            ended: dict[str, LoadOutcome] = {}
            wait_until(lambda: ended.update(worker.transfers.take_loaded()) or len(ended) == 2)
            assert ended["interrupted"] == LoadOutcome(64, [24, 25, 26, 27])
            assert ended["later"] == LoadOutcome(0, list(range(30, 38)))
            assert worker.memory[0].holds(wanted, 4)
            assert worker.save(2, move(FULL, chain_of(15, 2), 0, 2)) == 0
            assert worker.transfers.take_counters().dropped_blocks == 2
            if number == signal.SIGSTOP:
                os.kill(daemon.pid, signal.SIGCONT)
            else:
                daemon.kill()
                daemon.start()
            pages.interrupt = lambda: None

            def is_back() -> bool:
                worker.transfers.load(load_job("again", wanted, is_async=False))
                return worker.transfers.take_loaded()["again"].is_complete

            wait_until(is_back)
            assert worker.memory[0].holds(wanted)


def test_with_nobody_listening_all_ends_at_once(tmp_path: Path) -> None:
    with Worker(settings(f"unix:{tmp_path}/none")) as worker:
        worker.transfers.load(load_job("a", move(FULL, chain_of(1, 2), 0, 2), is_async=False))
        assert worker.transfers.take_loaded() == {"a": LoadOutcome(0, [1, 2])}
        assert worker.save(1, move(FULL, chain_of(1, 2), 0, 2)) == 0
        assert worker.transfers.take_counters().dropped_blocks == 2


# --- when things end


class SlowPages:
    """Pages whose loads end when a test lets them."""

    block_bytes = BLOCK_BYTES

    def __init__(self) -> None:
        self.may_end = threading.Semaphore(0)
        self.num_running = 0
        self.lock = threading.Lock()

    def put(self, store: Store, chain: BlockHashes, block_ids: BlockIds) -> TransferResult:
        self.load(store, chain, block_ids, 0.0)
        return TransferResult(len(chain), num_stored=len(chain))

    def load(
        self,
        store: Store,
        chain: BlockHashes,
        block_ids: BlockIds,
        deadline: float,
        holders: Sequence[str] = (),
    ) -> int:
        with self.lock:
            self.num_running += 1
        self.may_end.acquire()
        with self.lock:
            self.num_running -= 1
        return len(chain)


@pytest.fixture
def slow(address: str) -> Iterator[tuple[Worker, SlowPages]]:
    pages = SlowPages()
    with Worker(settings(address, threads=1, load_deadline=0.05), pages={0: pages}) as made:
        yield made, pages
        pages.may_end.release(100)


def test_a_load_that_still_writes_is_not_over_though_its_deadline_is(
    slow: tuple[Worker, SlowPages],
) -> None:
    worker, pages = slow
    began = time.monotonic()
    worker.transfers.load(load_job("writes", move(FULL, chain_of(1, 2), 0, 2)))
    wait_until(lambda: pages.num_running == 1)
    worker.transfers.load(load_job("waits", move(FULL, chain_of(1, 2), 0, 2)))
    ended: dict[str, LoadOutcome] = {}
    wait_until(lambda: ended.update(worker.transfers.take_loaded()) or "waits" in ended)
    assert time.monotonic() - began >= 0.05
    assert ended == {"waits": LoadOutcome(0, [1, 2])}
    pages.may_end.release()
    wait_until(lambda: ended.update(worker.transfers.take_loaded()) or "writes" in ended)
    assert ended["writes"].is_complete


def test_close_ends_what_waits_and_leaves_what_runs(slow: tuple[Worker, SlowPages]) -> None:
    worker, pages = slow
    transfers = worker.transfers
    transfers.load(load_job("runs", move(FULL, chain_of(1, 2), 0, 2)))
    transfers.save(save_job(1, move(FULL, chain_of(1, 2), 0, 2)))
    wait_until(lambda: pages.num_running == 2)
    transfers.load(load_job("waits", move(FULL, chain_of(1, 2), 0, 2)))
    transfers.save(save_job(2, move(FULL, chain_of(2, 3), 0, 3)))
    transfers.close(0.0)
    assert transfers.take_loaded() == {"waits": LoadOutcome(0, [1, 2])}
    transfers.load(load_job("late", move(FULL, chain_of(1, 2), 0, 2)))
    transfers.save(save_job(3, move(FULL, chain_of(1, 1), 0, 1)))
    assert transfers.take_loaded() == {"late": LoadOutcome(0, [1, 2])}
    pages.may_end.release(2)
    ended: dict[str, LoadOutcome] = {}
    wait_until(lambda: ended.update(transfers.take_loaded()) or "runs" in ended)
    report = StepReport()

    def all_reported() -> bool:
        nonlocal report
        report = report.merge(transfers.take_report())
        return len(report.saved) == 3

    wait_until(all_reported)
    assert report.stored == {1: 2, 2: 0, 3: 0}


class Interleavings(RuleBasedStateMachine):
    """Loads are submitted, let end, and taken in any order: each ends once, and as it went."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = SlowPages()
        chosen = AdapterSettings(address="unix:/nowhere/s", threads=2, load_deadline=600.0)
        self.store = kvstore.open(BlockSpec.of_bytes(BLOCK_BYTES), cpu="1MiB")
        self.transfers = Transfers(
            (FULL,), lambda _: self.store, lambda *_: self.store, {0: self.pages}, chosen
        )
        self.submitted: list[str] = []
        self.taken: list[str] = []
        self.num_released = 0

    @rule(name=st.sampled_from("abcd"), blocks=st.integers(1, 3))
    def submit(self, name: str, blocks: int) -> None:
        self.submitted.append(name)
        self.transfers.load(load_job(name, move(FULL, chain_of(1, 3), 0, blocks)))

    @precondition(lambda self: self.num_released < len(self.submitted))
    @rule()
    def let_one_end(self) -> None:
        self.num_released += 1
        self.pages.may_end.release()

    @rule()
    def take(self) -> None:
        self.taken += self.transfers.take_loaded()

    @invariant()
    def none_ends_twice_or_unasked(self) -> None:
        for name in set(self.taken):
            assert self.taken.count(name) <= self.submitted.count(name)
        assert len(self.taken) <= self.num_released

    def teardown(self) -> None:
        self.pages.may_end.release(1 + len(self.submitted))
        wait_until(lambda: self.take() or len(self.taken) >= len(self.submitted))
        self.transfers.close(60.0)
        self.store.close()
        self.take()
        assert sorted(self.taken) == sorted(self.submitted)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = profile(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_the_stores_of_two_ranks_share_nothing(address: str) -> None:
    chain = chain_of(16, 3)
    with (
        Worker(settings(address), rank=0, num_ranks=2) as one,
        Worker(settings(address), rank=1, num_ranks=2) as other,
    ):
        assert namespaces(2)[0, 0].digest != namespaces(2)[1, 0].digest
        one.save(1, move(FULL, chain, 0, 3))
        other.transfers.load(load_job("a", move(FULL, chain, 0, 3), is_async=False))
        assert other.transfers.take_loaded() == {"a": LoadOutcome(0, [1, 2, 3])}

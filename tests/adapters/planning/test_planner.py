"""Planner: each of its rules on its own, with lookups whose answers the test sets."""

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import pytest

from kvstore_adapters.planning.chains import Chain
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.plan import StepReport
from kvstore_adapters.planning.planner import LOOKUP_SECONDS_MAX, Planner
from kvstore_adapters.planning.tracking import PlannerSettings, ScheduledRequest

BLOCK = 16
FULL = (Group(0, BLOCK, "full"),)
WITH_WINDOW = (Group(0, BLOCK, "full"), Group(1, BLOCK, "window", 24))
HASHES = [hashlib.sha256(bytes([i])).digest() for i in range(64)]
SOURCE = "0123456789abcdef"


class Lookups:
    """Answers what `found` says, once it is set."""

    def __init__(self) -> None:
        self.found: int | None = None
        self.begun: list[dict[str, Any]] = []
        self.waited: list[float] = []
        self.on_wait: Callable[[], None] = lambda: None

    def begin(
        self,
        request_id: str,
        chain: Chain,
        limit_tokens: int,
        *,
        want_tokens: int = 0,
        wait_seconds: float = 0.0,
        holder: str = "",
    ) -> None:
        self.begun.append(
            {
                "request": request_id,
                "limit": limit_tokens,
                "want": want_tokens,
                "hashes": len(chain),
                "holder": holder,
            }
        )

    def result(self, request_id: str, wait_seconds: float = 0.0) -> int | None:
        if wait_seconds:
            self.waited.append(wait_seconds)
            self.on_wait()
        limit = next(b["limit"] for b in reversed(self.begun) if b["request"] == request_id)
        return None if self.found is None else min(self.found, limit // BLOCK * BLOCK)

    def forget(self, request_id: str) -> None:
        pass


class Bench:
    """A planner with a clock that the test moves."""

    def __init__(self, groups: tuple[Group, ...] = FULL, **changes: Any) -> None:
        self.lookups = Lookups()
        self.now = 100.0
        settings: dict[str, Any] = {
            "num_ranks": 1,
            "can_load": True,
            "can_save": True,
            "save_decode": True,
            "is_async": True,
            "max_pinned_blocks": 100,
            "lookup_wait": 0.0,
            "pd_wait": 2.0,
            "source": SOURCE,
            "push_targets": ("decode",),
        }
        self.planner = Planner(
            groups,
            BLOCK,
            self.lookups,
            PlannerSettings(**{**settings, **changes}),
            lambda: self.now,
        )
        self.groups = groups

    def arrive(self, tokens: int, params: Any = None, name: str = "a") -> None:
        self.planner.arrive(name, HASHES[: tokens // BLOCK], tokens, params)

    def match(self, tokens: int, computed: int = 0, name: str = "a") -> int | None:
        return self.planner.match(name, HASHES[: tokens // BLOCK], tokens, computed)

    def table(self, blocks: int) -> tuple[list[int], ...]:
        return tuple([100 * i + j + 1 for j in range(blocks)] for i, _ in enumerate(self.groups))

    def due(self, computed_after: int, known: int | None = None, name: str = "a") -> Any:
        hashes = HASHES[: (computed_after if known is None else known) // BLOCK]
        return ScheduledRequest(name, computed_after, hashes, self.table(64))

    def saved_blocks(self, *due: Any) -> list[list[int]]:
        plan = self.planner.step(due)
        return [move.block_ids.tolist() for job in plan.saves for move in job.moves]


# --- loads


def test_a_match_is_unknown_until_the_lookup_is_done_and_then_a_memo() -> None:
    bench = Bench()
    bench.arrive(64)
    assert bench.match(64) is None
    bench.lookups.found = 48
    assert bench.match(64, 16) == 32
    bench.lookups.found = None
    assert bench.match(64) == 48
    assert len(bench.lookups.begun) == 1


def test_a_load_has_the_blocks_from_the_computed_ones_to_the_hit() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 64
    assert bench.match(64, 16) == 48
    bench.planner.allocated("a", 48, bench.table(4))
    (job,) = bench.planner.step([]).loads
    (move,) = job.moves
    assert list(move.chain()) == HASHES[1:4]
    assert (move.first, move.parent, move.block_ids.tolist()) == (1, HASHES[0], [2, 3, 4])
    assert not bench.planner.step([]).loads


def test_a_match_that_the_engine_did_not_take_loads_nothing() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 64
    bench.match(64)
    bench.planner.allocated("a", 0, bench.table(4))
    assert not bench.planner.step([]).loads


def test_fewer_tokens_than_matched_may_be_loaded() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 64
    bench.match(64)
    bench.planner.allocated("a", 32, bench.table(4))
    (job,) = bench.planner.step([]).loads
    assert job.moves[0].block_ids.tolist() == [1, 2]


@pytest.mark.parametrize(("is_async", "loaded"), [(True, 64), (False, 48)])
def test_only_a_load_beside_the_step_covers_a_whole_prompt(is_async: bool, loaded: int) -> None:
    bench = Bench(is_async=is_async)
    bench.arrive(64)
    bench.lookups.found = 64
    assert bench.match(64) == loaded


def test_a_window_leaves_a_token_as_the_last_one_sees_further_back() -> None:
    bench = Bench(WITH_WINDOW)
    bench.arrive(64)
    bench.lookups.found = 64
    assert bench.match(64) == 48
    assert bench.lookups.begun[0]["limit"] == 63


def test_a_window_loads_what_it_sees_and_no_null_blocks() -> None:
    bench = Bench(WITH_WINDOW)
    bench.arrive(80)
    bench.lookups.found = 64
    assert bench.match(80) == 64
    table = bench.table(4)
    table[1][:2] = [0, 0]
    bench.planner.allocated("a", 64, table)
    full, window = bench.planner.step([]).loads[0].moves
    assert full.block_ids.tolist() == [1, 2, 3, 4]
    assert window.block_ids.tolist() == [103, 104]
    assert list(window.chain()) == HASHES[2:4]
    assert not window.chain().linked


def test_a_window_that_would_end_earlier_than_was_looked_up_is_not_loaded() -> None:
    bench = Bench(WITH_WINDOW)
    bench.arrive(80)
    bench.lookups.found = 64
    assert bench.match(80) == 64
    assert bench.match(64) == 0  # a window's blocks before an earlier end need not be there


def test_speculative_decoding_gives_up_the_last_block_of_a_hit() -> None:
    bench = Bench(drop_blocks=1)
    bench.arrive(64)
    bench.lookups.found = 48
    assert bench.match(64) == 32


def test_a_prompt_shorter_than_a_block_is_not_looked_up() -> None:
    bench = Bench()
    bench.arrive(15)
    assert bench.match(15) == 0
    assert not bench.lookups.begun


def test_a_producer_looks_nothing_up_and_a_consumer_saves_nothing() -> None:
    bench = Bench(can_load=False)
    bench.arrive(64)
    assert bench.match(64) == 0
    assert not bench.lookups.begun
    bench = Bench(can_save=False)
    bench.arrive(64)
    assert not bench.planner.save_at
    assert bench.saved_blocks(bench.due(64)) == []


def test_requests_that_never_arrived_are_left_alone() -> None:
    bench = Bench()
    assert bench.match(64) == 0
    bench.planner.allocated("a", 16, bench.table(4))
    plan = bench.planner.step([bench.due(64)], ["a"])
    assert not plan
    assert bench.planner.report(StepReport({7: 1}, {7: 3}, {"a": 0})) == []
    assert bench.planner.finished("a", 0, []) is None


def test_a_step_waits_for_lookups_no_longer_than_it_may_in_all() -> None:
    bench = Bench(lookup_wait=1.0)
    bench.arrive(64, name="a")
    bench.arrive(64, name="b")

    def wait() -> None:
        bench.now += 0.7

    bench.lookups.on_wait = wait
    for name in ("a", "b", "a"):
        assert bench.match(64, name=name) is None
    assert bench.lookups.waited == pytest.approx([1.0, 0.3])
    bench.planner.step([])
    bench.match(64)
    assert bench.lookups.waited[-1] == 1.0


def test_who_waits_for_long_is_looked_up_again() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 0
    assert bench.match(64) == 0
    bench.now += LOOKUP_SECONDS_MAX + 1
    bench.lookups.found = 48
    assert bench.match(64) == 48
    assert len(bench.lookups.begun) == 2


def test_a_preempted_request_is_looked_up_with_what_it_generated() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 0
    bench.match(64)
    bench.planner.step([], preempted=["a"])
    bench.lookups.found = 96
    assert bench.match(100) == 96
    begun = bench.lookups.begun[-1]
    assert begun == {"request": "a", "limit": 100, "want": 0, "hashes": 6, "holder": ""}


def test_a_request_preempted_and_admitted_again_at_once_keeps_its_load() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 48
    bench.match(64)
    bench.planner.allocated("a", 48, bench.table(4))
    assert len(bench.planner.step([], preempted=["a"]).loads) == 1
    assert bench.match(64) == 48
    assert len(bench.lookups.begun) == 1


# --- failures


def load(bench: Bench, tokens: int) -> int | None:
    matched = bench.match(tokens)
    if matched:
        bench.planner.allocated("a", matched, bench.table(tokens // BLOCK))
        assert len(bench.planner.step([]).loads) == 1
    return matched


def test_after_a_failed_load_no_more_than_what_arrived_and_after_two_nothing() -> None:
    bench = Bench()
    bench.arrive(80)
    bench.lookups.found = 64
    assert load(bench, 80) == 64
    bench.planner.report(StepReport(failed={"a": 40}))
    assert load(bench, 80) == 32
    bench.planner.report(StepReport(failed={"a": 16}))
    assert load(bench, 80) == 0


def test_ranks_that_fail_the_same_load_count_as_one_failure() -> None:
    bench = Bench(num_ranks=2)
    bench.arrive(80)
    bench.lookups.found = 64
    load(bench, 80)
    bench.planner.report(StepReport(failed={"a": 48}))
    bench.planner.report(StepReport(failed={"a": 32}))
    assert load(bench, 80) == 32


def test_what_did_not_arrive_is_saved_once_it_is_computed() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 64
    load(bench, 64)
    bench.planner.report(StepReport(failed={"a": 32}))
    assert bench.saved_blocks(bench.due(64)) == [[3, 4]]


def test_a_failure_told_after_the_abort_changes_nothing() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 64
    load(bench, 64)
    bench.planner.finished("a", 0, [])
    assert bench.planner.report(StepReport(failed={"a": 0})) == []


# --- saves


def test_only_whole_computed_blocks_with_a_known_hash_are_saved_each_once() -> None:
    bench = Bench()
    bench.arrive(100)
    assert bench.planner.save_at == {"a": 16}
    assert bench.saved_blocks(bench.due(31)) == [[1]]
    assert bench.saved_blocks(bench.due(31)) == []
    assert bench.saved_blocks(bench.due(64, known=47)) == [[2]]
    assert bench.planner.save_at == {"a": 48}
    assert bench.saved_blocks(bench.due(64)) == [[3, 4]]


def test_blocks_that_the_lookup_saw_are_not_saved_again() -> None:
    bench = Bench()
    bench.arrive(96)
    bench.lookups.found = 48
    bench.match(96)
    assert bench.saved_blocks(bench.due(96)) == [[4, 5, 6]]


def test_blocks_to_push_are_saved_though_the_store_has_them() -> None:
    bench = Bench()
    bench.arrive(32, {"kvstore_push": "decode"})
    bench.lookups.found = 32
    bench.match(32)
    (job,) = bench.planner.step([bench.due(32)]).saves
    assert (job.push_to, job.num_blocks) == ("decode", 2)


def test_generated_blocks_are_saved_only_where_that_is_wanted() -> None:
    bench = Bench(save_decode=False)
    bench.arrive(40)
    assert bench.saved_blocks(bench.due(40)) == [[1, 2]]
    assert not bench.planner.save_at
    assert bench.saved_blocks(bench.due(64)) == []


def test_nothing_is_saved_in_a_step_that_waits_for_a_load() -> None:
    bench = Bench(is_async=False)
    bench.arrive(64, name="a")
    bench.arrive(64, name="b")
    bench.lookups.found = 32
    bench.match(64)
    bench.planner.allocated("a", 32, bench.table(4))
    plan = bench.planner.step([bench.due(64, name="a"), bench.due(64, name="b")])
    assert len(plan.loads) == 1
    assert not plan.saves
    assert bench.saved_blocks(bench.due(64, name="b")) == [[1, 2, 3, 4]]


def test_all_groups_save_up_to_where_their_blocks_end_together() -> None:
    bench = Bench((Group(0, BLOCK, "full"), Group(1, 3 * BLOCK, "full")))
    bench.arrive(64)
    assert bench.saved_blocks(bench.due(47)) == []
    assert bench.saved_blocks(bench.due(64)) == [[1, 2, 3], [101]]


def test_a_window_saves_the_blocks_that_it_still_has() -> None:
    bench = Bench(WITH_WINDOW)
    bench.arrive(64)
    table = bench.table(4)
    table[1][0] = 0
    plan = bench.planner.step([ScheduledRequest("a", 64, HASHES[:4], table)])
    full, window = plan.saves[0].moves
    assert full.block_ids.tolist() == [1, 2, 3, 4]
    assert window.block_ids.tolist() == [102, 103, 104]
    assert list(window.chain()) == HASHES[1:4]


def test_no_more_blocks_are_pinned_than_allowed_and_the_rest_comes_later() -> None:
    bench = Bench(max_pinned_blocks=3)
    bench.arrive(80)
    plan = bench.planner.step([bench.due(80)])
    assert plan.saves[0].num_blocks == bench.planner.num_pinned_blocks == 3
    assert bench.planner.is_full
    assert bench.saved_blocks(bench.due(80)) == []
    (ended,) = bench.planner.report(StepReport({0: 1}, {0: 2}))
    assert (ended.block_ids, ended.num_stored) == ([1, 2, 3], 2)
    assert bench.saved_blocks(bench.due(80)) == [[4, 5]]


def test_what_found_no_room_until_the_end_is_counted() -> None:
    bench = Bench(max_pinned_blocks=3)
    bench.arrive(80)
    bench.planner.step([bench.due(80)])
    bench.planner.finished("a", 80, HASHES[:5])
    assert bench.planner.take_counters().dropped_blocks == 2


def test_pins_end_when_all_ranks_are_done_with_the_fewest_stored() -> None:
    bench = Bench(num_ranks=3)
    bench.arrive(64)
    bench.planner.step([bench.due(64)])
    bench.planner.finished("a", 0, [])
    assert bench.planner.report(StepReport({0: 2}, {0: 3})) == []
    assert bench.planner.num_saves == 1
    (ended,) = bench.planner.report(StepReport({0: 1}, {0: 4}))
    assert (ended.num_stored, bench.planner.num_pinned_blocks) == (3, 0)
    assert bench.planner.report(StepReport({0: 1}, {0: 4})) == []


def test_tokens_that_an_engine_took_back_are_saved_under_their_new_names() -> None:
    bench = Bench()
    bench.arrive(48)
    bench.saved_blocks(bench.due(32, known=48))
    table = bench.table(4)
    went_on = [*HASHES[:2], HASHES[40], HASHES[41]]
    plan = bench.planner.step([ScheduledRequest("a", 64, went_on, table)])
    assert list(plan.saves[0].moves[0].chain()) == went_on[2:]


def test_a_cleared_store_is_not_filled_by_requests_from_before() -> None:
    bench = Bench()
    bench.arrive(64)
    bench.lookups.found = 64
    bench.planner.clear()
    assert bench.match(64) == 0
    bench.now += LOOKUP_SECONDS_MAX + 1
    assert bench.match(64) == 0
    assert bench.saved_blocks(bench.due(64)) == []
    bench.arrive(64, name="b")
    assert bench.match(64, name="b") == 64


# --- handing over


def test_a_prefill_says_what_it_saved_and_a_decode_waits_for_it() -> None:
    prefill = Bench(can_load=False)
    prefill.arrive(70)
    prefill.planner.step([prefill.due(70)])
    params = prefill.planner.finished("a", 70, HASHES[:4])
    assert params == {"kvstore": {"tokens": 64, "hash": HASHES[3].hex(), "source": SOURCE}}
    decode = Bench()
    decode.arrive(70, params)
    (begun,) = decode.lookups.begun
    assert begun == {"request": "a", "limit": 70, "want": 64, "hashes": 4, "holder": ""}


def test_who_does_not_hand_over_is_told_nothing() -> None:
    bench = Bench()
    bench.arrive(64, name="a")
    bench.arrive(64, {}, name="b")
    bench.planner.step([bench.due(64, name="a"), bench.due(64, name="b")])
    assert bench.planner.finished("a", 64, HASHES[:4]) is None
    assert bench.planner.finished("b", 64, HASHES[:4]) is not None


@pytest.mark.parametrize(
    "params",
    [
        {"kvstore": "64"},
        {"kvstore": {"tokens": True, "hash": HASHES[0].hex(), "source": SOURCE}},
        {"kvstore": {"tokens": -16, "hash": HASHES[0].hex(), "source": SOURCE}},
        {"kvstore": {"tokens": 17, "hash": HASHES[0].hex(), "source": SOURCE}},
        {"kvstore": {"tokens": 1 << 70, "hash": HASHES[0].hex(), "source": SOURCE}},
        {"kvstore": {"tokens": 32, "hash": HASHES[0].hex(), "source": SOURCE}},
        {"kvstore": {"tokens": 32, "hash": 7, "source": SOURCE}},
        {"kvstore": {"tokens": 32, "hash": HASHES[1].hex(), "source": "other"}},
        {"kvstore_push": "nowhere"},
        {"kvstore_push": ["decode"]},
    ],
)
def test_a_promise_that_is_not_right_is_ignored_with_one_warning(
    params: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING):
        bench.arrive(64, params, name="a")
        bench.arrive(64, params, name="b")
    assert [begun["want"] for begun in bench.lookups.begun] == [0, 0]
    assert len(caplog.records) == 1
    assert "kvstore" in caplog.text
    assert bench.planner.step([bench.due(64)]).saves[0].push_to == ""

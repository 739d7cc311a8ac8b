"""Planner: against a simulated engine that does what an engine may do, in any order.

Hypothesis drives arrivals, lookups that answer late, chunked steps, loads that end late or in part,
saves that run late on each rank, preemption, aborts and time. The simulation fails when a block is
saved that is not what it is called, when a pin is given back twice or never, when a load goes
beyond what was found, or when a request fails again and again. At the end everything is finished,
and nothing may be left pinned or tracked.
"""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.planner import LOOKUP_SECONDS_MAX
from kvstore_adapters.planning.tracking import PlannerSettings

from .simulated_engine import Engine, Request

ONE_GROUP = [(Group(0, 4, "full"),), (Group(0, 8, "full"),)]
SEVERAL = [
    (Group(0, 4, "full"), Group(1, 8, "full")),
    (Group(0, 4, "full"), Group(1, 4, "window", 9)),
    (Group(0, 8, "full"), Group(1, 4, "window", 6)),
]


class PlannerMachine(RuleBasedStateMachine):
    engine: Engine

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        is_async = data.draw(st.booleans())
        self.engine = Engine(
            data.draw(st.sampled_from(ONE_GROUP + SEVERAL if is_async else ONE_GROUP)),
            PlannerSettings(
                num_ranks=data.draw(st.integers(1, 2)) if is_async else 1,
                can_load=data.draw(st.sampled_from([True, True, True, False])),
                can_save=True,
                save_decode=data.draw(st.booleans()),
                is_async=is_async,
                max_pinned_blocks=data.draw(st.sampled_from([3, 10, 100])),
                lookup_wait=0.0,
                pd_wait=1.0,
                push_targets=["decode"],
            ),
            num_blocks=data.draw(st.sampled_from([24, 60])),
            chunk=data.draw(st.sampled_from([3, 8, 40])),
        )
        self.count = 0

    def pick(self, data: st.DataObject, among: Any) -> Any:
        return data.draw(st.sampled_from(sorted(among)))

    @precondition(lambda self: len(self.engine.requests) < 4)
    @rule(family=st.sampled_from([0, 0, 0, 1]), num_prompt=st.integers(1, 40), push=st.booleans())
    def arrive(self, family: int, num_prompt: int, push: bool) -> None:
        self.count += 1
        request = Request(f"r{self.count}", family, num_prompt, num_prompt)
        self.engine.add(request, {"kvstore_push": "decode"} if push else None)

    @precondition(lambda self: self.engine.lookups.asked)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self.engine.lookups.answer(self.pick(data, self.engine.lookups.asked))

    @rule(good=st.one_of(st.none(), st.integers(0, 5)))
    def step(self, good: int | None) -> None:
        self.engine.step(good)

    @rule(steps=st.integers(1, 5))
    def all_goes_well(self, steps: int) -> None:
        engine = self.engine
        for _ in range(steps):
            for request_id in list(engine.lookups.asked):
                engine.lookups.answer(request_id)
            engine.step()
            for request_id in list(engine.loads):
                engine.end_load(request_id, 99)
            for job_id in list(engine.saves):
                engine.run_save(job_id, 99)

    @precondition(lambda self: len(self.engine.requests) < 4)
    @rule(num_prompt=st.integers(9, 40))
    def arrive_and_be_looked_up(self, num_prompt: int) -> None:
        self.arrive(0, num_prompt, False)
        for request_id in list(self.engine.lookups.asked):
            self.engine.lookups.answer(request_id)

    @precondition(lambda self: self.engine.loads)
    @rule(data=st.data(), good=st.sampled_from([0, 1, 3, 99, 99]))
    def end_load(self, data: st.DataObject, good: int) -> None:
        self.engine.end_load(self.pick(data, self.engine.loads), good)

    @precondition(lambda self: self.engine.saves)
    @rule(data=st.data(), stored=st.sampled_from([0, 2, 99, 99]))
    def run_save(self, data: st.DataObject, stored: int) -> None:
        self.engine.run_save(self.pick(data, self.engine.saves), stored)

    @precondition(lambda self: self.engine.running())
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        running = {request.request_id for request in self.engine.running()}
        self.engine.preempt(self.engine.requests[self.pick(data, running)])

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def finish_or_abort(self, data: st.DataObject) -> None:
        self.engine.abort(self.engine.requests[self.pick(data, self.engine.requests)])

    @rule()
    def evict_all(self) -> None:
        self.engine.store.clear()

    @rule()
    def time_passes(self) -> None:
        self.engine.now += LOOKUP_SECONDS_MAX + 1

    @invariant()
    def pins_are_what_saves_hold_and_bounded(self) -> None:
        engine = self.engine
        pinned = sum(running.job.num_blocks for running in engine.saves.values())
        assert engine.planner.num_pinned_blocks == pinned <= engine.settings.max_pinned_blocks

    @invariant()
    def requests_hold_what_they_count_as_computed(self) -> None:
        for request in self.engine.running():
            assert self.engine.is_right(request, request.num_computed)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for request in list(engine.requests.values())[1:]:
            engine.abort(request)
        # Whatever goes wrong from now on, the one that is left comes to compute something.
        for _ in range(8):
            for request_id in list(engine.lookups.asked):
                engine.lookups.answer(request_id)
            engine.step(0)
            for request_id in list(engine.loads):
                engine.end_load(request_id, 0)
            for job_id in list(engine.saves):
                engine.run_save(job_id, 0)
        for request in list(engine.requests.values()):
            assert request.status == "running"
            engine.abort(request)
        for job_id in list(engine.saves):
            while job_id in engine.saves:
                engine.run_save(job_id, 0)
        assert engine.planner.num_pinned_blocks == 0
        assert not engine.planner.save_at
        assert not engine.lookups.asked
        assert len(engine.free_blocks()) == engine.num_blocks - 1


TestPlannerModel = PlannerMachine.TestCase
TestPlannerModel.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

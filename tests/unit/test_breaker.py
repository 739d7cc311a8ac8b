"""When a client asks a daemon again that did not answer.

Proved by Hypothesis against the clock it drives: calls go through exactly while the last attempt
succeeded; attempts are made one at a time, `first` to `longest` seconds apart after the first; the
pauses never shrink while it does not stay up; and however long an outage lasts, an attempt comes at
most `longest` seconds after the one before it failed.
"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.client.breaker import Breaker

FIRST, LONGEST = 0.05, 1.0


class Model(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.now = 100.0
        self.breaker = Breaker(lambda: self.now, FIRST, LONGEST)
        self.is_open = False
        self.attempting = False
        self.failed_at = 0.0
        self.closed_at = 0.0
        self.pauses: list[float] = []  # since it last stayed up

    @rule(seconds=st.floats(0.0, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def time_comes(self) -> None:
        self.now += self.breaker.wait_seconds()

    @precondition(lambda self: not self.is_open)
    @rule()
    def a_call_fails(self) -> None:
        if self.now - self.closed_at >= LONGEST:
            self.pauses = []
        self.breaker.failed()
        self.is_open = True
        self.failed_at = self.now
        self.pauses.append(self.breaker.wait_seconds())

    @precondition(lambda self: self.is_open and not self.attempting)
    @rule()
    def another_call_fails_late(self) -> None:
        before = self.breaker.wait_seconds()
        self.breaker.failed()
        assert self.breaker.wait_seconds() == before

    @rule()
    def an_attempt_begins_when_it_is_time(self) -> None:
        is_due = self.is_open and not self.attempting and self.breaker.wait_seconds() == 0
        assert self.breaker.attempt() == is_due
        self.attempting = self.attempting or is_due

    @precondition(lambda self: self.attempting)
    @rule()
    def the_attempt_fails(self) -> None:
        self.breaker.failed()
        self.attempting = False
        self.failed_at = self.now
        self.pauses.append(self.breaker.wait_seconds())

    @precondition(lambda self: self.attempting)
    @rule()
    def the_attempt_succeeds(self) -> None:
        self.breaker.succeeded()
        self.attempting = self.is_open = False
        self.closed_at = self.now

    @invariant()
    def it_is_open_from_a_failure_to_a_success(self) -> None:
        assert self.breaker.is_open == self.is_open

    @invariant()
    def an_attempt_is_never_further_off_than_the_longest_pause(self) -> None:
        assert 0 <= self.breaker.wait_seconds() <= LONGEST
        if not self.is_open:
            assert self.breaker.wait_seconds() == 0
        elif not self.attempting:
            latest = max(self.now, self.failed_at + LONGEST)
            assert self.now + self.breaker.wait_seconds() <= latest + 1e-9

    @invariant()
    def pauses_grow_from_none_to_the_longest(self) -> None:
        for before, after in zip(self.pauses, self.pauses[1:], strict=False):
            assert abs(after - min(max(2 * before, FIRST), LONGEST)) < 1e-9
        if self.pauses:
            assert self.pauses[0] < 1e-9


TestBreaker = Model.TestCase


def test_pauses_of_a_long_outage() -> None:
    now = 0.0
    breaker = Breaker(lambda: now)
    breaker.failed()
    pauses = []
    for _ in range(8):
        now += breaker.wait_seconds()
        pauses.append(round(breaker.wait_seconds(), 9))
        assert breaker.attempt()
        breaker.failed()
        pauses[-1] = round(breaker.wait_seconds(), 3)
    assert pauses == [0.05, 0.1, 0.2, 0.25, 0.25, 0.25, 0.25, 0.25]


def test_a_refusal_is_waited_for_longer_and_the_next_failure_is_not() -> None:
    now = 0.0
    breaker = Breaker(lambda: now)
    breaker.failed(1.0)
    assert breaker.wait_seconds() == 1.0
    now += 1.0
    assert breaker.attempt()
    breaker.failed()
    assert round(breaker.wait_seconds(), 9) == 0.05

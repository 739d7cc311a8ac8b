"""Room for blocks that come and go over a socket.

Proved by Hypothesis against a dict: no place has two holders, every place is given out again, what
is asked for beyond the room is refused in time, and whoever was granted a place can tell from its
sequence number whether it still holds it. Also that threads which want all the room get by.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.client.landing import Landing

BLOCK_BYTES = 5000  # two pages a place


class Model(RuleBasedStateMachine):
    @initialize(num_places=st.integers(0, 9))
    def start(self, num_places: int) -> None:
        self.landing = Landing(BLOCK_BYTES, num_places * 8192)
        assert self.landing.capacity == max(2, num_places)
        self.held: dict[int, tuple[list[int], bool]] = {}  # key -> places, whether overdue
        self.granted: list[tuple[int, int, int]] = []  # key, place, sequence
        self.next_key = 1

    def free(self) -> int:
        return self.landing.capacity - sum(len(places) for places, _ in self.held.values())

    @rule(count=st.integers(0, 12), overdue=st.booleans())
    def take(self, count: int, overdue: bool) -> None:
        room = self.free()
        for key, (places, is_over) in list(self.held.items()):
            if room >= count and room > 0:
                break
            if is_over and (room < count):
                room += len(places)
                del self.held[key]
        taken = self.landing.take(count, time.monotonic())
        assert len(taken) == min(count, room)
        others = {place for places, _ in self.held.values() for place in places}
        assert not others & set(taken.tolist())
        assert len(set(taken.tolist())) == len(taken)
        key, self.next_key = self.next_key, self.next_key + 1
        self.landing.hold(key, taken, -1.0 if overdue else None)
        self.held[key] = (taken.tolist(), overdue)
        sequences = self.landing.sequences(taken).tolist()
        self.granted += [(key, p, s) for p, s in zip(taken.tolist(), sequences, strict=True)]

    @rule(dice=st.randoms(use_true_random=False))
    def end(self, dice: object) -> None:
        if not self.held:
            return
        key = dice.choice(sorted(self.held))  # type: ignore[attr-defined]
        places = self.landing.end(key)
        assert places is not None
        assert places.tolist() == self.held.pop(key)[0]
        self.landing.give(places)
        assert self.landing.end(key) is None

    @invariant()
    def sequences_tell_who_holds_a_place(self) -> None:
        for key, place, sequence in self.granted:
            now = int(self.landing.sequences(np.array([place]))[0])
            assert (now == sequence) == (key in self.held)

    @invariant()
    def offsets_lie_apart_and_inside(self) -> None:
        every = np.arange(self.landing.capacity)
        offsets = self.landing.offsets(every).astype(np.int64)
        assert offsets[0] >= 8 * self.landing.capacity
        assert np.all(np.diff(offsets) >= BLOCK_BYTES)
        assert offsets[-1] + BLOCK_BYTES <= len(self.landing.memory)
        assert not np.any(offsets % 4096)


TestLanding = Model.TestCase


def test_threads_that_want_all_of_it_take_turns() -> None:
    landing = Landing(BLOCK_BYTES, 4 * 8192)
    inside = threading.Semaphore(landing.capacity)

    def work(_: int) -> int:
        got = 0
        for _ in range(100):
            places = landing.take(4, time.monotonic() + 60)
            assert len(places) >= 1
            for _ in places:
                assert inside.acquire(blocking=False)
            got += len(places)
            inside.release(len(places))
            landing.give(places)
        return got

    with ThreadPoolExecutor(4) as threads:
        assert all(got >= 100 for got in threads.map(work, range(4)))
    assert landing.num_free == landing.capacity

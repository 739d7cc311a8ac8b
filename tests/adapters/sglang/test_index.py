"""HashIndex holds what was added last, and what the store's events say; it never grows beyond its
bound. The model is an ordered dict, driven by Hypothesis.
"""

from __future__ import annotations

from collections import OrderedDict

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore import AllBlocksCleared, BlockRemoved, BlockStored
from kvstore_adapters.sglang.index import HashIndex

CAPACITY = 5
HASHES = [bytes([i]) * 32 for i in range(8)]
some = st.lists(st.sampled_from(HASHES), max_size=4)


def hexes(hashes: list[bytes]) -> list[str]:
    return [one.hex() for one in hashes]


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = HashIndex(CAPACITY)
        self.model: OrderedDict[str, None] = OrderedDict()
        self.sequence = 0

    def _added(self, hashes: list[bytes]) -> None:
        for one in hexes(hashes):
            self.model.pop(one, None)
            self.model[one] = None
        while len(self.model) > CAPACITY:
            self.model.popitem(last=False)

    @rule(hashes=some)
    def add(self, hashes: list[bytes]) -> None:
        self.index.add(hexes(hashes))
        self._added(hashes)

    @rule(hashes=some)
    def discard(self, hashes: list[bytes]) -> None:
        self.index.discard(hexes(hashes))
        for one in hexes(hashes):
            self.model.pop(one, None)

    @rule(hashes=some.filter(bool))
    def event_of_stored_blocks(self, hashes: list[bytes]) -> None:
        self.sequence += len(hashes)
        self.index.apply([BlockStored(self.sequence, hashes, None, 16, "CPU")])
        self._added(hashes)

    @rule(hashes=some.filter(bool))
    def event_of_removed_blocks(self, hashes: list[bytes]) -> None:
        self.sequence += len(hashes)
        self.index.apply([BlockRemoved(self.sequence, hashes, "CPU")])
        for one in hexes(hashes):
            self.model.pop(one, None)

    @rule()
    def event_of_a_clear(self) -> None:
        self.sequence += 1
        self.index.apply([AllBlocksCleared(self.sequence)])
        self.model.clear()

    @rule(hashes=some.filter(bool), missed=st.integers(1, 3))
    def event_after_missed_ones(self, hashes: list[bytes], missed: int) -> None:
        is_first = self.sequence == 0
        self.sequence += missed + len(hashes)
        self.index.apply([BlockStored(self.sequence, hashes, None, 16, "CPU")])
        if not is_first:
            self.model.clear()
        self._added(hashes)

    @invariant()
    def knows_what_the_model_knows(self) -> None:
        assert [one for one in hexes(HASHES) if one in self.index] == [
            one for one in hexes(HASHES) if one in self.model
        ]
        assert len(self.index) == len(self.model) <= CAPACITY

    @rule(hashes=some)
    def leading(self, hashes: list[bytes]) -> None:
        asked = hexes(hashes)
        unknown = [i for i, one in enumerate(asked) if one not in self.model]
        assert self.index.leading(asked) == (unknown[0] if unknown else len(asked))


IndexMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
test_index_against_a_model = IndexMachine.TestCase

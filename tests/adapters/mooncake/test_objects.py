"""Values of any size in block stores of fixed sizes: two clients against a dictionary.

Hypothesis puts, reads, removes and clears through two clients of one store, by bytes and by pieces
of memory. Nothing is evicted, so each answer is known. A second model has a store that evicts:
there a value may be gone, but never another one. Then writers of the same keys at once, and the
small functions below it all.
"""

from __future__ import annotations

import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import kvstore
from kvstore_adapters.mooncake.memory import Regions
from kvstore_adapters.mooncake.objects import slot_bytes_of
from tests.adapters.mooncake.support import INVALID, NOT_FOUND, OK, Memory, client, shared

KEYS = [f"key-{i}" for i in range(6)]
MEMORY_BYTES = 16384
TARGET = MEMORY_BYTES // 2  # values are put from below, and read to above

keys = st.sampled_from(KEYS)
key_lists = st.lists(keys, min_size=1, max_size=5)
clients = st.integers(0, 1)
sizes = st.sampled_from([1, 63, 64, 65, 100, 1000, 1024, 1025, 4000])
places = st.integers(0, TARGET - 4000)


class ClientsModel(RuleBasedStateMachine):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        address = self.stack.enter_context(shared(directory, cpu="1MiB", chunk="16KiB"))
        self.clients = [client(address), client(address)]
        for one in self.clients:
            self.stack.callback(one.close)
        self.memory = Memory(MEMORY_BYTES, *self.clients)
        self.values: dict[str, bytes] = {}

    @rule(who=clients, pairs=st.lists(st.tuples(keys, places, sizes), min_size=1, max_size=4))
    def put_from(self, who: int, pairs: list[tuple[str, int, int]]) -> None:
        names, offsets, lengths = map(list, zip(*pairs, strict=True))
        at = [self.memory.at(offset) for offset in offsets]
        assert self.clients[who].batch_put_from(names, at, lengths) == [OK] * len(names)
        for name, offset, length in pairs:
            self.values.setdefault(name, self.memory[offset : offset + length])

    @rule(who=clients, key=keys, cut=st.lists(st.tuples(places, sizes), min_size=1, max_size=3))
    def put_pieces(self, who: int, key: str, cut: list[tuple[int, int]]) -> None:
        at = [[self.memory.at(offset) for offset, _ in cut]]
        lengths = [[length for _, length in cut]]
        assert self.clients[who].batch_put_from_multi_buffers([key], at, lengths) == [OK]
        value = b"".join(self.memory[offset : offset + length] for offset, length in cut)
        self.values.setdefault(key, value)

    @rule(who=clients, key=keys, value=st.binary(max_size=200))
    def put(self, who: int, key: str, value: bytes) -> None:
        assert self.clients[who].put(key, value) == (OK if value else INVALID)
        if value:
            self.values.setdefault(key, value)

    @rule(who=clients, names=key_lists)
    def get(self, who: int, names: list[str]) -> None:
        wanted = [self.values.get(name, b"") for name in names]
        assert self.clients[who].get_batch(names) == wanted

    @rule(who=clients, key=keys, room=st.integers(1, 4000))
    def get_into(self, who: int, key: str, room: int) -> None:
        value = self.values.get(key, b"")
        before = self.memory[TARGET : TARGET + 4000]
        code = self.clients[who].get_into(key, self.memory.at(TARGET), room)
        if not value:
            assert code == NOT_FOUND
        elif room < len(value):
            assert code == INVALID
        else:
            assert code == len(value)
            assert self.memory[TARGET : TARGET + 4000] == value + before[code:]

    @rule(who=clients, key=keys, first=st.integers(1, 3999))
    def get_pieces(self, who: int, key: str, first: int) -> None:
        value = self.values.get(key, b"")
        if len(value) <= first:
            return
        at, rest = [self.memory.at(TARGET), self.memory.at(TARGET + 4000)], len(value) - first
        if rest > 4000:
            return
        code = self.clients[who].batch_get_into_multi_buffers([key], [at], [[first, rest]])
        assert code == [len(value)]
        there = self.memory[TARGET : TARGET + first]
        assert there + self.memory[TARGET + 4000 : TARGET + 4000 + rest] == value

    @rule(who=clients, names=st.lists(keys, min_size=1, max_size=3, unique=True))
    def remove(self, who: int, names: list[str]) -> None:
        wanted = [OK if name in self.values else NOT_FOUND for name in names]
        assert self.clients[who].batch_remove(names) == wanted
        for name in names:
            self.values.pop(name, None)

    @rule(who=clients)
    def clear(self, who: int) -> None:
        assert self.clients[who].remove_all() == OK
        self.values.clear()

    @invariant()
    def both_see_what_is_there(self) -> None:
        there = [int(name in self.values) for name in KEYS]
        lengths = [len(self.values[name]) if name in self.values else NOT_FOUND for name in KEYS]
        for one in self.clients:
            assert one.batch_is_exist(KEYS) == there
            assert [one.get_size(name) for name in KEYS] == lengths

    def teardown(self) -> None:
        self.stack.close()


TestClientsModel: Any = ClientsModel.TestCase
TestClientsModel.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)


@settings(max_examples=10, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(["put", "get", "remove"]), clients),
        max_size=80,
    )
)
def test_what_evicts_never_gives_another_value(steps: list[tuple[int, str, int]]) -> None:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = stack.enter_context(shared(directory, cpu="1MiB", chunk="128KiB"))
        both = [client(address), client(address)]
        for one in both:
            stack.callback(one.close)
        generation: dict[int, int] = {}
        for number, act, who in steps:
            key = f"{number}"
            value = np.full(60_000, (7 * number + generation.get(number, 0)) % 251, np.uint8)
            if act == "put":
                both[who].put(key, value)
            elif act == "remove":
                both[who].remove(key)
                generation[number] = generation.get(number, 0) + 1
            else:
                is_there = both[who].is_exist(key)
                assert both[1 - who].get(key) == (value.tobytes() if is_there else b"")


def test_writers_of_the_same_keys_at_once_agree(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(20)]
    with shared(tmp_path) as address:
        stores = [client(address) for _ in range(4)]
        start = threading.Barrier(len(stores))
        codes: list[int] = []

        def write(who: int) -> None:
            start.wait()
            codes.extend(stores[who].put(name, bytes([who]) * (1000 + who)) for name in names)

        threads = [threading.Thread(target=write, args=(who,)) for who in range(len(stores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(codes) == {OK}
        values = [store.get_batch(names) for store in stores]
        assert all(found == values[0] for found in values)
        for value in values[0]:
            assert value == value[:1] * (1000 + value[0])
        # Losers removed what they had written: only as many values are left as there are keys.
        with kvstore.connect(address, kvstore.BlockSpec.of_bytes(64)) as observer:
            assert observer.stats()["kvstore_cpu_blocks"] == 2 * len(names)
        for store in stores:
            store.close()


@given(num_bytes=st.integers(1, 1 << 40))
def test_a_slot_is_little_larger_than_its_value(num_bytes: int) -> None:
    slot = slot_bytes_of(num_bytes)
    assert num_bytes <= slot <= max(64, num_bytes * 9 // 8)
    assert slot_bytes_of(slot) == slot


def test_there_are_few_slot_sizes() -> None:
    assert len({slot_bytes_of(size) for size in range(1, 1 << 16)}) <= 8 * 10 + 1
    for exact in (1 << 20, 3 << 19, 28 * 4096, 36 * 4096):
        assert slot_bytes_of(exact) == exact


@given(
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=8),
    removed=st.lists(st.integers(0, 40), max_size=4),
    asked=st.tuples(st.integers(0, 45), st.integers(1, 12)),
)
def test_regions_are_a_set_of_spans(
    spans: list[tuple[int, int]], removed: list[int], asked: tuple[int, int]
) -> None:
    regions, model = Regions(), dict[int, int]()
    for at, size in spans:
        is_free = not any(at < o + n and o < at + size for o, n in model.items())
        is_good = at > 0 and size > 0 and is_free
        assert regions.add(at, size) == is_good
        if is_good:
            model[at] = size
    for at in removed:
        assert regions.remove(at) == (model.pop(at, None) is not None)
    at, size = asked
    is_inside = any(o <= at and at + size <= o + n for o, n in model.items())
    assert (regions.pieces([[at]], [[size]], is_strict=True) == [([at], [size])]) == is_inside


@pytest.mark.parametrize(
    ("addresses", "sizes"),
    [([0], [1]), ([-8], [1]), ([8], [-1]), ([8], [0]), ([1 << 64], [1]), ([8, 9], [1]), ([], [])],
)
def test_what_cannot_be_memory_is_refused(addresses: list[int], sizes: list[int]) -> None:
    assert Regions().pieces([addresses], [sizes], is_strict=False) == [None]

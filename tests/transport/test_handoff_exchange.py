"""Exchanges of two processes' sides, with real endpoints and threads: bytes go from pool to
pool, by push and by pull, as they are and encoded; what is damaged on the way is refused.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.transport import Endpoint, SharedMemory, TransportSettings
from kvstore.transport.handoff import (
    Direction,
    Exchange,
    Failed,
    HandoffMessage,
    Incoming,
    Layout,
    Links,
    Party,
    Ready,
    Receiver,
    Sender,
    Wire,
)
from kvstore.transport.handoff.wire import Slots

PAGES = 12
SOURCE_PAGES, TARGET_PAGES = [7, 2, 9, 4, 0], [3, 11, 5, 6, 1]
BLOCKS = len(SOURCE_PAGES)


class Side:
    """A process' endpoint and exchange, in this one; the other side is told what it says."""

    def __init__(self, *, pages: int = PAGES, codec: str = "", fill: int | None = None) -> None:
        self.memory = SharedMemory(pages * SPEC.block_bytes)
        self.endpoint = Endpoint(TransportSettings(movers=("shm",)))
        region = self.endpoint.register(self.memory, writable=True)
        self.links = Links(self.endpoint)
        sizes = [SPEC.layer_bytes]
        offsets = [[layer * SPEC.layer_bytes] for layer in range(SPEC.num_layers)]
        layout = Layout(region.region_id, SPEC.block_bytes, sizes, offsets)
        wire = None
        if codec:
            staging = SharedMemory(1 << 20)
            of = self.endpoint.register(staging, writable=True)
            wire = Wire(codec, SPEC, staging.array, of.region_id)
        self.wire = wire
        self.news = threading.Event()
        self.other: Side | None = None
        self.said: list[HandoffMessage] = []
        self.party = Party(
            layout, self.memory.address, self.endpoint.info().encode(), self.links.connect, wire
        )
        self.exchange = Exchange(self.party, self.say, self.news.set)

    def say(self, handoff_id: str, message: HandoffMessage) -> None:
        self.said.append(message)
        if self.other is not None:
            self.other.exchange.deliver(handoff_id, message)

    def page(self, page: int) -> npt.NDArray[np.uint8]:
        size = SPEC.block_bytes
        return self.memory.array[page * size : (page + 1) * size]

    def wait_settled(self) -> None:
        give_up = time.monotonic() + 20
        while not (settled := self.exchange.take_settled()) and time.monotonic() < give_up:
            self.news.wait(0.1)
            self.news.clear()
        assert settled == ["h"]

    def close(self) -> None:
        self.exchange.close()
        self.links.close()
        self.endpoint.close()


SPEC = BlockSpec(num_layers=3, num_kv_heads=2, head_dim=16, block_tokens=16, dtype="float32")
Pair = tuple[Side, Side]


@pytest.fixture
def sides() -> Iterator[Callable[..., Pair]]:
    made: list[Side] = []

    def make(**options: Any) -> Pair:
        pair = Side(**options), Side(**options)
        made.extend(pair)
        pair[0].other, pair[1].other = pair[1], pair[0]
        values = np.random.default_rng(0).standard_normal(PAGES * SPEC.block_bytes // 4)
        pair[0].memory.array[:] = values.astype(np.float32).view(np.uint8)
        return pair

    yield make
    for side in made:
        side.close()


def hand_off(sides: Pair, direction: Direction) -> Incoming:
    """All layers of all blocks, in two chunks; waits until it is over."""
    sender, receiver = sides
    receiver.exchange.expect("h")
    sender.exchange.expect("h")
    sender.exchange.open_sender("h", direction, BLOCKS, lease_s=60.0)
    incoming = receiver.exchange.open_receiver("h", direction, TARGET_PAGES)
    for chunk in (slice(0, 2), slice(2, None)):
        for layer in range(SPEC.num_layers):
            sender.exchange.add("h", layer, chunk.start, SOURCE_PAGES[chunk])
    assert incoming.wait(20.0)
    return incoming


@pytest.mark.parametrize("direction", Direction)
def test_bytes_go_from_pool_to_pool(sides: Callable[..., Pair], direction: Direction) -> None:
    pair = sides()
    incoming = hand_off(pair, direction)
    assert (incoming.failure, incoming.blocks_ready, incoming.layers_ready) == ("", BLOCKS, 3)
    for source, target in zip(SOURCE_PAGES, TARGET_PAGES, strict=True):
        assert np.array_equal(pair[0].page(source), pair[1].page(target))
    for side in pair:
        side.wait_settled()
    sent, received = pair[0].exchange.counters(), pair[1].exchange.counters()
    size = BLOCKS * SPEC.block_bytes
    assert (sent.sent, received.received, received.received_bytes) == (1, 1, size)
    assert (sent + received).moved_bytes == {"shm": size}


def test_an_error_in_one_hand_off_does_not_end_the_others(
    sides: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One thread drives all of them."""
    sender, receiver = pair = sides()
    for kind in (Sender, Receiver):
        monkeypatch.setattr(kind, "poll", raising_for_one_block(kind.poll))
    sender.exchange.open_sender("bad", Direction.PULL, 1, lease_s=60.0)
    failed = receiver.exchange.open_receiver("bad", Direction.PUSH, [0])
    assert failed.wait(20.0)
    assert failed.failure == "an error in the receiver"
    incoming = hand_off(pair, Direction.PUSH)
    assert (incoming.failure, incoming.blocks_ready) == ("", BLOCKS)
    for side in pair:
        side.wait_settled()  # of the good one: nobody knows who uses the other's pages
    assert Failed("an error in the sender") in sender.said
    assert "hand-off bad" in caplog.text


def raising_for_one_block(poll: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def poll_or_raise(party: Any) -> Any:
        blocks = party._num_blocks if isinstance(party, Sender) else len(party._pages)
        if blocks == 1:
            raise RuntimeError("a fault")
        return poll(party)

    return poll_or_raise


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_a_codec_makes_it_smaller_and_a_little_wrong(
    sides: Callable[..., Pair], direction: Direction, codec: str
) -> None:
    pair = sides(codec=codec)
    assert hand_off(pair, direction).failure == ""
    for side in pair:
        side.wait_settled()
        assert side.wire is not None
        assert side.wire.slots.take(side.wire.slots.count) == 0, "a slot was not given back"
    for source, target in zip(SOURCE_PAGES, TARGET_PAGES, strict=True):
        was, came = (p.view(np.float32) for p in (pair[0].page(source), pair[1].page(target)))
        assert 0 < np.abs(was - came).max() < 0.3
    size = pair[1].exchange.counters().received_bytes
    assert size < 0.6 * BLOCKS * SPEC.block_bytes


@pytest.mark.parametrize("direction", Direction)
def test_what_a_codec_refuses_goes_as_it_is(
    sides: Callable[..., Pair], direction: Direction
) -> None:
    pair = sides(codec="int8")
    pair[0].page(SOURCE_PAGES[3]).view(np.float32)[5] = np.inf
    assert hand_off(pair, direction).failure == ""
    assert np.isinf(pair[1].page(TARGET_PAGES[3]).view(np.float32)[5])
    ready = [message for message in pair[0].said if isinstance(message, Ready)]
    assert {message.is_encoded for message in ready} == {False, True}


@pytest.mark.parametrize("direction", Direction)
def test_bytes_zeroed_on_the_way_are_refused(
    sides: Callable[..., Pair], direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a mover that checks nothing itself."""
    pair = sides()
    real = _native.move_pieces

    def move(to: Any, source: Any, lengths: Any, *rest: Any) -> Any:
        statuses = real(to, source, lengths, None, *rest[1:])
        for address, size in zip(to.tolist(), lengths.tolist(), strict=True):
            ctypes.memset(address, 0, size)
        return statuses

    monkeypatch.setattr(_native, "move_pieces", move)
    incoming = hand_off(pair, direction)
    assert "damaged" in incoming.failure
    assert incoming.blocks_ready == 0
    monkeypatch.undo()
    for side in pair:
        side.wait_settled()


@given(st.lists(st.integers(1, 5), max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_slots_are_given_to_one_at_a_time(wanted: list[int], chance: random.Random) -> None:
    slots, taken = Slots(16), dict[int, int]()
    for length in wanted:
        first = slots.take(length)
        used = {slot for begin, size in taken.items() for slot in range(begin, begin + size)}
        free = "".join("x" if slot in used else "." for slot in range(16))
        assert (first is None) == ("." * length not in free)
        if first is not None:
            assert not used & set(range(first, first + length))
            taken[first] = length
        elif taken:
            begin = chance.choice(sorted(taken))
            slots.give(begin, taken.pop(begin))

"""A hand-off brings exactly the sender's bytes into the receiver's pages, or fails; and pages are
never free while a writer may still write to them.

The two state machines are driven against a model world: moves that end when the test says so, late,
lost or damaged, over a link that settles only when it is closed (as UCX's), or at once; messages
that arrive later; processes that die at any point. After each step: what counts as arrived is what
the sender had computed, and no move under way touches memory that its owner believes free. Then
`Exchange` with real endpoints, links and threads.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.errors import PeerUnavailableError
from kvstore.transport import Endpoint, SharedMemory, TransportSettings
from kvstore.transport.handoff import (
    Direction,
    Ended,
    Exchange,
    Grant,
    HandoffMessage,
    Incoming,
    Layout,
    Links,
    Offer,
    Party,
    Ready,
    Receiver,
    Sender,
    Stop,
    Wire,
)
from kvstore.transport.handoff.wire import Slots
from kvstore.transport.types import Batch, Status, all_of

LAYERS, PAGES = 3, 12
SIZES = [48, 16]  # two parts of a layer
PAGE_BYTES = LAYERS * sum(SIZES)
GRACE = 4.0


def layout_of(region_id: int = 1, *, order: int = 1) -> Layout:
    """Page after page, layer after layer; order -1: the layers of a page backwards."""
    layers = list(range(LAYERS))[::order]
    offsets = [[layer * sum(SIZES), layer * sum(SIZES) + SIZES[0]] for layer in layers]
    return Layout(region_id, PAGE_BYTES, SIZES, offsets)


def layer_bytes(memory: npt.NDArray[np.uint8], layout: Layout, layer: int, page: int) -> bytes:
    start = [offset + page * layout.stride for offset in layout.offsets[layer]]
    return b"".join(memory[at : at + size].tobytes() for at, size in zip(start, SIZES, strict=True))


class FakeMove:
    """A move of the model world. It copies only when the world says so."""

    def __init__(self, world: World, link: FakeLink, batch: Batch, *, is_write: bool) -> None:
        self.world, self.link, self.batch, self.is_write = world, link, batch, is_write
        self.statuses: npt.NDArray[np.uint8] | None = None
        self.is_settled = False
        self.target = RECEIVER  # in either direction
        own = world.memories[link.owner]
        local = [int(address) - own.ctypes.data for address in batch.local_addresses]
        remote = [int(offset) for offset in batch.remote_offsets]
        self.places = list(
            zip(
                *((local, remote) if is_write else (remote, local)),
                (int(length) for length in batch.lengths),
                strict=True,
            )
        )

    def copy(self, flip: bool = False) -> None:
        """What the network does with it."""
        memories = self.world.memories
        for source, to, size in self.places:
            memories[RECEIVER][to : to + size] = memories[SENDER][source : source + size]
        if flip:
            memories[RECEIVER][self.places[0][1]] ^= 1

    def verdict(self) -> Status:
        """Of a mover that checks what arrived."""
        assert self.batch.checksums is not None
        got = [
            _native.xxh3(self.world.memories[RECEIVER][to : to + size].tobytes())
            for _, to, size in self.places
        ]
        return Status.OK if got == self.batch.checksums.tolist() else Status.DAMAGED

    def end(self, status: Status) -> None:
        self.statuses = all_of(status, len(self.batch))
        is_known = status in (Status.OK, Status.DAMAGED, Status.REFUSED)
        self.is_settled = is_known or not self.world.settles_late

    def pages_of(self, memory: int) -> set[int]:
        index = 0 if memory == SENDER else 1
        return {place[index] // PAGE_BYTES for place in self.places}

    def done(self) -> bool:
        return self.statuses is not None

    def wait(self, timeout: float | None = None) -> npt.NDArray[np.uint8]:
        assert self.statuses is not None
        return self.statuses

    def when_done(self, call: Callable[[], None]) -> None:
        pass


class FakeLink:
    mover = "fake"

    def __init__(self, world: World, owner: int) -> None:
        self.world, self.owner = world, owner
        self.is_alive = True
        self.moves: list[FakeMove] = []

    def submit_read(
        self, region_id: int, batch: Batch, *, timeout: float | None = None
    ) -> FakeMove:
        return self._submit(batch, is_write=False)

    def submit_write(
        self, region_id: int, batch: Batch, *, timeout: float | None = None
    ) -> FakeMove:
        return self._submit(batch, is_write=True)

    def _submit(self, batch: Batch, *, is_write: bool) -> FakeMove:
        if not self.is_alive:
            raise PeerUnavailableError("fake: gone")
        move = FakeMove(self.world, self, batch, is_write=is_write)
        self.moves.append(move)
        return move

    def close(self, timeout: float = 0.0) -> bool:
        self.is_alive = False
        for move in self.moves:
            if move.statuses is None:
                move.end(Status.CANCELLED)
            move.is_settled |= self.world.link_settles
        return self.world.link_settles


SENDER, RECEIVER = 0, 1
SOURCE_PAGES, TARGET_PAGES = [7, 2, 9, 4, 0], [3, 11, 5, 6, 1]
BLOCKS = len(SOURCE_PAGES)


class World:
    """One hand-off, both processes, and everything between them.

    `faults`: how likely any is, of each step. `settles_late`: what a failed move had begun may go
    on until its link is closed.
    """

    def __init__(self, seed: int, direction: Direction, settles_late: bool, faults: float) -> None:
        self.chance = random.Random(seed)
        self.direction, self.settles_late, self.faults = direction, settles_late, faults
        self.link_settles = True
        rng = np.random.default_rng(seed)
        self.memories = [rng.integers(0, 256, PAGES * PAGE_BYTES, np.uint8) for _ in range(2)]
        self.layouts = [layout_of(), layout_of(order=-1)]
        self.links: list[FakeLink] = []
        self.now = 0.0
        self.next = (0, 0)  # layer and block that come next
        self.chunk = 0
        self.original = {
            (layer, block): layer_bytes(self.memories[SENDER], self.layouts[SENDER], layer, page)
            for layer in range(LAYERS)
            for block, page in enumerate(SOURCE_PAGES)
        }
        self.died: dict[int, float | None] = {SENDER: None, RECEIVER: None}
        self.is_reused = False  # the receiver's pages
        self.had_fault = False
        self.ended = 0
        self.channels: dict[int, deque[HandoffMessage]] = {SENDER: deque(), RECEIVER: deque()}
        self.sender = Sender(direction, self.party(SENDER), BLOCKS, lease_s=60.0)
        self.receiver = Receiver(direction, self.party(RECEIVER), TARGET_PAGES)
        self.say(SENDER, self.sender.start())
        self.say(RECEIVER, self.receiver.start())

    def party(self, side: int) -> Party:
        def connect(endpoint: bytes) -> FakeLink:
            if not self.is_alive(1 - side):
                raise PeerUnavailableError("fake: gone")
            self.links.append(FakeLink(self, side))
            return self.links[-1]

        address = self.memories[side].ctypes.data
        return Party(
            self.layouts[side], address, b"", connect, death_grace_s=GRACE, clock=lambda: self.now
        )

    def say(self, side: int, messages: list[HandoffMessage]) -> None:
        for message in messages:
            copied = msgspec.json.decode(msgspec.json.encode(message), type=HandoffMessage)
            assert copied == message
            self.ended += isinstance(message, Ended)
            self.channels[1 - side].append(copied)

    def is_alive(self, side: int) -> bool:
        return self.died[side] is None

    @property
    def moves(self) -> list[FakeMove]:
        """Those that may still touch memory."""
        return [move for link in self.links for move in link.moves if not move.is_settled]

    def waited_for(self) -> list[FakeMove]:
        return [m for m in self.moves if m.statuses is None and self.is_alive(m.link.owner)]

    # --- what the processes do

    def compute(self) -> None:
        layer, first = self.next
        if layer == LAYERS or not self.is_alive(SENDER):
            return
        if layer == 0:
            self.chunk = min(self.chance.randint(1, 3), BLOCKS - first)
        end = first + self.chunk
        again = self.chance.randint(0, first)  # one that was preempted computes some again
        self.say(SENDER, self.sender.add(layer, again, SOURCE_PAGES[again:end]))
        is_last = layer == LAYERS - 1
        self.next = (layer + 1, first) if not is_last else (0, end)
        if is_last and end == BLOCKS:
            self.next = (LAYERS, BLOCKS)

    def sender_polls(self) -> None:
        if self.is_alive(SENDER):
            self.say(SENDER, self.sender.poll())

    def receiver_polls(self) -> None:
        if self.is_alive(RECEIVER):
            self.say(RECEIVER, self.receiver.poll())

    def to_sender(self) -> None:
        if self.channels[SENDER] and self.is_alive(SENDER):
            message: Any = self.channels[SENDER].popleft()
            self.say(SENDER, self.sender.take(message))

    def to_receiver(self) -> None:
        if self.channels[RECEIVER] and self.is_alive(RECEIVER):
            message: Any = self.channels[RECEIVER].popleft()
            self.say(RECEIVER, self.receiver.take(message))

    def free_pages_are_used_for_something_else(self) -> None:
        if self.sender.is_over and self.is_alive(SENDER):
            self.memories[SENDER][:] = 0xAA
        self.is_reused |= self.receiver.is_settled

    # --- what the network does

    def move_ends(self) -> None:
        moves = [move for move in self.waited_for() if self.is_alive(1 - move.link.owner)]
        if moves:
            move = self.chance.choice(moves)
            move.copy()
            move.end(move.verdict())

    def straggler_writes(self) -> None:
        """A move that nobody waits for, but that is not settled, does its work."""
        moves = [move for move in self.moves if self.may_write(move)]
        if moves:
            self.chance.choice(moves).copy()

    def may_write(self, move: FakeMove) -> bool:
        died = self.died[move.link.owner]
        return died is None or (move.is_write and self.now < died + GRACE)

    def time_passes(self) -> None:
        self.now += self.chance.choice([0.1, 1.0])

    def death_is_told(self) -> None:
        if not self.is_alive(SENDER) and self.is_alive(RECEIVER):
            self.receiver.sender_lost()
        elif not self.is_alive(RECEIVER) and self.is_alive(SENDER):
            self.say(SENDER, self.sender.receiver_lost())

    # --- faults

    def receiver_gives_up(self) -> None:
        if self.is_alive(RECEIVER):
            self.say(RECEIVER, self.receiver.abandon("as the test says"))

    def sender_gives_up(self) -> None:
        if self.is_alive(SENDER):
            self.say(SENDER, self.sender.stop("as the test says"))

    def move_arrives_damaged(self) -> None:
        if self.waited_for():
            move = self.chance.choice(self.waited_for())
            move.copy(flip=True)
            move.end(self.chance.choice([Status.DAMAGED, Status.OK]))

    def move_fails(self) -> None:
        if self.waited_for():
            status = self.chance.choice([Status.LOST, Status.LATE, Status.REFUSED])
            self.chance.choice(self.waited_for()).end(status)

    def links_settle_or_not(self) -> None:
        self.link_settles = not self.settles_late or self.chance.random() < 0.5

    def process_dies(self) -> None:
        if self.is_alive(SENDER) and self.is_alive(RECEIVER):
            self.died[self.chance.choice([SENDER, RECEIVER])] = self.now

    # --- what holds

    def check(self) -> None:
        for move in self.moves:
            if self.may_write(move) and self.receiver.is_settled and self.is_alive(RECEIVER):
                assert not move.pages_of(RECEIVER) & set(TARGET_PAGES), "free pages are written"
            if self.sender.is_over and self.is_alive(SENDER) and move.is_write:
                assert not move.pages_of(SENDER) & set(SOURCE_PAGES), "free pages are sent"
        if self.is_alive(RECEIVER):
            assert self.ended == int(self.sender.is_over)
            if not self.is_reused:
                self.check_bytes()

    def check_bytes(self) -> None:
        layers, blocks = self.receiver.layers_ready, self.receiver.blocks_ready
        for (layer, block), expected in self.original.items():
            if layer < layers or block < blocks:
                page = TARGET_PAGES[block]
                got = layer_bytes(self.memories[RECEIVER], self.layouts[RECEIVER], layer, page)
                assert got == expected, f"layer {layer} of block {block} is not what was computed"

    def run(self) -> str:
        """How it ended."""
        usual = [
            *[self.compute, self.to_sender, self.to_receiver, self.move_ends] * 3,
            *[self.sender_polls, self.receiver_polls, self.straggler_writes] * 2,
            *[self.time_passes, self.death_is_told, self.free_pages_are_used_for_something_else],
        ]
        faults = [
            *[self.move_fails, self.move_arrives_damaged, self.links_settle_or_not] * 3,
            *[self.receiver_gives_up, self.sender_gives_up, self.process_dies],
        ]
        for _ in range(120):
            is_fault = self.chance.random() < self.faults
            self.had_fault |= is_fault
            self.chance.choice(faults if is_fault else usual)()
            self.check()
        self.run_to_the_end()
        return "complete" if self.receiver.is_complete else "failed"

    def run_to_the_end(self) -> None:
        """Left alone, everything ends."""
        self.link_settles = True
        for _ in range(60):
            for move in self.waited_for():
                if not self.is_alive(1 - move.link.owner):
                    move.end(Status.LOST)
            for step in (
                *[self.compute, self.death_is_told, self.move_ends, self.move_ends],
                *[self.to_sender, self.to_receiver, self.to_receiver],
                *[self.sender_polls, self.receiver_polls, self.straggler_writes],
            ):
                step()
                self.check()
        self.now += GRACE
        self.receiver_polls()
        if self.is_alive(RECEIVER):
            assert self.receiver.is_settled
            assert self.receiver.is_complete or self.receiver.failure
        if self.is_alive(SENDER):
            assert self.sender.is_over
        if not self.had_fault:
            assert self.receiver.is_complete
            assert not self.sender.failure


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    direction=st.sampled_from(Direction),
    settles_late=st.booleans(),
    faults=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_what_arrives_is_what_was_computed_and_pages_are_not_reused_too_soon(
    seed: int, direction: Direction, settles_late: bool, faults: float
) -> None:
    World(seed, direction, settles_late, faults).run()


def test_the_model_world_sees_both_ends() -> None:
    for direction in Direction:
        ends = {World(seed, direction, True, 0.05).run() for seed in range(20)}
        assert ends == {"complete", "failed"}


# --- with real endpoints and threads


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


# --- messages and slots


def pull_receiver(region: SharedMemory) -> Receiver:
    party = Party(layout_of(), region.address, b"", lambda endpoint: FakeLink(Any, RECEIVER))  # type: ignore[arg-type]
    receiver = Receiver(Direction.PULL, party, TARGET_PAGES)
    assert receiver.take(Offer(b"", layout_of())) == []
    return receiver


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Ready(LAYERS, 0, 1, bytes(16), [0]), "not asked for"),
        (Ready(0, -1, 1, bytes(16), [0]), "not asked for"),
        (Ready(0, BLOCKS - 1, 2, bytes(32), [0, 1]), "not asked for"),
        (Ready(0, 0, 0, b"", []), "not asked for"),
        (Ready(0, 0, 1, bytes(8), [0]), "checksums"),
        (Ready(0, 0, 1, bytes(16), [0, 1]), "places"),
        (Ready(0, 0, 1, bytes(16), [-1]), "places"),
        (Ready(0, 0, 1, bytes(8), [0], True), "encoded"),
        (Offer(b"", layout_of()), "second offer"),
    ],
)
def test_nonsense_stops_a_hand_off(message: Any, reason: str) -> None:
    receiver = pull_receiver(SharedMemory(PAGES * PAGE_BYTES))
    (answer,) = receiver.take(message)
    assert isinstance(answer, Stop)
    assert reason in receiver.failure
    assert receiver.is_settled


@pytest.mark.parametrize(
    ("layout", "pages", "reason"),
    [
        (Layout(1, PAGE_BYTES, [64], layout_of().offsets), TARGET_PAGES, "bytes"),
        (Layout(1, PAGE_BYTES, SIZES, layout_of().offsets[:2]), TARGET_PAGES, "layers"),
        (Layout(1, PAGE_BYTES, SIZES, [[0], [0], [0]]), TARGET_PAGES, "parts"),
        (Layout(1, -1, SIZES, layout_of().offsets), TARGET_PAGES, "offset"),
        (layout_of(), TARGET_PAGES[:-1], "pages"),
        (layout_of(), [*TARGET_PAGES[:-1], -1], "page"),
    ],
)
def test_pages_of_another_shape_are_refused(layout: Layout, pages: list[int], reason: str) -> None:
    memory = SharedMemory(PAGES * PAGE_BYTES)
    party = Party(layout_of(), memory.address, b"", lambda endpoint: FakeLink(Any, SENDER))  # type: ignore[arg-type]
    sender = Sender(Direction.PUSH, party, BLOCKS, lease_s=1.0)
    failed, ended = sender.take(Grant(b"", layout, pages))
    assert reason in getattr(failed, "reason", "")
    assert isinstance(ended, Ended)


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

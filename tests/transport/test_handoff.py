"""A hand-off brings exactly the sender's bytes into the receiver's pages, or fails; and pages are
never free while a writer may still write to them.

The two state machines are driven against a model world: moves that end when the test says so, late,
lost or damaged, over a link that settles only when it is closed (as UCX's), or at once; messages
that arrive later; processes that die at any point. After each step: what counts as arrived is what
the sender had computed, and no move under way touches memory that its owner believes free. Then
`Exchange` with real endpoints, links and threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.codec import aligned_buffer
from kvstore.errors import ConfigError, IncompatibleError, PeerUnavailableError
from kvstore.transport import Endpoint, SharedMemory, TransportSettings
from kvstore.transport.handoff import (
    Computed,
    Direction,
    Ended,
    Exchange,
    Failed,
    Grant,
    HandoffMessage,
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

    def submit_read(self, region_id: int, batch: Batch, *, timeout: float | None = None) -> FakeMove:
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


class World(RuleBasedStateMachine):
    """One hand-off, both processes, and everything between them."""

    @initialize(direction=st.sampled_from(Direction), settles_late=st.booleans())
    def begin(self, direction: Direction, settles_late: bool) -> None:
        self.direction, self.settles_late, self.link_settles = direction, settles_late, True
        rng = np.random.default_rng(1)
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
        self.dead: dict[int, float | None] = {SENDER: None, RECEIVER: None}
        self.is_freed = {SENDER: False, RECEIVER: False}
        self.had_fault = False
        self.ended = 0
        self.channels: dict[int, deque[HandoffMessage]] = {SENDER: deque(), RECEIVER: deque()}
        self.sender = Sender(direction, self.party(SENDER), BLOCKS, lease_s=100.0)
        self.receiver = Receiver(direction, self.party(RECEIVER), TARGET_PAGES)
        self.say(SENDER, self.sender.start())
        self.say(RECEIVER, self.receiver.start())

    def party(self, side: int) -> Party:
        def connect(endpoint: bytes) -> FakeLink:
            if self.dead[1 - side] is not None:
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
        return self.dead[side] is None

    @property
    def moves(self) -> list[FakeMove]:
        """Those that may still touch memory."""
        return [move for link in self.links for move in link.moves if not move.is_settled]

    # --- what the processes do

    @precondition(lambda self: self.is_alive(SENDER) and self.next[0] < LAYERS)
    @rule(size=st.integers(1, 3))
    def compute(self, size: int) -> None:
        layer, first = self.next
        if layer == 0:
            self.chunk = min(size, BLOCKS - first)
        end = first + self.chunk
        again = max(0, first - 1) if size == 2 else first  # a preempted one computes some again
        self.say(SENDER, self.sender.add(layer, again, SOURCE_PAGES[again:end]))
        is_last = layer == LAYERS - 1
        self.next = (layer + 1, first) if not is_last else (0, end)
        if is_last and end == BLOCKS:
            self.next = (LAYERS, BLOCKS)

    @rule()
    def sender_polls(self) -> None:
        if self.is_alive(SENDER):
            self.say(SENDER, self.sender.poll())

    @rule()
    def receiver_polls(self) -> None:
        if self.is_alive(RECEIVER):
            self.say(RECEIVER, self.receiver.poll())

    @precondition(lambda self: self.channels[SENDER] and self.is_alive(SENDER))
    @rule()
    def to_sender(self) -> None:
        message: Any = self.channels[SENDER].popleft()
        self.say(SENDER, self.sender.take(message))

    @precondition(lambda self: self.channels[RECEIVER] and self.is_alive(RECEIVER))
    @rule()
    def to_receiver(self) -> None:
        message: Any = self.channels[RECEIVER].popleft()
        self.say(RECEIVER, self.receiver.take(message))

    @precondition(lambda self: self.is_alive(RECEIVER) and self.channels[RECEIVER])
    @rule(chance=st.integers(0, 9))
    def receiver_gives_up(self, chance: int) -> None:
        if chance == 0:
            self.had_fault = True
            self.say(RECEIVER, self.receiver.abandon("as the test says"))

    @precondition(lambda self: self.is_alive(SENDER))
    @rule(chance=st.integers(0, 19))
    def sender_gives_up(self, chance: int) -> None:
        if chance == 0:
            self.had_fault = True
            self.say(SENDER, self.sender.stop("as the test says"))

    # --- what the network does

    def pick(self, index: int) -> FakeMove | None:
        """One that its owner waits for."""
        waited = [m for m in self.moves if m.statuses is None and self.is_alive(m.link.owner)]
        return waited[index % len(waited)] if waited else None

    @rule(index=st.integers(0, 9))
    def move_ends_well(self, index: int) -> None:
        move = self.pick(index)
        if move is not None and self.is_alive(1 - move.link.owner):
            move.copy()
            move.end(move.verdict())

    @rule(index=st.integers(0, 9), is_noticed=st.booleans(), chance=st.integers(0, 2))
    def move_arrives_damaged(self, index: int, is_noticed: bool, chance: int) -> None:
        move = self.pick(index)
        if move is not None and chance == 0:
            self.had_fault = True
            move.copy(flip=True)
            move.end(Status.DAMAGED if is_noticed else Status.OK)

    @rule(
        index=st.integers(0, 9),
        status=st.sampled_from([Status.LOST, Status.LATE, Status.REFUSED]),
        chance=st.integers(0, 2),
    )
    def move_fails(self, index: int, status: Status, chance: int) -> None:
        move = self.pick(index)
        if move is not None and chance == 0:
            self.had_fault = True
            move.end(status)

    @rule(index=st.integers(0, 9))
    def straggler_writes(self, index: int) -> None:
        """A move that nobody waits for, but that is not settled, still does its work."""
        moves = [move for move in self.moves if self.may_write(move)]
        if moves:
            moves[index % len(moves)].copy()

    def may_write(self, move: FakeMove) -> bool:
        died = self.dead[move.link.owner]
        if died is None:
            return True
        return move.is_write and self.now < died + GRACE

    @precondition(lambda self: self.settles_late)
    @rule(settles=st.booleans())
    def links_settle_or_not(self, settles: bool) -> None:
        self.link_settles = settles

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.is_alive(SENDER) and self.is_alive(RECEIVER))
    @rule(side=st.sampled_from([SENDER, RECEIVER]), chance=st.integers(0, 19))
    def process_dies(self, side: int, chance: int) -> None:
        if chance == 0:
            self.had_fault = True
            self.dead[side] = self.now

    @rule()
    def death_is_told(self) -> None:
        if not self.is_alive(SENDER) and self.is_alive(RECEIVER):
            self.receiver.sender_lost()
        elif not self.is_alive(RECEIVER) and self.is_alive(SENDER):
            self.say(SENDER, self.sender.receiver_lost())

    @rule()
    def free_pages_are_used_for_something_else(self) -> None:
        if self.sender.is_over and self.is_alive(SENDER):
            self.is_freed[SENDER] = True
            self.memories[SENDER][:] = 0xAA
        if self.receiver.is_settled and self.is_alive(RECEIVER):
            self.is_freed[RECEIVER] = True

    # --- what holds

    @invariant()
    def free_pages_are_not_touched(self) -> None:
        for move in self.moves:
            if not self.may_write(move):
                continue
            if self.receiver.is_settled and self.is_alive(RECEIVER):
                assert not move.pages_of(RECEIVER) & set(TARGET_PAGES)
            if self.sender.is_over and self.is_alive(SENDER) and move.is_write:
                assert not move.pages_of(SENDER) & set(SOURCE_PAGES)

    @invariant()
    def what_has_arrived_is_what_was_computed(self) -> None:
        if self.is_freed[RECEIVER] or not self.is_alive(RECEIVER):
            return
        whole = self.receiver.layers_ready
        blocks = self.receiver.blocks_ready
        for (layer, block), expected in self.original.items():
            if layer < whole or block < blocks:
                page = TARGET_PAGES[block]
                got = layer_bytes(self.memories[RECEIVER], self.layouts[RECEIVER], layer, page)
                assert got == expected, (layer, block)

    @invariant()
    def it_ends_once(self) -> None:
        if self.is_alive(RECEIVER):
            assert self.ended == int(self.sender.is_over)

    def teardown(self) -> None:
        """Left alone, everything comes to its end."""
        if not hasattr(self, "sender"):
            return
        self.link_settles = True
        for _ in range(200):
            if self.next[0] < LAYERS and self.is_alive(SENDER):
                self.compute(1)
            self.death_is_told()
            for side, take in ((SENDER, self.to_sender), (RECEIVER, self.to_receiver)):
                while self.channels[side] and self.is_alive(side):
                    take()
            for index in range(len(self.moves)):
                self.move_ends_well(index)
            for move in self.moves:
                if move.statuses is None and not self.is_alive(1 - move.link.owner):
                    move.end(Status.LOST)
            self.sender_polls()
            self.receiver_polls()
            self.free_pages_are_not_touched()
            self.what_has_arrived_is_what_was_computed()
        self.now += GRACE
        self.receiver_polls()
        if self.is_alive(RECEIVER):
            assert self.receiver.is_settled
            assert self.receiver.is_complete or self.receiver.failure
            if not self.had_fault:
                assert self.receiver.is_complete
        if self.is_alive(SENDER):
            assert self.sender.is_over or not self.is_alive(RECEIVER)
            if not self.had_fault:
                assert not self.sender.failure


World.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestOneHandoff = World.TestCase

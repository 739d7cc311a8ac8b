"""A model world of one hand-off: both processes, their messages, moves that end when it says so."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import PeerUnavailableError
from kvstore.transport.handoff import (
    Direction,
    Ended,
    HandoffMessage,
    Layout,
    Party,
    Receiver,
    Sender,
)
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

"""A hand-off brings exactly the sender's bytes into the receiver's pages, or fails; and pages are
never free while a writer may still write to them.

The two state machines are driven against a model world: moves that end when the test says so, late,
lost or damaged, over a link that settles only when it is closed (as UCX's), or at once; messages
that arrive later; processes that die at any point. After each step: what counts as arrived is what
the sender had computed, and no move under way touches memory that its owner believes free. What no
sound peer would say ends a hand-off, and nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.transport import SharedMemory
from kvstore.transport.handoff import (
    Direction,
    Ended,
    Grant,
    Layout,
    Offer,
    Party,
    Ready,
    Receiver,
    Sender,
    Stop,
)
from tests.transport.handoff_world import (
    BLOCKS,
    LAYERS,
    PAGE_BYTES,
    PAGES,
    RECEIVER,
    SENDER,
    SIZES,
    TARGET_PAGES,
    FakeLink,
    World,
    layout_of,
)


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


# --- what peers may say


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

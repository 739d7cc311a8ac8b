"""Pieces of device memory arrive whole through pinned memory of any size, and a send that fails, or
a device that does not copy, leaves the next one in order. The device is host memory that behaves
like a GPU's."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import DeadlineExceededError, _native
from kvstore.gpu.host_device import HostDevice
from kvstore.transport import Status
from kvstore_adapters.sglang.staging import Staging, rounds
from tests.transport.peer import pattern

U64s = npt.NDArray[np.uint64]
SIZE = 1 << 16


def copy(sources: U64s, targets: U64s, lengths: U64s) -> npt.NDArray[np.uint8]:
    return _native.move_pieces(targets, sources, lengths, None, 1, 10.0)


class Setup:
    def __init__(self, half_bytes: int) -> None:
        self.device = HostDevice()
        self.source, self.target = pattern(3, SIZE), np.zeros(SIZE, np.uint8)
        self.device.adopt(self.source)
        self.staging = Staging(self.device, half_bytes)

    def send(self, begins: list[int], lengths: list[int], send: object = copy) -> list[int]:
        """Each piece goes to where it came from."""
        offsets, sizes = np.array(begins, np.uint64), np.array(lengths, np.uint64)
        return list(
            self.staging.send(
                offsets + np.uint64(self.source.ctypes.data),
                offsets + np.uint64(self.target.ctypes.data),
                sizes,
                send,  # type: ignore[arg-type]
                time.monotonic() + 10,
            )
        )

    def expected(self, begins: list[int], lengths: list[int]) -> npt.NDArray[np.uint8]:
        found = np.zeros(SIZE, np.uint8)
        for begin, length in zip(begins, lengths, strict=True):
            found[begin : begin + length] = self.source[begin : begin + length]
        return found


@settings(max_examples=30, deadline=None)
@given(
    st.integers(200, 9000),
    st.lists(st.tuples(st.integers(0, SIZE - 9000), st.integers(1, 9000)), min_size=1, max_size=12),
)
def test_pieces_arrive_whole(half_bytes: int, pieces: list[tuple[int, int]]) -> None:
    begins, lengths = (list(column) for column in zip(*pieces, strict=True))
    parts = list(rounds(np.array(lengths, np.uint64), half_bytes))
    assert all(int(part.lengths.sum()) == half_bytes for part in parts[:-1])
    setup = Setup(half_bytes)
    assert setup.send(begins, lengths) == [Status.OK] * len(pieces)
    assert (setup.target == setup.expected(begins, lengths)).all()
    setup.staging.close()


def test_a_send_that_fails_ends_it_and_the_next_is_whole() -> None:
    setup = Setup(1000)
    calls = []

    def fail_at_second(sources: U64s, targets: U64s, lengths: U64s) -> npt.NDArray[np.uint8]:
        calls.append(len(lengths))
        statuses = copy(sources, targets, lengths)
        if len(calls) == 2:
            statuses[0] = Status.LOST
        return statuses

    begins, lengths = [0, 2000, 4000, 6000], [900, 900, 900, 900]
    found = setup.send(begins, lengths, fail_at_second)
    assert found == [Status.OK, Status.LOST, Status.CANCELLED, Status.CANCELLED]
    assert len(calls) == 2
    assert setup.send(begins, lengths) == [Status.OK] * 4
    assert (setup.target == setup.expected(begins, lengths)).all()


def test_a_send_that_raises_leaves_the_next_in_order() -> None:
    setup = Setup(1000)

    def refuse(sources: U64s, targets: U64s, lengths: U64s) -> npt.NDArray[np.uint8]:
        raise ValueError("nobody there")

    with pytest.raises(ValueError, match="nobody there"):
        setup.send([0, 2000], [1500, 1500], refuse)
    assert setup.send([0, 2000], [1500, 1500]) == [Status.OK] * 2
    assert (setup.target == setup.expected([0, 2000], [1500, 1500])).all()


def test_a_device_that_hangs_costs_the_deadline() -> None:
    class Hung(HostDevice):
        def advance(self, only: int | None = None) -> bool:
            return False

    device = Hung(late=True)
    source = pattern(3, SIZE)
    device.adopt(source)
    staging = Staging(device, 1000)
    one = np.array([source.ctypes.data], np.uint64)
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="did not copy"):
        staging.send(one, one, np.array([100], np.uint64), copy, began + 0.05)
    assert time.monotonic() - began < 5

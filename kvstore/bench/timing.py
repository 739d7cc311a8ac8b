"""Timing things in turn, so that a machine whose speed drifts treats all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


def in_turn(calls: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Seconds]:
    """Call each of `calls` once a round with the round's number; return seconds by name.

    Every other round goes backwards, so that none always runs behind the same neighbour.
    """
    taken = {name: np.empty(rounds) for name in calls}
    names = list(calls)
    clock = time.perf_counter
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            call = calls[name]
            begin = clock()
            call(number)
            taken[name][number] = clock() - begin
    return taken


def median(seconds: Seconds) -> float:
    return float(np.median(seconds))


def speedup(ours: Seconds, theirs: Seconds) -> float:
    """How many times as fast ours is: the median over rounds of theirs / ours."""
    return float(np.median(theirs / ours))


@dataclass(frozen=True)
class Scale:
    """How much to measure. A full run takes about three minutes and 3 GiB of memory."""

    quick: bool = False

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full

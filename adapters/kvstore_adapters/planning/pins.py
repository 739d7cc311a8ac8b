"""Pins: the engine blocks that saves under way read from, and so must stay as they are.

A save pins its source blocks from the step that starts it until every rank has reported it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .plan import BlockMove, SaveJob, StepReport


@dataclass(slots=True)
class EndedSave:
    """A save that all ranks are done with: its source blocks are not read any more.

    Args:
        num_stored: blocks, leading in the order of the moves, that every rank has in the store.
    """

    job: SaveJob
    block_ids: list[int]
    num_stored: int


@dataclass(slots=True)
class _Pin:
    job: SaveJob
    block_ids: list[int]
    ranks_left: int
    num_stored: int


class Pins:
    """Not thread-safe. Invariant: num_blocks <= max_blocks."""

    def __init__(self, max_blocks: int, num_ranks: int) -> None:
        self.max_blocks = max_blocks
        self.num_blocks = 0
        self._num_ranks = num_ranks
        self._pins: dict[int, _Pin] = {}
        self._num_jobs = 0
        self._started: list[int] = []

    def __len__(self) -> int:
        """Saves under way."""
        return len(self._pins)

    @property
    def room(self) -> int:
        """Blocks that may be pinned besides."""
        return self.max_blocks - self.num_blocks

    def jobs(self) -> Iterator[int]:
        """Yield the ids of saves under way."""
        return iter(self._pins)

    def blocks(self) -> Iterator[int]:
        """Yield the pinned blocks; one that several saves hold comes as often."""
        return (block for pin in self._pins.values() for block in pin.block_ids)

    def start(self, request_id: str, moves: Sequence[BlockMove], push_to: str) -> SaveJob:
        """Make a job of `moves`, at least one, and pin their blocks.

        REQUIRES: there is room for them.
        """
        job = SaveJob(self._num_jobs, request_id, list(moves), push_to)
        self._num_jobs += 1
        ids = moves[0].block_ids.tolist()
        for move in moves[1:]:
            ids += move.block_ids.tolist()
        self._started += ids
        self._pins[job.job_id] = _Pin(job, ids, self._num_ranks, len(ids))
        self.num_blocks += len(ids)
        return job

    def take_started(self) -> list[int]:
        """Return the blocks of jobs that were started since the last call."""
        started, self._started = self._started, []
        return started

    def report(self, report: StepReport) -> list[EndedSave]:
        """Return the saves that ended with this report, each once."""
        for job_id, count in report.stored.items():
            pin = self._pins.get(job_id)
            if pin is not None:
                pin.num_stored = min(pin.num_stored, count)
        ended = []
        for job_id, ranks in report.saved.items():
            pin = self._pins.get(job_id)
            if pin is None:
                continue
            pin.ranks_left -= ranks
            if pin.ranks_left <= 0:
                del self._pins[job_id]
                self.num_blocks -= len(pin.block_ids)
                ended.append(EndedSave(pin.job, pin.block_ids, pin.num_stored))
        return ended

"""What crosses from the scheduler to the workers and back: plain data, which engines may pickle.

The scheduler side names blocks by their hashes, so that a worker needs nothing of a request but its
id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore import BlockHashes

_HASH_BYTES = 32
_Key = TypeVar("_Key")


@dataclass(slots=True)
class BlockMove:
    """Blocks of one group: block i of `chain()` is, or becomes, the engine's `block_ids[i]`.

    Args:
        hashes: 32 bytes a block, joined.
        first: the first block's place in its chain.
        parent: the hash before the first block; None at the root.
        is_linked: whether the blocks know their chain.
    """

    group_id: int
    hashes: bytes
    first: int
    parent: bytes | None
    is_linked: bool
    block_ids: npt.NDArray[np.int64]

    @classmethod
    def of(cls, group_id: int, first: int, chain: BlockHashes, block_ids: object) -> BlockMove:
        ids = np.asarray(block_ids, dtype=np.int64)
        return cls(group_id, chain.array.tobytes(), first, chain.parent, chain.linked, ids)

    def chain(self) -> BlockHashes:
        rows = np.frombuffer(self.hashes, dtype=np.uint8).reshape(-1, _HASH_BYTES)
        return BlockHashes(rows, self.first, self.parent) if self.is_linked else BlockHashes(rows)

    def __len__(self) -> int:
        return len(self.block_ids)


@dataclass(slots=True)
class LoadJob:
    """Load a request's blocks: all that its computed tokens then rest on, one move a group.

    `holders`: daemons that may have what ours has not.
    """

    request_id: str
    moves: list[BlockMove]
    is_async: bool
    holders: tuple[str, ...] = ()


@dataclass(slots=True)
class SaveJob:
    """Save computed blocks, which nobody changes until every rank has reported the job.

    `push_to` names the target of settings that gets them too.
    """

    job_id: int
    request_id: str
    moves: list[BlockMove]
    push_to: str = ""

    @property
    def num_blocks(self) -> int:
        return sum(len(move) for move in self.moves)


@dataclass(slots=True)
class StepPlan:
    """What one step starts."""

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.loads or self.saves)


@dataclass(slots=True)
class StepReport:
    """What ended since the last report, on one worker or merged over several.

    Args:
        saved: job -> ranks that are done with it, stored or not: its source blocks are free.
        stored: job -> fewest blocks, leading in the order of its moves, that are in the store.
        failed: request -> tokens of its load that arrived, leading, in all groups. Only requests
            whose load was incomplete.
    """

    saved: dict[int, int] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def merge(self, other: StepReport) -> StepReport:
        """Both as one: counts of ranks add up, and of the rest the least counts."""
        saved = dict(self.saved)
        for job, ranks in other.saved.items():
            saved[job] = saved.get(job, 0) + ranks
        return StepReport(
            saved, _least(self.stored, other.stored), _least(self.failed, other.failed)
        )

    def __bool__(self) -> bool:
        return bool(self.saved or self.stored or self.failed)


def _least(one: dict[_Key, int], other: dict[_Key, int]) -> dict[_Key, int]:
    least = dict(one)
    for key, value in other.items():
        least[key] = min(value, least.get(key, value))
    return least

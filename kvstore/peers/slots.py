"""Slots: room in our own arena for blocks that come from peers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.control import NO_SPACE, ORPHAN, PENDING, PRESENT, RESERVED

U64s = npt.NDArray[np.uint64]
__all__ = ["NO_SPACE", "ORPHAN", "PENDING", "PRESENT", "RESERVED", "Piece", "Slots"]


@dataclass(eq=False, slots=True)
class Piece:
    """Blocks of one reservation, on their way here. Belongs to one thread at a time.

    `ok[i]` is set once block i is whole; until `Slots.end` it can be tried again.
    """

    begin: int  # of its run, in the flight's chain
    hashes: BlockHashes  # the run
    places: npt.NDArray[np.int64]  # in the run, of the blocks that are fetched
    reservation: int
    addresses: U64s
    ok: npt.NDArray[np.bool_]
    checksums: U64s
    tried: set[str] = field(default_factory=set)  # holders that failed it

    def missing(self) -> npt.NDArray[np.intp]:
        return np.flatnonzero(~self.ok)

    @property
    def first_missing(self) -> int:
        """Where in the flight's chain; REQUIRES: one is missing."""
        return self.begin + int(self.places[self.missing()[0]])


class Slots:
    """One namespace of the core of this process, as a fetch writes to it. Thread-safe."""

    def __init__(
        self, core: _native.StoreCore, owner: int, number: int, arena_address: int
    ) -> None:
        self._core = core
        self._owner = owner
        self._number = number
        self._base = np.uint64(arena_address)
        self.block_bytes = core.block_bytes(number)

    def reserve(self, begin: int, run: BlockHashes) -> tuple[Piece | None, npt.NDArray[np.uint8]]:
        """Return a piece of the blocks that got a slot, and a status for each of the run."""
        reservation, statuses, offsets = self._core.reserve(
            self._owner, self._number, run.array, run.start, run.parent, False
        )
        if not reservation:
            return None, statuses
        places = np.flatnonzero(statuses == RESERVED)
        count = len(places)
        piece = Piece(
            begin,
            run,
            places,
            reservation,
            offsets[places] + self._base,
            np.zeros(count, bool),
            np.zeros(count, np.uint64),
        )
        return piece, statuses

    def end(self, piece: Piece) -> None:
        """Publish the blocks that are whole, and give the room of the others back."""
        self._core.commit(self._owner, piece.reservation, piece.checksums, piece.ok)

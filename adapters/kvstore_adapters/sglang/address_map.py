"""AddressMap: in which registered region addresses lie. SGLang names memory by address, the
transport by region and offset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.uint64]


class Range(Protocol):
    """Region and RegionInfo are such."""

    @property
    def region_id(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class Rows(NamedTuple):
    """The pieces of a batch that lie in one region: their places in the batch, and their offsets in
    the region."""

    region_id: int
    rows: npt.NDArray[np.intp]
    offsets: Addresses


class AddressMap:
    """Does not change once made. Regions may overlap, as buffers that are views of another do."""

    def __init__(self, regions: Iterable[Range]) -> None:
        ordered = sorted(regions, key=lambda one: (one.address, one.num_bytes))
        self._ids = [one.region_id for one in ordered]
        self._starts = np.array([one.address for one in ordered], np.uint64)
        self._ends = np.array([one.address + one.num_bytes for one in ordered], np.uint64)

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, addresses: Addresses, lengths: Addresses) -> npt.NDArray[np.intp]:
        """Return for each piece the place of a region that holds all of it, -1 for none."""
        if not self._ids:
            return np.full(len(addresses), -1, np.intp)
        found = np.searchsorted(self._starts, addresses, side="right").astype(np.intp) - 1
        found[~self._holds(found, addresses, lengths)] = -1
        for row in np.flatnonzero(found < 0):  # few: where a region lies within another
            at = np.arange(len(self._ids))
            holding = np.flatnonzero(self._holds(at, addresses[row], lengths[row]))
            if len(holding):
                found[row] = holding[0]
        return found

    def split(self, found: npt.NDArray[np.intp], addresses: Addresses) -> list[Rows]:
        """Return the pieces by region, in the order they came. `found`: of `find`, without -1."""
        if not len(found):
            return []
        order = np.argsort(found, kind="stable")
        places, begins = np.unique(found[order], return_index=True)
        return [
            Rows(self._ids[place], rows, addresses[rows] - self._starts[place])
            for place, rows in zip(places, np.split(order, begins[1:]), strict=True)
        ]

    def _holds(
        self, places: npt.NDArray[np.intp], addresses: Addresses, lengths: Addresses
    ) -> npt.NDArray[np.bool_]:
        # Differences, not sums: those of nonsense would wrap around.
        starts, ends = self._starts[places], self._ends[places]
        begins_inside = (places >= 0) & (starts <= addresses) & (addresses <= ends)
        return begins_inside & (lengths <= ends - addresses)

"""Addresses are found in the regions that hold them, as by looking at one region after another, and
nonsense in none."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore_adapters.sglang.address_map import AddressMap


class Region(NamedTuple):
    region_id: int
    address: int
    num_bytes: int


_sizes = st.integers(1, 64)
_regions = st.lists(st.tuples(st.integers(1, 300), _sizes), max_size=8).map(
    lambda found: [Region(7 + i, address, size) for i, (address, size) in enumerate(found)]
)
_pieces = st.lists(
    st.tuples(st.integers(0, 400) | st.integers(0, 2**64 - 1), _sizes | st.just(2**64 - 1)),
    min_size=1,
    max_size=20,
)


@given(_regions, _pieces)
def test_found_are_those_that_lie_within_one_region(
    regions: list[Region], pieces: list[tuple[int, int]]
) -> None:
    addresses, lengths = (np.array(column, np.uint64) for column in zip(*pieces, strict=True))
    by_address = AddressMap(regions)
    found = by_address.find(addresses, lengths)

    def holding(address: int, length: int) -> set[int]:
        return {
            one.region_id
            for one in regions
            if one.address <= address and address + length <= one.address + one.num_bytes
        }

    allowed = [holding(address, length) for address, length in pieces]
    assert [place >= 0 for place in found] == [bool(ids) for ids in allowed]

    known = np.flatnonzero(found >= 0)
    seen = []
    for region_id, rows, offsets in by_address.split(found[known], addresses[known]):
        (region,) = (one for one in regions if one.region_id == region_id)
        for row, offset in zip(known[rows], offsets, strict=True):
            assert region_id in allowed[row]
            assert region.address + int(offset) == int(addresses[row])
            seen.append(row)
    assert sorted(seen) == list(known)


def test_without_regions_nothing_is_found() -> None:
    one = np.array([5], np.uint64)
    assert AddressMap(()).find(one, one).tolist() == [-1]

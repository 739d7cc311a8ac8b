"""Which prefixes several pools can restore together, against the definition read aloud.

Needs no SGLang: the policies are functions of which pages are present.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_adapters.sglang.hit_policies import (
    all_pages,
    block_groups,
    leading,
    trailing_pages,
)

PAGES = st.lists(st.booleans(), max_size=24)


@given(PAGES)
@settings(max_examples=100)
def test_leading_pages_end_at_the_first_that_is_missing(present: list[bool]) -> None:
    count = leading(np.array(present, np.bool_))
    assert all(present[:count])
    assert count == len(present) or not present[count]


@given(PAGES)
@settings(max_examples=100)
def test_all_pages_needs_each(present: list[bool]) -> None:
    flags = all_pages(np.array(present, np.bool_))
    assert flags.tolist() == [all(present[:n]) for n in range(1, len(present) + 1)]


@given(PAGES, st.integers(1, 30))
@settings(max_examples=100)
def test_trailing_pages_needs_the_last_ones(present: list[bool], window: int) -> None:
    flags = trailing_pages(np.array(present, np.bool_), window)
    wanted = [all(present[max(0, n - window) : n]) for n in range(1, len(present) + 1)]
    assert flags.tolist() == wanted


@given(PAGES, st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=100)
def test_block_groups_counts_leading_blocks_whose_last_pages_are_there(
    present: list[bool], block_pages: int, group_pages: int
) -> None:
    covered = block_groups(np.array(present, np.bool_), block_pages, group_pages)
    if not 1 <= group_pages <= block_pages:
        assert covered == 0
        return
    wanted = 0
    while wanted + block_pages <= len(present) and all(
        present[wanted + block_pages - group_pages : wanted + block_pages]
    ):
        wanted += block_pages
    assert covered == wanted

"""Groups: the longest prefix that all of them hold is what the definition says it is.

`hit_tokens` is compared with a loop that follows the definition word by word, on random groups and
residencies; `needed_blocks` with the tokens that a window sees.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import ConfigError
from kvstore_adapters.planning.groups import Group, hit_tokens, needed_blocks

BLOCK = 4


def visible_blocks(group: Group, end: int) -> set[int]:
    """Blocks that hold a token before `end` which the token at `end` attends to."""
    first = 0 if group.kind == "full" else max(0, end - group.window_tokens + 1)
    return {token // group.block_tokens for token in range(first, end)}


def longest_prefix(groups: list[Group], present: list[list[bool]], limit: int) -> int:
    step = math.lcm(*(g.block_tokens for g in groups))
    for end in range(limit // step * step, 0, -step):
        if all(
            end <= len(there) * group.block_tokens
            and all(there[block] for block in visible_blocks(group, end))
            for group, there in zip(groups, present, strict=True)
        ):
            return end
    return 0


@st.composite
def group(draw: st.DrawFn) -> Group:
    tokens = draw(st.sampled_from([BLOCK, 2 * BLOCK, 3 * BLOCK]))
    if draw(st.booleans()):
        return Group(0, tokens, "full")
    return Group(0, tokens, "window", draw(st.integers(1, 6 * BLOCK)))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_the_hit_is_the_longest_prefix_that_the_definition_allows(data: st.DataObject) -> None:
    groups = data.draw(st.lists(group(), min_size=1, max_size=3))
    present = [
        data.draw(st.lists(st.sampled_from([True, True, True, False]), max_size=16)) for _ in groups
    ]
    limit = data.draw(st.integers(0, 80))
    arrays = [np.array(there, dtype=np.bool_) for there in present]
    assert hit_tokens(groups, arrays, limit) == longest_prefix(groups, present, limit)


@given(group(), st.integers(0, 12), st.integers(0, 12))
def test_blocks_that_the_next_token_sees_are_needed_and_no_others(
    of: Group, begin: int, more: int
) -> None:
    end = (begin + more) * of.block_tokens
    needed = needed_blocks(of, begin * of.block_tokens, end)
    assert set(needed) == {block for block in visible_blocks(of, end) if block >= begin}


def test_no_groups_hold_nothing() -> None:
    assert hit_tokens([], [], 100) == 0


def test_a_window_group_needs_its_window_and_a_full_group_none() -> None:
    with pytest.raises(ConfigError, match="window_tokens"):
        Group(0, 16, "window")
    with pytest.raises(ConfigError, match="window_tokens"):
        Group(0, 16, "full", 128)
    with pytest.raises(ConfigError, match="block_tokens"):
        Group(0, 0, "full")

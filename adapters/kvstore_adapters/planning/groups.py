"""Groups of layers that share block tables, and how much of a prompt they hold together.

A model's layers fall into groups: those of one group keep KV for the same tokens in blocks of the
same number of tokens. Full attention needs every block of a prefix. A sliding window needs only the
blocks that its last token still sees, so a prefix can be there in a window group though its early
blocks are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvstore import ConfigError


@dataclass(frozen=True, slots=True)
class Group:
    """One group of layers.

    Args:
        group_id: the engine's number for it.
        block_tokens: tokens of a block.
        kind: "full", or "window" where a token attends to the `window_tokens` tokens that end with
            itself.

    Raises:
        ConfigError: a number is not positive, or a window is missing or not wanted.
    """

    group_id: int
    block_tokens: int
    kind: Literal["full", "window"]
    window_tokens: int = 0

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ConfigError(f"block_tokens: {self.block_tokens} is not positive")
        if (self.window_tokens > 0) != (self.kind == "window"):
            raise ConfigError(
                f"window_tokens: {self.window_tokens} does not fit the kind {self.kind!r}"
            )


def alignment_tokens(groups: Sequence[Group]) -> int:
    """The fewest tokens that are whole blocks in every group: prefixes are multiples of it."""
    return math.lcm(*(group.block_tokens for group in groups))


def hit_tokens(
    groups: Sequence[Group], present: Sequence[npt.NDArray[np.bool_]], limit_tokens: int
) -> int:
    """Return the longest prefix, in tokens, whose needed blocks are present in every group.

    A prefix is a multiple of every group's block_tokens and at most `limit_tokens`. `present[i]`
    says of each leading block of `groups[i]` whether it is there; blocks beyond are not.
    """
    if not groups:
        return 0
    step = alignment_tokens(groups)
    known = min(len(p) * g.block_tokens for g, p in zip(groups, present, strict=True))
    ends = np.arange(step, min(known, limit_tokens) + 1, step)
    good = np.ones(len(ends), dtype=np.bool_)
    for group, there in zip(groups, present, strict=True):
        absent_before = np.concatenate(([0], np.cumsum(~there)))
        firsts = np.zeros_like(ends)
        if group.kind == "window":
            firsts = np.maximum(ends - group.window_tokens + 1, 0) // group.block_tokens
        good &= absent_before[ends // group.block_tokens] == absent_before[firsts]
    best = np.flatnonzero(good)
    return int(ends[best[-1]]) if len(best) else 0


def needed_blocks(group: Group, begin_tokens: int, end_tokens: int) -> range:
    """Return the blocks to load so that the tokens [0, end) count as computed when [0, begin) do.

    A window needs only those that hold its last window_tokens - 1 tokens before `end_tokens`: what
    the next token sees besides itself. Both numbers are multiples of the group's block_tokens.
    """
    first = begin_tokens
    if group.kind == "window":
        first = max(first, end_tokens - group.window_tokens + 1)
    end = end_tokens // group.block_tokens
    return range(min(first // group.block_tokens, end), end)

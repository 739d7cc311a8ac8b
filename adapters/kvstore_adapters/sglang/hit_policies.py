"""How far a prefix can be restored when several pools must hold parts of it.

Pure functions of which pages each pool has. A prefix of n pages is restorable when the main pool
has all n, and each other pool what its policy asks for:

- ALL_PAGES: all n.
- TRAILING_PAGES: the last few, as many as the transfer names (a window, or one state).
- BLOCK_GROUPS: nothing; the pool reports how many pages its leading complete groups cover.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]


def leading(present: Flags) -> int:
    """How many leading pages are present."""
    missing = np.flatnonzero(~present)
    return int(missing[0]) if missing.size else len(present)


def all_pages(present: Flags) -> Flags:
    """For n = 1, 2, ...: whether the first n pages are all present."""
    return np.arange(len(present)) < leading(present)


def trailing_pages(present: Flags, window: int) -> Flags:
    """For n = 1, 2, ...: whether the last `window` of the first n pages are all present."""
    missing = np.concatenate(([0], np.cumsum(~present)))
    ends = np.arange(1, len(present) + 1)
    flags: Flags = missing[ends] == missing[np.maximum(0, ends - window)]
    return flags


def block_groups(present: Flags, block_pages: int, group_pages: int) -> int:
    """How many pages the leading complete groups cover.

    Each block of `block_pages` pages has a group: the `group_pages` pages that end with it.
    """
    if block_pages < 1 or not 1 <= group_pages <= block_pages:
        return 0
    count = len(present) // block_pages
    blocks = present[: count * block_pages].reshape(count, block_pages)
    complete: Flags = np.all(blocks[:, block_pages - group_pages :], axis=1)
    return leading(complete) * block_pages

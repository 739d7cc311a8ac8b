"""How the kernels of csrc/cuda/block_copy.cu are launched: their grid, and their parameters."""

from __future__ import annotations

from ctypes import c_uint, c_ulonglong, c_void_p
from typing import Any, NamedTuple

import numpy as np

from kvstore.gpu.device import Addresses, word_bytes

THREADS = 256  # kThreads and kWords there
WORDS = 4


class Shape(NamedTuple):
    """Of a launch: bytes of a word, and thread blocks for each block."""

    width: int
    tiles: int


def launch_shape(alignment: int, addresses: Addresses, begin: int, end: int) -> Shape | None:
    """How to copy payload bytes [begin, end) of the blocks at `addresses`; None: nothing to do."""
    if len(addresses) == 0 or begin == end:
        return None
    width = word_bytes(alignment, begin, end, int(np.bitwise_or.reduce(addresses)))
    return Shape(width, -(-(end - begin) // (width * THREADS * WORDS)))


def parameters_of(
    runs: int,
    num_runs: int,
    table: int,
    ids: int,
    blocks: int,
    payload: tuple[int, int],
    tiles: int,
) -> tuple[Any, ...]:
    """The kernels' parameters, in their order and of their types."""
    return (
        c_void_p(runs),
        c_uint(num_runs),
        c_void_p(table),
        c_void_p(ids),
        c_void_p(blocks),
        c_ulonglong(payload[0]),
        c_ulonglong(payload[1]),
        c_uint(tiles),
    )

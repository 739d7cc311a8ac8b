"""PieceBuffers: blocks whose bytes lie wherever an engine's pointers say."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import ConfigError
from kvstore.layout import BlockBuffers

PIECES = "pieces"


class PieceBuffers(BlockBuffers):
    """Blocks for engines that hand over raw pointers: block i is the concatenation of the k pieces
    of memory at `addresses[i]`.

    Made for each call or kept, as the engine likes: making one takes time in proportion to the
    number of pieces, and pieces that lie alike in all blocks are copied as fast as from a tensor.
    """

    def __init__(
        self,
        addresses: object,
        sizes: object,
        keepalive: object = None,
        writable: bool = True,
    ) -> None:
        """
        Args:
            addresses: shape (n, k), integers.
            sizes: bytes of each of the k pieces, the same for all blocks; shape (k,).
            keepalive: what owns the memory, if its owner could let go of it before these buffers.
            writable: whether blocks may be loaded into that memory. If not, pieces may overlap.

        Raises:
            ConfigError: a null address, an empty piece, overlapping pieces, or wrong shapes.
        """
        where = _unsigned("addresses", addresses, 2)
        lengths = _unsigned("sizes", sizes, 1)
        try:
            plan = _native.CopyPlan.scattered(where, lengths, writable=writable)
        except ValueError as error:
            raise ConfigError(f"addresses: {error}") from error
        super().__init__(plan, PIECES, keepalive)


def _unsigned(name: str, values: object, num_dimensions: int) -> npt.NDArray[np.uint64]:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{name}: {error}") from error
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name}: need integers, got {array.dtype}")
    if array.ndim != num_dimensions:
        raise ConfigError(f"{name}: need {num_dimensions} dimensions, got {array.ndim}")
    if array.dtype.kind == "i" and array.size and array.min() < 0:
        raise ConfigError(f"{name}: {array.min()} is negative")
    return np.ascontiguousarray(array, np.uint64)

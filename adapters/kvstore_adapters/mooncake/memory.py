"""Memory of an engine, given as numbers: what of it we may touch, and values as pieces of it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import threading
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

_Addresses = npt.NDArray[np.uint64]


logger = logging.getLogger(__name__)


def bytes_of(value: Any) -> npt.NDArray[np.uint8]:
    """Raises TypeError for what has no bytes, as Mooncake does."""
    view = memoryview(value)
    return np.frombuffer(view.cast("B") if view.c_contiguous else view.tobytes(), np.uint8)


class Pieces(NamedTuple):
    """The memory of one value: it is the concatenation of these pieces."""

    addresses: Sequence[int]
    sizes: Sequence[int]

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    def is_sound(self) -> bool:
        """Whether this can be the memory of a value at all. Empty pieces are none."""
        return (
            len(self.addresses) == len(self.sizes)
            and all(size >= 0 for size in self.sizes)
            and all(
                0 < at < at + size <= 1 << 64
                for at, size in zip(self.addresses, self.sizes, strict=True)
                if size
            )
            and self.num_bytes > 0
        )

    def leading(self, num_bytes: int) -> Pieces:
        """The pieces of the first `num_bytes` bytes, without empty ones."""
        addresses, sizes = [], []
        for at, size in zip(self.addresses, self.sizes, strict=True):
            taken = min(size, num_bytes)
            if taken:
                addresses.append(at)
                sizes.append(taken)
                num_bytes -= taken
        return Pieces(addresses, sizes)

    @classmethod
    def of(cls, array: npt.NDArray[np.uint8]) -> Pieces | None:
        """The piece that a contiguous array is, while it lives; None for an empty one."""
        return cls([array.ctypes.data], [array.nbytes]) if array.nbytes else None


def is_host_memory(address: int, num_bytes: int) -> bool:
    """Whether all of it may be read and written by this process now.

    Memory of a GPU has addresses too, and engines register it: to touch it would end the process.
    """
    end = address + num_bytes
    with Path("/proc/self/maps").open() as lines:
        for line in lines:
            span, flags = line.split(None, 2)[:2]
            first, last = (int(bound, 16) for bound in span.split("-"))
            if first <= address < last:
                if not flags.startswith("rw"):
                    return False
                if end <= last:
                    return True
                address = last
    return False


class Regions:
    """What the engine registered: the only memory that we read or write at its word.

    Thread safety: all methods may be called from any thread. Readers see the arrays of before or of
    after a change.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # for those who change _bounds
        nothing = np.zeros(0, np.uint64)
        self._bounds: tuple[_Addresses, _Addresses] = (nothing, nothing)  # begins sorted, and ends
        self._has_warned = False  # an engine that errs once does so with each block

    def add(self, address: int, num_bytes: int) -> bool:
        """Return False, and change nothing, for what overlaps another region or is none."""
        end = address + num_bytes
        if not 0 < address < end < 1 << 64:
            return False
        with self._lock:
            begins, ends = self._bounds
            at = int(np.searchsorted(begins, address))
            if (at and ends[at - 1] > address) or (at < len(begins) and begins[at] < end):
                return False
            self._bounds = (
                np.insert(begins, at, np.uint64(address)),
                np.insert(ends, at, np.uint64(end)),
            )
            return True

    def remove(self, address: int) -> bool:
        with self._lock:
            begins, ends = self._bounds
            at = np.flatnonzero(begins == address)
            if not len(at):
                return False
            self._bounds = (np.delete(begins, at), np.delete(ends, at))
            return True

    def pieces(
        self,
        all_addresses: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        *,
        is_strict: bool,
    ) -> list[Pieces | None]:
        """The memory of each value; None for what is no memory or, if it is strict, not registered.

        `all_addresses` and `all_sizes` are of equal length.
        """
        values = [Pieces(*value) for value in zip(all_addresses, all_sizes, strict=True)]
        lengths = [len(value.addresses) for value in values]
        if 0 not in lengths and lengths == [len(value.sizes) for value in values]:
            with contextlib.suppress(OverflowError):  # a negative number
                addresses = np.array(list(chain.from_iterable(all_addresses)), np.uint64)
                sizes = np.array(list(chain.from_iterable(all_sizes)), np.uint64)
                if self._are_fine(addresses, sizes, is_strict):
                    return list(values)
        return [self._checked(value, is_strict) for value in values]

    def _are_fine(self, addresses: _Addresses, sizes: _Addresses, is_strict: bool) -> bool:
        """Whether no piece is empty, and each lies in one region."""
        ends = addresses + sizes  # where that overflows, the end is before the beginning
        if not np.all((addresses > 0) & (addresses < ends)):
            return False
        begins, region_ends = self._bounds
        places = np.searchsorted(begins, addresses, side="right")
        return not is_strict or bool(np.all(places > 0) and np.all(ends <= region_ends[places - 1]))

    def _checked(self, value: Pieces, is_strict: bool) -> Pieces | None:
        if value.is_sound():
            value = value.leading(value.num_bytes)
            addresses, sizes = (np.array(numbers, np.uint64) for numbers in value)
            if self._are_fine(addresses, sizes, is_strict):
                return value
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "memory that is none or not registered is refused: %s", value)
        return None


class MooncakeHostMemAllocator:
    """Page-aligned memory by its address, as SGLang asks for its host pool."""

    # Of all allocators: a tensor over such memory may outlive the one that it came from.
    _mapped: ClassVar[dict[int, mmap.mmap]] = {}

    def alloc(self, num_bytes: int) -> int:
        """Return an address, or 0."""
        try:
            mapped = mmap.mmap(-1, num_bytes)
        except (OSError, ValueError, OverflowError):
            return 0
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._mapped[address] = mapped
        return address

    def free(self, address: int) -> int:
        return 0 if self._mapped.pop(address, None) is not None else -1

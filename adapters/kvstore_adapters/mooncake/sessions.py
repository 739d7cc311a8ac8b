"""Sessions: values that are read in ranges, layer by layer, while others are still under way.

A value is loaded whole when its session begins, since its checksum is of the whole; ranges are
copied from there. So a session costs memory of ours, of which there is a bound.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from .codes import INVALID_PARAMS, NO_AVAILABLE_HANDLE, OBJECT_NOT_FOUND, OK
from .memory import Pieces
from .objects import Entries

SESSION_BYTES_MAX = 1 << 30

_Value = npt.NDArray[np.uint8]


class Sessions:
    """Thread safety: all methods may be called from any thread."""

    def __init__(self, num_bytes_max: int = SESSION_BYTES_MAX) -> None:
        self._lock = threading.Lock()  # guards all below
        self._values: dict[str, tuple[_Value, int]] = {}  # and how many sessions have it
        self._num_bytes = 0
        self._num_bytes_max = num_bytes_max

    def start(
        self,
        keys: Sequence[str],
        find: Callable[[Sequence[str]], Entries],
        load: Callable[[Sequence[str]], Sequence[_Value | None]],
    ) -> list[int]:
        """Return a code for each key. `load` is asked only for what no session has."""
        codes = [OK if self._join(key) else OBJECT_NOT_FOUND for key in keys]
        missing = [place for place, code in enumerate(codes) if code != OK]
        wanted = [keys[place] for place in missing]
        if not self._has_room(int(find(wanted)["num_bytes"].sum())):
            for place in missing:
                codes[place] = NO_AVAILABLE_HANDLE
            return codes
        for place, value in zip(missing, load(wanted), strict=True):
            if value is not None:
                self._begin(keys[place], value)
                codes[place] = OK
        return codes

    def copy(self, key: str, offsets: Sequence[int], target: Pieces) -> int:
        """Copy from each offset of a value to the piece at the same place; return how many bytes,
        or a code."""
        with self._lock:
            value, _ = self._values.get(key, (None, 0))
        if value is None or len(offsets) != len(target.sizes):
            return INVALID_PARAMS
        ranges = list(zip(target.addresses, offsets, target.sizes, strict=True))
        if any(begin < 0 or begin + size > value.nbytes for _, begin, size in ranges):
            return INVALID_PARAMS
        for at, begin, size in ranges:
            ctypes.memmove(at, value.ctypes.data + begin, size)
        return target.num_bytes

    def end(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                if key not in self._values:
                    continue
                value, count = self._values[key]
                if count > 1:
                    self._values[key] = (value, count - 1)
                else:
                    del self._values[key]
                    self._num_bytes -= value.nbytes

    def _join(self, key: str) -> bool:
        with self._lock:
            if key not in self._values:
                return False
            value, count = self._values[key]
            self._values[key] = (value, count + 1)
            return True

    def _begin(self, key: str, value: _Value) -> None:
        with self._lock:
            value, count = self._values.get(key, (value, 0))
            if count == 0:
                self._num_bytes += value.nbytes
            self._values[key] = (value, count + 1)

    def _has_room(self, num_bytes: int) -> bool:
        with self._lock:
            return self._num_bytes + num_bytes <= self._num_bytes_max

"""An engine's memory on a device, with a copy of it on the host to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.gpu.blocks import run_table
from kvstore.gpu.device import Device, Event, PreparedPlan, wait_for
from kvstore.layout import BlockBuffers

Bytes = npt.NDArray[np.uint8]
WAIT_S = 60.0


class Shadow:
    """Host memory, cut into arrays, and as much of a device's, to which it is copied.

    What lies between the arrays is filled too, and compared: a kernel must not touch it.
    """

    def __init__(self, num_bytes: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        raw = np.empty(num_bytes + 64, np.uint8)
        begin = -raw.ctypes.data % 64
        self.bytes: Bytes = raw[begin : begin + num_bytes]
        self.refill()
        self._used = 0

    def refill(self) -> None:
        self.bytes[:] = self._rng.integers(0, 256, len(self.bytes), dtype=np.uint8)

    def new(self, dtype: Any, gap: int, *shape: int) -> npt.NDArray[Any]:
        """The next array, `gap` bytes behind the one before."""
        itemsize = np.dtype(dtype).itemsize
        begin = -(-(self._used + gap) // itemsize) * itemsize
        self._used = begin + int(np.prod(shape)) * itemsize
        array: npt.NDArray[Any] = self.bytes[begin : self._used].view(dtype).reshape(shape)
        return array

    def prepare(self, device: Device, buffers: BlockBuffers, address: int) -> PreparedPlan:
        """The plan of `buffers`, whose memory is ours, over the device's copy at `address`."""
        table = run_table(buffers.plan)
        moved = np.uint64((address - self.bytes.ctypes.data) % (1 << 64))
        table.rows["base"] += moved
        assert (address - self.bytes.ctypes.data) % 16 == 0, "alignment is another one there"
        return device.prepare(table)


class View:
    """Memory of a device as CuPy and torch describe it."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str = "|u1") -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "version": 3,
        }


def finish(event: Event) -> None:
    assert wait_for(event, WAIT_S)


def u64(values: Any) -> npt.NDArray[np.uint64]:
    return np.asarray(values, np.uint64)

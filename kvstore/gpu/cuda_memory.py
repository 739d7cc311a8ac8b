"""What a CudaDevice hands out or keeps: events, memory, plans, and what a launch is told."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from ctypes import byref, c_void_p
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.gpu import driver as cuda
from kvstore.gpu.device import Event, RunTable
from kvstore.gpu.driver import CudaCallError, Driver


class Context(Protocol):
    """What these need of their device."""

    name: str
    driver: Driver

    def current(self) -> AbstractContextManager[None]: ...
    def allocate(self, num_bytes: int) -> CudaMemory: ...
    def write(self, address: int, data: npt.NDArray[np.uint8]) -> None: ...
    def recycle(self, handle: int) -> None: ...


class CudaEvent:
    """See `kvstore.gpu.device.Event`. Its handle is used again when nobody refers to it."""

    __slots__ = ("__weakref__", "_is_done", "device", "handle")

    def __init__(self, device: Context, handle: int) -> None:
        self.device = device
        self.handle = handle
        self._is_done = False

    def done(self) -> bool:
        if not self._is_done:
            with self.device.current():
                code = self.device.driver.try_call("cuEventQuery", self.handle)
            if code not in (0, cuda.NOT_READY):
                what = self.device.driver.describe(code)
                raise CudaCallError(f"{self.device.name}: work on a stream failed: {what}", code)
            self._is_done = code == 0
        return self._is_done

    def __del__(self) -> None:
        self.device.recycle(self.handle)


class CudaMemory:
    """See `kvstore.gpu.device.Memory`."""

    def __init__(self, device: Context, address: int, num_bytes: int) -> None:
        self._device = device
        self.address = address
        self.num_bytes = num_bytes
        self._closed = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """So that CuPy and torch can see it as an array of bytes."""
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with self._device.current():
                self._device.driver.call("cuMemFree_v2", self.address)


class CudaPlan:
    """Runs, then the addresses of scattered blocks."""

    def __init__(self, device: Context, table: RunTable) -> None:
        self.table = table
        rows = table.rows.view(np.uint8).ravel()
        addresses = table.addresses.view(np.uint8).ravel()
        self._memory = device.allocate(rows.size + addresses.size)
        device.write(self._memory.address, np.concatenate((rows, addresses)))
        self.runs = self._memory.address
        self.scattered = self.runs + rows.size if addresses.size else 0

    def close(self) -> None:
        self._memory.close()


class Slip:
    """Memory for what one launch is told: pinned, and its twin on the device."""

    def __init__(self, device: Context, num_bytes: int) -> None:
        self.memory = device.allocate(num_bytes)
        pinned = c_void_p()
        try:
            with device.current():
                device.driver.call("cuMemHostAlloc", byref(pinned), num_bytes, cuda.HOST_PORTABLE)
        except BaseException:
            self.memory.close()
            raise
        self.num_bytes = num_bytes
        self.pinned = int(pinned.value or 0)
        raw = (ctypes.c_uint64 * (num_bytes // 8)).from_address(self.pinned)
        self.words: npt.NDArray[np.uint64] = np.ctypeslib.as_array(raw)
        self.event: Event | None = None  # of the launch that uses it

    def close(self, driver: Driver) -> None:
        self.memory.close()
        driver.try_call("cuMemFreeHost", self.pinned)


class _Never:
    """Of a slip whose launch could not be marked: it is not used again."""

    def done(self) -> bool:
        return False


NEVER = _Never()

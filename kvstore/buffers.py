"""Addresses of memory that somebody else owns: numpy, torch, DLPack and buffer-protocol objects.

Nothing here copies, and nothing imports torch: a tensor is read through the DLPack capsule that it
hands out itself (numpy cannot name bfloat16, a capsule can). Format: dmlc.github.io/dlpack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import ConfigError

# DLDeviceType of the DLPack specification. Pinned host memory is ordinary memory to us.
_HOST_DEVICES = frozenset({1, 3, 11})
_DEVICE_NAMES = {2: "cuda", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm", 13: "cuda_managed"}


@dataclass(frozen=True)
class HostBuffer:
    """A strided array in host memory.

    `keepalive` owns the memory: the address is valid for as long as this object is referenced.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    itemsize: int
    dtype: str
    readonly: bool
    keepalive: object = field(repr=False, compare=False)

    @classmethod
    def of(cls, source: object, name: str = "buffer", *, writable: bool = False) -> HostBuffer:
        """Describes `source`: a HostBuffer, numpy array, torch CPU tensor, or any object with
        `__dlpack__`, the buffer protocol or `__array_interface__`.

        Raises ConfigError, naming `name`, when it is none of these, when it is not in host memory,
        or when `writable` is asked for and it is read-only.
        """
        buffer = _describe(source, name)
        if writable and buffer.readonly:
            raise ConfigError(f"{name}: read-only memory cannot be a destination")
        return buffer

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements, without gaps."""
        return math.prod(self.shape) * self.itemsize

    def is_contiguous(self, first_axis: int = 0) -> bool:
        """True when the axes from `first_axis` on lie in C order without gaps."""
        dense = self.itemsize
        for size, stride in zip(
            reversed(self.shape[first_axis:]), reversed(self.strides[first_axis:]), strict=True
        ):
            if size != 1 and stride != dense:
                return False
            dense *= size
        return True


def _describe(source: object, name: str) -> HostBuffer:
    if isinstance(source, HostBuffer):
        return source
    if isinstance(source, np.ndarray):
        return _from_numpy(source, source, name)
    if hasattr(source, "__dlpack__"):
        return _from_dlpack(source, name)
    array: np.ndarray[Any, Any] | None = None
    try:
        array = np.asarray(memoryview(source))  # type: ignore[arg-type]
    except TypeError:
        if hasattr(source, "__array_interface__"):
            array = np.asarray(source)
    if array is not None:
        return _from_numpy(array, source, name)
    raise ConfigError(
        f"{name}: {type(source).__name__} gives no access to its memory"
        " (expected numpy, torch, __dlpack__ or the buffer protocol)"
    )


def _from_numpy(array: np.ndarray[Any, Any], owner: object, name: str) -> HostBuffer:
    if array.dtype.hasobject:
        raise ConfigError(f"{name}: an array of Python objects has no bytes to store")
    return HostBuffer(
        address=array.__array_interface__["data"][0],
        shape=array.shape,
        strides=array.strides,
        itemsize=array.itemsize,
        dtype=array.dtype.name,
        readonly=not array.flags.writeable,
        keepalive=(array, owner),
    )


def _from_dlpack(source: Any, name: str) -> HostBuffer:
    try:
        # The device comes first: making a capsule of a GPU tensor may wait for its stream.
        device_type, device_id = (int(part) for part in source.__dlpack_device__())
        if device_type not in _HOST_DEVICES:
            device = _DEVICE_NAMES.get(device_type, f"device type {device_type}")
            raise ConfigError(f"{name}: is on {device}:{device_id}, only host memory is supported")
        try:
            capsule = source.__dlpack__(max_version=(1, 0))
        except TypeError:  # producers from before DLPack 1.0 take no max_version
            capsule = source.__dlpack__()
        described = _native.dlpack_describe(capsule)
    except ConfigError:
        raise
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {type(source).__name__} exports no memory: {error}") from error
    address, shape, strides, itemsize, dtype, _, _, readonly = described
    return HostBuffer(address, shape, strides, itemsize, dtype, readonly, (capsule, source))


def as_block_ids(block_ids: object) -> npt.NDArray[np.int64]:
    """Return block ids as the native code takes them; it checks their range itself.

    Raises:
        TypeError: they are not integers.
        ValueError: they do not have one dimension.
    """
    ids = np.asarray(block_ids)
    if ids.dtype != np.int64:
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"block_ids must be integers, not {ids.dtype}")
        if ids.dtype == np.uint64 and ids.size and ids.max() >= 1 << 63:
            raise IndexError(f"block id {ids.max()} is out of range")
        ids = ids.astype(np.int64)
    if ids.ndim != 1:
        raise ValueError(f"block_ids must have one dimension, not {ids.ndim}")
    contiguous: npt.NDArray[np.int64] = np.ascontiguousarray(ids)
    return contiguous

"""DeviceBlocks: an engine's paged KV on a device, as the copy kernels see it.

Layouts are those of `kvstore.layout`: the same named axes over strides, the same plan. It is no
`BlockBuffers`, on purpose: a store copies with the CPU, which must not touch these addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.buffers import HostBuffer, as_block_ids
from kvstore.errors import ConfigError
from kvstore.gpu.device import Device, RunTable, word_bytes
from kvstore.layout import AxisTensor, BlockBuffers, ContiguousBlocks, PagedBuffers

# KvRun of csrc/cuda/piece_index.h
RUN_DTYPE = np.dtype(
    [
        ("base", "<u8"),
        ("block_stride", "<i8"),
        ("engine_stride", "<i8"),
        ("block_offset", "<u8"),
        ("piece_bytes", "<u4"),
        ("count", "<u4"),
    ]
)
_RUN_BYTES_MAX = 1 << 32  # of one run in the payload: the kernels divide 32 bits
_CUDA = frozenset({2, 13})  # DLDeviceType: memory of a GPU, and managed memory


def run_table(plan: _native.CopyPlan) -> RunTable:
    """Return a plan as the kernels read it.

    Raises:
        ConfigError: a run of 4 GiB or more.
    """
    runs, addresses = plan.runs, plan.addresses
    rows = np.zeros(len(runs), RUN_DTYPE)
    columns = ("base", "block_stride", "engine_stride", "block_offset")
    for index, name in enumerate(columns):
        rows[name] = runs[:, index]
    rows["count"], rows["piece_bytes"] = runs[:, 5], runs[:, 6]
    if (runs[:, 5] * runs[:, 6]).max() >= _RUN_BYTES_MAX:
        raise ConfigError("blocks: a run of 4 GiB or more is too long for the copy kernels")
    parts = [runs[:, :5].ravel(), runs[:, 6], addresses.view(np.int64).ravel()]
    alignment = word_bytes(*(int(np.bitwise_or.reduce(part)) for part in parts if part.size))
    return RunTable(rows, addresses, plan.block_bytes, plan.num_blocks, alignment)


def device_buffer(source: object, name: str = "tensor") -> HostBuffer:
    """Describe memory of a GPU: a torch or CuPy array, or what has `__cuda_array_interface__`.

    Its stream is not waited for: what fills the memory has to come before, on the same stream or by
    an event.

    Raises:
        ConfigError: it is not on a GPU.
    """
    if isinstance(source, HostBuffer):
        return source
    if hasattr(source, "__dlpack_device__"):
        return _from_dlpack(source, name)
    interface: dict[str, Any] | None = getattr(source, "__cuda_array_interface__", None)
    if interface is None:
        raise ConfigError(f"{name}: {type(source).__name__} is no memory of a GPU")
    shape = tuple(int(size) for size in interface["shape"])
    dtype = np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is None:
        strides = _dense(shape, dtype.itemsize)
    address, readonly = interface["data"]
    return HostBuffer(
        int(address), shape, tuple(strides), dtype.itemsize, dtype.name, bool(readonly), source
    )


def _from_dlpack(source: Any, name: str) -> HostBuffer:
    kind, _ = (int(part) for part in source.__dlpack_device__())
    if kind not in _CUDA:
        raise ConfigError(f"{name}: is in host memory, not on a GPU")
    try:
        # -1: no stream is to wait for this one; max_version is not known to older torch.
        capsule = source.__dlpack__(stream=-1)
        described = _native.dlpack_describe(capsule)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {type(source).__name__} exports no memory: {error}") from error
    address, shape, strides, itemsize, dtype, _, _, readonly = described
    return HostBuffer(address, shape, strides, itemsize, dtype, readonly, (capsule, source))


def _dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    stride = itemsize
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


class DeviceBlocks:
    """Numbered blocks in the memory of one device. Immutable; keeps the memory referenced.

    Made by `paged`, `strided`, `opaque` or `contiguous`; `close` gives back what the kernels' table
    takes (some KiB), once no copy is under way.
    """

    def __init__(self, device: Device, buffers: BlockBuffers) -> None:
        """`buffers`: over addresses of the device; nobody else may use it."""
        self.device = device
        self.layout = buffers.layout
        self._buffers = buffers
        self.prepared = device.prepare(run_table(buffers.plan))

    @classmethod
    def paged(
        cls, device: Device, layout: str, tensors: Any, spec: BlockSpec, **options: Any
    ) -> DeviceBlocks:
        """Any layout of `kvstore.PagedBuffers`, by name: "vllm_nhd", "vllm_views", "reference", ...

        Args:
            device: that has the memory.
            layout: a classmethod of PagedBuffers that takes tensors and a spec.
            tensors: what that takes, on the device; one tensor, a list, or two lists for
                "sglang_pools".
            spec: the shape of a block.
            options: further arguments of that classmethod.

        Raises:
            ConfigError: as that classmethod, or no such layout.
        """
        make = getattr(PagedBuffers, layout, None)
        if make is None or layout.startswith("_") or layout in ("strided", "opaque"):
            raise ConfigError(f"layout: {layout!r} is none of PagedBuffers'")
        if layout == "sglang_pools":
            keys, values = tensors
            described = [_describe(keys), _describe(values)]
        else:
            described = [_describe(tensors)]
        return cls(device, make(*described, spec, **options))

    @classmethod
    def strided(
        cls, device: Device, tensors: Sequence[AxisTensor], spec: BlockSpec
    ) -> DeviceBlocks:
        """See `PagedBuffers.strided`."""
        described = [
            AxisTensor(device_buffer(t.buffer, t.name), t.axes, t.layer, t.part, t.name)
            for t in tensors
        ]
        return cls(device, PagedBuffers.strided(described, spec))

    @classmethod
    def opaque(cls, device: Device, tensors: Sequence[object], layout: str) -> DeviceBlocks:
        """See `PagedBuffers.opaque`."""
        return cls(device, PagedBuffers.opaque([device_buffer(t) for t in tensors], layout))

    @classmethod
    def contiguous(cls, device: Device, array: object) -> DeviceBlocks:
        """An array `[n, ...]` whose row i is block i."""
        return cls(device, ContiguousBlocks(device_buffer(array)))

    @property
    def num_blocks(self) -> int:
        return self._buffers.num_blocks

    @property
    def block_bytes(self) -> int:
        return self._buffers.block_bytes

    @property
    def num_layers(self) -> int:
        return self._buffers.num_layers

    def layer_range(self, first: int, count: int = 1) -> tuple[int, int]:
        """The payload bytes [begin, end) of layers [first, first + count) of any block."""
        return self._buffers.layer_range(first, count)

    def require_block_bytes(self, block_bytes: int) -> None:
        self._buffers.require_block_bytes(block_bytes)

    def require_writable(self) -> None:
        self._buffers.require_writable()

    def check_ids(self, block_ids: object, *, distinct: bool) -> npt.NDArray[np.int64]:
        """Return `block_ids` as the kernels take them, which check nothing.

        Raises:
            IndexError: an id is out of range. TypeError: other than integers.
            ValueError: not one dimension; or, if they must be `distinct`, one appears twice.
        """
        ids = self._buffers.validate_ids(as_block_ids(block_ids))
        if distinct and len(np.unique(ids)) != len(ids):
            raise ValueError("block_ids: overlapping destination, a block appears twice")
        return ids

    def close(self) -> None:
        self.prepared.close()


def _describe(tensors: object) -> object:
    if isinstance(tensors, list | tuple):
        return [device_buffer(tensor, f"layers[{i}]") for i, tensor in enumerate(tensors)]
    return device_buffer(tensors)

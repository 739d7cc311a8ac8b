"""CudaDevice: a GPU through its driver. Never run on a GPU so far; see docs/gpu.md.

A launch needs its block ids and addresses in GPU memory. They go there by a copy on the caller's
stream, from pinned memory that stays as it is until the launch is done: a *slip*, of a pool that
grows with the number of launches under way, up to SLIPS_MAX, and reused when its event says so.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError, GpuError
from kvstore.gpu import driver as cuda
from kvstore.gpu.blocks import RUN_DTYPE
from kvstore.gpu.cuda_memory import NEVER, CudaEvent, CudaMemory, CudaPlan, Slip
from kvstore.gpu.device import (
    Addresses,
    BlockIds,
    Event,
    PreparedPlan,
    RunTable,
    wait_for,
    word_bytes,
)
from kvstore.gpu.driver import Driver
from kvstore.gpu.launches import THREADS, launch_shape, parameters_of
from kvstore.gpu.modules import KERNELS, Compiler, cached_kernels

_GRID_MAX = (1 << 31) - 1
SLIPS_MAX = 64
_SLIP_BYTES_MIN = 64 << 10  # 4,096 blocks: a prompt of 65,536 tokens
_SLIP_WAIT_SECONDS = 10.0
# Below this a launch that copies all pieces beats one driver call for each.
_EACH_BYTES_MIN = 256 << 10
_EACH_PIECES_MAX = 8
_LEGACY_STREAM = 1  # 0 and 1 are the legacy default stream, which takes no batches


class CudaDevice:
    """See `kvstore.gpu.device.Device`. Uses the device's primary context, as torch and CuPy do."""

    def __init__(
        self,
        ordinal: int = 0,
        *,
        driver: Driver | None = None,
        compiler: Compiler = cached_kernels,
    ) -> None:
        """
        Args:
            ordinal: which of the GPUs that this process sees.
            driver: default: the machine's.
            compiler: of the copy kernels, when they are first needed.

        Raises:
            GpuError: no driver, no GPU, or no such one.
        """
        self.driver = driver or Driver()
        self.ordinal = ordinal
        self._compiler = compiler
        self._lock = threading.RLock()  # guards functions, module and slips
        self._functions: dict[str, c_void_p] = {}
        self._module = c_void_p()
        self._slips: list[Slip] = []
        self._events: list[int] = []  # handles that nobody uses
        self._closed = False
        number = c_int()
        self.driver.call("cuDeviceGet", byref(number), ordinal)
        self._number = number.value
        context = c_void_p()
        self.driver.call("cuDevicePrimaryCtxRetain", byref(context), self._number)
        self._context = context
        text = ctypes.create_string_buffer(256)
        self.driver.call("cuDeviceGetName", text, len(text), self._number)
        self.name = text.value.decode(errors="replace")
        uuid = ctypes.create_string_buffer(16)
        self.driver.call("cuDeviceGetUuid_v2", uuid, self._number)
        self.uuid = uuid.raw
        major = self.attribute(cuda.COMPUTE_CAPABILITY_MAJOR)
        self.capability = 10 * major + self.attribute(cuda.COMPUTE_CAPABILITY_MINOR)

    def attribute(self, which: int) -> int:
        value = c_int()
        self.driver.call("cuDeviceGetAttribute", byref(value), which, self._number)
        return value.value

    @contextmanager
    def current(self) -> Iterator[None]:
        """Calls of this thread are about this device's context meanwhile."""
        self.driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.driver.try_call("cuCtxPopCurrent_v2", byref(c_void_p()))

    # --- memory

    def allocate(self, num_bytes: int) -> CudaMemory:
        address = c_uint64()
        with self.current():
            self.driver.call("cuMemAlloc_v2", byref(address), num_bytes)
        return CudaMemory(self, address.value, num_bytes)

    def owns(self, address: int) -> bool:
        kind, ordinal = c_uint(), c_int()
        with self.current():
            codes = [
                self.driver.try_call("cuPointerGetAttribute", byref(value), attribute, address)
                for value, attribute in (
                    (kind, cuda.POINTER_MEMORY_TYPE),
                    (ordinal, cuda.POINTER_DEVICE_ORDINAL),
                )
            ]
        is_device = kind.value == cuda.MEMORY_TYPE_DEVICE
        return not any(codes) and is_device and ordinal.value == self.ordinal

    def allocation_of(self, address: int, num_bytes: int) -> tuple[int, int]:
        """Return where the allocation or registration around a piece begins, and its bytes; 0
        bytes: the driver knows none. What it knows can be copied without waiting."""
        base, size, kind = c_uint64(), c_size_t(), c_uint()

        def ask(value: Any, attribute: int, at: int) -> int:
            return self.driver.try_call("cuPointerGetAttribute", byref(value), attribute, at)

        with self.current():
            if not (
                ask(base, cuda.POINTER_RANGE_START, address)
                or ask(size, cuda.POINTER_RANGE_SIZE, address)
            ):
                return base.value, size.value
            # Known, but not its bounds: the piece for itself.
            ends = (address, address + max(num_bytes, 1) - 1)
            if any(ask(kind, cuda.POINTER_MEMORY_TYPE, end) for end in ends):
                return 0, 0
        return address, num_bytes

    def write(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        data = np.ascontiguousarray(data)
        with self.current():
            self.driver.call("cuMemcpyHtoD_v2", address, data.ctypes.data, data.nbytes)

    def read(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        data = np.empty(num_bytes, np.uint8)
        with self.current():
            self.driver.call("cuMemcpyDtoH_v2", data.ctypes.data, address, num_bytes)
        return data

    def register(self, address: int, num_bytes: int, *, read_only: bool) -> None:
        # Portable: for every context of this process; mapped: for kernels too.
        flags = cuda.REGISTER_PORTABLE | cuda.REGISTER_MAPPED
        if self.attribute(cuda.CAN_USE_HOST_POINTER) == 0:
            raise GpuError(f"{self.name}: cannot reach registered memory by the CPU's addresses")
        if read_only:
            if self.attribute(cuda.READ_ONLY_REGISTER_SUPPORTED) == 0:
                raise GpuError(f"{self.name}: cannot register memory that is mapped read-only")
            flags |= cuda.REGISTER_READ_ONLY
        with self.current():
            self.driver.call("cuMemHostRegister_v2", address, num_bytes, flags)

    def unregister(self, address: int) -> None:
        with self.current():
            self.driver.call("cuMemHostUnregister", address)

    # --- order

    def new_stream(self) -> int:
        stream = c_void_p()
        with self.current():
            self.driver.call("cuStreamCreate", byref(stream), cuda.STREAM_NON_BLOCKING)
        return int(stream.value or 0)

    def close_stream(self, stream: int) -> None:
        with self.current():
            self.driver.call("cuStreamDestroy_v2", stream)

    def record(self, stream: int) -> CudaEvent:
        try:
            handle = self._events.pop()
        except IndexError:
            handle = 0
        with self.current():
            if handle == 0:
                made = c_void_p()
                self.driver.call("cuEventCreate", byref(made), cuda.EVENT_DISABLE_TIMING)
                handle = int(made.value or 0)
            event = CudaEvent(self, handle)  # from here on its end gives the handle back
            self.driver.call("cuEventRecord", handle, stream)
        return event

    def wait_event(self, stream: int, event: Event) -> None:
        handle: int = event.handle  # type: ignore[attr-defined]
        with self.current():
            self.driver.call("cuStreamWaitEvent", stream, handle, 0)

    def recycle(self, handle: int) -> None:
        """Without the lock: garbage is collected anywhere, and lists are safe by themselves."""
        if self._closed:
            self.driver.try_call("cuEventDestroy_v2", handle)
        else:
            self._events.append(handle)

    # --- copies

    def prepare(self, table: RunTable) -> CudaPlan:
        return CudaPlan(self, table)

    def gather(
        self,
        plan: PreparedPlan,
        block_ids: BlockIds,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None = None,
    ) -> None:
        self._launch("kv_gather", plan, block_ids, addresses, stream, payload)

    def scatter(
        self,
        plan: PreparedPlan,
        block_ids: BlockIds,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None = None,
    ) -> None:
        self._launch("kv_scatter", plan, block_ids, addresses, stream, payload)

    def _launch(
        self,
        kind: str,
        plan: PreparedPlan,
        block_ids: BlockIds,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None,
    ) -> None:
        assert isinstance(plan, CudaPlan)
        table = plan.table
        begin, end = payload or (0, table.block_bytes)
        shape = launch_shape(table.alignment, addresses, begin, end)
        if shape is None:
            return

        def parameters(ids: int, blocks: int) -> tuple[Any, ...]:
            return parameters_of(
                plan.runs, len(table.rows), plan.scattered, ids, blocks, (begin, end), shape.tiles
            )

        told = (block_ids.view(np.uint64), addresses)
        self._run(f"{kind}_{shape.width}", told, parameters, shape.tiles, stream)

    def _copy_small(self, to: Addresses, from_: Addresses, size: int, stream: int) -> None:
        """Copy pieces of one size by one launch: sources are scattered blocks of one run."""
        row = np.zeros(1, RUN_DTYPE)
        row["engine_stride"] = row["piece_bytes"] = size
        row["count"] = 1
        alignment = word_bytes(size, int(np.bitwise_or.reduce(from_)))
        shape = launch_shape(alignment, to, 0, size)
        assert shape is not None

        def parameters(runs: int, sources: int, ids: int, blocks: int) -> tuple[Any, ...]:
            return parameters_of(runs, 1, sources, ids, blocks, (0, size), shape.tiles)

        told = (row.view(np.uint64), from_, np.arange(len(to), dtype=np.uint64), to)
        self._run(f"kv_gather_{shape.width}", told, parameters, shape.tiles, stream)

    def _run(
        self,
        kernel: str,
        told: tuple[Addresses, ...],
        parameters: Callable[..., tuple[Any, ...]],
        tiles: int,
        stream: int,
    ) -> None:
        """Bring `told` to the device and launch there; `parameters` gets the address of each.

        The last of `told` has an element for each block.
        """
        function = self._function(kernel)
        sizes = [part.nbytes for part in told]
        grid = len(told[-1]) * tiles
        if grid > _GRID_MAX:
            raise ConfigError(f"block_ids: {len(told[-1])} blocks are too many for one launch")
        with self._lock, self.current():
            slip = self._take_slip(sum(sizes))
            np.concatenate(told, out=slip.words[: sum(sizes) // 8])
            at = slip.memory.address
            values = parameters(*(at + before for before in accumulate(sizes[:-1], initial=0)))
            pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            slip.event = NEVER
            try:
                self.driver.call("cuMemcpyAsync", at, slip.pinned, sum(sizes), stream)
                shape = (grid, 1, 1, THREADS, 1, 1, 0)
                self.driver.call("cuLaunchKernel", function, *shape, stream, pointers, None)
            finally:
                # Also when a call failed: the one before it may be under way.
                slip.event = self.record(stream)

    def _function(self, name: str) -> c_void_p:
        with self._lock:
            if not self._functions:
                image = self._compiler(self.capability)
                with self.current():
                    self.driver.call("cuModuleLoadData", byref(self._module), image)
                    for kernel in KERNELS:
                        function = c_void_p()
                        self.driver.call(
                            "cuModuleGetFunction", byref(function), self._module, kernel.encode()
                        )
                        self._functions[kernel] = function
            return self._functions[name]

    def _take_slip(self, num_bytes: int) -> Slip:
        """A slip that no launch uses. REQUIRES: the lock."""
        fitting = [slip for slip in self._slips if slip.num_bytes >= num_bytes]
        for slip in fitting:
            if slip.event is None or slip.event.done():
                return slip
        if len(self._slips) < SLIPS_MAX or not fitting:
            size = max(_SLIP_BYTES_MIN, 1 << (num_bytes - 1).bit_length())
            slip = Slip(self, size)
            self._slips.append(slip)
            return slip
        oldest = fitting[0]
        assert oldest.event is not None
        if not wait_for(oldest.event, _SLIP_WAIT_SECONDS):
            raise GpuError(f"{self.name}: {SLIPS_MAX} launches are under way and none ends")
        return oldest

    def copy(
        self,
        to: Addresses,
        from_: Addresses,
        sizes: Addresses,
        stream: int,
        *,
        is_from_host: bool = False,
    ) -> None:
        # Neighbours are not joined: they may be of two allocations, and no copy may span those.
        todo = sizes > 0
        to, from_, sizes = (np.ascontiguousarray(part[todo]) for part in (to, from_, sizes))
        if len(to) == 0:
            return
        if self.driver.has_batch and stream > _LEGACY_STREAM:
            # ANY lets the driver read a source before its turn: right only for what nothing on the
            # stream writes. KV that is not computed yet would be copied as it was before.
            order = cuda.ORDER_ANY if is_from_host else cuda.ORDER_STREAM
            with self.current():
                self.driver.copy_batch(to, from_, sizes, order, stream)
            return
        size = int(sizes[0])
        if size < _EACH_BYTES_MIN and len(to) > _EACH_PIECES_MAX and (sizes == size).all():
            with suppress(GpuError):  # no kernels: then one by one
                self._function("kv_gather_1")
                self._copy_small(to, from_, size, stream)
                return
        with self.current():
            for piece in zip(to.tolist(), from_.tolist(), sizes.tolist(), strict=True):
                self.driver.call("cuMemcpyAsync", *piece, stream)

    def close(self) -> None:
        """Give back what this object took. REQUIRES: nothing is under way; memory, plans and
        streams that it made are closed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            slips, self._slips = self._slips, []
            events, self._events = self._events, []
            self._functions = {}
        with suppress(GpuError), self.current():
            for slip in slips:
                slip.close(self.driver)
            for handle in events:
                self.driver.try_call("cuEventDestroy_v2", handle)
            if self._module:
                self.driver.try_call("cuModuleUnload", self._module)
        self.driver.try_call("cuDevicePrimaryCtxRelease_v2", self._number)

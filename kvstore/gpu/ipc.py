"""Memory and events of a GPU in another process of this host (CUDA IPC).

A handle stands for a whole allocation, so what is handed on is the handle of the one around a
region and the region's place in it. A process opens an allocation once and counts its uses. Its
owner must not free it while another has it open: what then happens is undefined; see
`kvstore.transport.cuda_ipc`, where an owner knows.

Memory of `cuMemCreate`, as torch allocates with `expandable_segments:True`, and of
`cudaMallocAsync` has no such handle, and is refused.
"""

from __future__ import annotations

import threading
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass

from kvstore.errors import ConfigError, GpuError
from kvstore.gpu import driver as cuda
from kvstore.gpu.cuda_device import CudaDevice
from kvstore.gpu.driver import IpcHandle


@dataclass(frozen=True, slots=True)
class Exported:
    """A region of a GPU's memory, for other processes."""

    handle: bytes  # of the allocation around it
    offset: int  # where in the allocation it begins
    allocation_bytes: int


def export_memory(device: CudaDevice, address: int, num_bytes: int) -> Exported:
    """
    Raises:
        ConfigError: it is not within one allocation of this device.
        GpuError: it is of a kind that cannot be shared; the message says what to do.
    """
    if not device.owns(address):
        raise ConfigError(f"memory: {address:#x} is not of {device.name}")
    base, size, capable = c_uint64(), c_size_t(), c_int()
    driver = device.driver
    with device.current():
        driver.call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
        if address + num_bytes > base.value + size.value:
            raise ConfigError(
                f"memory: {num_bytes} bytes at {address:#x} are more than one allocation:"
                f" it ends after {base.value + size.value - address}"
            )
        code = driver.try_call(
            "cuPointerGetAttribute", byref(capable), cuda.POINTER_IS_IPC_CAPABLE, address
        )
        handle = IpcHandle()
        if code == 0 and not capable.value:
            code = cuda.INVALID_VALUE
        else:
            code = driver.try_call("cuIpcGetMemHandle", byref(handle), base.value)
    if code:
        raise GpuError(
            f"memory: the allocation at {base.value:#x} cannot be shared with other processes"
            f" ({driver.describe(code)}): it is no plain cudaMalloc. In torch, unset"
            " expandable_segments in PYTORCH_CUDA_ALLOC_CONF, and the cudaMallocAsync backend"
        )
    return Exported(bytes(handle), address - base.value, size.value)


class Imports:
    """Allocations of other processes that this one has open. Thread-safe."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._open: dict[bytes, tuple[int, int]] = {}  # handle -> address, uses

    def open(self, handle: bytes) -> int:
        """Return where the allocation begins here. Each needs one `close`.

        Raises:
            GpuError: it cannot be opened: its owner has gone, or it is of another GPU.
        """
        with self._lock:
            address, uses = self._open.get(handle, (0, 0))
            if uses == 0:
                made = c_uint64()
                with self._device.current():
                    self._device.driver.call(
                        "cuIpcOpenMemHandle_v2",
                        byref(made),
                        IpcHandle.of(handle),
                        cuda.IPC_LAZY_PEER_ACCESS,
                    )
                address = made.value
            self._open[handle] = (address, uses + 1)
        return address

    def close(self, handle: bytes) -> None:
        """REQUIRES: nothing under way uses it for whoever opened it."""
        with self._lock:
            address, uses = self._open[handle]
            if uses > 1:
                self._open[handle] = (address, uses - 1)
                return
            del self._open[handle]
            with self._device.current():
                self._device.driver.try_call("cuIpcCloseMemHandle", address)

    def __len__(self) -> int:
        return len(self._open)


class SharedEvent:
    """An event that streams of several processes record and wait for.

    Who waits, waits for what was recorded last when it asked: so the message that sends it there
    comes after `record`. Thread-safe.
    """

    def __init__(self, device: CudaDevice, handle: bytes | None = None) -> None:
        """`handle`: of another process's event; None: make one.

        Raises:
            GpuError: it cannot be had.
        """
        self._device = device
        made = c_void_p()
        with device.current():
            if handle is None:
                flags = cuda.EVENT_DISABLE_TIMING | cuda.EVENT_INTERPROCESS
                device.driver.call("cuEventCreate", byref(made), flags)
            else:
                device.driver.call("cuIpcOpenEventHandle", byref(made), IpcHandle.of(handle))
        self._event: int | None = made.value

    def export(self) -> bytes:
        handle = IpcHandle()
        with self._device.current():
            self._device.driver.call("cuIpcGetEventHandle", byref(handle), self._event)
        return bytes(handle)

    def record(self, stream: int) -> None:
        with self._device.current():
            self._device.driver.call("cuEventRecord", self._event, stream)

    def wait_on(self, stream: int) -> None:
        """What is enqueued on `stream` from now on comes after what was recorded last."""
        with self._device.current():
            self._device.driver.call("cuStreamWaitEvent", stream, self._event, 0)

    def close(self) -> None:
        if self._event is not None:
            with self._device.current():
                self._device.driver.try_call("cuEventDestroy_v2", self._event)
            self._event = None

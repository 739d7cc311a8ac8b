"""The part of the CUDA driver's API that we call, through ctypes.

The driver rather than the runtime: it comes with the GPU (libcuda.so.1), so nothing has to be
installed or built for it; its calls leave no pending error for torch or CuPy to trip over; and it
is one library that a test can replace. Contexts are the primary ones, which torch and CuPy use too,
so addresses, streams and events are theirs as well.

Signatures are those of cuda.h: tests/gpu/fake is compiled against that header and called through
this file. Symbols carry the suffix (`_v2`) of the version that is meant; `cuMemcpyBatchAsync` lost
an argument in CUDA 13 and kept its name, so it is asked for by version.

ctypes releases the GIL during each call.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import GpuError

Places = npt.NDArray[np.uint64]

LIBRARY: Final = "libcuda.so.1"

NOT_READY: Final = 600
INVALID_VALUE: Final = 1
ALREADY_REGISTERED: Final = 712

IPC_HANDLE_BYTES: Final = 64
_BATCH_VERSION: Final = 12080

# CUdevice_attribute
COMPUTE_CAPABILITY_MAJOR: Final = 75
COMPUTE_CAPABILITY_MINOR: Final = 76
CAN_USE_HOST_POINTER: Final = 91
READ_ONLY_REGISTER_SUPPORTED: Final = 113
# CUpointer_attribute
POINTER_MEMORY_TYPE: Final = 2
POINTER_BUFFER_ID: Final = 7
POINTER_DEVICE_ORDINAL: Final = 9
POINTER_IS_IPC_CAPABLE: Final = 10
POINTER_RANGE_START: Final = 11
POINTER_RANGE_SIZE: Final = 12
MEMORY_TYPE_DEVICE: Final = 2
# flags
REGISTER_PORTABLE: Final = 0x1
REGISTER_MAPPED: Final = 0x2
REGISTER_READ_ONLY: Final = 0x8
HOST_PORTABLE: Final = 0x1
EVENT_DISABLE_TIMING: Final = 0x2
EVENT_INTERPROCESS: Final = 0x4
STREAM_NON_BLOCKING: Final = 0x1
IPC_LAZY_PEER_ACCESS: Final = 0x1
# CUmemcpySrcAccessOrder
ORDER_STREAM: Final = 1
ORDER_ANY: Final = 3


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle and CUipcEventHandle, which are passed by value."""

    _fields_ = [("reserved", c_char * IPC_HANDLE_BYTES)]

    @classmethod
    def of(cls, data: bytes) -> IpcHandle:
        return cls.from_buffer_copy(data)


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes_v1. The places are hints for managed memory, which we never have."""

    _fields_ = [
        ("source_order", c_int),
        ("source_place", c_int * 2),
        ("destination_place", c_int * 2),
        ("flags", c_uint),
    ]


_DEVICE_POINTER = c_uint64
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (c_char_p, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(_DEVICE_POINTER), c_size_t),
    "cuMemFree_v2": (_DEVICE_POINTER,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemcpyHtoD_v2": (_DEVICE_POINTER, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, _DEVICE_POINTER, c_size_t),
    "cuMemcpyAsync": (_DEVICE_POINTER, _DEVICE_POINTER, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventElapsedTime": (POINTER(ctypes.c_float), c_void_p, c_void_p),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *([c_uint] * 7), c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuPointerGetAttribute": (c_void_p, c_int, _DEVICE_POINTER),
    "cuMemGetAddressRange_v2": (POINTER(_DEVICE_POINTER), POINTER(c_size_t), _DEVICE_POINTER),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), _DEVICE_POINTER),
    "cuIpcOpenMemHandle_v2": (POINTER(_DEVICE_POINTER), IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (_DEVICE_POINTER,),
    "cuIpcGetEventHandle": (POINTER(IpcHandle), c_void_p),
    "cuIpcOpenEventHandle": (POINTER(c_void_p), IpcHandle),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
# Only drivers since CUDA 12.0 have it; without it there are no batched copies.
_GET_ADDRESS: Final = (c_char_p, POINTER(c_void_p), c_int, c_uint64, POINTER(c_int))
_BATCH: Final = ctypes.CFUNCTYPE(
    c_int,
    c_void_p,  # destinations
    c_void_p,  # sources
    c_void_p,  # sizes
    c_size_t,
    POINTER(CopyAttributes),
    POINTER(c_size_t),  # the first copy that has each attribute
    c_size_t,
    POINTER(c_size_t),  # which copy failed
    c_void_p,
)


class CudaCallError(GpuError):
    """A call that the driver refused. `code` is a CUresult."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Driver:
    """libcuda, loaded and initialised.

    Thread safety: as the driver's, whose calls are.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        """
        Raises:
            GpuError: there is no driver, or it finds no GPU.
        """
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise GpuError(f"no CUDA driver: {error}") from error
        self._functions: dict[str, Any] = {}
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise GpuError(f"{library}: has no {name}, the driver is too old") from None
            function.argtypes = arguments
            function.restype = c_int
            self._functions[name] = function
        self.call("cuInit", 0)
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        if count.value == 0:
            raise GpuError("the CUDA driver finds no GPU")
        self.num_devices = count.value
        self._batch = self._find_batch()

    @property
    def version(self) -> int:
        """As 13000 for 13.0."""
        version = c_int()
        self.call("cuDriverGetVersion", byref(version))
        return version.value

    @property
    def has_batch(self) -> bool:
        """Whether many copies can be given to the driver in one call."""
        return self._batch is not None

    def call(self, name: str, *arguments: Any) -> None:
        """
        Raises:
            CudaCallError: the driver refused.
        """
        code = self.try_call(name, *arguments)
        if code:
            raise CudaCallError(f"{name}: {self.describe(code)}", code)

    def try_call(self, name: str, *arguments: Any) -> int:
        """Return the call's CUresult."""
        code: int = self._functions[name](*arguments)
        return code

    def describe(self, code: int) -> str:
        name, text = c_char_p(), c_char_p()
        self._functions["cuGetErrorName"](code, byref(name))
        self._functions["cuGetErrorString"](code, byref(text))
        if not name.value:
            return f"error {code}"
        return f"{name.value.decode()} ({(text.value or b'').decode()})"

    def copy_batch(
        self, to: Places, from_: Places, sizes: Places, source_order: int, stream: int
    ) -> None:
        """Enqueue copies. The arrays are contiguous; the driver reads them before it returns.

        REQUIRES: `has_batch`; `stream` is not the NULL stream.

        Raises:
            CudaCallError: the driver refused; which copy, if it says so, is in the message.
        """
        assert self._batch is not None
        attributes = CopyAttributes(source_order=source_order)
        first, failed = c_size_t(0), c_size_t(2**64 - 1)
        count = len(to)
        pointers = (part.ctypes.data for part in (to, from_, sizes))
        last = (byref(attributes), byref(first), 1, byref(failed), stream)
        code = self._batch(*pointers, count, *last)
        if code:
            which = f", copy {failed.value} of {count}" if failed.value < count else ""
            raise CudaCallError(f"cuMemcpyBatchAsync: {self.describe(code)}{which}", code)

    def _find_batch(self) -> Any:
        try:
            find = self._library.cuGetProcAddress_v2
        except AttributeError:
            return None
        find.argtypes, find.restype = _GET_ADDRESS, c_int
        address, status = c_void_p(), c_int()
        code = find(b"cuMemcpyBatchAsync", byref(address), _BATCH_VERSION, 0, byref(status))
        return _BATCH(address.value) if code == 0 and address.value else None

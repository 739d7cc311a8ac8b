"""The fake driver: compiled once for a run of the tests, and loaded anew for each that asks.

It runs the kernels of csrc/cuda as they are, compiled by g++: every thread of every block.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

from kvstore.gpu import CudaDevice
from kvstore.gpu.driver import Driver

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake"
SOURCES = (*sorted(FAKE.iterdir()), *sorted((ROOT / "csrc" / "cuda").iterdir()))
HEADERS = Path("/usr/local/cuda/include")
FLAGS = [
    *("-std=c++20", "-O2", "-shared", "-fPIC", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
# What cuModuleLoadData is given: the fake has the kernels already.
IMAGE = b"\x7fELF"

ALLOCATIONS, REGISTERED, OPENED, STREAMS, EVENTS, PINNED = range(6)


def build(*, with_headers: bool | None = None) -> Path:
    """Compile the fake, unless it is there already; against NVIDIA's headers where they are."""
    directory = ROOT / "build" / "fake-cuda"
    directory.mkdir(parents=True, exist_ok=True)
    if with_headers is None:
        with_headers = (HEADERS / "cudaTypedefs.h").exists()
    digest = hashlib.sha256(str(with_headers).encode())
    for path in SOURCES:
        digest.update(path.read_bytes())
    library = directory / f"libfakecuda-{digest.hexdigest()[:16]}.so"
    with open(directory / "fake.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            ours = [f"-I{HEADERS}"] if with_headers else ["-DKV_OWN_ABI"]
            made = directory / "making.so"
            command = ["g++", *FLAGS, *ours, str(FAKE / "fake_cuda.cc"), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=100)
            made.rename(library)
    return library


class FakeCuda:
    """A driver of its own: a copy of the library, since one that is loaded keeps its state."""

    def __init__(self, library: Path, directory: Path) -> None:
        own = directory / f"libcuda-{id(self)}.so"
        shutil.copy(library, own)
        self.path = str(own)
        self._library = ctypes.CDLL(self.path)
        self._library.fake_allocate_mapped.argtypes = (
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.c_size_t,
        )

    def driver(self) -> Driver:
        return Driver(self.path)

    def device(self) -> CudaDevice:
        return CudaDevice(driver=self.driver(), compiler=lambda capability: IMAGE)

    def set_late(self, late: bool) -> None:
        self._library.fake_set_late(int(late))

    def set_batch(self, has: bool) -> None:
        self._library.fake_set_batch(int(has))

    def inject(self, name: str, code: int, *, after: int = 0, count: int = 1) -> None:
        """Let calls of `name` fail: `count` of them after the next `after`."""
        self._library.fake_inject(name.encode(), code, after, count)

    def calls(self, name: str) -> int:
        return int(self._library.fake_calls(name.encode()))

    def live(self, what: int) -> int:
        return int(self._library.fake_num_live(what))

    @property
    def has_cuda_h(self) -> bool:
        return bool(self._library.fake_has_cuda_h())

    def allocate_mapped(self, num_bytes: int) -> int:
        """Memory as torch's expandable segments have it."""
        address = ctypes.c_uint64()
        assert self._library.fake_allocate_mapped(ctypes.byref(address), num_bytes) == 0
        return address.value

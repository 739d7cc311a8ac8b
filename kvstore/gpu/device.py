"""What the GPU tier needs of a device: memory, streams, events, and copies that are only enqueued.

Two devices: `CudaDevice` is a GPU, `HostDevice` is host memory that behaves like one, for tests and
for machines without. Both pass tests/gpu/test_device_contract.py.

A stream is an int: a `cudaStream_t`, as torch's `stream.cuda_stream` and CuPy's `stream.ptr` are.
Nothing here ever waits for a stream. What is enqueued on one stream runs in order; between streams
only events say what comes before what.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.uint64]
BlockIds = npt.NDArray[np.int64]

_SPIN_SECONDS = 200e-6  # looked at without a pause: a sleep would be longer than most copies
_PAUSE_SECONDS = (50e-6, 1e-3)  # between two looks after that: the first, the longest


class Event(Protocol):
    """A place in a stream. Thread-safe."""

    def done(self) -> bool:
        """Return whether all before it has run.

        Raises:
            GpuError: something before it failed.
        """


class Memory(Protocol):
    """Memory of a device, until `close`."""

    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def close(self) -> None:
        """Give it back. REQUIRES: nothing that is under way uses it."""


@dataclass(frozen=True, slots=True)
class RunTable:
    """The runs of a copy plan as the kernels read them (csrc/cuda/piece_index.h).

    `addresses`: of scattered blocks, each block's runs; empty for blocks at even distances.
    `alignment`: the largest power of two up to 16 that divides all addresses, strides and lengths.
    """

    rows: npt.NDArray[np.void]
    addresses: Addresses
    block_bytes: int
    num_blocks: int
    alignment: int


class PreparedPlan(Protocol):
    """A run table in the memory of a device."""

    @property
    def table(self) -> RunTable: ...
    def close(self) -> None:
        """REQUIRES: no copy that uses it is under way."""


class Device(Protocol):
    """Thread safety: all methods may be called from any thread.

    Every method may raise GpuError: the device refused.
    """

    @property
    def name(self) -> str: ...

    @property
    def uuid(self) -> bytes:
        """16 bytes that name the device in every process of the host."""

    # --- memory
    def allocate(self, num_bytes: int) -> Memory: ...
    def owns(self, address: int) -> bool:
        """Return whether `address` is in this device's memory."""

    def write(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        """Copy host memory to the device, at once."""

    def read(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Copy device memory to the host, at once: what streams have under way may be missing."""

    def register(self, address: int, num_bytes: int, *, read_only: bool) -> None:
        """Pin host memory for direct access, in one piece; see `HostRegistration`."""

    def unregister(self, address: int) -> None: ...

    # --- order
    def new_stream(self) -> int: ...
    def close_stream(self, stream: int) -> None: ...
    def record(self, stream: int) -> Event: ...
    def wait_event(self, stream: int, event: Event) -> None:
        """What is enqueued on `stream` from now on runs after `event`."""

    # --- copies
    def prepare(self, table: RunTable) -> PreparedPlan: ...
    def gather(
        self,
        plan: PreparedPlan,
        block_ids: BlockIds,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None = None,
    ) -> None:
        """Canonical block at addresses[i] <- engine block block_ids[i], in one launch.

        `addresses` are of the device, or of registered host memory. `payload`: only the bytes
        [begin, end) of each block. REQUIRES: ids in range, and for a scatter all different.
        """

    def scatter(
        self,
        plan: PreparedPlan,
        block_ids: BlockIds,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None = None,
    ) -> None:
        """Engine block block_ids[i] <- canonical block at addresses[i], in one launch."""

    def copy(
        self,
        to: Addresses,
        from_: Addresses,
        sizes: Addresses,
        stream: int,
        *,
        is_from_host: bool = False,
    ) -> None:
        """Copy pieces between memory of the device and registered host memory, either way.

        `is_from_host`: all sources are host memory that nothing on the stream writes.
        """

    def close(self) -> None: ...


def poll_pauses() -> Iterator[float]:
    """Yield how long to pause before each next look at an event."""
    end = time.monotonic() + _SPIN_SECONDS
    while time.monotonic() < end:
        yield 0.0
    pause, longest = _PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, longest)


def wait_for(event: Event, timeout: float | None) -> bool:
    """Wait until `event` is done; False when `timeout` seconds were not enough.

    By looking again and again: the driver's own wait has no deadline.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pauses = poll_pauses()
    while not event.done():
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(next(pauses))
    return True


def all_done(events: Sequence[Event]) -> bool:
    return all(event.done() for event in events)


def word_bytes(*values: int) -> int:
    """Return the largest power of two up to 16 that divides all of `values`."""
    combined = 16
    for value in values:
        combined |= value
    return combined & -combined

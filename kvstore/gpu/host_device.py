"""HostDevice: host memory that behaves like a GPU's, for tests and for machines without one.

It refuses what a GPU would: memory that it does not know. With `late=True` its streams are as late
as they may be: nothing runs before somebody looks at an event, and each look runs one operation of
each stream. So whoever reuses memory too early, or forgets an event, reads wrong bytes for certain.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import GpuError
from kvstore.gpu.device import Addresses, BlockIds, Event, PreparedPlan, RunTable

_Work = Callable[[], bool]  # False: not yet


class HostEvent:
    """See `kvstore.gpu.device.Event`."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self.has_passed = False

    def done(self) -> bool:
        if not self.has_passed:
            self._device.advance()
        return self.has_passed


class HostMemory:
    """See `kvstore.gpu.device.Memory`."""

    def __init__(self, device: HostDevice, num_bytes: int) -> None:
        self._device = device
        self._array = np.zeros(num_bytes + 64, np.uint8)
        self.address = -(-self._array.ctypes.data // 64) * 64
        self.num_bytes = num_bytes

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        begin = self.address - self._array.ctypes.data
        return self._array[begin : begin + self.num_bytes]

    def close(self) -> None:
        self._device._forget(self.address)


class _Plan:
    def __init__(self, table: RunTable) -> None:
        self.table = table
        rows = table.rows
        if len(table.addresses):
            steps = [np.arange(row["count"], dtype=np.uint64) for row in rows]
            pieces = [
                table.addresses[:, [r]] + steps[r] * np.uint64(rows[r]["engine_stride"])
                for r in range(len(rows))
            ]
            sizes = np.repeat(rows["piece_bytes"], rows["count"]).astype(np.uint64)
            joined = np.ascontiguousarray(np.concatenate(pieces, axis=1), np.uint64)
            self.copy_plan = _native.CopyPlan.scattered(joined, sizes)
            return
        runs = np.empty((len(rows), 7), np.int64)
        for index, name in enumerate(
            ("base", "block_stride", "engine_stride", "block_offset", "piece_bytes", "count")
        ):
            runs[:, index] = rows[name]
        runs[:, 6] = rows["piece_bytes"]
        self.copy_plan = _native.CopyPlan(runs, table.block_bytes, table.num_blocks)

    def close(self) -> None: ...


class HostDevice:
    """See `kvstore.gpu.device.Device`."""

    name = "host memory"

    def __init__(self, *, late: bool = False) -> None:
        self.uuid = os.urandom(16)
        self._late = late
        self._lock = threading.RLock()  # guards all below, and runs one operation at a time
        self._known: dict[int, tuple[int, object]] = {}  # address -> bytes, owner
        self._registered: dict[int, tuple[int, bool]] = {}  # address -> bytes, read only
        self._numbers = itertools.count(16)
        self._streams: dict[int, deque[_Work]] = {0: deque()}

    # --- memory

    def allocate(self, num_bytes: int) -> HostMemory:
        memory = HostMemory(self, num_bytes)
        with self._lock:
            self._known[memory.address] = (num_bytes, memory)
        return memory

    def adopt(self, array: npt.NDArray[np.uint8]) -> None:
        """Take an array for memory of this device: an engine's, in tests."""
        with self._lock:
            self._known[array.ctypes.data] = (array.nbytes, array)

    def _forget(self, address: int) -> None:
        with self._lock:
            self._known.pop(address, None)

    def owns(self, address: int) -> bool:
        with self._lock:
            return any(begin <= address < begin + n for begin, (n, _) in self._known.items())

    def write(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        self._view(address, data.nbytes)[:] = data

    def read(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        return self._view(address, num_bytes).copy()

    def _view(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        self._check(address, num_bytes, is_written=False)
        with self._lock:
            for begin, (size, owner) in self._known.items():
                if begin <= address < begin + size:
                    array = owner.bytes if isinstance(owner, HostMemory) else owner
                    assert isinstance(array, np.ndarray)
                    flat: npt.NDArray[np.uint8] = array.reshape(-1).view(np.uint8)
                    return flat[address - begin : address - begin + num_bytes]
        raise GpuError(f"{self.name}: {address:#x} is registered, not of the device")

    def register(self, address: int, num_bytes: int, *, read_only: bool) -> None:
        with self._lock:
            for begin, (size, _) in self._registered.items():
                if address < begin + size and begin < address + num_bytes:
                    raise GpuError(f"{self.name}: {address:#x} is registered already")
            self._registered[address] = (num_bytes, read_only)

    def unregister(self, address: int) -> None:
        with self._lock:
            if self._registered.pop(address, None) is None:
                raise GpuError(f"{self.name}: {address:#x} is not registered")

    def _check(self, address: int, num_bytes: int, *, is_written: bool) -> None:
        with self._lock:
            for begin, (size, _) in self._known.items():
                if begin <= address and address + num_bytes <= begin + size:
                    return
            for begin, (size, read_only) in self._registered.items():
                if begin <= address and address + num_bytes <= begin + size:
                    if is_written and read_only:
                        break
                    return
        raise GpuError(f"{self.name}: {num_bytes} bytes at {address:#x} are not the device's")

    # --- order

    def new_stream(self) -> int:
        with self._lock:
            stream = next(self._numbers)
            self._streams[stream] = deque()
        return stream

    def close_stream(self, stream: int) -> None:
        with self._lock:
            while self._streams[stream]:
                self.advance()
            del self._streams[stream]

    def record(self, stream: int) -> HostEvent:
        event = HostEvent(self)

        def pass_it() -> bool:
            event.has_passed = True
            return True

        self._enqueue(stream, pass_it)
        return event

    def wait_event(self, stream: int, event: Event) -> None:
        assert isinstance(event, HostEvent)
        self._enqueue(stream, lambda: event.has_passed)

    def _enqueue(self, stream: int, work: _Work) -> None:
        with self._lock:
            if stream not in self._streams:
                raise GpuError(f"{self.name}: no stream {stream}")
            self._streams[stream].append(work)
            while not self._late and self.advance():
                pass

    def advance(self, only: int | None = None) -> bool:
        """Run the next operation of each stream, or of `only` one; False: none could run."""
        ran = False
        with self._lock:
            for stream in list(self._streams) if only is None else [only]:
                queue = self._streams[stream]
                if queue and queue[0]():
                    queue.popleft()
                    ran = True
        return ran

    # --- copies

    def prepare(self, table: RunTable) -> _Plan:
        return _Plan(table)

    def gather(
        self,
        plan: PreparedPlan,
        block_ids: BlockIds,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None = None,
    ) -> None:
        self._launch(True, plan, block_ids, addresses, stream, payload)

    def scatter(
        self,
        plan: PreparedPlan,
        block_ids: BlockIds,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None = None,
    ) -> None:
        self._launch(False, plan, block_ids, addresses, stream, payload)

    def _launch(
        self,
        is_gather: bool,
        plan: PreparedPlan,
        block_ids: BlockIds,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None,
    ) -> None:
        assert isinstance(plan, _Plan)
        begin, end = payload or (0, plan.table.block_bytes)
        for address in addresses.tolist():
            self._check(address + begin, end - begin, is_written=is_gather)
        ids, places, copy_plan = block_ids.copy(), addresses.copy(), plan.copy_plan
        rows = np.empty((len(ids), plan.table.block_bytes), np.uint8)
        own = rows.ctypes.data + rows.strides[0] * np.arange(len(ids), dtype=np.uint64)
        copy = _native.gather_range if is_gather else _native.scatter_range

        def move() -> None:
            for place, row in zip(places.tolist(), own.tolist(), strict=True):
                to, source = (place, row) if is_gather else (row, place)
                ctypes.memmove(to + begin, source + begin, end - begin)

        def run() -> bool:
            # Through rows of our own: of a part of a block there may be no more than that part.
            if not is_gather:
                move()
            copy(copy_plan, ids, own, begin, end)
            if is_gather:
                move()
            return len(rows) > 0  # which keeps them until now

        if len(ids) and begin < end:
            self._enqueue(stream, run)

    def copy(
        self,
        to: Addresses,
        from_: Addresses,
        sizes: Addresses,
        stream: int,
        *,
        is_from_host: bool = False,
    ) -> None:
        for piece in zip(to.tolist(), from_.tolist(), sizes.tolist(), strict=True):
            self._check(piece[0], piece[2], is_written=True)
            self._check(piece[1], piece[2], is_written=False)
        pieces = (to.copy(), from_.copy(), sizes.copy())

        def run() -> bool:
            for address, source, size in zip(*pieces, strict=True):
                _native.copy_with_checksum(int(address), int(source), int(size))
            return True

        if len(to):
            self._enqueue(stream, run)

    def close(self) -> None:
        with self._lock:
            self._known.clear()
            self._registered.clear()

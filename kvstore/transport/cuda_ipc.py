"""GPU memory of another process on this host, by CUDA IPC. Never run on a GPU; see docs/gpu.md.

An endpoint with this mover has GPU regions and no others: `TransportSettings(movers=("cuda",))`.
What a peer gets of a region is the handle of its allocation, its place therein, and an event: a
read waits, on the GPU, for what `CudaIpcMover.mark` said of the region before.

Who has a region open holds a shared flock on a file of its owner's, which ends with that process.
So `deregister` knows whether a peer could still reach the memory, which must not be freed then. The
other way round, a peer sees its owner's death by a pidfd, and closes what it had open of it.

A copy that was enqueued cannot be called back: after LATE, LOST or CANCELLED memory is settled only
when the link's `close` says so.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from dataclasses import dataclass

import msgspec
import numpy as np

from kvstore._native import CancelFlag
from kvstore.errors import GpuError, IncompatibleError, PeerUnavailableError
from kvstore.gpu.cuda_device import CudaDevice
from kvstore.gpu.device import Event, poll_pauses
from kvstore.gpu.driver import Driver
from kvstore.gpu.ipc import Imports, SharedEvent, export_memory
from kvstore.transport.cuda_regions import (
    Mapped,
    RegionKey,
    close_region,
    joined,
    open_region,
    sums_of,
)
from kvstore.transport.processes import is_readable, start_of, try_lock
from kvstore.transport.settings import TransportSettings
from kvstore.transport.types import (
    Batch,
    EndpointInfo,
    Region,
    RegionInfo,
    Status,
    Statuses,
    U64s,
    all_of,
)

_WATCH_SECONDS = 0.1  # how long after an owner's death its memory is closed, at most


class _Info(msgspec.Struct, frozen=True, array_like=True):
    started: int  # of the process, in clock ticks since boot
    uuid: bytes


@dataclass(slots=True)
class _Served:
    region: Region
    event: SharedEvent
    fd: int


_local_lock = threading.Lock()
_local: dict[int, CudaIpcMover] = {}  # epoch -> mover, of this process


class CudaIpcMover:
    """See `kvstore.transport.mover.Mover`."""

    name = "cuda"
    has_rdma = False

    def __init__(self, settings: TransportSettings, secret: bytes, epoch: int) -> None:
        """
        Raises:
            GpuError: no driver, or no such GPU.
        """
        driver = Driver(settings.cuda_library) if settings.cuda_library else Driver()
        self.device = CudaDevice(settings.cuda_device, driver=driver)
        self.imports = Imports(self.device)
        self.pid = os.getpid()
        self._epoch = epoch
        self._started = start_of(self.pid)
        self._lock = threading.Lock()  # guards all below
        self._served: dict[int, _Served] = {}
        self._links: list[CudaIpcLink] = []
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        with _local_lock:
            _local[epoch] = self

    def info(self) -> bytes:
        return msgspec.msgpack.encode(_Info(self._started, self.device.uuid))

    def register(self, region: Region, fd: int, fd_offset: int) -> bytes | None:
        if not self.device.owns(region.address):
            return None
        exported = export_memory(self.device, region.address, region.num_bytes)
        event = SharedEvent(self.device)
        lock_file = os.memfd_create("kvstore-gpu-region", os.MFD_CLOEXEC)
        with self._lock:
            self._served[region.region_id] = _Served(region, event, lock_file)
        return msgspec.msgpack.encode(
            RegionKey(
                self.device.uuid,
                exported.handle,
                exported.offset,
                exported.allocation_bytes,
                event.export(),
                lock_file,
                os.fstat(lock_file).st_ino,
            )
        )

    def mark(self, region: Region, stream: int) -> bool:
        """See `Endpoint.mark`; False: it is not registered."""
        found = self.served(region.region_id)
        if found is not None:
            found[1].record(stream)
        return found is not None

    def deregister(self, region: Region, timeout: float) -> bool:
        with self._lock:
            served = self._served.get(region.region_id)
            if served is None:
                return True
            if not try_lock(served.fd, fcntl.LOCK_EX):
                return False  # a peer has it open
            del self._served[region.region_id]
        served.event.close()
        os.close(served.fd)  # and with it the lock: who comes now finds no such file
        return True

    def served(self, region_id: int) -> tuple[Region, SharedEvent] | None:
        with self._lock:
            found = self._served.get(region_id)
        return None if found is None else (found.region, found.event)

    def connect(self, peer: EndpointInfo, timeout: float) -> CudaIpcLink:
        try:
            info = msgspec.msgpack.decode(peer.movers[self.name], type=_Info)
        except msgspec.MsgspecError as error:
            raise IncompatibleError(f"cuda: what the peer says is none of ours: {error}") from error
        with _local_lock:
            neighbour = _local.get(peer.epoch)
        link = CudaIpcLink(self, peer, info.started, neighbour)
        with self._lock:
            self._links.append(link)
            if self._watcher is None:
                self._watcher = threading.Thread(
                    target=self._watch, name="kvstore-cuda-ipc", daemon=True
                )
                self._watcher.start()
        return link

    def forget(self, link: CudaIpcLink) -> None:
        with self._lock:
            if link in self._links:
                self._links.remove(link)

    def _watch(self) -> None:
        """Close what dead peers owned, and what links left under way when they were closed."""
        while not self._closing.wait(_WATCH_SECONDS):
            with self._lock:
                links = list(self._links)
            for link in links:
                link.let_go_if_dead()

    def close(self) -> None:
        with _local_lock:
            _local.pop(self._epoch, None)
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        with self._lock:
            served, self._served = self._served, {}
        for each in served.values():
            each.event.close()
            os.close(each.fd)
        self.device.close()


class CudaIpcLink:
    """See `kvstore.transport.mover.MoverLink`."""

    def __init__(
        self, mover: CudaIpcMover, peer: EndpointInfo, started: int, neighbour: CudaIpcMover | None
    ) -> None:
        self._mover = mover
        self._device = mover.device
        self._neighbour = neighbour
        self._pid = peer.pid
        self._pidfd = -1
        self._lock = threading.Lock()  # guards all below
        self._regions: dict[int, Mapped] = {}
        self._moving: dict[int, Event | None] = {}  # None: being enqueued
        self._next_move = 0
        self._closed = False
        self._let_go = False
        if neighbour is None:
            try:
                self._pidfd = os.pidfd_open(peer.pid)
                if start_of(peer.pid) != started:
                    raise PeerUnavailableError(f"cuda: process {peer.pid} is another one by now")
            except OSError as error:
                raise PeerUnavailableError(f"cuda: process {peer.pid}: {error}") from error
            except BaseException:
                os.close(self._pidfd)
                raise
        self._stream = self._device.new_stream()

    @property
    def detail(self) -> str:
        whose = "this process" if self._neighbour is not None else f"process {self._pid}"
        return f"{self._device.name}, memory of {whose}"

    @property
    def is_alive(self) -> bool:
        with self._lock:
            return not self._closed and not self._is_peer_dead()

    def _is_peer_dead(self) -> bool:
        if self._neighbour is not None:
            return self._neighbour._closing.is_set()
        if self._pidfd < 0:
            return True
        return is_readable(self._pidfd)

    def open(self, region: RegionInfo) -> None:
        try:
            key = msgspec.msgpack.decode(region.keys["cuda"], type=RegionKey)
        except msgspec.MsgspecError as error:
            raise IncompatibleError(f"cuda: region {region.region_id}: no key: {error}") from error
        if self._neighbour is not None:
            found = self._neighbour.served(region.region_id)
            if found is None:
                raise PeerUnavailableError(f"cuda: region {region.region_id} is served no more")
            mapped = Mapped(region.address, region.num_bytes, region.writable, found[1])
        else:
            try:
                mapped = open_region(self._device, self._mover.imports, self._pid, region, key)
            except GpuError as error:
                if self.is_alive:
                    raise IncompatibleError(f"cuda: region {region.region_id}: {error}") from error
                raise PeerUnavailableError(f"cuda: process {self._pid} has gone") from error
        with self._lock:
            if not self._closed:
                self._regions[region.region_id] = mapped
                return
        close_region(self._mover.imports, mapped)
        raise PeerUnavailableError("cuda: the link is closed")

    # --- moving

    def read(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        return self._move(region_id, batch, timeout, cancel, True)

    def write(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        return self._move(region_id, batch, timeout, cancel, False)

    def _move(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None, is_read: bool
    ) -> Statuses:
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._closed or self._is_peer_dead():
                return all_of(Status.LOST, len(batch))
            mapped = self._regions.get(region_id)
            if mapped is None or (not is_read and not mapped.writable):
                return all_of(Status.REFUSED, len(batch))
            if self._neighbour is not None and self._neighbour.served(region_id) is None:
                return all_of(Status.REFUSED, len(batch))
            move, self._next_move = self._next_move, self._next_move + 1
            self._moving[move] = None
        statuses = all_of(Status.REFUSED, len(batch))
        event: Event | None = None
        try:
            owners = self._owners(batch)
            inside = batch.is_inside(mapped.num_bytes) & (owners > 0)
            chosen = batch if inside.all() else batch.pick(inside)
            event = self._enqueue(mapped, chosen, owners[inside], is_read)
            statuses[inside] = self._await(event, chosen, deadline, cancel, is_read)
        except GpuError:
            statuses[:] = Status.LOST
        finally:
            with self._lock:
                self._moving[move] = event
                self._sweep()
        return statuses

    def _enqueue(self, mapped: Mapped, batch: Batch, owners: U64s, is_read: bool) -> Event:
        ours, theirs, sizes = joined(batch, owners)
        theirs = theirs + np.uint64(mapped.address)
        to, source = (ours, theirs) if is_read else (theirs, ours)
        mapped.event.wait_on(self._stream)
        try:
            self._device.copy(to, source, sizes, self._stream)
        finally:
            event = self._device.record(self._stream)
        return event

    def _owners(self, batch: Batch) -> U64s:
        """The allocation that has our side of each piece, by its address; 0: the driver knows none.
        A copy to or from any other memory would wait for the stream.
        """
        owners = np.zeros(len(batch), np.uint64)
        begins, ends = batch.local_addresses, batch.local_addresses + batch.lengths
        todo = np.ones(len(batch), bool)
        while todo.any():
            first = int(np.argmax(todo))
            size = int(batch.lengths[first])
            base, size = self._device.allocation_of(int(begins[first]), size)
            inside = (begins >= np.uint64(base)) & (ends <= np.uint64(base + size))
            owners[todo & inside] = base
            todo &= ~inside
            todo[first] = False
        return owners

    def _await(
        self,
        event: Event,
        batch: Batch,
        deadline: float,
        cancel: CancelFlag | None,
        is_read: bool,
    ) -> Statuses:
        pauses = poll_pauses()
        while not event.done():
            if cancel is not None and cancel.is_set():
                return all_of(Status.CANCELLED, len(batch))
            if not self.is_alive:
                return all_of(Status.LOST, len(batch))
            if time.monotonic() >= deadline:
                return all_of(Status.LATE, len(batch))
            time.sleep(next(pauses))
        # What the peer had not finished writing, nobody will.
        if not self.is_alive:
            return all_of(Status.LOST, len(batch))
        statuses = all_of(Status.OK, len(batch))
        if is_read and batch.checksums is not None:
            statuses[sums_of(self._device, batch) != batch.checksums] = Status.DAMAGED
        return statuses

    # --- ending

    def _sweep(self) -> None:
        """Forget moves that are done. REQUIRES: the lock."""
        for move, event in list(self._moving.items()):
            try:
                if event is not None and event.done():
                    del self._moving[move]
            except GpuError:
                del self._moving[move]  # the GPU's context is gone, and with it its copies

    def let_go_if_dead(self) -> None:
        """For the mover's watcher."""
        with self._lock:
            if not self._closed and self._is_peer_dead():
                self._closed = True
            if self._closed:
                self._finish_closing()

    def _finish_closing(self) -> bool:
        """Close all that is open, if nothing is under way. REQUIRES: the lock, `_closed`."""
        self._sweep()
        if self._moving:
            return False
        if not self._let_go:
            self._let_go = True
            for mapped in self._regions.values():
                close_region(self._mover.imports, mapped)
            self._regions.clear()
            self._device.close_stream(self._stream)
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
        return True

    def close(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                self._closed = True
                if self._finish_closing():
                    break
            if time.monotonic() >= deadline:
                return False
            time.sleep(1e-3)
        self._mover.forget(self)
        return True

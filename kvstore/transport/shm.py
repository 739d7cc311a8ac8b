"""Pointer copy: memory of this process, or of another of the same user on this host.

Nothing listens: a peer's memfd is opened through /proc/PID/fd, which the kernel allows to those who
could debug the peer anyway. Its pid is taken for its own only when it began when it says it did.
Death is seen by a pidfd, without a message.

Who maps a writable region holds a shared flock on its file, which ends with that process. So
`deregister` knows whether somebody could still write to it, and keeps newcomers out.
"""

from __future__ import annotations

import fcntl
import os
import threading
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore._native import CancelFlag
from kvstore.errors import IncompatibleError, PeerUnavailableError
from kvstore.transport.processes import cannot_shrink, is_readable, start_of, try_lock
from kvstore.transport.types import (
    Batch,
    EndpointInfo,
    Natural,
    Region,
    RegionInfo,
    Status,
    Statuses,
    all_of,
)

_THREADS = 2  # past two a copy is bound by memory on most machines
_CLOSE_SECONDS = 5.0


class _Key(msgspec.Struct, frozen=True, array_like=True):
    """Where a region's file is; fd < 0: only threads of that process can reach the region."""

    fd: int
    fd_offset: Natural
    inode: int


class _Info(msgspec.Struct, frozen=True, array_like=True):
    started: int  # of the process, in clock ticks since boot


_Said = TypeVar("_Said", _Key, _Info)


def _decode(data: bytes, kind: type[_Said]) -> _Said:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise IncompatibleError(f"shm: what the peer says is none of ours: {error}") from error


_local_lock = threading.Lock()
_local: dict[int, ShmMover] = {}  # epoch -> mover, of this process


def is_local(epoch: int) -> bool:
    """Whether that endpoint is of this process."""
    mover = _local.get(epoch)
    return mover is not None and mover.pid == os.getpid()


class ShmMover:
    """See `kvstore.transport.mover.Mover`."""

    name = "shm"
    has_rdma = False

    def __init__(self, epoch: int) -> None:
        self.pid = os.getpid()
        self._epoch = epoch
        self._started = start_of(self.pid)
        self._regions: dict[int, tuple[Region, int]] = {}  # with its own descriptor
        self._removed: set[int] = set()  # of those: served no more
        self._moves: list[tuple[int, CancelFlag]] = []  # of threads here, and their regions
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        with _local_lock:
            _local[epoch] = self

    def info(self) -> bytes:
        return msgspec.msgpack.encode(_Info(self._started))

    def register(self, region: Region, fd: int, fd_offset: int) -> bytes | None:
        inode = 0
        if fd >= 0:
            # Our own, so that it stays open, under this number, for as long as it is served.
            fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            inode = os.fstat(fd).st_ino
        with self._lock:
            self._regions[region.region_id] = (region, fd)
        return msgspec.msgpack.encode(_Key(fd, fd_offset, inode))

    def deregister(self, region: Region, timeout: float) -> bool:
        with self._lock:
            if region.region_id in self._regions:
                self._removed.add(region.region_id)
            if not self._wait_for_moves(region.region_id, timeout):
                return False
            _, fd = self._regions.get(region.region_id, (region, -1))
            has_lock = region.writable and fd >= 0 and try_lock(fd, fcntl.LOCK_EX)
            is_free = has_lock or not region.writable or fd < 0
            if is_free and self._regions.pop(region.region_id, None) is not None and fd >= 0:
                # The lock is the file's, which may be served again; so it must not outlive this.
                # Who comes between finds that the descriptor has gone.
                ours = os.dup(fd)
                os.close(fd)
                if has_lock:
                    fcntl.flock(ours, fcntl.LOCK_UN)
                os.close(ours)
            if is_free:
                self._removed.discard(region.region_id)
        return is_free

    def begin(self, region_id: int, cancel: CancelFlag) -> Region | None:
        """Return a region for a move of a thread here, which must `end` it; None: there is none."""
        with self._lock:
            found = self._regions.get(region_id)
            if found is None or region_id in self._removed:
                return None
            self._moves.append((region_id, cancel))
        return found[0]

    def end(self, region_id: int, cancel: CancelFlag) -> None:
        with self._lock:
            self._moves.remove((region_id, cancel))
            self._changed.notify_all()

    def _wait_for_moves(self, region_id: int | None, timeout: float) -> bool:
        """Whether no thread here moves bytes of it (None: of any). REQUIRES: `_lock` is held."""
        return self._changed.wait_for(
            lambda: not any(region_id in (None, moved) for moved, _ in self._moves), timeout
        )

    def connect(self, peer: EndpointInfo, timeout: float) -> SameProcessLink | MappedLink:
        if is_local(peer.epoch):
            return SameProcessLink(_local[peer.epoch])
        return MappedLink(peer, _decode(peer.movers[self.name], _Info).started)

    def close(self) -> None:
        with _local_lock:
            _local.pop(self._epoch, None)
        with self._lock:
            regions, self._regions = self._regions, {}
            # The caller may free the memory when this returns.
            for _, cancel in self._moves:
                cancel.set()
            self._wait_for_moves(None, _CLOSE_SECONDS)
        for _, fd in regions.values():
            if fd >= 0:
                os.close(fd)


@dataclass(frozen=True, slots=True)
class _Mapped:
    address: int
    num_bytes: int
    writable: bool
    array: npt.NDArray[np.uint8] | None = None  # keeps it mapped
    path: str = ""  # of the owner's descriptor, open for as long as it serves the region
    inode: int = 0

    def is_served(self) -> bool:
        try:
            return os.stat(self.path).st_ino == self.inode
        except OSError:
            return False


class SameProcessLink:
    """See `kvstore.transport.mover.MoverLink`."""

    detail = "same process"

    def __init__(self, mover: ShmMover) -> None:
        self._mover = mover
        self._closed = False

    @property
    def is_alive(self) -> bool:
        mover = self._mover
        # After a fork the memory is not the peer's any more.
        return not self._closed and _local.get(mover._epoch) is mover and mover.pid == os.getpid()

    def open(self, region: RegionInfo) -> None:
        pass

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
        if not self.is_alive:
            return all_of(Status.LOST, len(batch))
        cancel = cancel or CancelFlag()
        region = self._mover.begin(region_id, cancel)
        if region is None:
            return all_of(Status.REFUSED, len(batch))
        try:
            mapped = _Mapped(region.address, region.num_bytes, region.writable)
            return _copy(mapped, batch, timeout, cancel, is_read)
        finally:
            self._mover.end(region_id, cancel)

    def close(self, timeout: float) -> bool:
        self._closed = True
        return True


class MappedLink:
    """See `kvstore.transport.mover.MoverLink`. Another process of this user on this host."""

    def __init__(self, peer: EndpointInfo, started: int) -> None:
        self._pid = peer.pid
        try:
            self._pidfd = os.pidfd_open(peer.pid)
        except OSError as error:
            raise PeerUnavailableError(f"shm: process {peer.pid}: {error.strerror}") from error
        self._regions: dict[int, _Mapped] = {}
        self._files: list[int] = []  # whose flocks tell the owner that we may write
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._moving = 0
        self._closed = False
        self._released = False
        try:
            if start_of(peer.pid) != started:
                raise PeerUnavailableError(f"shm: process {peer.pid} is another one by now")
        except BaseException:
            os.close(self._pidfd)
            raise
        self.detail = f"memory of process {peer.pid}"

    @property
    def is_alive(self) -> bool:
        with self._lock:
            return not self._closed and not is_readable(self._pidfd)

    def open(self, region: RegionInfo) -> None:
        key = _decode(region.keys["shm"], _Key)
        if key.fd < 0:
            raise IncompatibleError(f"shm: region {region.region_id} is no shared memory")
        path = f"/proc/{self._pid}/fd/{key.fd}"
        access = os.O_RDWR if region.writable else os.O_RDONLY
        try:
            # Never waits, whatever the number stands for by now.
            fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise PeerUnavailableError(f"shm: {path}: {error.strerror}") from error
        try:
            mapped = self._map(region, key, path, fd)
            with self._lock:
                if self._closed:
                    raise PeerUnavailableError("shm: the link is closed")
                is_new = region.region_id not in self._regions
                if is_new:
                    self._regions[region.region_id] = mapped
                    if region.writable:
                        self._files.append(fd)
        except OSError as error:
            os.close(fd)
            raise PeerUnavailableError(f"shm: {path}: {error}") from error
        except BaseException:
            os.close(fd)
            raise
        if not (is_new and region.writable):
            os.close(fd)

    def _map(self, region: RegionInfo, key: _Key, path: str, fd: int) -> _Mapped:
        """`fd` has the flock then, where the region is writable."""
        found = os.fstat(fd)
        if not self.is_alive or found.st_ino != key.inode:
            raise PeerUnavailableError(f"shm: process {self._pid} has gone")
        end = key.fd_offset + region.num_bytes
        if found.st_size < end:
            raise IncompatibleError(f"shm: region of {end} bytes in a file of {found.st_size}")
        if not cannot_shrink(fd):
            raise IncompatibleError(f"shm: region {region.region_id}: its file could shrink")
        if region.writable and not try_lock(fd, fcntl.LOCK_SH):
            raise PeerUnavailableError(f"shm: region {region.region_id} is served no more")
        if os.stat(path).st_ino != key.inode:  # closed before we had the lock
            raise PeerUnavailableError(f"shm: region {region.region_id} is served no more")
        array = _native.map_shared(fd, end, region.writable)
        address = array.ctypes.data + key.fd_offset
        return _Mapped(address, region.num_bytes, region.writable, array, path, key.inode)

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
        with self._lock:
            if self._closed or is_readable(self._pidfd):
                return all_of(Status.LOST, len(batch))
            mapped = self._regions.get(region_id)
            if mapped is None or not mapped.is_served():
                return all_of(Status.REFUSED, len(batch))
            self._moving += 1
        try:
            statuses = _copy(mapped, batch, timeout, cancel, is_read)
        finally:
            with self._lock:
                self._moving -= 1
                self._idle.notify_all()
                self._release_if_idle()
        # What it had not finished writing, nobody will, and what it serves no more may have been
        # reused meanwhile; where checksums were given they tell.
        if batch.checksums is None or not is_read:
            if not self.is_alive:
                statuses[statuses == Status.OK] = Status.LOST
            elif not mapped.is_served():
                statuses[statuses == Status.OK] = Status.REFUSED
        return statuses

    def close(self, timeout: float) -> bool:
        with self._lock:
            self._closed = True
            is_idle = self._idle.wait_for(lambda: self._moving == 0, timeout)
            self._release_if_idle()
        return is_idle

    def _release_if_idle(self) -> None:
        """By whoever is last: `close`, or a move that it did not wait for. REQUIRES: the lock."""
        if not self._closed or self._moving > 0 or self._released:
            return
        self._released = True
        os.close(self._pidfd)
        self._regions.clear()
        for fd in self._files:
            os.close(fd)


def _copy(
    mapped: _Mapped, batch: Batch, timeout: float, cancel: CancelFlag | None, is_read: bool
) -> Statuses:
    inside = batch.is_inside(mapped.num_bytes)
    if not is_read and not mapped.writable:
        inside[:] = False
    if not inside.all():
        statuses = all_of(Status.REFUSED, len(batch))
        if inside.any():
            statuses[inside] = _copy(mapped, batch.pick(inside), timeout, cancel, is_read)
        return statuses
    theirs = batch.remote_offsets + np.uint64(mapped.address)
    ours = batch.local_addresses
    to, source = (ours, theirs) if is_read else (theirs, ours)
    return _native.move_pieces(
        to, source, batch.lengths, batch.checksums, _THREADS, timeout, cancel
    )

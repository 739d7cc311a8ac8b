"""Pointer copy: memory of this process, or of another of the same user on this host.

Nothing listens: a peer's memfd is opened through /proc/PID/fd, which the kernel allows to those who
could debug the peer anyway. Its pid is taken for its own only when it began when it says it did.
Death is seen by a pidfd, without a message.

Who maps a writable region holds a shared flock on its file, which ends with that process. So
`deregister` knows whether somebody could still write to it, and keeps newcomers out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import threading
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore._native import CancelFlag
from kvstore.errors import IncompatibleError, PeerUnavailableError
from kvstore.transport.types import (
    Batch,
    EndpointInfo,
    Region,
    RegionInfo,
    Status,
    Statuses,
    all_of,
)

_THREADS = 2  # past two a copy is bound by memory on most machines


class _Key(msgspec.Struct, frozen=True, array_like=True):
    """Where a region's file is; fd < 0: only threads of that process can reach the region."""

    fd: int
    fd_offset: int
    inode: int


class _Info(msgspec.Struct, frozen=True, array_like=True):
    started: int  # of the process, in clock ticks since boot


_local_lock = threading.Lock()
_local: dict[int, ShmMover] = {}  # epoch -> mover, of this process


def is_local(epoch: int) -> bool:
    """Whether that endpoint is of this process."""
    mover = _local.get(epoch)
    return mover is not None and mover.pid == os.getpid()


def start_of(pid: int) -> int:
    """Return when a process began, in clock ticks since boot.

    Raises:
        PeerUnavailableError: there is none.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError as error:
        raise PeerUnavailableError(f"shm: process {pid}: {error.strerror}") from error
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


class ShmMover:
    """See `kvstore.transport.mover.Mover`."""

    name = "shm"
    has_rdma = False

    def __init__(self, epoch: int) -> None:
        self.pid = os.getpid()
        self._epoch = epoch
        self._started = start_of(self.pid)
        self._regions: dict[int, tuple[Region, int]] = {}  # with its own descriptor
        self._lock = threading.Lock()
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
        return is_free

    def region(self, region_id: int) -> Region | None:
        with self._lock:
            found = self._regions.get(region_id)
        return None if found is None else found[0]

    def connect(self, peer: EndpointInfo, timeout: float) -> SameProcessLink | MappedLink:
        if is_local(peer.epoch):
            return SameProcessLink(_local[peer.epoch])
        return MappedLink(peer, msgspec.msgpack.decode(peer.movers[self.name], type=_Info).started)

    def close(self) -> None:
        with _local_lock:
            _local.pop(self._epoch, None)
        with self._lock:
            regions, self._regions = self._regions, {}
        for _, fd in regions.values():
            if fd >= 0:
                os.close(fd)


@dataclass(frozen=True, slots=True)
class _Mapped:
    address: int
    num_bytes: int
    writable: bool
    array: npt.NDArray[np.uint8] | None = None  # keeps it mapped


class SameProcessLink:
    """See `kvstore.transport.mover.MoverLink`."""

    detail = "same process"

    def __init__(self, mover: ShmMover) -> None:
        self._mover = mover
        self._closed = False

    @property
    def is_alive(self) -> bool:
        return not self._closed and _local.get(self._mover._epoch) is self._mover

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
        region = self._mover.region(region_id)
        if region is None:
            return all_of(Status.REFUSED, len(batch))
        mapped = _Mapped(region.address, region.num_bytes, region.writable)
        return _copy(mapped, batch, timeout, cancel, is_read)

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
            return not self._closed and not _is_readable(self._pidfd)

    def open(self, region: RegionInfo) -> None:
        key = msgspec.msgpack.decode(region.keys["shm"], type=_Key)
        if key.fd < 0:
            raise IncompatibleError(f"shm: region {region.region_id} is no shared memory")
        path = f"/proc/{self._pid}/fd/{key.fd}"
        try:
            fd = os.open(path, (os.O_RDWR if region.writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise PeerUnavailableError(f"shm: {path}: {error.strerror}") from error
        try:
            found = os.fstat(fd)
            if not self.is_alive or found.st_ino != key.inode:
                raise PeerUnavailableError(f"shm: process {self._pid} has gone")
            end = key.fd_offset + region.num_bytes
            if found.st_size < end:
                raise IncompatibleError(f"shm: region of {end} bytes in a file of {found.st_size}")
            if region.writable and not try_lock(fd, fcntl.LOCK_SH):
                raise PeerUnavailableError(f"shm: region {region.region_id} is served no more")
            if os.stat(path).st_ino != key.inode:  # closed before we had the lock
                raise PeerUnavailableError(f"shm: region {region.region_id} is served no more")
            array = _native.map_shared(fd, end, region.writable)
        except OSError as error:
            os.close(fd)
            raise PeerUnavailableError(f"shm: {path}: {error}") from error
        except BaseException:
            os.close(fd)
            raise
        if region.writable:
            self._files.append(fd)
        else:
            os.close(fd)
        address = array.ctypes.data + key.fd_offset
        self._regions[region.region_id] = _Mapped(address, region.num_bytes, region.writable, array)

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
            if self._closed or _is_readable(self._pidfd):
                return all_of(Status.LOST, len(batch))
            mapped = self._regions.get(region_id)
            if mapped is None:
                return all_of(Status.REFUSED, len(batch))
            self._moving += 1
        try:
            statuses = _copy(mapped, batch, timeout, cancel, is_read)
        finally:
            with self._lock:
                self._moving -= 1
                self._idle.notify_all()
        # What it had not finished writing, nobody will; where checksums were given they tell.
        if (batch.checksums is None or not is_read) and not self.is_alive:
            statuses[statuses == Status.OK] = Status.LOST
        return statuses

    def close(self, timeout: float) -> bool:
        with self._lock:
            was_closed, self._closed = self._closed, True
            is_idle = self._idle.wait_for(lambda: self._moving == 0, timeout)
            if is_idle and not was_closed:
                os.close(self._pidfd)
                self._regions.clear()
                for fd in self._files:
                    os.close(fd)
        return is_idle


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


def try_lock(fd: int, kind: int) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_readable(fd: int) -> bool:
    poll: Any = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))

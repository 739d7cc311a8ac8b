"""A GPU region on its way from its owner to whoever opens it; see `cuda_ipc`."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass

import msgspec
import numpy as np

from kvstore import _native
from kvstore.errors import IncompatibleError, PeerUnavailableError
from kvstore.gpu.cuda_device import CudaDevice
from kvstore.gpu.driver import IPC_HANDLE_BYTES
from kvstore.gpu.ipc import Imports, SharedEvent
from kvstore.transport.processes import try_lock
from kvstore.transport.types import Batch, RegionInfo, U64s


class RegionKey(msgspec.Struct, frozen=True, array_like=True):
    """Where a region is. `fd`, `inode`: the file on which those who have it open hold a lock."""

    uuid: bytes
    handle: bytes
    offset: int
    allocation_bytes: int
    event: bytes
    fd: int
    inode: int


@dataclass(frozen=True, slots=True)
class Mapped:
    """A peer's region, here."""

    address: int
    num_bytes: int
    writable: bool
    event: SharedEvent
    handle: bytes = b""  # b"": of this process
    fd: int = -1  # holds our lock


def open_region(
    device: CudaDevice, imports: Imports, pid: int, region: RegionInfo, key: RegionKey
) -> Mapped:
    """Make a region of process `pid` usable, and tell that process so.

    Raises:
        PeerUnavailableError: it serves the region no more.
        IncompatibleError: the key is none.
        GpuError: the driver cannot open it.
    """
    if len(key.handle) != IPC_HANDLE_BYTES or len(key.event) != IPC_HANDLE_BYTES:
        raise IncompatibleError(f"cuda: region {region.region_id} has no handle")
    if key.offset < 0 or key.offset + region.num_bytes > key.allocation_bytes:
        raise IncompatibleError(f"cuda: region {region.region_id} leaves its allocation")
    fd = _hold(pid, region, key)
    try:
        base = imports.open(key.handle)
        try:
            event = SharedEvent(device, key.event)
        except BaseException:
            imports.close(key.handle)
            raise
    except BaseException:
        os.close(fd)
        raise
    address = base + key.offset
    return Mapped(address, region.num_bytes, region.writable, event, key.handle, fd)


def close_region(imports: Imports, mapped: Mapped) -> None:
    """REQUIRES: no copy of it is under way."""
    if mapped.handle:
        mapped.event.close()
        imports.close(mapped.handle)
        os.close(mapped.fd)


def _hold(pid: int, region: RegionInfo, key: RegionKey) -> int:
    """Tell the owner that we have it open, by a lock on its file; return our descriptor."""
    path = f"/proc/{pid}/fd/{key.fd}"
    gone = f"cuda: region {region.region_id} of process {pid} is served no more"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PeerUnavailableError(f"{gone}: {error.strerror}") from error
    try:
        if os.fstat(fd).st_ino != key.inode or not try_lock(fd, fcntl.LOCK_SH):
            raise PeerUnavailableError(gone)
        if os.stat(path).st_ino != key.inode:  # closed before we had the lock
            raise PeerUnavailableError(gone)
    except OSError as error:
        os.close(fd)
        raise PeerUnavailableError(gone) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def joined(batch: Batch, owners: U64s) -> tuple[U64s, U64s, U64s]:
    """Local addresses, remote offsets and lengths, with neighbours made one: theirs are of one
    allocation, and ours where `owners` are the same."""
    ours, theirs, sizes = batch.local_addresses, batch.remote_offsets, batch.lengths
    follows = (ours[:-1] + sizes[:-1] == ours[1:]) & (theirs[:-1] + sizes[:-1] == theirs[1:])
    starts = np.flatnonzero(np.concatenate(([True], ~(follows & (owners[:-1] == owners[1:])))))
    if len(ours) == 0:
        return ours, theirs, sizes
    return ours[starts], theirs[starts], np.add.reduceat(sizes, starts)


def sums_of(device: CudaDevice, batch: Batch) -> U64s:
    """The checksums of our side, by the CPU, so of GPU memory through a copy: for those who ask."""
    sums = []
    for address, size in zip(batch.local_addresses.tolist(), batch.lengths.tolist(), strict=True):
        if device.owns(address):
            sums.append(_native.xxh3(device.read(address, size)))
        else:
            sums.append(_native.checksum(address, size))
    return np.array(sums, np.uint64)

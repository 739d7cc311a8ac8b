"""What `doctor` looks at, behind one class that tests replace: nothing here judges.

Nothing of the machine is changed. A directory is tried with a file that never has a name.
"""

from __future__ import annotations

import ctypes.util
import errno
import importlib.util
import os
import platform
import resource
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvstore import _native
from kvstore.admin import Admin
from kvstore.auth import read_secret
from kvstore.codec import aligned_buffer
from kvstore.errors import IncompatibleError, KVStoreError
from kvstore.status import Status

if TYPE_CHECKING:
    from kvstore.transport import Choice, TransportSettings
    from kvstore.transport.ucx_library import UcxReport

_PAGE = 4096
UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True)
class PathInfo:
    is_dir: bool
    uid: int
    mode: int  # permission bits


class Probes:
    """The machine."""

    def release(self) -> str:
        return platform.release()

    def machine(self) -> str:
        return platform.machine()

    def uid(self) -> int:
        return os.getuid()

    def read(self, path: str) -> str:
        """A small text file; empty when it is not there or may not be read."""
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read(1 << 20)
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def path_info(self, path: Path) -> PathInfo | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return PathInfo(stat.S_ISDIR(found.st_mode), found.st_uid, found.st_mode & 0o7777)

    def memory_bytes(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def limit(self, name: str) -> int:
        """The soft limit RLIMIT_<name>; UNLIMITED for none."""
        return resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0]

    def try_uring(self) -> str:
        """Empty when io_uring can be used, else why not."""
        try:
            _native.IoQueue("uring", 2)
        except RuntimeError as error:
            return str(error)
        return ""

    def try_direct(self, directory: Path) -> str:
        """Empty when a file there can be written with O_DIRECT, else the error's name."""
        memory = aligned_buffer(_PAGE)
        memory[:] = np.uint8(0)
        flags = os.O_RDWR | os.O_TMPFILE
        try:
            fd = os.open(directory, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        try:
            os.pwrite(fd, memory.data, 0)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        finally:
            os.close(fd)
        return ""

    def try_memfd(self) -> str:
        """Empty when an arena can be sealed and refuses writable mappings, else why not."""
        import fcntl

        future_write = 0x10  # F_SEAL_FUTURE_WRITE, Linux 5.1
        try:
            fd = os.memfd_create("kvstore-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            return f"memfd_create: {error.strerror}"
        try:
            os.posix_fallocate(fd, 0, _PAGE)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | future_write
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            return f"sealing: {error.strerror}"
        finally:
            os.close(fd)
        return ""

    def package(self, name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    def library(self, name: str) -> str:
        """The file that the linker would take, or empty."""
        return ctypes.util.find_library(name) or ""

    def simd_level(self) -> int:
        return _native._simd_level()

    def ask(self, address: str, timeout: float) -> Status | KVStoreError:
        try:
            with Admin(address, timeout) as admin:
                return admin.status()
        except KVStoreError as error:
            return error

    # Imported late: they load native libraries, which no other check needs.

    def movers(self, settings: TransportSettings) -> tuple[tuple[str, ...], dict[str, str]] | str:
        """The movers that work here, and why the others do not; or why none does."""
        from kvstore.transport import Endpoint

        try:
            with Endpoint(settings) as endpoint:
                return endpoint.movers, endpoint.unavailable
        except KVStoreError as error:
            return str(error)

    def ucx_libraries(self, given: str) -> list[UcxReport]:
        """What each libucp that is found says of itself, the one that is used first."""
        from kvstore.transport import ucx_library

        return [ucx_library.probe(library) for library in ucx_library.candidates(given)]

    def reach_peer(
        self, address: str, token: str, settings: TransportSettings, timeout: float
    ) -> tuple[str, str, list[Choice]]:
        """By which mover we reach a daemon, how, and what there is to say of each.

        Raises:
            KVStoreError: we do not.
        """
        from kvstore.peers.process import endpoint_secret
        from kvstore.transport import Endpoint, EndpointInfo, choices

        secret = read_secret(token, "peer_token")
        with Admin(address, timeout, secret, is_peer=True) as admin:
            welcome = admin.welcome
        if not welcome.endpoint:
            raise IncompatibleError(f"{address}: it serves no peers: it has no peer_token")
        info = EndpointInfo.decode(welcome.endpoint)
        theirs = endpoint_secret(secret, welcome.epoch)
        info = msgspec.structs.replace(info, secret=theirs)
        with Endpoint(settings, secret=secret) as ours:
            allowed = settings.movers
            judged = choices(ours.info(), info, allowed)
            with ours.connect(info, movers=allowed, timeout=timeout) as link:
                return link.mover, link.detail, judged

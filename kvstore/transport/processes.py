"""What the kernel tells of other processes and of files that are shared with them."""

from __future__ import annotations

import errno
import fcntl
import select
from typing import Any

from kvstore.errors import PeerUnavailableError


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


def cannot_shrink(fd: int) -> bool:
    """A file that its owner cuts off while we read it would kill us."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def try_lock(fd: int, kind: int) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def is_readable(fd: int) -> bool:
    poll: Any = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))

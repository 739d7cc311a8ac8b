"""The daemon's side of the holder: start it, hand it the arena, take the arena back.

See holder.py for what the two say to each other. The connection stays open for as long as the
daemon lives; that is how the holder knows. A holder that was killed is started again and given the
descriptor again, by `check`, which the daemon calls now and then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from kvstore.daemon import holder
from kvstore.errors import ConfigError, InUseError, StorageError

log = logging.getLogger(__name__)

SOCKET_NAME = "holder.sock"
_ANSWER_SECONDS = 5.0
_START_SECONDS = 20.0
_ATTEMPTS = 5


class Holding:
    """A connection to the holder of a state directory. Thread-safe: `_lock` guards all fields.

    Raises (all methods):
        StorageError: the holder cannot be started.
        InUseError: one is there but does not answer; the message names its process.
    """

    def __init__(self, directory: Path, hold_seconds: float) -> None:
        self._path = directory / SOCKET_NAME
        if len(str(self._path).encode()) > 107:
            raise ConfigError(f"state: {self._path} is too long for a socket's path")
        self._hold_seconds = hold_seconds
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._fd = -1  # a duplicate of what the holder was given
        self._generation = ""

    @property
    def pid(self) -> int:
        """The holder's process; 0 when there is none."""
        with self._lock:
            return _peer(self._connection)[0] if self._connection is not None else 0

    def get(self) -> tuple[int, str] | None:
        """Return a descriptor, now the caller's, and its generation; None when none is held.

        Where no holder runs, none is started.
        """
        with self._lock:
            try:
                self._connect()
                packet, fds = self._ask(f"get {self._hold_seconds}")
            except (FileNotFoundError, ConnectionError):  # none, or it ends just now
                return None
            words = packet.split()
            if words[:1] != ["ok"] or len(words) != 2 or len(fds) != 1:
                for fd in fds:
                    os.close(fd)
                return None
            self._remember(fds[0], words[1])
            return fds[0], words[1]

    def put(self, fd: int, generation: str, hold_seconds: float | None = None) -> None:
        """Have the holder keep a descriptor, instead of what it kept; start one where needed."""
        with self._lock:
            if hold_seconds is not None:
                self._hold_seconds = hold_seconds
            self._remember(fd, generation)
            self._put()

    def drop(self) -> None:
        """Have the holder free what it keeps; it ends with our connection."""
        with self._lock:
            self._forget()
            with contextlib.suppress(FileNotFoundError, ConnectionError):  # none: nothing is kept
                self._connect()
                self._ask("drop")

    def check(self) -> bool:
        """Start the holder again where it has gone; True when that was so."""
        with self._lock:
            if self._fd < 0:
                return False
            try:
                if self._connection is not None:
                    self._ask("ping")
                    return False
            except (ConnectionError, StorageError):
                log.warning("the holder has gone; starting another")
            self._put()
            return True

    def close(self, timeout: float = 0.0) -> None:
        """End the connection, and wait until a holder that keeps nothing has ended."""
        with self._lock:
            pid = _peer(self._connection)[0] if self._connection is not None else 0
            kept = self._fd >= 0
            self._disconnect()
            self._forget()
        deadline = time.monotonic() + timeout
        while pid and not kept and time.monotonic() < deadline and self._path.exists():
            time.sleep(0.005)

    def _remember(self, fd: int, generation: str) -> None:
        mine = os.dup(fd)
        self._forget()
        self._fd, self._generation = mine, generation

    def _forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _put(self) -> None:
        said = f"put {self._generation} {self._hold_seconds}"
        for _ in range(_ATTEMPTS):
            try:
                self._connect()
                packet, _fds = self._ask(said, self._fd)
            except (FileNotFoundError, ConnectionError):
                # None there, or it ended just now.
                self._disconnect()
                self._start()
                continue
            if packet == "ok":
                return
            self._disconnect()
        raise StorageError(0, f"state: the holder at {self._path} does not take the arena")

    def _connect(self) -> None:
        """Raises FileNotFoundError or ConnectionRefusedError where no holder listens."""
        if self._connection is not None:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(_ANSWER_SECONDS)
        try:
            try:
                connection.connect(str(self._path))
            except (BlockingIOError, TimeoutError) as error:  # nobody takes those before us
                raise InUseError(f"state: the holder at {self._path} does not answer") from error
            except (FileNotFoundError, ConnectionError):
                raise
            except OSError as error:
                said = f"state: {self._path}: {error.strerror}"
                raise StorageError(error.errno or 0, said) from error
            if _peer(connection)[1] != os.geteuid():
                raise InUseError(f"state: {self._path} belongs to another user's process")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _ask(self, said: str, fd: int = -1) -> tuple[str, list[int]]:
        connection = self._connection
        assert connection is not None
        try:
            if fd >= 0:
                socket.send_fds(connection, [said.encode()], [fd])
            else:
                connection.send(said.encode())
            packet, fds, _, _ = socket.recv_fds(connection, holder.PACKET_BYTES_MAX, 1)
        except TimeoutError as error:
            pid = _peer(connection)[0]
            self._disconnect()
            raise InUseError(
                f"state: the holder at {self._path}, process {pid}, does not answer"
            ) from error
        except ConnectionError:
            self._disconnect()
            raise
        except OSError as error:
            self._disconnect()
            raise StorageError(error.errno or 0, f"state: {self._path}: {error}") from error
        if not packet:
            self._disconnect()
            raise ConnectionResetError(f"{self._path}: the holder has gone")
        for each in fds:
            os.set_inheritable(each, False)
        return packet.decode("ascii", "replace"), fds

    def _start(self) -> None:
        """Start a holder. REQUIRES: the state directory is locked by us, and no holder answers."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", holder.__file__, str(self._path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_START_SECONDS,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise StorageError(0, f"state: the holder does not start: {error}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise StorageError(0, f"state: the holder does not start: {' '.join(said)}")


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the other end."""
    pid, uid, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    )
    return int(pid), int(uid)

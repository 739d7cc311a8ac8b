"""Daemons to measure and to kill: one of our own as a child process, or one that runs already."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from kvstore.address import unix_path
from kvstore.errors import ConfigError, DeadlineExceededError, KVStoreError

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
POLL_SECONDS = 0.002

# It looks for modules where this process does, so both run the same code however this one found it;
# and it ends when this process dies (prctl PR_SET_PDEATHSIG).
_SERVE = (
    "import ctypes, sys; ctypes.CDLL(None).prctl(1, 15); sys.path[:] = {path!r}; "
    "from kvstore.cli import main; main()"
)


def accepts(path: Path) -> bool:
    """Whether somebody listens on this Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _wait_until_serving(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS_MAX
    while not accepts(path):
        if process.poll() is not None:
            words = log.read_text(errors="replace").strip().splitlines()[-1:] if log else []
            raise KVStoreError(f"the daemon ended: {' '.join(words) or process.returncode}")
        if time.monotonic() > give_up:
            raise DeadlineExceededError(f"the daemon did not serve within {START_SECONDS_MAX:g} s")
        time.sleep(POLL_SECONDS)


class PrivateDaemon:
    """`kvstore serve` in `directory`, as a child. Use it as a context manager; it starts stopped.

    Args:
        directory: for its socket, state and log; must exist.
        settings: of `kvstore serve`, as text.
    """

    def __init__(self, directory: Path, **settings: str) -> None:
        self.path = directory / "kvstore.sock"
        self.address = f"unix:{self.path}"
        self._log = directory / "daemon.log"
        self._state = directory / "state"
        # What is held must not outlive a caller that was killed for long.
        self._settings = {"http": "", "hold_seconds": "20", **settings}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> float:
        """Start it, with the memory that a killed one left; return the seconds until it serves.

        Raises:
            KVStoreError: it ended, or did not serve in time.
        """
        assert self._process is None
        settings = {"listen": self.address, "state": str(self._state), **self._settings}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        begin = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE.format(path=sys.path), "serve", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt is for the caller, which ends it
            )
        try:
            _wait_until_serving(self.path, self._process, self._log)
        except BaseException:
            self.kill()
            raise
        return time.monotonic() - begin

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it in an orderly way, which frees its memory: a next one has the ssd directory."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def __enter__(self) -> PrivateDaemon:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class RunningDaemon:
    """A daemon that somebody else started, to be killed and started again as it was.

    Raises:
        ConfigError: no such address, or it is another user's.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.path = unix_path(address)

    def _pid(self) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(self.path))
            except OSError as error:
                raise ConfigError(f"connect: {self.address}: {error}") from error
            size = struct.calcsize("3i")
            pid, uid, _ = struct.unpack(
                "3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            )
        if uid != os.geteuid():
            raise ConfigError(f"connect: {self.address} is served by user {uid}, who is not us")
        return int(pid)

    def kill(self) -> None:
        """SIGKILL; remembers how it was started."""
        process = Path("/proc") / str(self._pid())
        self._command = [os.fsdecode(part) for part in _parts(process / "cmdline")]
        self._environment = dict(
            os.fsdecode(part).split("=", 1) for part in _parts(process / "environ") if b"=" in part
        )
        self._directory = os.readlink(process / "cwd")
        with suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGKILL)
        give_up = time.monotonic() + STOP_SECONDS_MAX
        while accepts(self.path):
            if time.monotonic() > give_up:
                raise DeadlineExceededError(f"{self.address} is still served")
            time.sleep(POLL_SECONDS)

    def start(self) -> float:
        """Start it by the same command; it goes on after us. Return the seconds until it serves.

        Where something else starts it again, the one that comes second ends by itself.
        """
        begin = time.monotonic()
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._directory,
            env=self._environment,
            start_new_session=True,
        )
        give_up = begin + START_SECONDS_MAX
        while not accepts(self.path):
            process.poll()
            if time.monotonic() > give_up:
                raise DeadlineExceededError(
                    f"{self.address} was not served again within {START_SECONDS_MAX:g} s"
                )
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - begin
        if process.poll() is None:
            process.returncode = 0  # it goes on without us, so nobody waits for it
        return seconds


def _parts(path: Path) -> list[bytes]:
    return [part for part in path.read_bytes().split(b"\0") if part]

"""Starting a daemon where an engine finds none: the setting `start_daemon`.

All ranks and engines of a host may come here at the same time; one starts it, the others wait. The
daemon is nobody's child to keep: it goes on when the engine ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from kvstore_adapters.settings import AdapterSettings

START_SECONDS = 60.0  # to take and clear its memory; 100 GiB are cleared in about 20 s
_POLL_SECONDS = 0.02
_READY = b"kvstored serves "

_log = logging.getLogger(__name__)


def ensure_daemon(settings: AdapterSettings, seconds: float = START_SECONDS) -> bool:
    """Start `kvstore serve` where `settings` ask for one and nobody listens at their address.

    Returns:
        Whether somebody listens now. Where the daemon does not start the reason is logged: an
        engine goes on without a cache.
    """
    if not settings.start_daemon:
        return True
    path = Path(settings.address.removeprefix("unix:"))
    deadline = time.monotonic() + seconds
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_served(path):
            return True
        lock = _open(path.with_name(path.name + ".start"))
        try:
            return _locked(lock, deadline) and (is_served(path) or _start(settings, path, deadline))
        finally:
            os.close(lock)
    except OSError as error:
        _log.warning("start_daemon: no daemon at %s: %s", settings.address, error)
        return False


def is_served(path: Path) -> bool:
    """Whether somebody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError):
            return True  # its queue is full: it lives, or is stopped
    return True


def _open(path: Path) -> int:
    """Open a file of ours for appending; no other user's, and no link to somewhere else."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(f"{path} belongs to another user")
    return fd


def _locked(fd: int, deadline: float) -> bool:
    """Wait for a file's lock, which ends with our descriptor."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)


def _start(settings: AdapterSettings, path: Path, deadline: float) -> bool:
    said = path.with_name(path.name + ".log")
    output = _open(said)
    try:
        begin = os.fstat(output).st_size
        arguments = ["serve", "--listen", settings.address, "--cpu", settings.start_daemon]
        process = subprocess.Popen(
            [sys.executable, "-m", "kvstore", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a signal to the engine's terminal is not for it
        )
        # Reaps it, should it end before us.
        threading.Thread(target=process.wait, name="kvstore-daemon", daemon=True).start()
        while time.monotonic() < deadline:
            news = os.pread(output, 1 << 20, begin)
            if _READY in news:
                _log.info("started a daemon at %s, which writes to %s", settings.address, said)
                return True
            if process.returncode is not None:
                last = (news.decode(errors="replace").strip().splitlines() or ["no reason given"])[
                    -1
                ]
                _log.warning("start_daemon: the daemon ended: %s (%s)", last, said)
                return False
            time.sleep(_POLL_SECONDS)
    finally:
        os.close(output)
    _log.warning("start_daemon: the daemon does not serve yet, see %s", said)
    return False

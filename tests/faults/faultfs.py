"""A disk that fails on demand: a FUSE pass-through whose faults are set while it is in use.

Requests of any kind reach it: buffered, O_DIRECT, io_uring, mmap. `FaultyDisk` is the test's side;
run as a program, this file is the file system itself, told what to do over a Unix socket with one
JSON document a connection: {"rules": [...]} sets the rules and frees what is held up by earlier
ones; every answer is {"hits": [...]}, how often each rule struck since it was set.

A fault strikes a request as the kernel sends it: at most 128 KiB of a read or write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTO_INVAL_DATA = 1 << 12  # FUSE_CAP_AUTO_INVAL_DATA in fuse_common.h
HUNG_S = 300.0  # longer than any test


@dataclass(frozen=True)
class Rule:
    """What to do to requests `op` (read, write, fsync, open, create, unlink, rename, fallocate) of
    files whose path matches. The first rule that fits a request counts."""

    op: str
    match: str = "*"  # fnmatch pattern of the path below the mount
    do: str = "errno"  # | drop (write) | torn (write) | flip | shift (read, write) | delay
    value: float = errno.EIO  # errno; bytes that a torn write keeps; bytes to shift by; seconds
    skip: int = 0  # requests that pass first
    count: int = -1  # requests that it then strikes; -1: all


def missing_tools() -> str:
    """Why there can be no such disk here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None:
        return "needs fuse3"
    try:
        importlib.import_module("mfusepy")
    except ImportError:
        return "needs mfusepy"
    return ""


class FaultyDisk:
    """A mounted directory, `path`, whose files lie in another directory."""

    def __init__(self, directory: Path) -> None:
        self.below = directory / "below"
        self.path = directory / "mounted"
        self._control = directory / "control"
        self._log = directory / "log"
        self._server: subprocess.Popen[bytes] | None = None

    def mount(self) -> None:
        self.below.mkdir(exist_ok=True)
        self.path.mkdir(exist_ok=True)
        command = [sys.executable, __file__, str(self.below), str(self.path), str(self._control)]
        with open(self._log, "wb") as log:
            self._server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        assert self._server.stdout is not None
        if self._server.stdout.readline() != b"mounted\n":
            raise RuntimeError(f"not mounted: {self._log.read_text()}")
        # The line precedes the mount; the kernel answers requests only once there is one.
        while not os.path.ismount(self.path):
            if self._server.poll() is not None:
                raise RuntimeError(f"not mounted: {self._log.read_text()}")

    def unmount(self) -> None:
        if self._server is None:
            return
        self.heal()
        subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=False)
        try:
            self._server.wait(5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()
        self._server = None

    def set(self, *rules: Rule) -> None:
        self._ask({"rules": [dataclasses.asdict(rule) for rule in rules]})

    def heal(self) -> None:
        """No more faults; what hangs goes on."""
        self.set()

    def hits(self) -> list[int]:
        found: list[int] = self._ask({})["hits"]
        return found

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._control))
            connection.sendall(json.dumps(message).encode())
            connection.shutdown(socket.SHUT_WR)
            parts = iter(lambda: connection.recv(65536), b"")
            answer: dict[str, Any] = json.loads(b"".join(parts))
            return answer


@contextlib.contextmanager
def faulty_disk(directory: Path) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(directory)
    disk.mount()
    try:
        yield disk
    finally:
        disk.unmount()


class Faults:
    """The rules in force. `_lock` guards all fields."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._seen: list[int] = []
        self._hits: list[int] = []
        self._healed = threading.Event()

    def set(self, rules: list[Rule]) -> None:
        with self._lock:
            self._healed.set()
            self._healed = threading.Event()
            self._rules = rules
            self._seen = [0] * len(rules)
            self._hits = [0] * len(rules)

    def hits(self) -> list[int]:
        with self._lock:
            return list(self._hits)

    def strike(self, op: str, path: str) -> Rule | None:
        """The rule for this request; waits out a delay and raises OSError for an errno."""
        with self._lock:
            rule = self._next(op, path)
            healed = self._healed
        if rule is None:
            return None
        if rule.do == "errno":
            raise OSError(int(rule.value), os.strerror(int(rule.value)))
        if rule.do == "delay":
            healed.wait(rule.value)
            return None
        return rule

    def _next(self, op: str, path: str) -> Rule | None:
        for i, rule in enumerate(self._rules):
            if rule.op != op or not fnmatch.fnmatch(path, rule.match):
                continue
            self._seen[i] += 1
            struck = self._seen[i] - rule.skip
            if struck < 1 or (rule.count >= 0 and struck > rule.count):
                continue
            self._hits[i] += 1
            return rule
        return None

    def serve(self, control: str) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(control)
            listener.listen()
            print("mounted", flush=True)  # noqa: T201  (the parent waits for this line)
            while True:
                connection, _ = listener.accept()
                with connection:
                    parts = iter(lambda c=connection: c.recv(65536), b"")  # type: ignore[misc]
                    message = json.loads(b"".join(parts))
                    if "rules" in message:
                        self.set([Rule(**rule) for rule in message["rules"]])
                    connection.sendall(json.dumps({"hits": self.hits()}).encode())


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


class PassThrough:
    """mfusepy's operations. Each request is one call, on one of libfuse's threads."""

    use_ns = True

    def __init__(self, root: str, faults: Faults) -> None:
        self._root = root
        self._faults = faults

    def init_with_config(self, connection: Any, _: Any) -> None:
        # As on a disk, cached pages stay: not dropped for a time stamp that this process gave.
        connection.want &= ~AUTO_INVAL_DATA

    def _real(self, path: str) -> str:
        return os.path.join(self._root, path.lstrip("/"))

    # -- what can fail

    def open(self, path: str, flags: int) -> int:
        self._faults.strike("open", path)
        return os.open(self._real(path), flags & ~os.O_DIRECT)

    def create(self, path: str, mode: int, _: Any = None) -> int:
        self._faults.strike("create", path)
        return os.open(self._real(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        rule = self._faults.strike("read", path)
        if rule is not None and rule.do == "shift":
            offset += int(rule.value)
        data = os.pread(fh, size, offset)
        return _flipped(data) if rule is not None and rule.do == "flip" else data

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        rule = self._faults.strike("write", path)
        do = rule.do if rule is not None else ""
        if rule is not None and do == "shift":
            offset += int(rule.value)
        elif rule is not None and do == "torn":
            os.pwrite(fh, data[: int(rule.value)], offset)
        if do in ("drop", "torn"):
            # What a disk loses is bytes: the file system goes on to believe in the size.
            os.truncate(fh, max(os.fstat(fh).st_size, offset + len(data)))
        else:
            os.pwrite(fh, _flipped(data) if do == "flip" else data, offset)
        return len(data)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._faults.strike("fsync", path)
        return 0  # the files below are the disk: they outlive this process

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._faults.strike("fsync", path)
        return 0

    def unlink(self, path: str) -> None:
        self._faults.strike("unlink", path)
        os.unlink(self._real(path))

    def rename(self, old: str, new: str) -> None:
        self._faults.strike("rename", old)
        os.rename(self._real(old), self._real(new))

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        self._faults.strike("fallocate", path)
        os.posix_fallocate(fh, offset, size)
        return 0

    # -- what is only passed on

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        found = os.lstat(self._real(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_blocks")
        times = {f"st_{t}time": getattr(found, f"st_{t}time_ns") for t in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._real(path))]

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._real(path), length)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._real(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._real(path))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._real(path), mode)

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._real(path))
        names = ("bavail", "bfree", "blocks", "bsize", "frsize", "files", "ffree", "namemax")
        return {f"f_{name}": getattr(found, f"f_{name}") for name in names}


def main() -> None:
    root, mounted_at, control = sys.argv[1:]
    fuse = importlib.import_module("mfusepy")
    faults = Faults()
    threading.Thread(target=faults.serve, args=[control], daemon=True).start()
    # hard_remove: we hear of a close some time after it; until then libfuse would make a rename
    # out of an unlink.
    fuse.FUSE(
        PassThrough(root, faults), mounted_at, foreground=True, kernel_cache=True, hard_remove=True
    )


if __name__ == "__main__":
    main()

"""An SSD directory that nobody has open, looked at without changing a byte of it.

It is held by a shared lock on the store's own lock file: a store and a look exclude each other, two
looks do not. Nothing is created, repaired, renamed or deleted, so a read-only mount will do. A
directory that is not ours, or of another format, is refused as the store refuses it.

Thread safety: for one thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from kvstore import _native
from kvstore.block import Namespace
from kvstore.codec import CodecId
from kvstore.errors import ConfigError, IncompatibleError, InUseError, KVStoreError
from kvstore.tiers import ssd_index, ssd_open
from kvstore.tiers.names import parse_stored, stored_key
from kvstore.tiers.segment_log import Segment, SegmentLog
from kvstore.tiers.ssd_format import (
    HEADER,
    NAMESPACES,
    PAGE_BYTES,
    SUPERBLOCK,
    Structs,
    header_fault,
    pages_of,
    read_checked_json,
    read_superblock,
)

_OURS = {SUPERBLOCK, NAMESPACES, "lock", "index", "segments", "lost+found"}
_SEGMENT_DIGITS = 10


@dataclass
class SegmentFile:
    """One file. `fault` is of its header: "" | short | damaged | foreign | unreadable."""

    number: int
    path: Path
    bytes: int
    fault: str
    header_bytes: int  # what the header says; 0 when the header has a fault
    live_blocks: int = 0
    live_pages: int = 0

    def as_segment(self) -> Segment:
        """What SegmentLog's readers want."""
        return Segment(self.number, self.path, self.bytes // PAGE_BYTES, self.fault)


@dataclass
class NamespaceInfo:
    """A namespace of the directory. `namespace` is None where the description is not readable."""

    number: int
    digest: bytes  # of tenant and namespace; see tiers/names.py
    tenant: str
    namespace: Namespace | None
    live_blocks: int = 0
    stored_bytes: int = 0
    raw_bytes: int = 0
    codecs: dict[str, int] = field(default_factory=dict)  # blocks by codec


class OfflineDirectory:
    """Use as a context manager.

    Raises:
        ConfigError: there is no such directory, or it may not be read.
        IncompatibleError: it is not kvstore's, or of another format.
        CorruptError: its superblock is damaged.
        InUseError: a store has it open.
        StorageError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.foreign: list[str] = []  # files that no version of ours has made, from the top
        self.leftovers: list[str] = []  # of interrupted work and of earlier damage; harmless
        self.index: ssd_index.SsdIndex | None = None  # None: lost, or LMDB cannot walk it
        self.index_fault = ""
        self.namespaces_fault = ""
        self._lock_fd = -1
        if not path.is_dir():
            raise ConfigError(f"ssd: {path} is not a directory")
        try:
            if not (path / SUPERBLOCK).is_file():
                raise IncompatibleError(
                    f"{path}: not an SSD directory of kvstore (it has no {SUPERBLOCK}). "
                    "Nothing was changed."
                )
            self._lock_fd = _lock(path)
            self.uuid = read_superblock(path / SUPERBLOCK)
            self.segments = self._find_segments()
            self._open_index()
            self.namespaces = self._find_namespaces()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, KVStoreError):
                raise ssd_open.os_error(error, path, "reading the SSD directory") from error
            raise

    def close(self) -> None:
        if self.index is not None:
            self.index.close()
            self.index = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> OfflineDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def locked(self) -> bool:
        """False where there was no lock file to lock: no store has opened this copy yet."""
        return self._lock_fd >= 0

    def log(self, queue: _native.IoQueue) -> SegmentLog:
        """For its readers of summaries; it knows no segments by itself."""
        return SegmentLog(self.path / "segments", self.uuid, 0, queue)

    def records(self) -> Iterator[tuple[Structs, int]]:
        """Batches of (sound records, number of bad ones); nothing without an index.

        Counts what is live per segment and per namespace while it goes.
        """
        if self.index is None:
            return
        by_number = {segment.number: segment for segment in self.segments}
        for rows, bad in self.index.scan():
            self._count(rows, by_number)
            yield rows, bad

    def _count(self, rows: Structs, by_number: dict[int, SegmentFile]) -> None:
        for number in np.unique(rows["segment"]).tolist():
            if number in by_number:
                here = rows[rows["segment"] == number]
                by_number[number].live_blocks += len(here)
                by_number[number].live_pages += int(pages_of(here["stored_bytes"]).sum())
        for number in np.unique(rows["namespace"]).tolist():
            if number not in self.namespaces:
                continue
            info = self.namespaces[number]
            here = rows[rows["namespace"] == number]
            info.live_blocks += len(here)
            info.stored_bytes += int(here["stored_bytes"].sum(dtype=np.int64))
            info.raw_bytes += int(here["raw_bytes"].sum(dtype=np.int64))
            codecs, counts = np.unique(here["codec"], return_counts=True)
            for codec, count in zip(codecs.tolist(), counts.tolist(), strict=True):
                name = codec_name(codec)
                info.codecs[name] = info.codecs.get(name, 0) + count

    # -- opening

    def _find_segments(self) -> list[SegmentFile]:
        found: list[SegmentFile] = []
        for entry in sorted(os.scandir(self.path), key=lambda e: e.name):
            if entry.name.endswith(".tmp") or entry.name.startswith("index.damaged-"):
                self.leftovers.append(entry.name)
            elif entry.name not in _OURS:
                self.foreign.append(entry.name)
        if not (self.path / "segments").is_dir():
            return found
        for entry in sorted(os.scandir(self.path / "segments"), key=lambda e: e.name):
            name, _, kind = entry.name.partition(".")
            numbered = name.isascii() and name.isdecimal() and len(name) == _SEGMENT_DIGITS
            if numbered and kind == "seg" and entry.is_file(follow_symlinks=False):
                found.append(_segment(Path(entry.path), int(name), self.uuid))
            elif numbered and kind == "seg.tmp":
                self.leftovers.append(f"segments/{entry.name}")
            else:
                self.foreign.append(f"segments/{entry.name}")
        return found

    def _open_index(self) -> None:
        where = self.path / "index"
        if not where.is_dir():
            self.index_fault = "it is missing"
            return
        try:
            if not ssd_index.is_sound(where):
                self.index_fault = "LMDB cannot walk it"
                return
            size = (where / "data.mdb").stat().st_size
            self.index = ssd_index.SsdIndex(where, size, readonly=True)
        except (OSError, lmdb.Error) as error:
            self.index_fault = f"it cannot be read: {error}"

    def _find_namespaces(self) -> dict[int, NamespaceInfo]:
        """From both copies; `namespaces_fault` says what is wrong with the file or between them."""
        packed: dict[int, bytes] = {}
        if self.index is not None:
            packed = self.index.namespaces()
        copied = {number: ssd_open.unpack_namespace(names) for number, names in packed.items()}
        in_file: ssd_open.Namespaces = {}
        try:
            if not read_checked_json(self.path / NAMESPACES)[1]:
                self.namespaces_fault = "it is damaged"
            else:
                in_file = ssd_open.read_namespaces(self.path)
        except FileNotFoundError:
            if copied:
                self.namespaces_fault = "it is missing"
        except (ValueError, TypeError):
            self.namespaces_fault = "it is not what this version writes"
        if not self.namespaces_fault and self.index is not None:
            differing = sorted(n for n in copied if copied[n] != in_file.get(n))
            if differing:
                self.namespaces_fault = f"the index has another namespace {differing[0]}"
        merged = {**copied, **in_file}
        return {number: _info(number, *names) for number, names in sorted(merged.items())}


def codec_name(codec: int) -> str:
    try:
        return CodecId(codec).name.lower()
    except ValueError:
        return f"unknown ({codec})"


def read_json(data: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _info(number: int, digest: bytes, description: bytes) -> NamespaceInfo:
    with contextlib.suppress(KVStoreError, TypeError, KeyError):
        tenant, namespace = parse_stored(read_json(description))
        if stored_key(tenant, namespace) == digest:
            return NamespaceInfo(number, digest, tenant, namespace)
    return NamespaceInfo(number, digest, "", None)


def _segment(path: Path, number: int, uuid: bytes) -> SegmentFile:
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            page = os.pread(file.fileno(), PAGE_BYTES, 0)
    except OSError:
        return SegmentFile(number, path, 0, "unreadable", 0)
    fault = header_fault(page, uuid, number)
    said = 0 if fault else int(np.frombuffer(page, HEADER)["bytes"][0])
    return SegmentFile(number, path, size, fault, said)


def _lock(path: Path) -> int:
    """A shared lock on the store's lock file; -1 when there is none."""
    try:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1
    except OSError as error:
        raise ssd_open.os_error(error, path, "opening the lock file") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).strip().decode("ascii", "replace") or "unknown"
        os.close(fd)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise InUseError(
                f"{path}: in use by process {holder}; stop it, or ask it with --connect."
            ) from None
        raise ssd_open.os_error(error, path, "locking the SSD directory") from error
    return fd

"""Opening an SSD directory: who may use it, whether it is ours, and getting its index back.

Nothing that is not ours is changed or deleted: a foreign or newer directory is refused, a damaged
index is renamed and rebuilt from the segments.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid as uuids
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np

from kvstore.errors import (
    ConfigError,
    IncompatibleError,
    InUseError,
    KVStoreError,
    OutOfSpaceError,
    StorageError,
)
from kvstore.tiers import ssd_index
from kvstore.tiers.segment_log import SegmentLog
from kvstore.tiers.ssd_format import (
    KEY_BYTES,
    NAMESPACES,
    RECORD,
    SUPERBLOCK,
    Structs,
    read_checked_json,
    read_superblock,
    records_from,
    sync_directory,
    write_checked_json,
    write_superblock,
)

# What the creation of a directory leaves when it is interrupted, and what a fresh ext4 has.
_NOT_FOREIGN = {"lock", SUPERBLOCK + ".tmp", "lost+found"}

Namespaces = dict[int, tuple[bytes, bytes]]  # number -> (digest, description)


def os_error(error: OSError, path: Path, doing: str) -> KVStoreError:
    """The library's error for an operating system's refusal while opening."""
    text = f"{path}: {doing} failed: {error.strerror}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ConfigError(f"{text}. Give a directory that this user can write to.")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutOfSpaceError(f"{text}. Free some space or give another directory.")
    return StorageError(error.errno, f"{text}.")


def lock_directory(path: Path) -> int:
    """Makes the directory if need be and takes its lock, held until the descriptor is closed."""
    if not path.parent.is_dir():
        raise ConfigError(f"path: {path.parent} does not exist; create it first.")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"path: {path} is not a directory; give one that is, or a new name.")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        refuse_foreign(path)  # before a lock file is left in it
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise os_error(error, path, "creating the SSD directory") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).strip().decode("ascii", "replace") or "unknown"
        os.close(fd)
        raise InUseError(
            f"{path}: in use by process {holder}; close that store or give another directory."
        ) from None
    except OSError as error:
        os.close(fd)
        raise os_error(error, path, "locking the SSD directory") from error
    return fd


def refuse_foreign(path: Path) -> None:
    """Raises IncompatibleError for a directory that is neither ours nor empty."""
    if (path / SUPERBLOCK).exists():
        return
    foreign = sorted(set(os.listdir(path)) - _NOT_FOREIGN)
    if foreign:
        more = "" if len(foreign) <= 3 else f" and {len(foreign) - 3} more"
        raise IncompatibleError(
            f"{path}: holds files that are not kvstore's ({', '.join(foreign[:3])}{more}); "
            "give an empty directory. Nothing was changed."
        )


def open_superblock(path: Path) -> bytes:
    """The directory's uuid; a new or empty directory gets one."""
    superblock = path / SUPERBLOCK
    try:
        if not superblock.exists():
            refuse_foreign(path)
            write_superblock(superblock, uuids.uuid4().bytes)
        uuid = read_superblock(superblock)
        (path / "segments").mkdir(mode=0o700, exist_ok=True)
        sync_directory(path)
        sync_directory(path.parent)
    except OSError as error:
        raise os_error(error, path, "opening the SSD directory") from error
    return uuid


def read_namespaces(path: Path) -> Namespaces:
    """From the file; empty when it is missing or damaged (the index has a copy)."""
    try:
        body, sound = read_checked_json(path / NAMESPACES)
    except FileNotFoundError:
        return {}
    if not sound:
        return {}
    return {
        int(number): (bytes.fromhex(digest), bytes.fromhex(description))
        for number, (digest, description) in body.items()
    }


def write_namespaces(path: Path, namespaces: Namespaces) -> None:
    body = {
        str(number): [digest.hex(), description.hex()]
        for number, (digest, description) in namespaces.items()
    }
    write_checked_json(path / NAMESPACES, body)


def pack_namespace(digest: bytes, description: bytes) -> bytes:
    return len(digest).to_bytes(2, "little") + digest + description


def unpack_namespace(packed: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(packed[:2], "little")
    return packed[2 : 2 + length], packed[2 + length :]


def tag_of(digest: bytes) -> int:
    """What a descriptor repeats of its namespace."""
    return int.from_bytes(digest[:8].ljust(8, b"\0"), "little")


def open_index(
    path: Path, log: SegmentLog, map_bytes: int, counters: Counter[str]
) -> tuple[ssd_index.SsdIndex, Namespaces]:
    """The index, walkable by LMDB, and the namespaces; the index rebuilt if it is lost.

    Its records are not checked yet: see rebuild_index.
    """
    where = path / "index"
    shutil.rmtree(path / "index.tmp", ignore_errors=True)
    with _translated(where):
        namespaces = read_namespaces(path)
        if where.exists():
            if ssd_index.make_sound(where, map_bytes):
                index = ssd_index.SsdIndex(where, map_bytes)
                for number, packed in index.namespaces().items():
                    namespaces.setdefault(number, unpack_namespace(packed))
                return index, namespaces
            counters["index_damaged"] += 1
    return rebuild_index(path, log, map_bytes, namespaces, counters), namespaces


def rebuild_index(
    path: Path, log: SegmentLog, map_bytes: int, namespaces: Namespaces, counters: Counter[str]
) -> ssd_index.SsdIndex:
    """A new index from the segments' summaries; the present one, closed, is set aside."""
    where = path / "index"
    with _translated(where):
        if where.exists():
            ssd_index.set_aside(where)
        rows = rebuilt_records(log, namespaces, counters)
        packed = {number: pack_namespace(*names) for number, names in namespaces.items()}
        ssd_index.create(where, map_bytes, rows, packed)
        return ssd_index.SsdIndex(where, map_bytes)


@contextlib.contextmanager
def _translated(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise os_error(error, where, "opening the index") from error
    except lmdb.Error as error:
        raise StorageError(errno.EIO, f"{where}: opening the index failed: {error}.") from error


def rebuilt_records(log: SegmentLog, namespaces: Namespaces, counters: Counter[str]) -> Structs:
    """Index records of every block that an intact summary names; of one key, the newest.

    Payloads are not read: a block that was never completely written fails its checksum when it is
    read. A block that was forgotten since comes back; it has the bytes that belong to its hash.
    """
    counters["index_rebuilt"] += 1
    found: list[Structs] = []
    sequences: list[int] = []
    for number in sorted(log.segments):
        segment = log.segments[number]
        if segment.fault == "foreign":
            continue
        try:
            for sequence, descriptors in log.descriptors(segment):
                log.sequence = max(log.sequence, sequence + 1)
                known = np.zeros(len(descriptors), bool)
                for namespace in np.unique(descriptors["namespace"]).tolist():
                    if namespace in namespaces:
                        tag = np.uint64(tag_of(namespaces[namespace][0]))
                        known |= (descriptors["namespace"] == namespace) & (
                            descriptors["namespace_tag"] == tag
                        )
                counters["rebuild_unknown_namespace"] += int(len(known) - known.sum())
                found.append(records_from(descriptors[known], number))
                sequences.append(sequence)
        except OSError:
            counters["rebuild_io_errors"] += 1
    if not found:
        return np.empty(0, RECORD)
    rows = np.concatenate(found)
    age = np.repeat(np.array(sequences, np.uint64), [len(part) for part in found])
    newest_first = np.lexsort((np.arange(len(rows)), age))[::-1]
    rows = rows[newest_first]
    keys = np.frombuffer(b"".join(ssd_index.keys_of(rows)), f"V{KEY_BYTES}")
    _, first = np.unique(keys, return_index=True)
    kept: Structs = rows[first]
    return kept


def close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)

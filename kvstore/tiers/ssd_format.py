"""What lies on disk in an SSD directory, format 1. All integers are little-endian.

    kvstore.json       superblock: magic, format, uuid; replaced whole, with its own checksum
    namespaces.json    number -> (digest, description), likewise; the index holds a second copy
    lock               flock of the owning process, holds its pid
    index/             LMDB environment: (namespace, hash) -> record; always synchronous
    segments/N.seg     the data, ten-digit decimal number, never reused while a record names it

A segment is an array of 4 KiB pages. Page 0 is its header. Then come batches: one or more summary
pages that describe the blocks of the batch, followed by their payloads, each on its own pages.
Every page of a summary names its segment, its own place, its batch and the length of the batch and
has its own checksum, so the index can be rebuilt by jumping from summary to summary, as a
log-structured file system does (Rosenblum and Ousterhout, 1991), and a damaged page costs only the
blocks it describes. Payload bytes are covered by `stored_checksum`, which is in the summary and in
the index record; a record's own checksum covers its key, so a misplaced record is noticed too.

Checksums are XXH3-64.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import CorruptError, IncompatibleError

FORMAT = 1
PAGE_BYTES = 4096
SUPERBLOCK = "kvstore.json"
NAMESPACES = "namespaces.json"
MAGIC = "kvstore-ssd"
HEADER_MAGIC = b"KVSSEGMT"
SUMMARY_MAGIC = b"KVSBATCH"

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("format", "<u4"),
        ("segment", "<u4"),
        ("uuid", "u1", 16),
        ("bytes", "<u8"),
        ("unused", "u1", PAGE_BYTES - 48),
        ("checksum", "<u8"),
    ]
)
DESCRIPTOR = np.dtype(
    [
        ("hash", "u1", 32),
        ("parent", "u1", 32),
        ("namespace", "<u4"),
        ("depth", "<u4"),
        ("page", "<u4"),
        ("stored_bytes", "<u4"),
        ("raw_bytes", "<u4"),
        ("codec", "u1"),
        ("unused", "u1", 3),
        ("namespace_tag", "<u8"),  # start of the namespace's digest: guards against a lost table
        ("checksum", "<u8"),
        ("stored_checksum", "<u8"),
    ]
)
DESCRIPTORS_PER_PAGE = 36
SUMMARY = np.dtype(
    [
        ("magic", "S8"),
        ("uuid", "u1", 16),
        ("segment", "<u4"),
        ("page", "<u4"),
        ("sequence", "<u8"),
        ("summary_pages", "<u2"),
        ("index", "<u2"),
        ("count", "<u2"),
        ("unused", "<u2"),
        ("batch_pages", "<u4"),
        ("unused2", "<u4"),
        ("blocks", DESCRIPTOR, DESCRIPTORS_PER_PAGE),
        ("checksum", "<u8"),
    ]
)
# An index record: LMDB key (namespace, hash), then LMDB value (the rest).
RECORD = np.dtype(
    [
        ("namespace", "<u4"),
        ("hash", "u1", 32),
        ("parent", "u1", 32),
        ("depth", "<u4"),
        ("segment", "<u4"),
        ("page", "<u4"),
        ("stored_bytes", "<u4"),
        ("raw_bytes", "<u4"),
        ("codec", "u1"),
        ("unused", "u1", 3),
        ("checksum", "<u8"),
        ("stored_checksum", "<u8"),
        ("record_checksum", "<u8"),
    ]
)
KEY_BYTES = 36
RECORD_CHECKED_BYTES = RECORD.itemsize - 8
PAGE_CHECKED_BYTES = PAGE_BYTES - 8
assert HEADER.itemsize == SUMMARY.itemsize == PAGE_BYTES

Structs = npt.NDArray[np.void]

# Columns that a record and a descriptor share.
SHARED = [
    name for name in DESCRIPTOR.fields or () if name in (RECORD.fields or ()) and name != "unused"
]


@dataclass(frozen=True)
class Records:
    """Index records as columns; entry i of every column is block i."""

    namespace: npt.NDArray[np.uint32]
    hash: npt.NDArray[np.uint8]  # (n, 32)
    parent: npt.NDArray[np.uint8]  # (n, 32)
    depth: npt.NDArray[np.uint32]  # 0: not linked to a parent
    segment: npt.NDArray[np.uint32]
    page: npt.NDArray[np.uint32]
    stored_bytes: npt.NDArray[np.uint32]
    raw_bytes: npt.NDArray[np.uint32]
    checksum: npt.NDArray[np.uint64]  # of the raw payload
    stored_checksum: npt.NDArray[np.uint64]
    codec: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.namespace)

    @classmethod
    def of(cls, rows: Structs) -> "Records":
        def column(name: str, dtype: Any) -> npt.NDArray[Any]:
            return np.ascontiguousarray(rows[name], dtype=dtype)

        return cls(
            **{name: column(name, np.uint8) for name in ("hash", "parent", "codec")},
            **{name: column(name, np.uint64) for name in ("checksum", "stored_checksum")},
            **{
                name: column(name, np.uint32)
                for name in ("namespace", "depth", "segment", "page", "stored_bytes", "raw_bytes")
            },
        )


def as_bytes(rows: Structs) -> npt.NDArray[np.uint8]:
    """The same memory as a matrix of bytes, one row an item."""
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)


def pages_of(stored_bytes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return (stored_bytes.astype(np.int64) + (PAGE_BYTES - 1)) // PAGE_BYTES


def seal_records(rows: Structs) -> Structs:
    rows["record_checksum"] = _native.io_checksum_rows(as_bytes(rows), RECORD_CHECKED_BYTES)
    return rows


def sound_records(rows: Structs) -> npt.NDArray[np.bool_]:
    good: npt.NDArray[np.bool_] = rows["record_checksum"] == _native.io_checksum_rows(
        as_bytes(rows), RECORD_CHECKED_BYTES
    )
    return good


def records_from(descriptors: Structs, segments: npt.NDArray[Any] | int) -> Structs:
    rows = np.zeros(len(descriptors), RECORD)
    for name in SHARED:
        rows[name] = descriptors[name]
    rows["segment"] = segments
    return seal_records(rows)


def encode_header(uuid: bytes, segment: int, segment_bytes: int) -> bytes:
    header = np.zeros(1, HEADER)
    header["magic"] = HEADER_MAGIC
    header["format"] = FORMAT
    header["segment"] = segment
    header["uuid"] = np.frombuffer(uuid, np.uint8)
    header["bytes"] = segment_bytes
    header["checksum"] = _native.io_checksum_rows(as_bytes(header), PAGE_CHECKED_BYTES)
    return header.tobytes()


def header_fault(page: bytes, uuid: bytes, segment: int) -> str:
    """What is wrong with a segment's first page: "" | "short" | "damaged" | "foreign"."""
    if len(page) < PAGE_BYTES:
        return "short"
    header = np.frombuffer(page, HEADER)
    if header["checksum"] != _native.io_checksum_rows(as_bytes(header), PAGE_CHECKED_BYTES):
        return "damaged"
    ours = header["magic"][0] == HEADER_MAGIC and header["format"][0] == FORMAT
    if not ours or header["uuid"].tobytes() != uuid or header["segment"][0] != segment:
        return "foreign"
    return ""


def summary_pages_of(blocks: int) -> int:
    return -(-blocks // DESCRIPTORS_PER_PAGE)


def encode_summary(
    uuid: bytes, segment: int, page: int, sequence: int, descriptors: Structs
) -> npt.NDArray[np.uint8]:
    """Summary pages, as rows of bytes, of a batch that starts at `page`."""
    count = len(descriptors)
    pages = summary_pages_of(count)
    summary = np.zeros(pages, SUMMARY)
    summary["magic"] = SUMMARY_MAGIC
    summary["uuid"] = np.frombuffer(uuid, np.uint8)
    summary["segment"] = segment
    summary["page"] = page + np.arange(pages)
    summary["sequence"] = sequence
    summary["summary_pages"] = pages
    summary["index"] = np.arange(pages)
    summary["count"] = DESCRIPTORS_PER_PAGE
    summary["count"][-1] = count - (pages - 1) * DESCRIPTORS_PER_PAGE
    summary["batch_pages"] = pages + int(pages_of(descriptors["stored_bytes"]).sum())
    padded = np.zeros(pages * DESCRIPTORS_PER_PAGE, DESCRIPTOR)
    padded[:count] = descriptors
    summary["blocks"] = padded.reshape(pages, DESCRIPTORS_PER_PAGE)
    summary["checksum"] = _native.io_checksum_rows(as_bytes(summary), PAGE_CHECKED_BYTES)
    return as_bytes(summary)


def decode_summary(page: bytes, uuid: bytes, segment: int, at: int) -> Structs | None:
    """The summary page (one item) at page `at`, or None when it is not one, or is damaged."""
    if len(page) < PAGE_BYTES or page[:8] != SUMMARY_MAGIC:
        return None
    summary = np.frombuffer(page, SUMMARY)
    head = summary[0]
    if (
        summary["checksum"] != _native.io_checksum_rows(as_bytes(summary), PAGE_CHECKED_BYTES)
        or summary["uuid"].tobytes() != uuid
        or head["segment"] != segment
        or head["page"] != at
        or not 0 < head["count"] <= DESCRIPTORS_PER_PAGE
        or not head["index"] < head["summary_pages"] < head["batch_pages"]
    ):
        return None
    return summary


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_checked_json(path: Path, body: dict[str, Any]) -> None:
    """Replaces the file as a whole, so that a crash leaves the old one or the new one."""
    text = json.dumps(body, sort_keys=True)
    checked = json.dumps({"body": body, "checksum": _native.io_checksum(text.encode())}, indent=1)
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, checked.encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_directory(path.parent)


def read_checked_json(path: Path) -> tuple[dict[str, Any], bool]:
    """(body, whether its checksum holds); an empty body when it is not such a file at all."""
    try:
        document = json.loads(path.read_bytes())
        body = document["body"]
        checksum = document["checksum"]
        if not isinstance(body, dict):
            return {}, False
        text = json.dumps(body, sort_keys=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}, False
    return body, checksum == _native.io_checksum(text.encode())


def read_superblock(path: Path) -> bytes:
    """The directory's uuid; raises when it is not ours, of another format, or damaged."""
    body, sound = read_checked_json(path)
    if body.get("magic") == MAGIC and body.get("format") != FORMAT:
        found = body.get("format")
        raise IncompatibleError(
            f"{path}: written in format {found!r}, this version of kvstore reads format {FORMAT}; "
            "use the version that wrote it, or another directory. Nothing was changed."
        )
    if not sound:
        if body and body.get("magic") != MAGIC:
            raise IncompatibleError(f"{path}: not a kvstore file. Nothing was changed.")
        raise CorruptError(
            f"{path}: the superblock is damaged. Restore it from a backup, or give another "
            "directory; nothing was changed."
        )
    try:
        uuid = bytes.fromhex(body["uuid"])
    except (KeyError, TypeError, ValueError):
        uuid = b""
    if len(uuid) != 16:
        raise IncompatibleError(f"{path}: not a kvstore superblock. Nothing was changed.")
    return uuid


def write_superblock(path: Path, uuid: bytes) -> None:
    write_checked_json(path, {"magic": MAGIC, "format": FORMAT, "uuid": uuid.hex()})

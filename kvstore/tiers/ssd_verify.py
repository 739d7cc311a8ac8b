"""The check of an SSD directory that nobody has open: every byte that a store could serve.

1. The index: LMDB can walk it, and each record has its checksum. Places of records are kept, 16
   bytes a block; all else is read in pieces.
2. Each segment in the order of its pages: header, size, summaries; of each block that a summary
   names and the index has there, that both say the same, then its payload: the stored checksum, and
   after decoding that of the raw bytes (a lossy codec gives other bytes: its own checks stand for
   that).
3. What the index names and no summary does: the same payload checks, and a finding, because such a
   block is lost with the index.

Space that no record points at (forgotten, replaced or half-written blocks, and pages not written
yet) is counted and not judged: nothing reads it. Payloads are read past the page cache, several
requests at a time, each batch in page order.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.codec import Codec, CodecId, aligned_buffer, get_codec
from kvstore.errors import ConfigError, KVStoreError
from kvstore.tiers.ssd_format import PAGE_BYTES, SHARED, Structs, pages_of
from kvstore.tiers.ssd_index import keys_of
from kvstore.tiers.ssd_offline import OfflineDirectory, SegmentFile, codec_name
from kvstore.tiers.ssd_open import tag_of

BATCH_BYTES = 16 << 20  # payload in memory at a time, unless one block is larger
_NO_PLACES = np.empty(0, np.uint64)
Progress = Callable[[int, int], None]  # bytes checked so far, of how many


@dataclass(frozen=True)
class Damage:
    """One thing wrong. `segment` and `page` are 0 where it has no place in the log.

    `kind`: index, index_record, namespaces, namespace, header, truncated, missing, foreign,
    summary, disagreement, overlap, payload, unreadable.
    """

    kind: str
    segment: int
    page: int
    detail: str


@dataclass
class SsdReport:
    path: str
    uuid: str
    segments: int = 0
    file_bytes: int = 0
    records: int = 0
    checked_blocks: int = 0
    checked_bytes: int = 0  # as stored
    decoded_blocks: int = 0
    undecoded_blocks: int = 0  # stored checksum only: the codec or namespace is not to be had
    summaries: int = 0
    live_bytes: int = 0  # whole pages
    unreferenced_bytes: int = 0  # in segments, but no record points there
    damage: Counter[str] = field(default_factory=Counter)  # how many, by kind
    findings: list[Damage] = field(default_factory=list)  # the first of them
    notes: list[str] = field(default_factory=list)

    @property
    def num_damaged(self) -> int:
        return sum(self.damage.values())


def verify_directory(
    directory: OfflineDirectory,
    *,
    io: str = "auto",
    depth: int = 16,
    findings_max: int = 100,
    progress: Progress = lambda done, total: None,
) -> SsdReport:
    """Check everything; what is wrong is in the report, never an exception.

    Raises:
        ConfigError: the I/O kind is not to be had on this machine.
    """
    try:
        queue = _native.IoQueue(io, depth)
    except RuntimeError as error:
        raise ConfigError(f"io: {error}") from error
    check = _Check(directory, queue, findings_max, progress)
    check.directory_itself()
    check.index()
    check.segments()
    check.unsummarized()
    return check.report


def _places(rows: Structs, segment: int | None = None) -> npt.NDArray[np.uint64]:
    """Segment and page of each row as one number."""
    number = rows["segment"].astype(np.uint64) if segment is None else np.uint64(segment)
    places: npt.NDArray[np.uint64] = (number << np.uint64(32)) | rows["page"].astype(np.uint64)
    return places


class _Check:
    def __init__(
        self,
        directory: OfflineDirectory,
        queue: _native.IoQueue,
        findings_max: int,
        progress: Progress,
    ) -> None:
        self._directory = directory
        self._queue = queue
        self._log = directory.log(queue)
        self._findings_max = findings_max
        self._progress = progress
        self._total_bytes = 0
        self._places = _NO_PLACES  # of all records, sorted
        self._named = np.empty(0, np.bool_)  # by a summary; parallel to `_places`
        self._memory = aligned_buffer(BATCH_BYTES)
        self._decoded = aligned_buffer(0)
        self._codecs: dict[tuple[int, int], Codec | None] = {}
        self._by_number = {segment.number: segment for segment in directory.segments}
        self._without_o_direct = False
        self.report = SsdReport(str(directory.path), directory.uuid.hex())

    def _found(self, kind: str, segment: int, page: int, detail: str, times: int = 1) -> None:
        self.report.damage[kind] += times
        if len(self.report.findings) < self._findings_max:
            self.report.findings.append(Damage(kind, segment, page, detail))

    # -- 1

    def directory_itself(self) -> None:
        directory = self._directory
        self.report.segments = len(directory.segments)
        self.report.file_bytes = sum(segment.bytes for segment in directory.segments)
        for name in directory.foreign:
            self._found("foreign", 0, 0, f"{name}: not a file of kvstore; the store ignores it")
        if directory.leftovers:
            self.report.notes.append(
                f"left by interrupted work or an earlier repair: {', '.join(directory.leftovers)}"
            )
        if not directory.locked:
            self.report.notes.append("there is no lock file; a store that opens it now is not seen")
        if directory.namespaces_fault:
            self._found("namespaces", 0, 0, f"namespaces.json: {directory.namespaces_fault}")
        for number, info in directory.namespaces.items():
            if info.namespace is None:
                self.report.notes.append(
                    f"namespace {number} has a description that this version does not read; "
                    "its payloads are not decoded"
                )

    def index(self) -> None:
        if self._directory.index is None:
            what = self._directory.index_fault
            fresh = what == "it is missing" and not self._directory.segments
            if not fresh:
                self._found("index", 0, 0, f"index: {what}; the store would rebuild it")
            return
        parts: list[npt.NDArray[np.uint64]] = []
        known = np.array(list(self._directory.namespaces), np.uint32)
        for rows, bad in self._directory.records():
            if bad:
                self._found("index_record", 0, 0, f"{bad} records fail their checksum", bad)
            self.report.records += len(rows)
            self._total_bytes += int(rows["stored_bytes"].sum(dtype=np.int64))
            unknown = rows[~np.isin(rows["namespace"], known)]
            if len(unknown):
                number = int(unknown["namespace"][0])
                detail = f"{len(unknown)} records of namespace {number}, which is not known"
                self._found("namespace", 0, 0, detail, len(unknown))
            self._missing(rows)
            parts.append(_places(rows))
        self._places = np.sort(np.concatenate(parts)) if parts else _NO_PLACES
        self._named = np.zeros(len(self._places), np.bool_)
        twice = int((self._places[1:] == self._places[:-1]).sum())
        if twice:
            self._found("overlap", 0, 0, f"{twice} pages have two records", twice)

    def _missing(self, rows: Structs) -> None:
        """Records that point at no segment, or behind the end of one."""
        for number in np.unique(rows["segment"]).tolist():
            here = rows[rows["segment"] == number]
            segment = self._by_number.get(number)
            if segment is None:
                detail = f"{number:010d}.seg is not there; {len(here)} records point at it"
                self._found("missing", number, 0, detail, len(here))
                continue
            outside = here[~_inside(here, segment)]
            if len(outside):
                detail = f"{len(outside)} records point outside of {segment.path.name}"
                self._found("missing", number, int(outside["page"].min()), detail, len(outside))

    # -- 2

    def segments(self) -> None:
        for segment in self._directory.segments:
            self._header(segment)
            if segment.fault in ("unreadable", "foreign") and not segment.live_blocks:
                continue
            try:
                live = self._summaries(segment)
                self._payloads(segment, live)
            except OSError as error:
                self._found("unreadable", segment.number, 0, f"{segment.path.name}: {error}")
            used = segment.live_pages * PAGE_BYTES
            self.report.live_bytes += used
            self.report.unreferenced_bytes += max(0, segment.bytes - PAGE_BYTES - used)

    def _header(self, segment: SegmentFile) -> None:
        name = segment.path.name
        if segment.fault == "foreign":
            detail = f"{name}: its header is of another directory, segment or format"
            self._found("foreign", segment.number, 0, detail)
        elif segment.fault == "unreadable":
            self._found("unreadable", segment.number, 0, f"{name}: cannot be read")
        elif segment.fault:
            self._found("header", segment.number, 0, f"{name}: its header is {segment.fault}")
        elif segment.bytes != segment.header_bytes:
            detail = f"{name}: has {segment.bytes} bytes; its header says {segment.header_bytes}"
            page = min(segment.bytes, segment.header_bytes) // PAGE_BYTES
            self._found("truncated", segment.number, page, detail)

    def _summaries(self, segment: SegmentFile) -> Structs:
        """The index's records of blocks that summaries name at the same place, in page order."""
        index = self._directory.index
        parts: list[Structs] = []
        for _, descriptors in self._log.descriptors(segment.as_segment()):
            self.report.summaries += 1
            if index is None:
                continue
            here = self._live(_places(descriptors, segment.number))
            if not here.any():
                continue
            rows = self._agreeing(segment, descriptors[here])
            self._named[np.searchsorted(self._places, _places(rows))] = True
            parts.append(rows)
        if not parts:
            return np.empty(0, np.dtype([]))
        joined = np.concatenate(parts)
        rows = joined[np.argsort(joined["page"], kind="stable")]
        ends = rows["page"].astype(np.int64) + pages_of(rows["stored_bytes"])
        for i in np.flatnonzero(ends[:-1] > rows["page"][1:]).tolist():
            detail = f"the block at page {rows['page'][i]} reaches into the next"
            self._found("overlap", segment.number, int(rows["page"][i]), detail)
        return rows

    def _live(self, places: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of these places a record points at."""
        if not len(self._places):
            return np.zeros(len(places), np.bool_)
        at = np.minimum(np.searchsorted(self._places, places), len(self._places) - 1)
        live: npt.NDArray[np.bool_] = self._places[at] == places
        return live

    def _agreeing(self, segment: SegmentFile, descriptors: Structs) -> Structs:
        """Records of the blocks whose place the index knows; what differs is a finding.

        A block that the index has elsewhere or not at all is an old copy, whose pages another
        block cannot have been given.
        """
        assert self._directory.index is not None
        records = self._directory.index.find(list(dict.fromkeys(keys_of(descriptors))))
        records = records[records["segment"] == segment.number]
        records = records[np.isin(records["page"], descriptors["page"])]
        order = np.argsort(descriptors["page"], kind="stable")
        at = order[np.searchsorted(descriptors["page"][order], records["page"])]
        same = np.ones(len(records), np.bool_)
        for name in SHARED:
            differs = records[name] != descriptors[name][at]
            same &= ~(differs.any(axis=1) if differs.ndim > 1 else differs)
        tags = np.zeros(len(records), np.uint64)
        for number in np.unique(records["namespace"]).tolist():
            if number in self._directory.namespaces:
                tag = np.uint64(tag_of(self._directory.namespaces[number].digest))
                tags[records["namespace"] == number] = tag
        same &= tags == descriptors["namespace_tag"][at]
        for row in records[~same]:
            detail = f"block {_hex(row)}: its summary and the index differ"
            self._found("disagreement", segment.number, int(row["page"]), detail)
        found: Structs = records
        return found

    # -- payloads

    def _payloads(self, segment: SegmentFile, rows: Structs) -> None:
        if not len(rows):
            return
        rows = rows[_inside(rows, segment)]
        fd = self._open(segment.path)
        try:
            for part in _batches(rows):
                self._batch(segment, fd, part)
        finally:
            os.close(fd)

    def _open(self, path: Path) -> int:
        if not self._without_o_direct:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._without_o_direct = True
        return os.open(path, os.O_RDONLY)

    def _batch(self, segment: SegmentFile, fd: int, rows: Structs) -> None:
        room = pages_of(rows["stored_bytes"]) * PAGE_BYTES
        ends = np.cumsum(room)
        if int(ends[-1]) > self._memory.nbytes:
            self._memory = aligned_buffer(int(ends[-1]))
        addresses = np.uint64(self._memory.ctypes.data) + (ends - room).astype(np.uint64)
        lengths = rows["stored_bytes"].astype(np.uint64)
        errors = self._queue.read(
            np.full(len(rows), fd, np.int32),
            rows["page"].astype(np.uint64) * np.uint64(PAGE_BYTES),
            addresses,
            lengths,
            np.ascontiguousarray(rows["stored_checksum"]),
        )
        good = errors == 0
        for i in np.flatnonzero(~good).tolist():
            wrong = int(errors[i]) == errno.EBADMSG
            what = "fails its stored checksum" if wrong else os.strerror(int(errors[i]))
            kind = "payload" if wrong else "unreadable"
            detail = f"block {_hex(rows[i])} {what}"
            self._found(kind, segment.number, int(rows["page"][i]), detail)
        self._raw(segment, rows[good], addresses[good])
        self.report.checked_blocks += len(rows)
        self.report.checked_bytes += int(lengths.sum())
        self._progress(self.report.checked_bytes, max(self._total_bytes, 1))

    def _raw(self, segment: SegmentFile, rows: Structs, addresses: npt.NDArray[np.uint64]) -> None:
        """Blocks whose stored bytes are right: are they what was put?"""
        plain = rows["codec"] == int(CodecId.NONE)
        wrong = (rows["checksum"] != rows["stored_checksum"]) | (
            rows["raw_bytes"] != rows["stored_bytes"]
        )
        self._not_what_was_put(segment, rows[plain & wrong])
        self.report.decoded_blocks += int(plain.sum())
        groups = np.unique(rows[~plain][["namespace", "codec"]])
        for number, codec_id in groups.tolist():
            at = np.flatnonzero((rows["namespace"] == number) & (rows["codec"] == codec_id))
            codec = self._codec(number, codec_id)
            if codec is None:
                self.report.undecoded_blocks += len(at)
                continue
            spec = self._spec_of(number)
            for i in at.tolist():
                self._decode(segment, rows[i], addresses[i : i + 1], codec, spec)

    def _spec_of(self, number: int) -> Any:
        info = self._directory.namespaces[number]
        assert info.namespace is not None
        return info.namespace.spec

    def _codec(self, number: int, codec_id: int) -> Codec | None:
        key = number, codec_id
        if key not in self._codecs:
            info = self._directory.namespaces.get(number)
            codec: Codec | None = None
            try:
                if info is not None and info.namespace is not None:
                    codec = get_codec(codec_id, info.namespace.spec)
            except ConfigError as error:
                self.report.notes.append(
                    f"blocks of codec {codec_name(codec_id)} are not decoded: {error}"
                )
            self._codecs[key] = codec
        return self._codecs[key]

    def _decode(
        self,
        segment: SegmentFile,
        row: Any,
        address: npt.NDArray[np.uint64],
        codec: Codec,
        spec: Any,
    ) -> None:
        raw_bytes = int(row["raw_bytes"])
        if raw_bytes == spec.block_bytes and raw_bytes > self._decoded.nbytes:
            self._decoded = aligned_buffer(raw_bytes)
        out = np.array([self._decoded.ctypes.data], np.uint64)
        ok = False
        if raw_bytes == spec.block_bytes:
            try:
                length = np.array([row["stored_bytes"]], np.uint64)
                ok = bool(codec.decode(address, length, out, raw_bytes, spec)[0])
            except KVStoreError:
                ok = False
        if ok and not codec.lossy:
            ok = _native.xxh3(self._decoded[:raw_bytes]) == int(row["checksum"])
        self.report.decoded_blocks += 1
        if not ok:
            detail = f"block {_hex(row)} does not decode to the bytes that were put"
            self._found("payload", segment.number, int(row["page"]), detail)

    def _not_what_was_put(self, segment: SegmentFile, rows: Structs) -> None:
        for row in rows:
            detail = f"block {_hex(row)} was stored with other bytes than were put"
            self._found("payload", segment.number, int(row["page"]), detail)

    # -- 3

    def unsummarized(self) -> None:
        """Blocks that the index names and no intact summary does."""
        rest = self._places[~self._named]
        index = self._directory.index
        if not len(rest) or index is None:
            return
        for rows, _ in index.scan():
            mine = rows[np.isin(_places(rows), rest)]
            for number in np.unique(mine["segment"]).tolist():
                segment = self._by_number.get(number)
                here = mine[mine["segment"] == number]
                if segment is None:
                    continue
                here = here[_inside(here, segment)]
                self._unsummarized_in(segment, here[np.argsort(here["page"], kind="stable")])

    def _unsummarized_in(self, segment: SegmentFile, rows: Structs) -> None:
        for row in rows:
            detail = f"block {_hex(row)} is in no intact summary; it would be lost with the index"
            self._found("summary", segment.number, int(row["page"]), detail)
        try:
            self._payloads(segment, rows)
        except OSError as error:
            self._found("unreadable", segment.number, 0, f"{segment.path.name}: {error}")


def _inside(rows: Structs, segment: SegmentFile) -> npt.NDArray[np.bool_]:
    ends = rows["page"].astype(np.int64) + pages_of(rows["stored_bytes"])
    inside: npt.NDArray[np.bool_] = (rows["page"] > 0) & (rows["stored_bytes"] > 0)
    return inside & (ends <= segment.bytes // PAGE_BYTES)


def _batches(rows: Structs) -> Iterator[Structs]:
    """Consecutive rows of at most BATCH_BYTES, at least one."""
    ends = np.cumsum(pages_of(rows["stored_bytes"]) * PAGE_BYTES)
    start = 0
    while start < len(rows):
        before = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, before + BATCH_BYTES, side="right"))
        end = max(end, start + 1)
        yield rows[start:end]
        start = end


def _hex(row: Any) -> str:
    return str(row["hash"].tobytes().hex())

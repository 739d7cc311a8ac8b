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

from collections.abc import Callable

import lmdb
import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import ConfigError
from kvstore.tiers.ssd_format import PAGE_BYTES, SHARED, Structs, pages_of
from kvstore.tiers.ssd_index import keys_of
from kvstore.tiers.ssd_offline import OfflineDirectory, SegmentFile
from kvstore.tiers.ssd_open import tag_of
from kvstore.tiers.ssd_payloads import PayloadCheck, hash_of, inside
from kvstore.tiers.ssd_report import SsdReport

_NO_PLACES = np.empty(0, np.uint64)
Progress = Callable[[int, int], None]  # bytes checked so far, of how many


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
        self._log = directory.log(queue)
        self._progress = progress
        self._total_bytes = 0
        self._places = _NO_PLACES  # of all records, sorted
        self._named = np.empty(0, np.bool_)  # by a summary; parallel to `_places`
        self._by_number = {segment.number: segment for segment in directory.segments}
        self.report = SsdReport(str(directory.path), directory.uuid.hex(), findings_max)
        self._payloads = PayloadCheck(queue, directory.namespaces, self.report, self._advance)

    def _advance(self) -> None:
        self._progress(self.report.checked_bytes, max(self._total_bytes, 1))

    # -- 1

    def directory_itself(self) -> None:
        directory = self._directory
        self.report.segments = len(directory.segments)
        self.report.file_bytes = sum(segment.bytes for segment in directory.segments)
        for name in directory.foreign:
            self.report.found(
                "foreign", 0, 0, f"{name}: not a file of kvstore; the store ignores it"
            )
        if directory.leftovers:
            self.report.notes.append(
                f"left by interrupted work or an earlier repair: {', '.join(directory.leftovers)}"
            )
        if not directory.locked:
            self.report.notes.append("there is no lock file; a store that opens it now is not seen")
        if directory.namespaces_fault:
            self.report.found("namespaces", 0, 0, f"namespaces.json: {directory.namespaces_fault}")
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
                self.report.found("index", 0, 0, f"index: {what}; the store would rebuild it")
            return
        parts: list[npt.NDArray[np.uint64]] = []
        known = np.array(list(self._directory.namespaces), np.uint32)
        for rows, bad in self._directory.records():
            if bad:
                self.report.found("index_record", 0, 0, f"{bad} records fail their checksum", bad)
            self.report.records += len(rows)
            self._total_bytes += int(rows["stored_bytes"].sum(dtype=np.int64))
            unknown = rows[~np.isin(rows["namespace"], known)]
            if len(unknown):
                number = int(unknown["namespace"][0])
                detail = f"{len(unknown)} records of namespace {number}, which is not known"
                self.report.found("namespace", 0, 0, detail, len(unknown))
            self._missing(rows)
            parts.append(_places(rows))
        self._places = np.sort(np.concatenate(parts)) if parts else _NO_PLACES
        self._named = np.zeros(len(self._places), np.bool_)
        twice = int((self._places[1:] == self._places[:-1]).sum())
        if twice:
            self.report.found("overlap", 0, 0, f"{twice} pages have two records", twice)

    def _missing(self, rows: Structs) -> None:
        """Records that point at no segment, or behind the end of one."""
        for number in np.unique(rows["segment"]).tolist():
            here = rows[rows["segment"] == number]
            segment = self._by_number.get(number)
            if segment is None:
                detail = f"{number:010d}.seg is not there; {len(here)} records point at it"
                self.report.found("missing", number, 0, detail, len(here))
                continue
            outside = here[~inside(here, segment)]
            if len(outside):
                detail = f"{len(outside)} records point outside of {segment.path.name}"
                self.report.found(
                    "missing", number, int(outside["page"].min()), detail, len(outside)
                )

    # -- 2

    def segments(self) -> None:
        for segment in self._directory.segments:
            self._header(segment)
            if segment.fault in ("unreadable", "foreign") and not segment.live_blocks:
                continue
            try:
                live = self._summaries(segment)
                self._payloads.check(segment, live)
            except OSError as error:
                self.report.found("unreadable", segment.number, 0, f"{segment.path.name}: {error}")
            except lmdb.Error as error:  # the walk over its leaves passed; its branches are damaged
                detail = f"index: {error}; the store would rebuild it"
                self.report.found("index", segment.number, 0, detail)
            used = segment.live_pages * PAGE_BYTES
            self.report.live_bytes += used
            self.report.unreferenced_bytes += max(0, segment.bytes - PAGE_BYTES - used)

    def _header(self, segment: SegmentFile) -> None:
        name = segment.path.name
        if segment.fault == "foreign":
            detail = f"{name}: its header is of another directory, segment or format"
            self.report.found("foreign", segment.number, 0, detail)
        elif segment.fault == "unreadable":
            self.report.found("unreadable", segment.number, 0, f"{name}: cannot be read")
        elif segment.fault:
            self.report.found("header", segment.number, 0, f"{name}: its header is {segment.fault}")
        elif segment.bytes != segment.header_bytes:
            detail = f"{name}: has {segment.bytes} bytes; its header says {segment.header_bytes}"
            page = min(segment.bytes, segment.header_bytes) // PAGE_BYTES
            self.report.found("truncated", segment.number, page, detail)

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
            self.report.found("overlap", segment.number, int(rows["page"][i]), detail)
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
            detail = f"block {hash_of(row)}: its summary and the index differ"
            self.report.found("disagreement", segment.number, int(row["page"]), detail)
        found: Structs = records
        return found

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
                here = here[inside(here, segment)]
                self._unsummarized_in(segment, here[np.argsort(here["page"], kind="stable")])

    def _unsummarized_in(self, segment: SegmentFile, rows: Structs) -> None:
        for row in rows:
            detail = (
                f"block {hash_of(row)} is in no intact summary; it would be lost with the index"
            )
            self.report.found("summary", segment.number, int(row["page"]), detail)
        try:
            self._payloads.check(segment, rows)
        except OSError as error:
            self.report.found("unreadable", segment.number, 0, f"{segment.path.name}: {error}")

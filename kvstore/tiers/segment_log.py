"""The SSD tier's data: append-only segment files, written and read past the page cache.

Blocks are appended in batches to the newest segment, the head. A segment is sealed when the next
block does not fit or when a write to it failed; sealed segments are only read, and at last removed
whole. Segment numbers grow and are never reused within a process, so an old location can miss but
never name another block's bytes.

Thread safety: append, sync, seal, create and remove are for one writer at a time (the tier's lock);
read, open_extents and the counters may be used by any thread beside it. `_lock` guards the table of
segments, their file descriptors and pin counts. A removed segment's descriptor stays open until the
last read of it is done.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import StoreClosedError
from kvstore.tiers.ssd_format import (
    DESCRIPTORS_PER_PAGE,
    PAGE_BYTES,
    SUMMARY_MAGIC,
    Structs,
    decode_summary,
    encode_header,
    encode_summary,
    header_fault,
    pages_of,
    summary_pages_of,
    sync_directory,
)

MISSING = -1  # beside errno values: the segment is gone, or too short for the extent
BATCH_BLOCKS_MAX = 64 * DESCRIPTORS_PER_PAGE  # bounds a summary to 256 KiB
OPEN_FILES_MAX = 128  # of segments that nobody is reading
_RESYNC_BYTES = 1 << 20


@dataclass
class Segment:
    """One file. Accounting is in pages; `live` counts those that index records point at."""

    number: int
    path: Path
    pages: int
    fault: str = ""  # of the header page, see header_fault
    used_pages: int = 1
    live_pages: int = 0
    live_blocks: int = 0
    fd: int = -1
    pins: int = 0
    removed: bool = False
    unsynced: bool = False
    sync_failed: bool = False  # what was written before may be lost: no later sync tells

    @property
    def ours(self) -> bool:
        """False for a file that we neither wrote nor hold a record of: it is left alone."""
        return self.fault == "" or self.live_blocks > 0

    @property
    def live_fraction(self) -> float:
        return self.live_pages / max(1, self.used_pages - 1)


@dataclass
class Appended:
    """The first `count` blocks are written; `reason` says why the rest is not."""

    count: int
    segments: npt.NDArray[np.uint32]
    pages: npt.NDArray[np.uint32]
    reason: str = ""
    touched: list[Segment] = field(default_factory=list)


class QueuePool:
    """A few IoQueues for readers, so that a large prefetch does not hold up a small load."""

    def __init__(self, kind: str, depth: int, count: int) -> None:
        self._idle = [_native.IoQueue(kind, depth) for _ in range(count)]
        self._count = count
        self._closed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self) -> Iterator[_native.IoQueue]:
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise StoreClosedError("the SSD tier is closed")
            queue = self._idle.pop()
        try:
            yield queue
        finally:
            with self._changed:
                self._idle.append(queue)
                self._changed.notify_all()

    def close(self) -> None:
        """Refuses new readers and waits for the present ones."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._idle) == self._count)


class SegmentLog:
    def __init__(self, directory: Path, uuid: bytes, segment_bytes: int, queue: _native.IoQueue):
        self._directory = directory
        self._uuid = uuid
        self._segment_bytes = segment_bytes
        self._queue = queue
        self._lock = threading.Lock()
        self._open_files = 0
        self._head: Segment | None = None
        self._number = 0
        self.direct = True
        self.sequence = 1
        self.segments: dict[int, Segment] = {}
        self._unlinkable: list[Path] = []  # files of removed segments that are still there

    # -- opening

    def discover(self, direct: bool) -> None:
        """Lists the segment files. A file under creation when its writer died is removed."""
        self.direct = direct
        for entry in sorted(os.scandir(self._directory), key=lambda e: e.name):
            name, _, kind = entry.name.partition(".")
            if not (name.isdecimal() and len(name) == 10 and entry.is_file()):
                continue
            if kind == "seg.tmp":
                os.unlink(entry.path)
            elif kind == "seg":
                self._add(int(name), Path(entry.path), entry.stat().st_size)

    def _add(self, number: int, path: Path, size: int) -> None:
        with open(path, "rb", buffering=0) as file:
            fault = _header_fault(file.fileno(), self._uuid, number)
        self.segments[number] = Segment(number, path, size // PAGE_BYTES, fault)
        self._number = max(self._number, number)

    def skip_numbers(self, number: int) -> None:
        """Numbers up to this one are not given to new segments."""
        self._number = max(self._number, number)

    def reset_live(self) -> None:
        """Before the records are counted again."""
        with self._lock:
            for segment in self.segments.values():
                segment.live_pages, segment.live_blocks = 0, 0

    def reset_accounts(self) -> None:
        """Before the index is read, and again when it had to be rebuilt."""
        for segment in self.segments.values():
            segment.used_pages, segment.live_pages, segment.live_blocks = 1, 0, 0

    def resume(self) -> None:
        """Goes on writing the newest segment behind the batch of its last block with a record.

        Not within that batch, though its last blocks may be forgotten: who jumps from summary to
        summary would pass over one that lies there.
        """
        newest = max(self.segments, default=0)
        segment = self.segments.get(newest)
        for other in self.segments.values():
            if other is not segment:
                other.used_pages = max(other.used_pages, other.pages)
        if segment is None or segment.fault or segment.pages * PAGE_BYTES < self._segment_bytes:
            return
        try:
            for summary in self.summaries(segment):
                head = summary[0]
                if head["page"] >= segment.used_pages:
                    break
                end = int(head["page"]) - int(head["index"]) + int(head["batch_pages"])
                segment.used_pages = max(segment.used_pages, min(end, segment.pages))
        except OSError:
            return
        self._head = segment

    # -- space

    def table(self) -> list[tuple[int, Segment]]:
        with self._lock:
            return list(self.segments.items())

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(s.pages * PAGE_BYTES for s in self.segments.values() if s.ours)

    def room_pages(self) -> int:
        """Pages left in the head."""
        return self._head.pages - self._head.used_pages if self._head else 0

    def account(self, rows: Structs, sign: int) -> None:
        """Adds (+1) or takes away (-1) the records' blocks from their segments' live counts."""
        if len(rows) == 0:
            return
        numbers, inverse = np.unique(rows["segment"], return_inverse=True)
        pages = np.bincount(inverse, weights=pages_of(rows["stored_bytes"])).astype(np.int64)
        blocks = np.bincount(inverse)
        with self._lock:
            for number, p, b in zip(numbers.tolist(), pages.tolist(), blocks.tolist(), strict=True):
                segment = self.segments.get(number)
                if segment is not None:
                    segment.live_pages += sign * p
                    segment.live_blocks += sign * b

    def victim(self) -> Segment | None:
        """The sealed segment with the smallest live share, in steps of 1/8; of equals, the oldest.

        In a cache that only fills up all shares are near 1 and this is first in, first out.
        """
        with self._lock:
            sealed = [s for s in self.segments.values() if s is not self._head and s.ours]
        return min(sealed, key=lambda s: (int(8 * s.live_fraction), s.number), default=None)

    # -- writing

    def create(self) -> Segment:
        """Makes a whole new head: allocated, headed and named durably. Raises OSError."""
        number = self._number + 1
        final = self._directory / f"{number:010d}.seg"
        temporary = final.with_name(final.name + ".tmp")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            # All blocks now: a full disk shows here and not in the middle of a batch.
            os.posix_fallocate(fd, 0, self._segment_bytes)
            os.pwrite(fd, encode_header(self._uuid, number, self._segment_bytes), 0)
            os.fsync(fd)
            os.rename(temporary, final)
            sync_directory(self._directory)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        segment = Segment(number, final, self._segment_bytes // PAGE_BYTES)
        with self._lock:
            self._number = number
            self.segments[number] = segment
            self._head = segment
        return segment

    def seal(self) -> None:
        self._head = None

    def append(
        self, descriptors: Structs, addrs: npt.NDArray[np.uint64], limit_bytes: int
    ) -> Appended:
        """Writes blocks in order until the end, a full log (`limit_bytes` of files) or an error.

        Sets `page` in the descriptors. What is written is not synced.
        """
        n = len(descriptors)
        done = Appended(0, np.zeros(n, np.uint32), np.zeros(n, np.uint32))
        while done.count < n and not done.reason:
            rest = descriptors[done.count : done.count + BATCH_BLOCKS_MAX]
            fit = self._fitting(rest, self.room_pages())
            if fit == 0:
                done.reason = self._next_segment(rest, limit_bytes)
                continue
            assert self._head is not None
            segment = self._head
            written, reason = self._append_batch(
                segment, rest[:fit], addrs[done.count : done.count + fit]
            )
            span = slice(done.count, done.count + written)
            done.segments[span] = segment.number
            done.pages[span] = rest["page"][:written]
            done.count += written
            done.reason = reason
            if segment not in done.touched:
                done.touched.append(segment)
            if reason:
                self.seal()
        return done

    @staticmethod
    def _fitting(descriptors: Structs, room_pages: int) -> int:
        """How many of the blocks, in order, fit with their summary."""
        payload = np.cumsum(pages_of(descriptors["stored_bytes"]))
        summary = -(-np.arange(1, len(descriptors) + 1) // DESCRIPTORS_PER_PAGE)
        return int(np.searchsorted(payload + summary, room_pages, side="right"))

    def _next_segment(self, rest: Structs, limit_bytes: int) -> str:
        if self._fitting(rest[:1], self._segment_bytes // PAGE_BYTES - 1) == 0:
            return "too_large"
        if self.used_bytes + self._segment_bytes > limit_bytes:
            return "full"
        self.seal()
        try:
            self.create()
        except OSError as error:
            return reason_of(error.errno or errno.EIO)
        return ""

    def _append_batch(
        self, segment: Segment, descriptors: Structs, addrs: npt.NDArray[np.uint64]
    ) -> tuple[int, str]:
        count = len(descriptors)
        pages = pages_of(descriptors["stored_bytes"])
        start = segment.used_pages
        ends = start + summary_pages_of(count) + np.cumsum(pages)
        descriptors["page"] = ends - pages
        summary = encode_summary(self._uuid, segment.number, start, self.sequence, descriptors)
        self.sequence += 1
        segment.used_pages = int(ends[-1])
        segment.unsynced = True
        offsets = np.empty(count + 1, np.uint64)
        offsets[0] = start * PAGE_BYTES
        offsets[1:] = (ends - pages) * PAGE_BYTES
        memory = np.empty(count + 1, np.uint64)
        memory[0] = summary.ctypes.data
        memory[1:] = addrs
        lengths = np.empty(count + 1, np.uint64)
        lengths[0] = summary.nbytes
        lengths[1:] = descriptors["stored_bytes"]
        try:
            fd = self._pin(segment)
        except OSError as error:
            return 0, reason_of(error.errno or errno.EIO)
        try:
            fds = np.full(count + 1, fd, np.int32)
            errors = self._queue.write(fds, offsets, memory, lengths)
        finally:
            self._unpin(segment)
        failed = np.flatnonzero(errors)
        if len(failed) == 0:
            return count, ""
        return max(0, int(failed[0]) - 1), reason_of(int(errors[failed[0]]))

    def sync(self, segments: list[Segment]) -> None:
        """Puts the segments' data on disk. Raises OSError when that failed for one of them.

        The kernel reports a failure once and takes the pages for clean then. So such a segment is
        never synced again, and what is in it stays `unsynced`.
        """
        failure: OSError | None = None
        for segment in segments:
            if not segment.unsynced or segment.sync_failed:
                continue
            try:
                fd = self._pin(segment)
                try:
                    os.fdatasync(fd)
                finally:
                    self._unpin(segment)
                segment.unsynced = False
            except OSError as error:
                segment.sync_failed = True
                if segment is self._head:
                    self.seal()
                failure = error
        if failure is not None:
            raise failure

    def remove(self, segment: Segment) -> None:
        """Unlinks the file; a read that has begun still finishes."""
        with self._lock:
            self.segments.pop(segment.number, None)
            segment.removed = True
            self._close_if_idle(segment)
        self._unlinkable.append(segment.path)
        self.unlink_removed()

    def unlink_removed(self) -> bool:
        """Deletes files of removed segments; false while the disk refuses to."""
        while self._unlinkable:
            try:
                self._unlinkable[-1].unlink(missing_ok=True)
            except OSError:
                return False
            self._unlinkable.pop()
        return True

    # -- reading

    def read(
        self,
        queue: _native.IoQueue,
        numbers: npt.NDArray[np.uint32],
        pages: npt.NDArray[np.uint32],
        stored_bytes: npt.NDArray[np.uint32],
        checksums: npt.NDArray[np.uint64],
        addrs: npt.NDArray[np.uint64],
    ) -> npt.NDArray[np.int32]:
        """Per block 0, MISSING or an errno (EBADMSG: the bytes fail their checksum)."""
        errors = np.full(len(numbers), MISSING, np.int32)
        fds = np.full(len(numbers), -1, np.int32)
        pinned = []
        try:
            for number in np.unique(numbers).tolist():
                rows = numbers == number
                with self._lock:
                    segment = self.segments.get(number)
                if segment is None:
                    continue
                try:
                    fd = self._pin(segment)
                except OSError as error:
                    errors[rows] = error.errno or errno.EIO
                    continue
                if fd < 0:
                    continue
                pinned.append(segment)
                ends = pages.astype(np.int64) + pages_of(stored_bytes)
                fds[rows & (ends <= segment.pages) & (pages > 0) & (stored_bytes > 0)] = fd
            found = np.flatnonzero(fds >= 0)
            errors[found] = queue.read(
                fds[found],
                pages[found].astype(np.uint64) * np.uint64(PAGE_BYTES),
                addrs[found],
                stored_bytes[found].astype(np.uint64),
                checksums[found],
            )
        finally:
            for segment in pinned:
                self._unpin(segment)
        return errors

    def summaries(self, segment: Segment) -> Iterator[Structs]:
        """The intact summary pages of a segment, in order; damaged ones are skipped."""
        fd = os.open(segment.path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            at, sequence = 1, 0
            while at < segment.pages:
                page = os.pread(fd, PAGE_BYTES, at * PAGE_BYTES)
                summary = decode_summary(page, self._uuid, segment.number, at)
                # A lower sequence is what an unacknowledged batch left behind.
                if summary is None or summary["sequence"][0] < sequence:
                    at = _next_magic(fd, at + 1, segment.pages)
                    continue
                head = summary[0]
                sequence = int(head["sequence"])
                if head["index"] == 0:  # the batch's other summary pages in one read, not in many
                    rest = (int(head["summary_pages"]) - 1) * PAGE_BYTES
                    if rest:
                        begin = (at + 1) * PAGE_BYTES
                        os.posix_fadvise(fd, begin, rest, os.POSIX_FADV_WILLNEED)
                yield summary
                if head["index"] + 1 < head["summary_pages"]:
                    at += 1
                else:
                    at += int(head["batch_pages"]) - int(head["index"])
        finally:
            os.close(fd)

    def descriptors(self, segment: Segment) -> Iterator[tuple[int, Structs]]:
        """(sequence, descriptors that lie within the segment) of every intact summary page."""
        for summary in self.summaries(segment):
            head = summary[0]
            rows: Structs = summary["blocks"][0][: int(head["count"])]
            ends = rows["page"].astype(np.int64) + pages_of(rows["stored_bytes"])
            yield int(head["sequence"]), rows[(ends <= segment.pages) & (rows["stored_bytes"] > 0)]

    def check_header(self, segment: Segment) -> str:
        with open(segment.path, "rb", buffering=0) as file:
            return _header_fault(file.fileno(), self._uuid, segment.number)

    def close(self) -> None:
        with self._lock:
            for segment in self.segments.values():
                segment.removed = True
                self._close_if_idle(segment)
            self.segments.clear()
            self._head = None

    # -- file descriptors

    def _pin(self, segment: Segment) -> int:
        """Its descriptor, kept open until _unpin; -1 when it was removed. Raises OSError."""
        with self._lock:
            fd = self._pinned(segment)
        if fd is not None:
            return fd
        opened = self._open(segment.path)  # not under the lock: a hung disk must not hold up others
        with self._lock:
            if segment.fd < 0 and not segment.removed:
                if self._open_files >= OPEN_FILES_MAX:
                    self._close_idle_files()
                segment.fd, opened = opened, -1
                self._open_files += 1
            fd = self._pinned(segment)
        if opened >= 0:
            os.close(opened)
        assert fd is not None
        return fd

    def _pinned(self, segment: Segment) -> int | None:
        """As _pin; None when the file is to be opened first. The caller holds `_lock`."""
        if segment.removed:
            return -1
        if segment.fd < 0:
            return None
        segment.pins += 1
        return segment.fd

    def _unpin(self, segment: Segment) -> None:
        with self._lock:
            segment.pins -= 1
            if segment.removed:
                self._close_if_idle(segment)

    def _close_if_idle(self, segment: Segment) -> None:
        if segment.fd >= 0 and segment.pins == 0:
            os.close(segment.fd)
            segment.fd = -1
            self._open_files -= 1

    def _close_idle_files(self) -> None:
        for segment in self.segments.values():
            if segment is not self._head:
                self._close_if_idle(segment)

    def _open(self, path: Path) -> int:
        if self.direct:
            try:
                return os.open(path, os.O_RDWR | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False  # this file system has no O_DIRECT
        return os.open(path, os.O_RDWR)


def reason_of(error: int) -> str:
    return "no_space" if error in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "io_error"


def _header_fault(fd: int, uuid: bytes, number: int) -> str:
    try:
        return header_fault(os.pread(fd, PAGE_BYTES, 0), uuid, number)
    except OSError:
        return "unreadable"


def _next_magic(fd: int, start: int, end: int) -> int:
    """The first page from `start` on that begins like a summary; `end` when there is none.

    Unwritten space is a hole to the file system and costs nothing.
    """
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at * PAGE_BYTES, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but holes from here on
            return end
        at = max(at, data // PAGE_BYTES)
        chunk = os.pread(fd, min(_RESYNC_BYTES, (end - at) * PAGE_BYTES), at * PAGE_BYTES)
        whole = len(chunk) // PAGE_BYTES
        if whole == 0:
            return end
        words = np.frombuffer(chunk, np.uint64, whole * PAGE_BYTES // 8)[:: PAGE_BYTES // 8]
        hits: npt.NDArray[Any] = np.flatnonzero(words == np.frombuffer(SUMMARY_MAGIC, np.uint64)[0])
        if len(hits):
            return at + int(hits[0])
        at += whole
    return end

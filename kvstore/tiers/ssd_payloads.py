"""Reads blocks of an SSD directory and compares them with their checksums; see ssd_verify.py.

Neighbours are read together, so that small blocks too are read as fast as the disk goes. Where such
a read fails, its blocks are read one by one to tell which of them cannot be.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.codec import Codec, CodecId, aligned_buffer, get_codec
from kvstore.errors import ConfigError, KVStoreError
from kvstore.tiers.ssd_format import PAGE_BYTES, Structs, pages_of
from kvstore.tiers.ssd_offline import NamespaceInfo, SegmentFile, codec_name
from kvstore.tiers.ssd_report import SsdReport

BATCH_BYTES = 16 << 20  # payload in memory at a time, unless one block is larger
_READ_PAGES = (1 << 20) // PAGE_BYTES  # read together
_GAP_PAGES = 1  # read over: a summary between two batches


class PayloadCheck:
    """Thread safety: for one thread."""

    def __init__(
        self,
        queue: _native.IoQueue,
        namespaces: dict[int, NamespaceInfo],
        report: SsdReport,
        advance: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._namespaces = namespaces
        self._report = report
        self._advance = advance  # called after every batch
        self._memory = aligned_buffer(BATCH_BYTES)
        self._decoded = aligned_buffer(0)
        self._codecs: dict[tuple[int, int], Codec | None] = {}
        self._has_o_direct = True

    def check(self, segment: SegmentFile, rows: Structs) -> None:
        """Check blocks of one segment; `rows` are their records in page order.

        Raises:
            OSError: the file cannot be opened.
        """
        if not len(rows):
            return
        rows = rows[inside(rows, segment)]
        fd = self._open(segment.path)
        try:
            for part in _batches(rows):
                self._batch(segment, fd, part)
        finally:
            os.close(fd)

    def _open(self, path: Path) -> int:
        if self._has_o_direct:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._has_o_direct = False
        return os.open(path, os.O_RDONLY)

    def _batch(self, segment: SegmentFile, fd: int, rows: Structs) -> None:
        lengths = rows["stored_bytes"].astype(np.uint64)
        addresses, errors = self._read(fd, rows)
        read = errors == 0
        sums = np.zeros(len(rows), np.uint64)
        sums[read] = _native.io_checksum_at(addresses[read], lengths[read])
        right = read & (sums == rows["stored_checksum"])
        for i in np.flatnonzero(~right).tolist():
            page, name = int(rows["page"][i]), hash_of(rows[i])
            if read[i]:
                detail = f"block {name} fails its stored checksum"
                self._report.found("payload", segment.number, page, detail)
            else:
                detail = f"block {name}: {os.strerror(int(errors[i]))}"
                self._report.found("unreadable", segment.number, page, detail)
        self._raw(segment, rows[right], addresses[right])
        self._report.checked_blocks += len(rows)
        self._report.checked_bytes += int(lengths.sum())
        self._advance()

    def _read(self, fd: int, rows: Structs) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
        """Where in memory each block is, and 0 or an errno for each."""
        pages = rows["page"].astype(np.int64)
        ends = pages + pages_of(rows["stored_bytes"])
        first = _groups(pages, ends)
        group = np.cumsum(np.isin(np.arange(len(rows)), first)) - 1
        start = pages[first]
        length = np.maximum.reduceat(ends, first) - start
        room = int(length.sum()) * PAGE_BYTES
        if room > self._memory.nbytes:
            self._memory = aligned_buffer(room)
        base = (np.cumsum(length) - length) * PAGE_BYTES + self._memory.ctypes.data
        errors = self._queue.read(
            np.full(len(first), fd, np.int32),
            (start * PAGE_BYTES).astype(np.uint64),
            base.astype(np.uint64),
            (length * PAGE_BYTES).astype(np.uint64),
        )
        addresses = (base[group] + (pages - start[group]) * PAGE_BYTES).astype(np.uint64)
        of_each = errors[group]
        again = np.flatnonzero(of_each)
        if len(again):
            of_each[again] = self._queue.read(
                np.full(len(again), fd, np.int32),
                (pages[again] * PAGE_BYTES).astype(np.uint64),
                addresses[again],
                rows["stored_bytes"][again].astype(np.uint64),
            )
        return addresses, of_each

    # -- what was put

    def _raw(self, segment: SegmentFile, rows: Structs, addresses: npt.NDArray[np.uint64]) -> None:
        """Blocks whose stored bytes are right: are they what was put?"""
        plain = rows["codec"] == int(CodecId.NONE)
        wrong = (rows["checksum"] != rows["stored_checksum"]) | (
            rows["raw_bytes"] != rows["stored_bytes"]
        )
        for row in rows[plain & wrong]:
            detail = f"block {hash_of(row)} was stored with other bytes than were put"
            self._report.found("payload", segment.number, int(row["page"]), detail)
        self._report.decoded_blocks += int(plain.sum())
        for number, codec_id in np.unique(rows[~plain][["namespace", "codec"]]).tolist():
            at = np.flatnonzero((rows["namespace"] == number) & (rows["codec"] == codec_id))
            codec = self._codec(number, codec_id)
            if codec is None:
                self._report.undecoded_blocks += len(at)
                continue
            self._report.decoded_blocks += len(at)
            spec = self._spec(number)
            for i in at.tolist():
                if not self._decodes(rows[i], addresses[i : i + 1], codec, spec):
                    detail = f"block {hash_of(rows[i])} does not decode to the bytes that were put"
                    self._report.found("payload", segment.number, int(rows["page"][i]), detail)

    def _spec(self, number: int) -> BlockSpec:
        namespace = self._namespaces[number].namespace
        assert namespace is not None  # it has a codec
        return namespace.spec

    def _codec(self, number: int, codec_id: int) -> Codec | None:
        key = number, codec_id
        if key not in self._codecs:
            info = self._namespaces.get(number)
            self._codecs[key] = None
            try:
                if info is not None and info.namespace is not None:
                    self._codecs[key] = get_codec(codec_id, info.namespace.spec)
            except ConfigError as error:
                self._report.notes.append(
                    f"blocks of codec {codec_name(codec_id)} are not decoded: {error}"
                )
        return self._codecs[key]

    def _decodes(
        self, row: Any, address: npt.NDArray[np.uint64], codec: Codec, spec: BlockSpec
    ) -> bool:
        raw_bytes = int(row["raw_bytes"])
        if raw_bytes != spec.block_bytes:
            return False
        if raw_bytes > self._decoded.nbytes:
            self._decoded = aligned_buffer(raw_bytes)
        out = np.array([self._decoded.ctypes.data], np.uint64)
        length = np.array([row["stored_bytes"]], np.uint64)
        try:
            if not codec.decode(address, length, out, raw_bytes, spec)[0]:
                return False
        except KVStoreError:
            return False
        return codec.lossy or _native.xxh3(self._decoded[:raw_bytes]) == int(row["checksum"])


def inside(rows: Structs, segment: SegmentFile) -> npt.NDArray[np.bool_]:
    """Which blocks lie within the segment's file."""
    ends = rows["page"].astype(np.int64) + pages_of(rows["stored_bytes"])
    within: npt.NDArray[np.bool_] = (rows["page"] > 0) & (rows["stored_bytes"] > 0)
    return within & (ends <= segment.bytes // PAGE_BYTES)


def hash_of(row: Any) -> str:
    return str(row["hash"].tobytes().hex())


def _groups(pages: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The first block of each run that is read together."""
    apart = pages[1:] - ends[:-1] > _GAP_PAGES
    full = np.diff(pages // _READ_PAGES) > 0
    return np.concatenate(([0], 1 + np.flatnonzero(apart | full)))


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

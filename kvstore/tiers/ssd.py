"""The SSD tier: blocks in segment files, found by an LMDB index. See ssd_format.py for the layout.

A passive tier. Its owner decides what to write, which blocks survive a reclaim and when; the tier
owns the files, the index, the capacity and the checks, and works on whole batches.

Acknowledgement: what write(durable=False) returned as ok survives a kill of the process, what
write(durable=True) returned as ok survives power loss, until it is forgotten, reclaimed or written
again. In every case a read gives the exact bytes or a miss. The bytes of one key are taken to never
change: after damage to the index an older copy of a key may come back.

`counters` counts what happened, by reason: written_blocks, written_bytes, write_{full, no_space,
io_error, index_error, too_large}; read_blocks, read_bytes, read_{missing, short, checksum,
io_error}; reclaimed_segments, moved_blocks, dropped_blocks, move_{...}; unlink_errors;
index_{damaged, bad_records, rebuilt, errors, reopened}; recover_{missing_data, bad_records};
rebuild_{unknown_namespace, io_errors}.

Thread safety: all methods may be called from any thread. `_writer` serializes those that change
something (write, forget, reclaim, register_namespace, sync, verify); reads run beside them and
beside each other. One LMDB transaction a write call: callers that batch, commit in groups.
"""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import ConfigError, OutOfSpaceError, StorageError, StoreClosedError
from kvstore.tiers import ssd_open
from kvstore.tiers.segment_log import MISSING, QueuePool, Segment, SegmentLog, reason_of
from kvstore.tiers.ssd_format import (
    DESCRIPTOR,
    PAGE_BYTES,
    RECORD,
    SHARED,
    Structs,
    pages_of,
    records_from,
    seal_records,
)
from kvstore.tiers.ssd_format import (
    Records as Records,
)
from kvstore.tiers.ssd_index import keys_of

_READERS = 2  # queues for reads: one long prefetch and one short load at a time
_MOVE_BYTES = 8 << 20  # memory that reclaim copies through
_SEGMENTS_MIN = 3  # the head, one to reclaim, one to move survivors into
_ADDRESS_PAGE = np.uint64(PAGE_BYTES)


@dataclass(frozen=True)
class SsdConfig:
    path: str | Path
    capacity_bytes: int
    segment_bytes: int = 256 << 20
    io: str = "auto"  # "uring" | "threads"
    io_depth: int = 16
    direct: bool = True  # O_DIRECT, where the file system has it
    map_bytes: int = 0  # LMDB's map; 0: from the capacity. It grows when it is full.

    def __post_init__(self) -> None:
        if self.io not in ("auto", "uring", "threads"):
            raise ConfigError(f"io: must be 'auto', 'uring' or 'threads', not {self.io!r}")
        if not 1 <= self.io_depth <= 4096:
            raise ConfigError(f"io_depth: must be between 1 and 4096, not {self.io_depth}")
        if self.segment_bytes % PAGE_BYTES or not 4 * PAGE_BYTES <= self.segment_bytes < 1 << 40:
            raise ConfigError(
                f"segment_bytes: must be a multiple of {PAGE_BYTES}, at least {4 * PAGE_BYTES}, "
                f"not {self.segment_bytes}"
            )
        if self.capacity_bytes < _SEGMENTS_MIN * self.segment_bytes:
            raise ConfigError(
                f"capacity_bytes: must hold at least {_SEGMENTS_MIN} segments of "
                f"{self.segment_bytes} bytes, not {self.capacity_bytes}"
            )
        if self.map_bytes < 0:
            raise ConfigError(f"map_bytes: must not be negative, not {self.map_bytes}")


@dataclass(frozen=True)
class Locations:
    """Where blocks were written. `ok` is true for a prefix; `reason` says what stopped the rest."""

    ok: npt.NDArray[np.bool_]
    segments: npt.NDArray[np.uint32]
    pages: npt.NDArray[np.uint32]
    stored_bytes: npt.NDArray[np.uint32]
    stored_checksums: npt.NDArray[np.uint64]
    reason: str = ""  # "" | "full" | "no_space" | "io_error" | "index_error" | "too_large"


@dataclass(frozen=True)
class Reclaimed:
    """A segment that was freed: what lies elsewhere now, and what is gone."""

    segment: int
    moved: Records
    dropped: Records


@dataclass(frozen=True)
class SegmentStats:
    segment: int
    pages: int
    used_pages: int
    live_pages: int
    live_blocks: int


@dataclass(frozen=True)
class Finding:
    """Something wrong on disk. `kind`: header, payload, index_record, missing or foreign."""

    kind: str
    segment: int
    page: int
    detail: str


class SsdTier:
    def __init__(self, config: SsdConfig) -> None:
        """Opens or creates the directory; raises ConfigError, IncompatibleError, InUseError,
        CorruptError (damaged superblock), OutOfSpaceError or StorageError, and changes nothing
        then."""
        self.config = config
        self.counters: Counter[str] = Counter()
        self._path = Path(config.path)
        self._index_openings = 0
        self._writer = threading.RLock()
        self._counting = threading.Lock()  # of what readers count
        self._closed = False
        self._refused_for_space = False
        self._lock_fd = ssd_open.lock_directory(self._path)
        try:
            uuid = ssd_open.open_superblock(self._path)
            try:
                self._queue = _native.IoQueue(config.io, config.io_depth)
                self._readers = QueuePool(config.io, config.io_depth, _READERS)
            except RuntimeError as error:
                raise ConfigError(f"io: {error}") from error
            self._log = SegmentLog(self._path / "segments", uuid, config.segment_bytes, self._queue)
            try:
                self._log.discover(config.direct)
            except OSError as error:
                raise ssd_open.os_error(error, self._path, "reading the segments") from error
            map_bytes = config.map_bytes or max(64 << 20, config.capacity_bytes // 32)
            self._index, self._namespaces = ssd_open.open_index(
                self._path, self._log, map_bytes, self.counters
            )
            bad = self._load()
            if bad:
                # What damaged these records may have damaged more than records.
                self.counters["index_bad_records"] += bad
                self._index.close()
                self._index = ssd_open.rebuild_index(
                    self._path, self._log, map_bytes, self._namespaces, self.counters
                )
                self._load()
            self._start()
        except BaseException:
            ssd_open.close_quietly(self._lock_fd)
            raise

    def _load(self) -> int:
        """Accounts for every record; the number of those that fail their checksum."""
        stale: list[Structs] = []
        highest = bad_records = 0
        self._log.reset_accounts()
        for scanned, bad in self._index.scan():
            bad_records += bad
            present = self._present(scanned)
            stale.append(scanned[~present])
            rows = scanned[present]
            self._log.account(rows, 1)
            if len(scanned):
                highest = max(highest, int(scanned["namespace"].max()))
            for number, end in _ends(rows):
                segment = self._log.segments[number]
                segment.used_pages = max(segment.used_pages, end)
        self._highest_namespace = max(highest, *self._namespaces, 0)
        self._stale = np.concatenate(stale) if stale else np.empty(0, RECORD)
        return bad_records

    def _start(self) -> None:
        """Forgets records whose data is gone and goes on where the last process stopped."""
        gone = self._stale
        self._stale = np.empty(0, RECORD)
        if len(gone):
            self.counters["recover_missing_data"] += len(gone)
            self._log.skip_numbers(int(gone["segment"].max()))
        self._index_openings = self._index.openings
        self._log.sequence = max(self._log.sequence, self._index.meta("sequence") + (1 << 20))
        self._log.resume()
        try:
            self._index.commit(np.empty(0, RECORD), keys_of(gone), self._meta())
        except (lmdb.Error, OSError):
            self.counters["index_errors"] += 1  # a disk that cannot be written can still be read

    def _present(self, rows: Structs) -> npt.NDArray[np.bool_]:
        """Which records have a known namespace and lie within a segment that is there."""
        present = np.isin(rows["namespace"], np.array(list(self._namespaces), np.uint32))
        for number, _ in _ends(rows):
            here = rows["segment"] == number
            segment = self._log.segments.get(number)
            if segment is None or segment.fault == "foreign":
                present[here] = False
            else:
                ends = rows["page"].astype(np.int64) + pages_of(rows["stored_bytes"])
                present[here & (ends > segment.pages)] = False
        return present

    def _meta(self) -> dict[str, int]:
        return {"sequence": self._log.sequence}

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the SSD tier is closed")

    # -- namespaces

    def register_namespace(self, namespace_digest: bytes, description: bytes) -> int:
        """The number of this digest in this directory, given once and for good."""
        with self._writer:
            self._check_open()
            for number, (digest, _) in self._namespaces.items():
                if digest == namespace_digest:
                    return number
            if not 0 < len(namespace_digest) < 1 << 16:
                raise ValueError("namespace_digest: must have 1 to 65535 bytes")
            number = self._highest_namespace + 1
            namespaces = {**self._namespaces, number: (namespace_digest, description)}
            try:
                # The file first: a number that the index knows must never mean something else.
                ssd_open.write_namespaces(self._path, namespaces)
                packed = ssd_open.pack_namespace(namespace_digest, description)
                self._settle_index()
                self._index.put_namespaces({number: packed})
            except OSError as error:
                raise ssd_open.os_error(error, self._path, "adding a namespace") from error
            except lmdb.Error as error:
                raise _storage_error(error, self._path) from error
            self._highest_namespace = number
            self._namespaces = namespaces
            return number

    def namespaces(self) -> dict[int, tuple[bytes, bytes]]:
        return dict(self._namespaces)

    # -- blocks

    def recover(self) -> Iterator[Records]:
        """What the index holds, in batches. Payloads are checked when they are read."""
        self._check_open()
        for rows, bad in self._index.scan():
            present = self._present(rows)
            self.counters["recover_bad_records"] += bad
            yield Records.of(rows[present])

    def write(  # noqa: PLR0913  (the columns of a batch)
        self,
        namespace: int,
        hashes: npt.NDArray[np.uint8],
        parents: npt.NDArray[np.uint8],
        depths: npt.NDArray[np.uint32],
        addrs: npt.NDArray[np.uint64],
        raw_bytes: npt.NDArray[np.uint32],
        checksums: npt.NDArray[np.uint64],
        *,
        durable: bool,
        codecs: npt.NDArray[np.uint8] | None = None,
        stored_bytes: npt.NDArray[np.uint32] | None = None,
    ) -> Locations:
        """Stores blocks from memory at `addrs`; a prefix of them when the disk is full or fails.

        `checksums` are XXH3-64 of the raw payloads. Without `stored_bytes` the memory holds those;
        with it, it holds `stored_bytes` bytes of what the codecs made of them. The memory must
        not change during the call.
        """
        n = len(addrs)
        _check_shapes(n, hashes=(hashes, (n, 32)), parents=(parents, (n, 32)))
        _check_shapes(n, depths=(depths, (n,)), raw_bytes=(raw_bytes, (n,)))
        _check_shapes(n, checksums=(checksums, (n,)))
        addrs = np.ascontiguousarray(addrs, np.uint64)
        descriptors = np.zeros(n, DESCRIPTOR)
        descriptors["hash"] = hashes
        descriptors["parent"] = parents
        descriptors["depth"] = depths
        descriptors["raw_bytes"] = descriptors["stored_bytes"] = raw_bytes
        descriptors["checksum"] = descriptors["stored_checksum"] = checksums
        if codecs is not None:
            _check_shapes(n, codecs=(codecs, (n,)))
            descriptors["codec"] = codecs
        if stored_bytes is not None:
            _check_shapes(n, stored_bytes=(stored_bytes, (n,)))
            descriptors["stored_bytes"] = stored_bytes
        if not descriptors["stored_bytes"].all() or not addrs.all():
            raise ValueError("raw_bytes, stored_bytes, addrs: must not be 0")
        if stored_bytes is not None:
            descriptors["stored_checksum"] = _native.io_checksum_at(
                addrs, descriptors["stored_bytes"].astype(np.uint64)
            )
        with self._writer:
            self._check_open()
            if namespace not in self._namespaces:
                raise ValueError(f"namespace: {namespace} is not registered")
            descriptors["namespace"] = namespace
            descriptors["namespace_tag"] = ssd_open.tag_of(self._namespaces[namespace][0])
            # The last segment is kept for reclaim to move survivors into.
            limit = self.config.capacity_bytes - self.config.segment_bytes
            return self._store(descriptors, addrs, limit, durable)

    def _store(
        self, descriptors: Structs, addrs: npt.NDArray[np.uint64], limit: int, durable: bool
    ) -> Locations:
        n = len(descriptors)
        done = self._log.append(descriptors, addrs, limit)
        count, reason = done.count, done.reason
        if durable and count:
            try:
                self._log.sync(done.touched)
            except OSError as error:
                count, reason = 0, reason_of(error.errno or errno.EIO)
        if count:
            rows = records_from(descriptors[:count], done.segments[:count])
            try:
                self._commit(rows)
            except (lmdb.Error, OSError) as error:
                count, reason = 0, "index_error"
                # Only then: a reclaim for any other error would cost a segment for nothing.
                self._refused_for_space |= _is_out_of_space(error)
        if reason:
            self.counters[f"write_{reason}"] += n - count
            self._refused_for_space |= reason in ("full", "no_space")
        elif n:
            self._refused_for_space = False  # or a disk that has room again would lose a segment
        self.counters["written_blocks"] += count
        self.counters["written_bytes"] += int(descriptors["stored_bytes"][:count].sum())
        return Locations(
            np.arange(n) < count,
            done.segments,
            done.pages,
            descriptors["stored_bytes"].astype(np.uint32),
            descriptors["stored_checksum"].astype(np.uint64),
            reason,
        )

    def _commit(self, rows: Structs) -> None:
        """Puts records and moves the accounts of what they replace."""
        keys = keys_of(rows)
        last = {key: i for i, key in enumerate(keys)}
        if len(last) < len(keys):  # a key twice in one batch: the last one counts
            rows = rows[np.fromiter(last.values(), np.int64, len(last))]
            keys = list(last)
        self._settle_index()
        replaced = self._index.find(keys)
        self._index.commit(rows, [], self._meta())
        self._log.account(replaced, -1)
        self._log.account(rows, 1)

    def _settle_index(self) -> None:
        """Counts again where LMDB had to be opened again: its last commit may have come to pass
        after all. Raises lmdb.Error or OSError while the index cannot be opened."""
        self._index.settle()
        if self._index.openings == self._index_openings:
            return
        self.counters["index_reopened"] += 1
        self._log.reset_live()
        for rows, _ in self._index.scan():
            self._log.account(rows[self._present(rows)], 1)
        self._index_openings = self._index.openings

    def read(
        self,
        segments: npt.NDArray[np.uint32],
        pages: npt.NDArray[np.uint32],
        stored_bytes: npt.NDArray[np.uint32],
        stored_checksums: npt.NDArray[np.uint64],
        addrs: npt.NDArray[np.uint64],
    ) -> npt.NDArray[np.bool_]:
        """Reads stored payloads into memory at `addrs`; true where they are there and check out.

        Where false, the memory holds unspecified bytes. Page-aligned memory is read in place.
        """
        n = len(addrs)
        _check_shapes(n, segments=(segments, (n,)), pages=(pages, (n,)))
        _check_shapes(n, stored_bytes=(stored_bytes, (n,)))
        _check_shapes(n, stored_checksums=(stored_checksums, (n,)))
        addrs = np.ascontiguousarray(addrs, np.uint64)
        if not addrs.all():
            raise ValueError("addrs: must not be 0")
        checksums = np.ascontiguousarray(stored_checksums, np.uint64)
        with self._readers.take() as queue:
            errors = self._log.read(queue, segments, pages, stored_bytes, checksums, addrs)
        return self._count_read(errors, stored_bytes)

    def _count_read(
        self, errors: npt.NDArray[np.int32], stored_bytes: npt.NDArray[np.uint32]
    ) -> npt.NDArray[np.bool_]:
        ok: npt.NDArray[np.bool_] = errors == 0
        with self._counting:
            self.counters["read_blocks"] += int(ok.sum())
            self.counters["read_bytes"] += int(stored_bytes[ok].sum(dtype=np.int64))
            for error, count in zip(*np.unique(errors[~ok], return_counts=True), strict=True):
                self.counters[f"read_{_READ_REASONS.get(int(error), 'io_error')}"] += int(count)
        return ok

    def forget(self, namespaces: npt.NDArray[np.uint32], hashes: npt.NDArray[np.uint8]) -> None:
        """Deletes the blocks' index records in one transaction. Raises StorageError if it fails."""
        n = len(hashes)
        _check_shapes(n, namespaces=(namespaces, (n,)), hashes=(hashes, (n, 32)))
        rows = np.zeros(n, RECORD)
        rows["namespace"] = namespaces
        rows["hash"] = hashes
        with self._writer:
            self._check_open()
            keys = list(dict.fromkeys(keys_of(rows)))
            try:
                self._settle_index()
                found = self._index.find(keys)
                self._index.commit(np.empty(0, RECORD), keys, self._meta())
            except (lmdb.Error, OSError) as error:
                raise _storage_error(error, self._path) from error
            self._log.account(found, -1)

    # -- space

    @property
    def used_bytes(self) -> int:
        """Bytes of segment files."""
        return self._log.used_bytes

    @property
    def capacity_bytes(self) -> int:
        return self.config.capacity_bytes

    def needs_reclaim(self, more_bytes: int) -> bool:
        """Whether a write of this many bytes could be refused for want of space."""
        with self._writer:
            self._check_open()
            if self._refused_for_space:
                return True
            # Blocks of one page have the largest summaries: one page in 36.
            pages = -(-more_bytes // PAGE_BYTES)
            pages += -(-pages // 36) + 1 - self._log.room_pages()
            free = self.config.capacity_bytes - self.config.segment_bytes - self._log.used_bytes
            return pages > 0 and pages > free // self.config.segment_bytes * (
                self.config.segment_bytes // PAGE_BYTES - 1
            )

    def segments(self) -> list[SegmentStats]:
        with self._writer:
            return [
                SegmentStats(s.number, s.pages, s.used_pages, s.live_pages, s.live_blocks)
                for s in sorted(self._log.segments.values(), key=lambda s: s.number)
            ]

    def reclaim(
        self,
        survivors: Callable[[Records], npt.NDArray[np.bool_]],
        survive_fraction: float = 0.5,
    ) -> Reclaimed | None:
        """Frees one sealed segment; None when there is none, or the disk does not let us.

        `survivors` sees the segment's live blocks in log order and says which are worth moving to
        the head of the log. Of those, the first that fill `survive_fraction` of a segment are
        moved; moved blocks are synced before the old copy goes. It must not call this tier.
        """
        with self._writer:
            self._check_open()
            # A disk that refuses to delete would else lose segment after segment for no space.
            if not self._log.unlink_removed():
                self.counters["unlink_errors"] += 1
                return None
            victim = self._log.victim()
            if victim is None:
                return None
            try:
                self._settle_index()
                live = self._live(victim)
            except (lmdb.Error, OSError):
                self.counters["index_errors"] += 1
                return None
            wanted = np.zeros(len(live), bool)
            if len(live):
                wanted = np.asarray(survivors(Records.of(live)), bool)
                if wanted.shape != (len(live),):
                    raise ValueError("survivors: must return one bool a block")
            limit_pages = int(survive_fraction * self.config.segment_bytes / PAGE_BYTES)
            pages = np.where(wanted, pages_of(live["stored_bytes"]), 0)
            wanted &= np.cumsum(pages) <= limit_pages
            moved, ok = self._move(live[wanted])
            kept = np.flatnonzero(wanted)[ok]
            gone = np.ones(len(live), bool)
            gone[kept] = False
            if not self._commit_reclaim(victim, moved, keys_of(live[gone])):
                return None
            self._log.account(moved, 1)
            self._log.account(live, -1)
            self._log.remove(victim)
            self._refused_for_space = False
            self.counters["reclaimed_segments"] += 1
            self.counters["moved_blocks"] += len(moved)
            self.counters["dropped_blocks"] += int(gone.sum())
            return Reclaimed(victim.number, Records.of(moved), Records.of(live[gone]))

    def _commit_reclaim(self, victim: Segment, moved: Structs, gone: list[bytes]) -> bool:
        try:
            self._index.commit(moved, gone, self._meta())
        except (lmdb.Error, OSError) as error:
            self.counters["index_errors"] += 1
            if not _is_out_of_space(error):
                return False
            # The disk is so full that the index cannot even shrink. The segment goes first: until
            # the index is written its records are misses, and a crash now costs the survivors.
            self._log.remove(victim)
            try:
                self._index.commit(moved, gone, self._meta())
            except (lmdb.Error, OSError):
                self.counters["index_errors"] += 1
                return False
        return True

    def _live(self, segment: Segment) -> Structs:
        """Records that point into the segment, in log order.

        Those that a damaged summary fails to name are not found; their records go on pointing at
        a segment that is missing, and are forgotten at the next opening.
        """
        if segment.live_blocks == 0:
            return np.empty(0, RECORD)
        try:
            parts = [rows for _, rows in self._log.descriptors(segment)]
        except OSError:
            parts = []
        if not parts:
            return np.empty(0, RECORD)
        keys = keys_of(np.concatenate(parts))
        rows = self._index.find(list(dict.fromkeys(keys)))
        rows = rows[rows["segment"] == segment.number]
        in_order: Structs = rows[np.argsort(rows["page"], kind="stable")]
        return in_order

    def _move(self, rows: Structs) -> tuple[Structs, npt.NDArray[np.bool_]]:
        """Copies blocks to the head. (their new records, which of `rows` those are)."""
        ok = np.zeros(len(rows), bool)
        moved = rows.copy()
        pages = pages_of(rows["stored_bytes"])
        touched: list[Segment] = []
        group = np.cumsum(pages) * PAGE_BYTES // _MOVE_BYTES
        for number in np.unique(group).tolist():
            at = np.flatnonzero(group == number)
            starts = np.cumsum(pages[at]) - pages[at]
            memory = np.empty((int(pages[at].sum()) + 1) * PAGE_BYTES, np.uint8)
            base = np.uint64(-(-memory.ctypes.data // PAGE_BYTES) * PAGE_BYTES)
            addrs = base + starts.astype(np.uint64) * _ADDRESS_PAGE
            part = Records.of(rows[at])
            good = self.read(
                part.segment, part.page, part.stored_bytes, part.stored_checksum, addrs
            )
            at = at[good]
            descriptors = np.zeros(len(at), DESCRIPTOR)
            for name in SHARED:
                descriptors[name] = rows[name][at]
            for namespace in np.unique(descriptors["namespace"]).tolist():
                digest, _ = self._namespaces[namespace]
                descriptors["namespace_tag"][descriptors["namespace"] == namespace] = (
                    ssd_open.tag_of(digest)
                )
            done = self._log.append(descriptors, addrs[good], self.config.capacity_bytes)
            touched += [s for s in done.touched if s not in touched]
            at = at[: done.count]
            ok[at] = True
            moved["segment"][at] = done.segments[: done.count]
            moved["page"][at] = done.pages[: done.count]
            if done.reason:
                self.counters[f"move_{done.reason}"] += 1
                break
        try:
            self._log.sync(touched)
        except OSError:
            ok[:] = False
        return seal_records(moved[ok]), ok

    # -- upkeep

    def sync(self) -> None:
        """Makes everything written so far survive power loss.

        Raises StorageError when that fails now. Segments where it failed before are left out; see
        `sync_failed`.
        """
        with self._writer:
            self._check_open()
            try:
                self._log.sync(list(self._log.segments.values()))
            except OSError as error:
                raise ssd_open.os_error(error, self._path, "syncing the segments") from error

    def synced(self, segments: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Which of these segments are known to survive power loss, with all that is in them."""
        known = [n for n, s in self._log.table() if not s.unsynced]
        return np.isin(segments, np.array(known, np.uint32))

    def sync_failed(self, segments: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Which of these segments no later sync can make survive power loss."""
        known = [n for n, s in self._log.table() if s.sync_failed]
        return np.isin(segments, np.array(known, np.uint32))

    def verify(self, repair: bool = False) -> Iterator[Finding]:
        """Checks every header, index record and payload. `repair` forgets blocks that fail.

        Writers wait from one batch of the index to the next; readers do not.
        """
        with self._writer:
            self._check_open()
            segments = list(self._log.segments.values())
        for segment in segments:
            fault = self._log.check_header(segment)
            if fault:
                yield Finding("header", segment.number, 0, f"{segment.path.name}: {fault}")
        for rows, bad in self._index.scan():
            if bad:
                yield Finding("index_record", 0, 0, f"{bad} records fail their checksum")
            yield from self._verify_payloads(rows, repair)

    def _verify_payloads(self, rows: Structs, repair: bool) -> Iterator[Finding]:
        memory = np.empty(_MOVE_BYTES + PAGE_BYTES, np.uint8)
        rows = rows[np.lexsort((rows["page"], rows["segment"]))]
        start = 0
        while start < len(rows):
            with self._writer:
                self._check_open()
                end, addrs, memory = _packed(rows, start, memory)
                part = Records.of(rows[start:end])
                good = self.read(
                    part.segment, part.page, part.stored_bytes, part.stored_checksum, addrs
                )
                bad = rows[start:end][~good]
                # What was rewritten, forgotten or moved since the scan is not a finding.
                now = self._index.find(keys_of(bad))
                bad = now[np.isin(now["record_checksum"], bad["record_checksum"])]
                if repair and len(bad):
                    self.forget(bad["namespace"].astype(np.uint32), bad["hash"])
            start = end
            for row in bad:
                where = int(row["segment"]), int(row["page"])
                yield Finding("payload", *where, f"block {row['hash'].tobytes().hex()}")

    def close(self) -> None:
        """Waits for reads and writes in progress. A second close does nothing."""
        self._readers.close()
        with self._writer:
            if self._closed:
                return
            self._closed = True
            self._index.close()
            self._log.close()
            ssd_open.close_quietly(self._lock_fd)

    def __enter__(self) -> "SsdTier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Names of the counters that a failed read adds to.
_READ_REASONS = {MISSING: "missing", errno.EBADMSG: "checksum", errno.ENODATA: "short"}


def _is_out_of_space(error: Exception) -> bool:
    return any(
        os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def _storage_error(error: Exception, path: Path) -> StorageError | OutOfSpaceError:
    text = f"{path}: the index cannot be written: {error}."
    return OutOfSpaceError(text) if _is_out_of_space(error) else StorageError(errno.EIO, text)


def _ends(rows: Structs) -> Iterator[tuple[int, int]]:
    """(segment, page behind the last block in it) of every segment that `rows` name."""
    if len(rows) == 0:
        return
    numbers, inverse = np.unique(rows["segment"], return_inverse=True)
    ends = np.zeros(len(numbers), np.int64)
    np.maximum.at(ends, inverse, rows["page"].astype(np.int64) + pages_of(rows["stored_bytes"]))
    yield from zip(numbers.tolist(), ends.tolist(), strict=True)


def _packed(
    rows: Structs, start: int, memory: npt.NDArray[np.uint8]
) -> tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """How many rows fit the memory, and aligned addresses for them; one large row enlarges it."""
    ends = np.cumsum(pages_of(rows["stored_bytes"][start:])) * PAGE_BYTES
    fit = max(1, int(np.searchsorted(ends, memory.nbytes - PAGE_BYTES, side="right")))
    if int(ends[fit - 1]) > memory.nbytes - PAGE_BYTES:
        memory = np.empty(int(ends[fit - 1]) + PAGE_BYTES, np.uint8)
    base = np.uint64(-(-memory.ctypes.data // PAGE_BYTES) * PAGE_BYTES)
    starts = ends[:fit] - pages_of(rows["stored_bytes"][start : start + fit]) * PAGE_BYTES
    return start + fit, base + starts.astype(np.uint64), memory


def _check_shapes(n: int, **columns: tuple[npt.NDArray[np.generic], tuple[int, ...]]) -> None:
    for name, (array, shape) in columns.items():
        if array.shape != shape:
            raise ValueError(f"{name}: must have the shape {shape}, not {array.shape}")

"""What the ssd tier needs of the core: addresses to write from, who survives a reclaim, what to
forget; and what the core needs of the ssd tier: places, and bytes read back.

All writes, reclaims and deletions run on the write-behind thread, one step after the other, so that
a block's record on disk and its place in the index never disagree for longer than one step.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import Namespace
from kvstore.codec import Codec, aligned_buffer, get_codec
from kvstore.config import StoreConfig, parse_bytes
from kvstore.control import Ack
from kvstore.errors import IncompatibleError, KVStoreError, OutOfSpaceError, StorageError
from kvstore.metrics import Counters
from kvstore.records import NO_CODEC, NOT_ON_SSD, RECORD, Records, hash_rows, records_from
from kvstore.tiers.admission import HashRows, Origin, make_admission
from kvstore.tiers.names import describe_stored, parse_stored, stored_key
from kvstore.tiers.ssd import Locations, SsdConfig, SsdTier
from kvstore.tiers.ssd_format import Records as Columns
from kvstore.tiers.write_behind import Job, WriteBehind
from kvstore.tracing import traced

log = logging.getLogger(__name__)

IN_CPU_ONLY = 1  # residency: ready, and not on ssd
CLOSE_SECONDS_MIN = 1.0  # for closing files, once nothing is left to write
_COLUMNS = ("hash", "parent", "depth", "segment", "page", "stored_bytes", "codec", "checksum")


class SsdSide:
    """The ssd tier of `Tiers`. Thread safety: all methods may be called from any thread."""

    def __init__(
        self,
        config: StoreConfig,
        core: _native.StoreCore,
        counters: Counters,
        arena_address: int,
        block_bytes: int,
    ) -> None:
        """`block_bytes`: of most blocks, as far as is known."""
        self._core = core
        self._counters = counters
        self._base = np.uint64(arena_address)
        self._codec_name = config.codec
        self._tier = SsdTier(
            SsdConfig(
                path=config.ssd,
                capacity_bytes=parse_bytes(config.ssd_capacity),
                segment_bytes=parse_bytes(config.ssd_segment),
                io=config.ssd_io,
                io_depth=config.ssd_depth,
            )
        )
        self._owner = core.new_owner()
        self._specs: dict[int, Namespace] = {}  # by the core's number
        self._codecs: dict[tuple[int, int], Codec] = {}  # (core's number, codec id)
        self._to_tier: dict[int, int] = {}
        self._to_core: dict[int, int] = {}
        # (key, description) of namespaces that the directory does not know yet, by our number
        self._unregistered: dict[int, tuple[bytes, bytes]] = {}
        self._quota_room: dict[int, Callable[[], int]] = {}  # bytes left, by the core's number
        self.admission = make_admission(
            config.ssd_admission,
            parse_bytes(config.ssd_write_budget),
            parse_bytes(config.ssd_capacity) // max(block_bytes, 4096),
        )
        self._unforgotten: Records = np.zeros(0, RECORD)  # garbage that the index still names
        self._writer = WriteBehind(self._write, parse_bytes(config.write_behind), counters)

    # --- namespaces and recovery

    def stored_namespaces(self) -> Iterator[tuple[str, Namespace]]:
        """Yield tenant and namespace of what the directory knows.

        Raises:
            IncompatibleError: a description does not give the key it is stored under.
        """
        for key, description in self._tier.namespaces().values():
            tenant, namespace = parse_stored(json.loads(description))
            if stored_key(tenant, namespace) != key:
                raise IncompatibleError(
                    f"ssd: namespace {namespace.model!r} in {self._tier.config.path} was written "
                    "by a version that names it differently"
                )
            yield tenant, namespace

    def bind(
        self,
        number: int,
        namespace: Namespace,
        tenant: str = "",
        quota_room: Callable[[], int] | None = None,
    ) -> None:
        """Keep blocks of the core's namespace `number` under the tenant's name. Without I/O: what
        the directory does not know is written there before its first block.

        `quota_room` returns how many bytes more the tenant may have on ssd.
        """
        self._specs[number] = namespace
        self._codec(number, self._codec_name)
        if quota_room is not None:
            self._quota_room[number] = quota_room
        key = stored_key(tenant, namespace)
        for tier_number, (known, _) in self._tier.namespaces().items():
            if known == key:
                self._name(number, tier_number)
                return
        description = json.dumps(describe_stored(tenant, namespace), sort_keys=True).encode()
        self._unregistered[number] = (key, description)

    def _name(self, number: int, tier_number: int) -> None:
        self._to_tier[number] = tier_number
        self._to_core = {**self._to_core, tier_number: number}

    def _register(self, number: int) -> bool:
        """Have the directory know a namespace; False where it cannot be written to."""
        if number in self._to_tier:
            return True
        try:
            self._name(number, self._tier.register_namespace(*self._unregistered[number]))
        except (StorageError, OutOfSpaceError) as error:
            self._counters.add("background_errors")
            log.warning("%s", error)
            return False
        del self._unregistered[number]
        return True

    @traced("restore", lambda blocks, _: {"blocks": blocks})
    def restore(self) -> int:
        """Put what the directory holds into the core's index; return how many blocks."""
        parts = [self._rows(columns) for columns in self._tier.recover()]
        if not parts:
            return 0
        restored = self._core.restore(np.concatenate(parts))
        self._forget_garbage()
        return restored

    def _rows(self, columns: Columns) -> Records:
        """Return the records of namespaces that we know, as the core's rows."""
        known = np.isin(columns.namespace, list(self._to_core))
        rows = np.zeros(int(known.sum()), RECORD)
        for name in _COLUMNS:
            rows[name] = getattr(columns, name)[known]
        rows["stored_checksum"] = columns.stored_checksum[known]
        for tier_number, number in self._to_core.items():
            rows["namespace"][columns.namespace[known] == tier_number] = number
        return rows

    def _codec(self, number: int, name_or_id: str | int) -> Codec:
        codec = get_codec(name_or_id, self._specs[number].spec)
        return self._codecs.setdefault((number, int(codec.id)), codec)

    # --- writing

    def write_later(self, job: Job, timeout: float = 0.0) -> bool:
        return self._writer.submit(job, timeout)

    def stored(self, number: int, hashes: HashRows) -> None:
        """Blocks were stored in the cpu tier at level memory; see `kvstore.tiers.admission`."""
        for origin, admitted in self.admission.stored(number, hashes):
            self._writer.submit(self._job(number, admitted, origin))

    def used(self, number: int, hashes: HashRows) -> None:
        """Blocks were read in the cpu tier; the last of them is not on ssd."""
        hashes = hashes[self._core.residency(number, np.ascontiguousarray(hashes)) == IN_CPU_ONLY]
        wanted = self.admission.used(hashes, self._core.block_bytes(number))
        if len(wanted) < len(hashes):
            self._counters.add("ssd_admission_skipped_blocks", len(hashes) - len(wanted))
        if len(wanted):
            self._writer.submit(self._job(number, wanted, Origin.USED))

    def adopted(self, number: int, hashes: HashRows) -> None:
        """Blocks are in the cpu tier from before this process began, ancestors first."""
        for origin, admitted in self.admission.stored(number, hashes):
            self._writer.offer_later(self._job(number, admitted, origin))

    def _job(self, number: int, hashes: HashRows, origin: Origin) -> Job:
        return Job(number, hashes, len(hashes) * self._core.block_bytes(number), origin=origin)

    def forget_later(self) -> None:
        """Delete the records of removed blocks, or they are back when the directory is opened."""
        self._writer.submit(Job(0, np.empty((0, 32), np.uint8), 0))

    def flush(self, timeout: float) -> bool:
        return self._writer.flush(timeout)

    def flush_later(self) -> Future[bool]:
        return self._writer.flush_later()

    @traced("write_batch", lambda _, __, jobs: {"blocks": sum(len(job.hashes) for job in jobs)})
    def _write(self, jobs: list[Job]) -> None:
        durable = any(job.ack == "durable" for job in jobs)
        try:
            named = [job for job in jobs if len(job.hashes)]
            for number in sorted({job.namespace_id for job in named}):
                mine = [job for job in named if job.namespace_id == number]
                if not self._register(number):
                    continue
                hashes = self._admitted(number, mine)
                block_bytes = self._core.block_bytes(number)
                written = self._write_blocks(number, hashes, durable)
                self.admission.give_back(max(0, len(hashes) * block_bytes - written))
            if durable:
                self._sync()
        finally:
            for job in jobs:
                if job.lease:
                    self._core.release(job.owner, job.lease)
            self._forget_garbage()
        for job in jobs:
            if job.future is not None:
                job.reach(self._level_of(job))

    def _sync(self) -> None:
        try:
            self._tier.sync()
        except (StorageError, OutOfSpaceError) as error:
            self._counters.add("background_errors")
            log.warning("%s", error)

    def _level_of(self, job: Job) -> Ack:
        if not np.all(self._core.residency(job.namespace_id, job.hashes) & 2):
            return "memory"
        if job.ack == "durable":
            rows = records_from(self._core.describe(job.namespace_id, job.hashes))
            if len(rows) < len(job.hashes) or not self._tier.synced(rows["segment"]).all():
                return "memory"
        return job.ack

    def _admitted(self, number: int, jobs: list[Job]) -> npt.NDArray[np.uint8]:
        """Return the hashes that may be written, of each chain the first ones."""
        block_bytes = self._core.block_bytes(number)
        quota_room = self._quota_room.get(number)
        room = quota_room() // block_bytes if quota_room is not None else None
        parts: list[npt.NDArray[np.uint8]] = []
        for origin in Origin:
            mine = [job for job in jobs if job.origin is origin]
            if not mine:
                continue
            hashes = self._todo(number, mine)
            if parts:
                hashes = hashes[~_is_among(hashes, np.concatenate(parts))]
            if room is not None:
                self._counters.add("ssd_quota_refused_blocks", len(hashes[max(0, room) :]))
                hashes = hashes[: max(0, room)]
                room -= len(hashes)
            granted = self.admission.grant(origin, len(hashes), block_bytes)
            self._counters.add("ssd_admission_skipped_blocks", len(hashes) - granted)
            parts.append(hashes[:granted])
        return np.concatenate(parts)

    def _todo(self, number: int, jobs: list[Job]) -> npt.NDArray[np.uint8]:
        """Return the hashes to write, ancestors first, each once."""
        parts = []
        for job in jobs:
            parts.append(hash_rows(self._core.ssd_gap(number, job.hashes[0].tobytes())))
            if job.origin is Origin.USED:  # there may be gaps between them
                parts.append(hash_rows(self._core.ssd_gap(number, job.hashes[-1].tobytes())))
            parts.append(job.hashes)
        hashes = np.concatenate(parts)
        wanted = self._core.residency(number, hashes) == 1
        for job in jobs:
            if job.ack == "durable":
                wanted |= self._on_unsyncable(number, job.hashes, hashes)
        hashes = hashes[wanted]
        _, first = np.unique(hashes, axis=0, return_index=True)
        return np.ascontiguousarray(hashes[np.sort(first)])

    def _on_unsyncable(
        self, number: int, mine: npt.NDArray[np.uint8], hashes: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.bool_]:
        """Which of `hashes` are among `mine` and must be written anew to survive power loss."""
        rows = records_from(self._core.describe(number, mine))
        lost = rows["hash"][self._tier.sync_failed(np.ascontiguousarray(rows["segment"]))]
        if len(lost) == 0:
            return np.zeros(len(hashes), bool)
        return _is_among(hashes, lost)

    def _write_blocks(self, number: int, hashes: npt.NDArray[np.uint8], durable: bool) -> int:
        """Write what is in the cpu tier; return how many bytes that took."""
        written = 0
        block_bytes = self._specs[number].spec.block_bytes
        # A quarter: what is being written is leased, and a disk may hang over it.
        quarter = self._core.stats()["cpu_capacity_bytes"] // 4
        step = max(1, min(WriteBehind.BATCH_BYTES, quarter) // block_bytes)
        while len(hashes):
            part = hashes[:step]
            lease, offsets, _, _, checksums = self._core.acquire(
                self._owner, number, part, None, False
            )
            held = len(offsets)
            try:
                written += self._write_leased(
                    number, part[:held], offsets + self._base, checksums, durable
                )
            finally:
                self._core.release(self._owner, lease)
            # Where one has left the cpu tier meanwhile, go on behind it.
            hashes = hashes[held if held == len(part) else held + 1 :]
        return written

    def _write_leased(
        self,
        number: int,
        hashes: npt.NDArray[np.uint8],
        addresses: npt.NDArray[np.uint64],
        checksums: npt.NDArray[np.uint64],
        durable: bool,
    ) -> int:
        rows = records_from(self._core.describe(number, hashes))
        n = len(rows)
        if n == 0:
            return 0
        # What was removed since it was leased, and what follows it, waits for its next put.
        hashes, addresses, checksums = hashes[:n], addresses[:n], checksums[:n]
        rows["checksum"] = checksums  # of the leased bytes, whatever was put under the hash since
        block_bytes = self._specs[number].spec.block_bytes
        sizes = np.full(n, block_bytes, np.uint32)
        codecs = np.zeros(n, np.uint8)
        codec = self._codec(number, self._codec_name)
        stored: npt.NDArray[np.uint32] | None = None
        if codec.id != NO_CODEC:
            encoded = codec.encode(addresses, block_bytes, self._specs[number].spec)
            codecs[encoded.ok] = codec.id  # a refused block (NaN, say) is stored as it is
            addresses = np.where(encoded.ok, encoded.addrs, addresses)
            stored = np.where(encoded.ok, encoded.lengths, sizes).astype(np.uint32)
        rows["codec"] = codecs
        needed = sizes if stored is None else stored
        done = 0
        # Twice: a disk that has less room than its capacity says so only when it is written to.
        for _ in range(2):
            rest = slice(done, None)
            self._make_room(int(needed[rest].sum(dtype=np.int64)))
            written = self._tier.write(
                self._to_tier[number],
                hashes[rest],
                np.ascontiguousarray(rows["parent"][rest]),
                rows["depth"][rest].astype(np.uint32),
                addresses[rest],
                sizes[rest],
                checksums[rest],
                durable=durable,
                codecs=codecs[rest],
                stored_bytes=None if stored is None else stored[rest],
            )
            done += self._publish(rows[rest], written)
            if done == n or not self._tier.needs_reclaim(0):
                break
        if done < n:
            self._counters.add("ssd_write_failures", n - done)
        return int(needed[:done].sum(dtype=np.int64))

    def _publish(self, rows: Records, written: Locations) -> int:
        """Tell the core where blocks lie now; return how many of `rows` were written."""
        rows["segment"], rows["page"] = written.segments, written.pages
        rows["stored_bytes"] = written.stored_bytes
        rows["stored_checksum"] = written.stored_checksums
        ok = written.ok
        self._core.set_ssd(np.ascontiguousarray(rows[ok]))
        self._counters.add("ssd_written_bytes", int(written.stored_bytes[ok].sum(dtype=np.int64)))
        return int(ok.sum())

    # --- reclaiming

    def _make_room(self, num_bytes: int) -> None:
        while self._tier.needs_reclaim(num_bytes):
            seen: list[Records] = []

            def survivors(columns: Columns, seen: list[Records] = seen) -> npt.NDArray[np.bool_]:
                known = np.isin(columns.namespace, list(self._to_core))
                rows = self._rows(columns)
                seen.append(rows)
                keep = np.zeros(len(known), bool)
                keep[known] = self._core.survivors(rows)
                return keep

            freed = self._tier.reclaim(survivors)
            if freed is None:
                return  # the write will say what is wrong
            self._counters.add("ssd_reclaimed_segments")
            self.admission.draw(int(freed.moved.stored_bytes.sum(dtype=np.int64)))
            self._follow(seen[0] if seen else np.zeros(0, RECORD), self._rows(freed.moved))
            for row in self._rows(freed.dropped):
                self._core.drop_ssd(
                    int(row["namespace"]),
                    row["hash"].tobytes(),
                    int(row["segment"]),
                    int(row["page"]),
                )
            self._forget_garbage()

    def _follow(self, before: Records, moved: Records) -> None:
        places = {(int(row["namespace"]), row["hash"].tobytes()): i for i, row in enumerate(before)}
        at = [places[int(row["namespace"]), row["hash"].tobytes()] for row in moved]
        self._core.move_ssd(np.ascontiguousarray(before[at]), moved)

    def _forget_garbage(self) -> None:
        """Delete records of copies that the core gave up, unless the block lies elsewhere now."""
        garbage = records_from(self._core.take_garbage())
        if len(self._unforgotten):
            garbage = np.unique(np.concatenate([self._unforgotten, garbage]))
            self._unforgotten = np.zeros(0, RECORD)
        for number in np.unique(garbage["namespace"]).tolist():
            rows = garbage[garbage["namespace"] == number]
            hashes = np.ascontiguousarray(rows["hash"])
            gone = self._core.residency(number, hashes) & 2 == 0
            if not gone.any():
                continue
            tier_numbers = np.full(int(gone.sum()), self._to_tier[number], np.uint32)
            try:
                self._tier.forget(tier_numbers, np.ascontiguousarray(hashes[gone]))
            except (StorageError, OutOfSpaceError) as error:
                # Records that stay would bring removed blocks back at the next opening.
                self._unforgotten = np.concatenate([self._unforgotten, rows[gone]])
                self._counters.add("background_errors")
                log.warning("%s", error)

    # --- reading

    def read(
        self, number: int, rows: Records, addresses: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        """Read blocks back into slots; True where the exact bytes arrived (decoded, if encoded)."""
        ok = np.zeros(len(rows), bool)
        present = rows["segment"] != NOT_ON_SSD
        for codec_id in np.unique(rows["codec"][present]).tolist():
            at = np.flatnonzero(present & (rows["codec"] == codec_id))
            if codec_id == NO_CODEC:
                ok[at] = self._read_raw(rows[at], addresses[at])
            else:
                ok[at] = self._read_encoded(number, codec_id, rows[at], addresses[at])
        self._counters.add("ssd_read_bytes", int(rows["stored_bytes"][ok].sum(dtype=np.int64)))
        return ok

    def _read_raw(self, rows: Records, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        return self._tier.read(
            np.ascontiguousarray(rows["segment"]),
            np.ascontiguousarray(rows["page"]),
            np.ascontiguousarray(rows["stored_bytes"]),
            np.ascontiguousarray(rows["stored_checksum"]),
            np.ascontiguousarray(addresses),
        )

    def _read_encoded(
        self, number: int, codec_id: int, rows: Records, addresses: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        lengths = rows["stored_bytes"].astype(np.uint64)
        room = -(-lengths // np.uint64(4096)) * np.uint64(4096)
        buffer = aligned_buffer(int(room.sum()))
        starts = np.cumsum(room) - room + np.uint64(buffer.ctypes.data)
        ok = self._read_raw(rows, starts)
        spec = self._specs[number].spec
        try:
            codec = self._codec(number, codec_id)
            ok[ok] = codec.decode(starts[ok], lengths[ok], addresses[ok], spec.block_bytes, spec)
        except KVStoreError as error:
            log.warning("cannot decode blocks of codec %d: %s", codec_id, error)
            ok[:] = False
        return ok

    # --- watching and ending

    def gauges(self) -> dict[str, float]:
        reports = [
            codec.error_report() for codec in list(self._codecs.values()) if codec.id != NO_CODEC
        ]
        raw, encoded = (sum(getattr(r, n) for r in reports) for n in ("raw_bytes", "encoded_bytes"))
        return {
            "kvstore_codec_ratio": raw / encoded if encoded else 1.0,
            "kvstore_codec_error_rms_relative": max(
                (report.error_rms_relative for report in reports), default=0.0
            ),
            "kvstore_codec_error_abs_max": max(
                (report.error_abs_max for report in reports), default=0.0
            ),
            "kvstore_ssd_used_bytes": self._tier.used_bytes,
            "kvstore_ssd_capacity_bytes": self._tier.capacity_bytes,
            "kvstore_write_behind_bytes": self._writer.queued_bytes,
            "kvstore_write_behind_backlog_blocks": self._writer.backlog_blocks,
        }

    @property
    def checksum_failures(self) -> int:
        """Reads of blocks, by whoever, that failed their checksum."""
        return self._tier.counters["read_checksum"]

    def close(self, timeout: float = 60.0) -> None:
        self.forget_later()
        deadline = time.monotonic() + timeout
        self._writer.close(timeout)
        self._core.release_owner(self._owner)
        # On a thread of its own: it waits for reads and writes that a hung disk may never end.
        ending = threading.Thread(target=self._tier.close, name="kvstore-ssd-close", daemon=True)
        ending.start()
        ending.join(max(CLOSE_SECONDS_MIN, deadline - time.monotonic()))
        if ending.is_alive():
            log.warning("the ssd does not answer; its directory stays in use until it does")


def _is_among(
    hashes: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    if len(hashes) == 0 or len(others) == 0:
        return np.zeros(len(hashes), bool)
    as_key = f"V{hashes.shape[1]}"
    return np.isin(
        np.ascontiguousarray(hashes).view(as_key).ravel(),
        np.ascontiguousarray(others).view(as_key).ravel(),
    )

"""The SSD tier's index: (namespace, hash) -> where the block lies, in LMDB.

LMDB stays in its synchronous mode: with sync=False a power loss leaves an environment that crashes
its reader. LMDB has no checksums and its C code trusts the file. So a short-lived child process
first walks an existing environment and copies it without its free list (a flipped bit there makes
LMDB overwrite live pages or abort), the copy takes its place, and records carry checksums of their
own. An environment that fails any of this is set aside (never deleted) and rebuilt from the
segments.

After a meta page that could not be written LMDB refuses every transaction, and the page cache may
hold either state: the environment is then opened again at the next use, and `openings` counts it.

LMDB reads through a mapping, where a failed read is a SIGBUS, the end of the process. So the pages
that it may read are locked in memory, as far as RLIMIT_MEMLOCK lets us.

Thread safety: all methods may be called from any thread; `_lock` serializes them, because growing
the map requires that no transaction is open.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import lmdb
import numpy as np

from kvstore import _native
from kvstore.tiers.ssd_format import (
    KEY_BYTES,
    RECORD,
    Structs,
    as_bytes,
    sound_records,
    sync_directory,
)

SCAN_RECORDS = 1 << 16  # records of one scan step: 7.6 MB, and the longest a scan holds the lock
_KEY = np.dtype([("namespace", "<u4"), ("hash", "u1", 32)])
_VALUE_BYTES = RECORD.itemsize - KEY_BYTES
_MAP_BYTES_MIN = 16 << 20
_LOCKED_RANGES_MAX = 64
_PROBE_SECONDS_MIN = 20.0
_PROBE_BYTES_PER_SECOND = 20e6  # a cold slow disk; a walk that takes longer is taken for a loop

# Walks every page that a reader would use, then copies what it walked.
_PROBE = """
import sys
sys.path[:0] = [sys.argv[1]]
import lmdb
env = lmdb.open(sys.argv[2], max_dbs=4, lock=False, readonly=True, map_size=int(sys.argv[3]))
with env.begin() as txn:
    names = [bytes(name) for name, _ in txn.cursor()]
for name in names:
    db = env.open_db(name, create=False)
    with env.begin(db=db) as txn:
        n, last = 0, b""
        for key, value in txn.cursor():
            if key <= last:
                sys.exit(3)
            n, last = n + 1, key
        if n != txn.stat(db)["entries"]:
            sys.exit(4)
if not set(names) >= {b"blocks", b"meta", b"namespaces"}:
    sys.exit(5)
try:
    if not sys.argv[4]:
        sys.exit(7)
    env.copy(sys.argv[4], compact=True)
except lmdb.Error as error:
    sys.exit(7 if "No space" in str(error) else 6)
"""
_SOUND, _SOUND_NOT_COPIED = 0, 7


def make_sound(path: Path, map_bytes: int) -> bool:
    """Replaces the environment by a compact copy; False when it is damaged.

    Where the disk has no room for a copy, a sound original stays as it is.
    """
    data = path / "data.mdb"
    size = data.stat().st_size if data.is_file() else 0
    if size == 0:
        return False
    copied = path.with_name(path.name + ".tmp")
    shutil.rmtree(copied, ignore_errors=True)
    with contextlib.suppress(OSError):  # a full disk must not keep us from reading it
        copied.mkdir(mode=0o700)
    try:
        code = _probe(path, map_bytes, copied if copied.is_dir() else None)
        if code == _SOUND:
            with open(copied / "data.mdb", "rb") as file:
                os.fsync(file.fileno())
            os.rename(copied / "data.mdb", data)
            sync_directory(path)
    finally:
        shutil.rmtree(copied, ignore_errors=True)
    return code in (_SOUND, _SOUND_NOT_COPIED)


def is_sound(path: Path) -> bool:
    """Whether LMDB can walk the environment; nothing is written, whatever it is."""
    data = path / "data.mdb"
    size = data.stat().st_size if data.is_file() else 0
    return size > 0 and _probe(path, 0, None) == _SOUND_NOT_COPIED


def _probe(path: Path, map_bytes: int, copy_to: Path | None) -> int:
    """The status of a child that walked the environment; negative when it died or hung."""
    size = (path / "data.mdb").stat().st_size
    command = [sys.executable, "-I", "-S", "-c", _PROBE, str(Path(lmdb.__file__).parent.parent)]
    command += [str(path), str(max(map_bytes, size)), str(copy_to or "")]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_SECONDS_MIN + size / _PROBE_BYTES_PER_SECOND,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1
    return done.returncode


def set_aside(path: Path) -> Path:
    """Renames a damaged environment out of the way; it is never deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.rename(path, target)
    sync_directory(path.parent)
    return target


def create(path: Path, map_bytes: int, rows: Structs, namespaces: dict[int, bytes]) -> None:
    """Builds an environment beside `path` and renames it into place once it is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    index = SsdIndex(temporary, max(map_bytes, 4 * rows.nbytes))
    try:
        index.put_namespaces(namespaces)
        index.commit(rows, [], {})
    finally:
        index.close()
    (temporary / "lock.mdb").unlink(missing_ok=True)
    sync_directory(temporary)
    os.rename(temporary, path)
    sync_directory(path.parent)


class SsdIndex:
    def __init__(self, path: Path, map_bytes: int, readonly: bool = False) -> None:
        """Opens what make_sound() or create() left. The caller holds the directory's lock.

        `readonly`: no file is made or written, and no page is locked.
        """
        self._path = path
        self._readonly = readonly
        self._map_bytes = max(map_bytes, _MAP_BYTES_MIN)
        self._lock = threading.Lock()
        self._locked_pages: list[mmap.mmap] = []  # ranges of the file, without gaps
        self._file: BinaryIO | None = None  # of the locked pages
        self._given_up = False  # and closed, since LMDB refused to go on
        self.openings = 0
        # Ours alone, and rebuilt by LMDB: one less file whose damage matters.
        if not readonly:
            (path / "lock.mdb").unlink(missing_ok=True)
        try:
            self._open()
        except BaseException:
            self._unlock_pages()
            raise

    def _open(self) -> None:
        """Raises lmdb.Error, or OSError where the file cannot be read."""
        self._read_through()
        self._lock_pages()
        self._env = lmdb.open(
            str(self._path),
            map_size=self._map_bytes,
            max_dbs=4,
            sync=True,
            metasync=True,
            writemap=False,
            readahead=False,
            readonly=self._readonly,
            lock=not self._readonly,
            create=not self._readonly,
        )
        try:
            create = not self._readonly
            self._blocks = self._env.open_db(b"blocks", create=create)
            self._meta = self._env.open_db(b"meta", create=create)
            self._namespaces = self._env.open_db(b"namespaces", create=create)
        except BaseException:
            self._env.close()
            raise
        self.openings += 1
        self._lock_pages()

    def _read_through(self) -> None:
        """Brings the file into the page cache, so that a page that cannot be read shows here."""
        if not (self._path / "data.mdb").exists():
            return
        with open(self._path / "data.mdb", "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass

    def _lock_pages(self) -> None:
        """Keeps the file's pages in memory, as many as the system lets us."""
        if self._readonly:
            return
        try:
            if self._file is None:
                if not (self._path / "data.mdb").exists():
                    return
                self._file = open(self._path / "data.mdb", "rb", buffering=0)  # noqa: SIM115
            size = os.fstat(self._file.fileno()).st_size
            size -= size % mmap.ALLOCATIONGRANULARITY
            begin = sum(len(pages) for pages in self._locked_pages)
            if size <= begin:
                return
            if len(self._locked_pages) >= _LOCKED_RANGES_MAX:
                begin = 0
            # The page cache, which LMDB's own mapping shares. Where a page cannot be read, mlock
            # fails; that is not our trouble yet.
            pages = mmap.mmap(
                self._file.fileno(), size - begin, access=mmap.ACCESS_READ, offset=begin
            )
            address = np.frombuffer(pages, np.uint8).ctypes.data
            ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(size - begin))
        except OSError:
            return
        self._locked_pages = [*(self._locked_pages if begin else []), pages]

    def close(self) -> None:
        with self._lock:
            self._env.close()
            self._unlock_pages()

    def _unlock_pages(self) -> None:
        self._locked_pages = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def settle(self) -> None:
        """Opens the environment again if LMDB has given it up. Raises lmdb.Error or OSError."""
        with self._lock, self._begin():
            pass

    def _begin(self, write: bool = False) -> Any:
        """A transaction (without buffers: all it gives is bytes). The caller holds `_lock`."""
        if not self._given_up:
            try:
                return self._env.begin(write=write)
            except lmdb.PanicError:
                self._given_up = True
                self._env.close()
        self._open()
        self._given_up = False
        return self._env.begin(write=write)

    def meta(self, name: str) -> int:
        """A number that was committed under this name, or 0."""
        with self._lock, self._begin() as txn:
            value = txn.get(name.encode(), db=self._meta)
        if value is None or value[8:] != _checksum_bytes(name.encode() + value[:8]):
            return 0
        return int.from_bytes(value[:8], "little")

    def namespaces(self) -> dict[int, bytes]:
        found = {}
        with self._lock, self._begin() as txn:
            for key, value in txn.cursor(db=self._namespaces):
                body, checksum = bytes(value[8:]), bytes(value[:8])
                if len(key) == 4 and checksum == _checksum_bytes(bytes(key) + body):
                    found[int.from_bytes(key, "big")] = body
        return found

    def put_namespaces(self, namespaces: dict[int, bytes]) -> None:
        items = []
        for number, body in namespaces.items():
            key = number.to_bytes(4, "big")
            items.append((key, _checksum_bytes(key + body) + body))
        self._transact(lambda txn: txn.cursor(db=self._namespaces).putmulti(items))

    def scan(self) -> Iterator[tuple[Structs, int]]:
        """Batches of (sound records, number of bad ones), in key order.

        A commit between two batches may or may not be seen.
        """
        last = b""
        while True:
            with self._lock, self._begin() as txn:
                cursor = txn.cursor(db=self._blocks)
                if not cursor.set_range(last + b"\0"):
                    return
                first, previous = cursor.key(), last
                # Two joins without a Python loop: four times as fast as pairs.
                keys = b"".join(islice(cursor.iternext(keys=True, values=False), SCAN_RECORDS))
                cursor.set_range(last + b"\0")
                values = b"".join(islice(cursor.iternext(keys=False, values=True), SCAN_RECORDS))
                count = len(keys) // KEY_BYTES
                bad = 0
                if len(keys) != count * KEY_BYTES or len(values) != count * _VALUE_BYTES:
                    cursor.set_range(last + b"\0")
                    pairs = list(islice(cursor.iternext(keys=True, values=True), SCAN_RECORDS))
                    count, sized = len(pairs), _of_right_size(pairs)
                    bad = count - len(sized)
                    keys = b"".join(key for key, _ in sized)
                    values = b"".join(value for _, value in sized)
            if first <= previous:  # keys out of order: going on could turn in circles
                yield np.empty(0, RECORD), 1
                return
            last = keys[-KEY_BYTES:]
            rows = np.empty(len(keys) // KEY_BYTES, RECORD)
            raw = as_bytes(rows)
            raw[:, :KEY_BYTES] = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
            raw[:, KEY_BYTES:] = np.frombuffer(values, np.uint8).reshape(-1, _VALUE_BYTES)
            good = sound_records(rows)
            yield rows[good], bad + int(len(rows) - good.sum())
            if count < SCAN_RECORDS or not last:
                return

    def find(self, keys: list[bytes]) -> Structs:
        """The sound records among `keys`, in no particular order."""
        with self._lock, self._begin() as txn:
            pairs = txn.cursor(db=self._blocks).getmulti(keys)
        rows = np.frombuffer(b"".join(chain.from_iterable(_of_right_size(pairs))), RECORD)
        return rows[sound_records(rows)]

    def commit(self, rows: Structs, deletes: list[bytes], meta: dict[str, int]) -> None:
        """One synchronous transaction; it is on disk when this returns. Raises lmdb.Error."""
        raw = rows.tobytes()
        items = [
            (raw[at : at + KEY_BYTES], raw[at + KEY_BYTES : at + RECORD.itemsize])
            for at in range(0, len(raw), RECORD.itemsize)
        ]

        def change(txn: lmdb.Transaction) -> None:
            for key in deletes:
                txn.delete(key, db=self._blocks)
            txn.cursor(db=self._blocks).putmulti(items)
            for name, number in meta.items():
                value = number.to_bytes(8, "little")
                checksum = _checksum_bytes(name.encode() + value)
                txn.put(name.encode(), value + checksum, db=self._meta)

        self._transact(change)

    def used_bytes(self) -> int:
        """Bytes of the environment's file."""
        with self._lock:
            return int(self._env.info()["last_pgno"] + 1) * int(self._env.stat()["psize"])

    def _transact(self, change: Callable[[lmdb.Transaction], object]) -> None:
        with self._lock:
            while True:
                try:
                    with self._begin(write=True) as txn:
                        change(txn)
                    self._lock_pages()
                    return
                except lmdb.MapFullError:
                    self._map_bytes = 2 * self._env.info()["map_size"]
                    self._env.set_mapsize(self._map_bytes)


def keys_of(rows: Structs) -> list[bytes]:
    """LMDB keys of records."""
    raw = np.ascontiguousarray(rows[["namespace", "hash"]].astype(_KEY)).tobytes()
    return [raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES)]


def _of_right_size(pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [pair for pair in pairs if (len(pair[0]), len(pair[1])) == (KEY_BYTES, _VALUE_BYTES)]


def _checksum_bytes(data: bytes) -> bytes:
    return _native.io_checksum(data).to_bytes(8, "little")

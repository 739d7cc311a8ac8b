"""Objects: values of any size under keys that are text, in block stores of fixed sizes.

A block store keeps blocks of one size under 32-byte names. So there is one store a *slot size*, in
which values of up to that size lie under names drawn at random, and one store of small *entries*,
under the hash of the key: how long the value is, in which slots, and under which name.

The entry decides. It is written after the value and removed before it, and each value has a name of
its own; so an entry never leads to the bytes of another value, whatever was evicted, removed, or
written twice at once in between. A value without its entry is found by nobody, and is evicted as
what is never read.

Slot sizes are rounded up to eight per power of two, so that engines with values of all lengths make
do with few stores; the rest of a slot is read from, and written to, memory of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

import kvstore

from .codes import (
    INVALID_PARAMS,
    NO_AVAILABLE_HANDLE,
    OBJECT_NOT_FOUND,
    OK,
    RPC_FAIL,
    TRANSFER_FAIL,
)
from .memory import Pieces

logger = logging.getLogger(__name__)

_NAME_BYTES: Final = 32
_SLOT_BYTES_MIN: Final = 64
_SLOTS_PER_OCTAVE: Final = 8
_MAGIC: Final = 0x31_45_4B_4F_4F_4D_56_4B  # "KVMOOKE1", of this version of entries
_ENTRY: Final = np.dtype(
    [
        ("magic", "<u8"),
        ("num_bytes", "<u8"),
        ("slot_bytes", "<u8"),
        ("unused", "<u8"),
        ("name", "u1", (_NAME_BYTES,)),
    ]
)

Entries = npt.NDArray[np.void]  # of _ENTRY; num_bytes 0: there is none
_Wanted = tuple[int, int, Pieces]  # place in the batch, slot size, without empty pieces
Flags = npt.NDArray[np.bool_]


def slot_bytes_of(num_bytes: int) -> int:
    """The smallest slot that holds a value: at most an eighth more than it."""
    if num_bytes <= _SLOT_BYTES_MIN:
        return _SLOT_BYTES_MIN
    step = 1 << max(0, (num_bytes - 1).bit_length() - _SLOTS_PER_OCTAVE.bit_length())
    return -(-num_bytes // step) * step


def key_names(keys: Iterable[str]) -> kvstore.BlockHashes:
    return kvstore.BlockHashes.of([hashlib.sha256(key.encode()).digest() for key in keys])


class OpenStore(Protocol):
    def __call__(self, namespace: kvstore.Namespace, *, required: bool) -> kvstore.Store: ...


class Objects:
    """See above.

    Args:
        open_store: as `kvstore.connect`. The first one is required, so that its errors are told.
        tenant: values of different tenants do not meet.

    Thread safety: all methods may be called from any thread.

    A daemon that is away means that nothing is found, and RPC_FAIL for what is put or removed.
    """

    def __init__(self, open_store: OpenStore, tenant: str) -> None:
        self._open_store = open_store
        self._salt = tenant.encode()
        self._lock = threading.Lock()  # for those who change _values, and _is_closed
        self._is_closed = False
        self._values: dict[int, kvstore.Store] = {}  # by slot size; as many as there are slot sizes
        self._index = open_store(self._namespace("entries-1", _ENTRY.itemsize), required=True)
        self._padding = _Padding()

    @property
    def index(self) -> kvstore.Store:
        return self._index

    # --- reading

    def find(self, keys: Sequence[str]) -> Entries:
        """The entry of each key. A value may be gone that has one."""
        entries = np.zeros(len(keys), _ENTRY)
        if len(keys):
            arrived = _load(self._index, key_names(keys), _rows(entries))
            is_sound = (entries["magic"] == _MAGIC) & (
                entries["num_bytes"] <= entries["slot_bytes"]
            )
            entries[~arrived | ~is_sound] = np.zeros((), _ENTRY)
        return entries

    def exist(self, entries: Entries) -> Flags:
        """Of which entries the value can be read."""
        there = np.zeros(len(entries), bool)
        for slot_bytes, places in _by_slot(entries):
            there[places] = self._store(slot_bytes).contains(_names(entries[places]))
        return there

    def in_memory(self, entry: np.void) -> bool:
        """Whether this value would be read from memory."""
        infos = self._store(int(entry["slot_bytes"])).describe([entry["name"].tobytes()])
        return bool(infos) and infos[0].in_cpu

    def get(self, entries: Entries, targets: Sequence[Pieces], *, exact: bool = False) -> list[int]:
        """Copy values; return how many bytes each has, or a code.

        Args:
            targets: as long as the value or longer; sound.
            exact: a longer target is an error too.
        """
        codes = [OBJECT_NOT_FOUND] * len(entries)
        wanted: list[_Wanted] = []
        for place, (num_bytes, slot_bytes) in enumerate(_sizes(entries)):
            room = targets[place].num_bytes
            if num_bytes == 0:
                continue
            if room < num_bytes:
                codes[place] = INVALID_PARAMS
            elif exact and room != num_bytes:
                codes[place] = TRANSFER_FAIL
            else:
                wanted.append((place, slot_bytes, targets[place].leading(num_bytes)))
        for places, slot_bytes, buffers in self._batches(wanted, is_load=True):
            arrived = _load(self._store(slot_bytes), _names(entries[places]), buffers)
            for place, is_here in zip(places, arrived, strict=True):
                if is_here:
                    codes[place] = int(entries[place]["num_bytes"])
        return codes

    def values(self, keys: Sequence[str]) -> list[npt.NDArray[np.uint8] | None]:
        """Each value in memory of its own."""
        entries = self.find(keys)
        places = np.flatnonzero(entries["num_bytes"])
        values = [np.empty(size, np.uint8) for size in entries["num_bytes"][places].tolist()]
        codes = self.get(
            entries[places], [Pieces([value.ctypes.data], [value.nbytes]) for value in values]
        )
        found: list[npt.NDArray[np.uint8] | None] = [None] * len(keys)
        for place, value, code in zip(places.tolist(), values, codes, strict=True):
            found[place] = value if code > 0 else None
        return found

    # --- writing

    def put(self, keys: Sequence[str], sources: Sequence[Pieces]) -> list[int]:
        """Store values; return a code each. A key that has a value keeps it.

        Args:
            keys: without repetition.
            sources: sound.
        """
        codes = [OK] * len(keys)
        is_readable = self._clean(keys)
        todo = np.flatnonzero(~is_readable).tolist()
        entries = self._put_values(todo, sources, codes)
        self._put_entries(keys, [place for place in todo if codes[place] == OK], entries, codes)
        return codes

    def _clean(self, keys: Sequence[str]) -> Flags:
        """Which keys have a value; of others, remove the entries that were left behind: they would
        be taken for those of new values."""
        if not self._index.contains(key_names(keys)).any():
            return np.zeros(len(keys), bool)
        entries = self.find(keys)
        is_readable = self.exist(entries)
        left = np.flatnonzero((entries["num_bytes"] != 0) & ~is_readable).tolist()
        if left:
            self._index.remove(key_names(keys[place] for place in left))
        return is_readable

    def _put_values(self, todo: list[int], sources: Sequence[Pieces], codes: list[int]) -> Entries:
        """Store the values at these places under new names; return entries for all places."""
        entries = np.zeros(len(codes), _ENTRY)
        drawn = np.frombuffer(os.urandom(_NAME_BYTES * len(todo)), np.uint8)
        entries["name"][todo] = drawn.reshape(-1, _NAME_BYTES)
        entries["magic"] = _MAGIC
        wanted: list[_Wanted] = []
        is_open: dict[int, bool] = {}  # by slot size
        for place in todo:
            num_bytes = sources[place].num_bytes
            slot_bytes = slot_bytes_of(num_bytes)
            entries["num_bytes"][place], entries["slot_bytes"][place] = num_bytes, slot_bytes
            if slot_bytes not in is_open:
                is_open[slot_bytes] = self._opens(slot_bytes)
            if is_open[slot_bytes]:
                wanted.append((place, slot_bytes, sources[place].leading(num_bytes)))
            else:
                codes[place] = NO_AVAILABLE_HANDLE
        for places, slot_bytes, buffers in self._batches(wanted, is_load=False):
            for place, code in zip(
                places, self._put_slots(slot_bytes, _names(entries[places]), buffers), strict=True
            ):
                codes[place] = code
        return entries

    def _opens(self, slot_bytes: int) -> bool:
        """Whether the daemon takes values of this size; if not, none of their memory is touched."""
        try:
            self._store(slot_bytes)
        except kvstore.ConfigError as error:
            logger.warning("a value is refused: %s", error)
            return False
        return True

    def _put_slots(
        self, slot_bytes: int, names: kvstore.BlockHashes, buffers: kvstore.BlockBuffers
    ) -> list[int]:
        store = self._store(slot_bytes)
        result = store.put(names, buffers).wait()
        if result.num_blocks == len(names):
            return [OK] * len(names)
        code = _refusal(result)
        return [OK if is_there else code for is_there in store.contains(names)]

    def _put_entries(
        self, keys: Sequence[str], places: list[int], entries: Entries, codes: list[int]
    ) -> None:
        """Make stored values known. Where somebody else was faster, theirs stays."""
        if not places:
            return
        ours = entries[places]
        named = [keys[place] for place in places]
        result = self._index.put(key_names(named), _rows(ours)).wait()
        if result.num_stored == len(places):
            return
        now = self.find(named)
        is_ours = np.all(now["name"] == ours["name"], axis=1)
        # Without an entry there was no room for it, or another writer has it in hand.
        for place, is_there in zip(places, now["num_bytes"] != 0, strict=True):
            codes[place] = OK if is_there or result.num_pending else _refusal(result)
        self._drop_values(ours[~is_ours])

    def remove(self, keys: Sequence[str]) -> list[int]:
        """Raises PeerUnavailableError or DeadlineExceededError when the daemon is away."""
        entries = self.find(keys)
        is_there = self.exist(entries)
        if len(keys):
            self._index.remove(key_names(keys))
        self._drop_values(entries[entries["num_bytes"] != 0])
        return [OK if found else OBJECT_NOT_FOUND for found in is_there]

    def clear(self) -> None:
        """Remove everything of the tenant. Slots of sizes that we never used are left to eviction;
        nobody finds what they hold. Raises as `remove`."""
        self._index.clear()
        for store in self._opened():
            store.clear()

    def _drop_values(self, entries: Entries) -> None:
        for slot_bytes, places in _by_slot(entries):
            with contextlib.suppress(kvstore.KVStoreError):  # nobody finds them anyway
                self._store(slot_bytes).remove(_names(entries[places]))

    # ---

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        for store in [self._index, *self._opened()]:
            store.close()

    def _opened(self) -> list[kvstore.Store]:
        with self._lock:
            return list(self._values.values())

    def _store(self, slot_bytes: int) -> kvstore.Store:
        known = self._values.get(slot_bytes)
        if known is not None:  # nobody waits while another size is connected
            return known
        with self._lock:
            if self._is_closed:
                raise kvstore.StoreClosedError("the store is closed")
            if slot_bytes not in self._values:
                namespace = self._namespace("values-1", slot_bytes)
                self._values[slot_bytes] = self._open_store(namespace, required=False)
            return self._values[slot_bytes]

    def _namespace(self, what: str, num_bytes: int) -> kvstore.Namespace:
        return kvstore.Namespace(
            model="mooncake",
            spec=kvstore.BlockSpec.of_bytes(num_bytes),
            layout=what,
            salt=self._salt,
            hash_algorithm="external",
        )

    def _batches(
        self, wanted: list[_Wanted], *, is_load: bool
    ) -> Iterator[tuple[list[int], int, kvstore.BlockBuffers]]:
        """Values that are cut alike go in one call: their places, slot size and memory."""
        alike: dict[tuple[int, tuple[int, ...]], list[tuple[int, Sequence[int]]]] = {}
        for place, slot_bytes, (addresses, sizes) in wanted:
            alike.setdefault((slot_bytes, tuple(sizes)), []).append((place, addresses))
        for (slot_bytes, sizes), members in alike.items():
            places = [place for place, _ in members]
            table = np.array([addresses for _, addresses in members], np.uint64)
            try:
                yield places, slot_bytes, self._padding.extend(table, sizes, slot_bytes, is_load)
            except kvstore.ConfigError:  # two values are to go to one place
                for place, row in zip(places, table, strict=True):
                    buffers = self._padding.extend(row[None], sizes, slot_bytes, is_load)
                    yield [place], slot_bytes, buffers


class _Padding:
    """Memory for the ends of slots: zeros to put, and room to load them into, which all share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both
        self._zeros = np.zeros(0, np.uint8)
        self._room = np.zeros(0, np.uint8)

    def extend(
        self, table: npt.NDArray[np.uint64], sizes: tuple[int, ...], slot_bytes: int, is_load: bool
    ) -> kvstore.PieceBuffers:
        """The memory of slots whose values lie at these addresses, a row each."""
        num_bytes = slot_bytes - sum(sizes)
        if num_bytes == 0:
            return kvstore.PieceBuffers(table, sizes, writable=is_load)
        memory = self._take(num_bytes, len(table) if is_load else 0)
        # Each slot has its own room: what is loaded must not overlap.
        ends = np.arange(len(table)) * (num_bytes if is_load else 0) + memory.ctypes.data
        table = np.column_stack((table, ends.astype(np.uint64)))
        return kvstore.PieceBuffers(table, (*sizes, num_bytes), memory, writable=is_load)

    def _take(self, num_bytes: int, num_loads: int) -> npt.NDArray[np.uint8]:
        with self._lock:
            if len(self._zeros) < num_bytes:
                self._zeros = np.zeros(num_bytes, np.uint8)
            if len(self._room) < num_bytes * num_loads:
                self._room = np.zeros(num_bytes * num_loads, np.uint8)
            return self._room if num_loads else self._zeros


def _load(store: kvstore.Store, names: kvstore.BlockHashes, buffers: kvstore.BlockBuffers) -> Flags:
    """As `store.load_each`, with a request less where all are there, or only those in front."""
    arrived = np.ones(len(names), bool)
    found = store.load(names, buffers).wait().num_blocks
    if found < len(names):
        rest = np.arange(found, len(names))
        arrived[found:] = store.load_each(names[found:], buffers, rest)
    return arrived


def _refusal(result: kvstore.TransferResult) -> int:
    return RPC_FAIL if result.num_unavailable else NO_AVAILABLE_HANDLE


def _rows(entries: Entries) -> kvstore.ContiguousBlocks:
    return kvstore.ContiguousBlocks(entries.view(np.uint8).reshape(len(entries), -1))


def _names(entries: Entries) -> kvstore.BlockHashes:
    return kvstore.BlockHashes.of(np.ascontiguousarray(entries["name"]))


def _sizes(entries: Entries) -> Iterator[tuple[int, int]]:
    return zip(entries["num_bytes"].tolist(), entries["slot_bytes"].tolist(), strict=True)


def _by_slot(entries: Entries) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """The places of entries, by slot size; of those that are none not."""
    for slot_bytes in np.unique(entries["slot_bytes"]).tolist():
        if slot_bytes:
            yield slot_bytes, np.flatnonzero(entries["slot_bytes"] == slot_bytes)

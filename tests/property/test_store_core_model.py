"""The store's decisions against what must hold after every one of them.

One core of 7 or 14 slots, two namespaces, chains that branch, an ssd that is only records. Which
block an eviction takes is the policy's business; the model asks the core what is there and checks:

  - a match is exactly the leading run of available blocks, linked or not, from any start;
  - every available linked block has its ancestors, on ssd as well;
  - resident and leased bytes are those that were written, in slots that no two blocks share;
  - a put is refused only when nothing could leave;
  - the events, applied one by one, give what is resident;
  - the counts agree, and at the end, when all is released and cleared, every slot is free.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvstore import ContiguousBlocks, _native
from kvstore.control import NO_SPACE, ORPHAN, PENDING, PRESENT, RESERVED
from kvstore.events import _EVENT
from kvstore.records import NOT_ON_SSD, RECORD, records_from

Path = tuple[int, ...]
Key = tuple[int, Path]  # namespace, path of the block in the tree of chains

BLOCK_BYTES = 4096
DEPTH = 5
SLOTS_PER_CHUNK = 7
ALL_PATHS: list[Path] = [()]
for _path in ALL_PATHS:
    if len(_path) < DEPTH:
        ALL_PATHS.extend([(*_path, 0), (*_path, 1)])
ALL_PATHS = ALL_PATHS[1:]
HASH = {path: hashlib.sha256(bytes(path)).digest() for path in ALL_PATHS}
PATH = {value: path for path, value in HASH.items()}
ALL_HASHES = np.frombuffer(b"".join(HASH[path] for path in ALL_PATHS), np.uint8).reshape(-1, 32)

NAMESPACES = st.integers(0, 1)
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=DEPTH).map(tuple)
PICK = st.integers(0, 1 << 30)


def hashes_of(paths: list[Path]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(HASH[path] for path in paths), np.uint8).reshape(-1, 32)


def prefixes(path: Path) -> list[Path]:
    return [path[: i + 1] for i in range(len(path))]


def mark_of(namespace: int, path: Path) -> npt.NDArray[np.uint8]:
    """The block's bytes: one mark at its begin and at its end."""
    return np.frombuffer(bytes([namespace + 1]) + HASH[path], np.uint8)


def checksum_of(namespace: int, path: Path) -> int:
    return int.from_bytes(HASH[path][:7], "little") * 2 + namespace


class CoreModel(RuleBasedStateMachine):
    core: _native.StoreCore

    @initialize(
        policy=st.sampled_from(_native.eviction_policy_names()),
        chunks=st.integers(1, 2),
        restored=st.lists(st.tuples(NAMESPACES, PATHS), max_size=4),
    )
    def start(self, policy: str, chunks: int, restored: list[Key]) -> None:
        self.core = _native.StoreCore(chunks * 32768, 32768, False, policy)
        self.capacity = chunks * SLOTS_PER_CHUNK
        assert [self.core.add_namespace(BLOCK_BYTES) for _ in range(2)] == [0, 1]
        self.owners = [self.core.new_owner(), self.core.new_owner()]
        # lease -> owner, [(key, place in the arena, place of its sequence, sequence)]
        self.leases: dict[int, tuple[int, list[tuple[Key, int, int, int]]]] = {}
        self.reservations: dict[int, tuple[int, list[tuple[Key, int]]]] = {}
        self.page = 0
        self.restore(restored)
        self.core.enable_events(1 << 12)
        self.sequence = [
            self.core.event_sequence(ns) for ns in (0, 1)
        ]  # of the last event seen, by namespace
        self.told: list[set[Key]] = [set(), self.resident(2)]  # cpu, ssd, by the events

    def restore(self, keys: list[Key]) -> None:
        wanted = {(ns, prefix) for ns, path in keys for prefix in prefixes(path)}
        orphans = {(ns, path) for ns, path in keys if len(path) == DEPTH and path[-1] == 0}
        rows = np.zeros(len(wanted), RECORD)
        for row, (ns, path) in zip(rows, sorted(wanted), strict=True):
            row["hash"] = np.frombuffer(HASH[path], np.uint8)
            row["parent"] = np.frombuffer(HASH.get(path[:-1], bytes(32)), np.uint8)
            row["namespace"], row["depth"] = ns, len(path)
            if (ns, path) in orphans and (ns, path[:-1]) in wanted:
                row["parent"] = np.frombuffer(b"nobody" + bytes(26), np.uint8)
            self.page += 1
            row["segment"], row["page"], row["stored_bytes"] = 0, self.page, BLOCK_BYTES
            row["checksum"] = checksum_of(ns, path)
        lost = {key for key in orphans if len(key[1]) > 1}
        assert self.core.restore(rows) == len(wanted - lost)
        assert len(records_from(self.core.take_garbage())) == len(lost)

    # --- what is there

    def residency(self, namespace: int) -> dict[Path, int]:
        return dict(
            zip(ALL_PATHS, self.core.residency(namespace, ALL_HASHES).tolist(), strict=True)
        )

    def resident(self, bit: int) -> set[Key]:
        return {
            (ns, path) for ns in (0, 1) for path, bits in self.residency(ns).items() if bits & bit
        }

    def record(self, namespace: int, path: Path) -> Any:
        return records_from(self.core.describe(namespace, hashes_of([path])))[0]

    def mark(self, key: Key, offset: int) -> None:
        slot = self.core.arena[offset : offset + BLOCK_BYTES]
        slot[:33] = slot[-33:] = mark_of(*key)

    def is_marked(self, key: Key, offset: int) -> bool:
        slot = self.core.arena[offset : offset + BLOCK_BYTES]
        return bool((slot[:33] == mark_of(*key)).all() and (slot[-33:] == mark_of(*key)).all())

    # --- writing

    @rule(
        namespace=NAMESPACES,
        path=PATHS,
        first=st.integers(0, DEPTH - 1),
        linked=st.sampled_from([True, True, True, False]),
        owner=st.integers(0, 1),
        from_ssd=st.sampled_from([False, False, False, True]),
    )
    def reserve(
        self, namespace: int, path: Path, first: int, linked: bool, owner: int, from_ssd: bool
    ) -> None:
        chain = prefixes(path)[min(first, len(path) - 1) :]
        start = len(chain[0]) - 1 if linked else -1
        parent = HASH[chain[0][:-1]] if start > 0 else None
        before = self.residency(namespace)
        reservation, statuses, offsets = self.core.reserve(
            self.owners[owner], namespace, hashes_of(chain), start, parent, from_ssd
        )
        blocks = []
        for block, status, offset in zip(chain, statuses.tolist(), offsets.tolist(), strict=True):
            if status == RESERVED:
                assert not before[block] & 5
                assert before[block] & 2 or not from_ssd
                blocks.append(((namespace, block), offset))
                self.mark((namespace, block), offset)
            # An eviction for an earlier block may have taken it meanwhile, never brought it.
            assert status != PRESENT or before[block] & 1
            assert status != PENDING or before[block] & 4
        refused = np.flatnonzero(statuses >= NO_SPACE)
        assert len(set(statuses[refused].tolist())) <= 1
        assert refused.tolist() == list(range(len(chain) - len(refused), len(chain)))
        assert (reservation != 0) == bool(blocks)
        if NO_SPACE in statuses:
            self.assert_nothing_could_leave(namespace, chain[int(refused[0])][:-1])
        if ORPHAN in statuses and start == 0 and not from_ssd:
            unlinked = [p for p in chain if before[p] and self.was_unlinked(namespace, p)]
            assert unlinked  # a whole chain is refused only behind a block without lineage
        if reservation:
            self.reservations[reservation] = (self.owners[owner], blocks)

    def was_unlinked(self, namespace: int, path: Path) -> bool:
        packed = self.core.describe(namespace, hashes_of([path]))
        return not packed or int(records_from(packed)[0]["depth"]) == 0

    def assert_nothing_could_leave(self, namespace: int, parent: Path) -> None:
        leased = {key for _, blocks in self.leases.values() for key, *_ in blocks}
        for ns in (0, 1):
            resident = self.residency(ns)
            in_slots = {path for path, bits in resident.items() if bits & 5}
            for path in in_slots:
                if (
                    resident[path] & 1
                    and (ns, path) not in leased
                    and (ns, path)
                    != (
                        namespace,
                        parent,
                    )
                ):
                    children = [(*path, 0), (*path, 1)]
                    linked = [c for c in children if c in in_slots and not self.was_unlinked(ns, c)]
                    assert linked, f"{(ns, path)} could have left"

    @precondition(lambda self: bool(getattr(self, "reservations", None)))
    @rule(pick=PICK, flags=st.lists(st.booleans(), min_size=DEPTH, max_size=DEPTH))
    def commit(self, pick: int, flags: list[bool]) -> None:
        reservation = sorted(self.reservations)[pick % len(self.reservations)]
        owner, blocks = self.reservations.pop(reservation)
        sums = np.array([checksum_of(*key) for key, _ in blocks], np.uint64)
        ok = np.array(flags[: len(blocks)]) if pick % 3 == 0 else None
        other = self.owners[owner == self.owners[0]]
        assert not self.core.commit(other, reservation, sums, ok)
        assert self.core.commit(owner, reservation, sums, ok)
        assert not self.core.commit(owner, reservation, sums, ok)

    @precondition(lambda self: bool(getattr(self, "reservations", None)))
    @rule(pick=PICK)
    def abort(self, pick: int) -> None:
        reservation = sorted(self.reservations)[pick % len(self.reservations)]
        owner, _ = self.reservations.pop(reservation)
        self.core.abort(owner, reservation)
        self.core.abort(owner, reservation)

    @rule(namespace=NAMESPACES, path=PATHS)
    def put_and_load(self, namespace: int, path: Path) -> None:
        chain = prefixes(path)
        hashes = hashes_of(chain)
        source = np.zeros((len(chain), BLOCK_BYTES), np.uint8)
        for row, block in zip(source, chain, strict=True):
            row[:33] = row[-33:] = mark_of(namespace, block)
        ids = np.arange(len(chain))
        _, *counts = self.core.put(
            self.owners[0], namespace, hashes, 0, None, ContiguousBlocks(source).plan, ids, 1
        )
        assert sum(counts) == len(chain)
        room = np.zeros_like(source)
        plan = ContiguousBlocks(room).plan
        loaded, corrupt = self.core.load(self.owners[0], namespace, hashes, plan, ids, False, 1)
        assert not corrupt
        assert (room[:loaded] == source[:loaded]).all()
        bits = self.core.residency(namespace, hashes)
        assert loaded == [*(bits & 1).tolist(), 0].index(0)

    # --- reading

    @rule(
        namespace=NAMESPACES, path=PATHS, first=st.integers(0, 2), owner=st.integers(0, 1),
        use=st.booleans(),
    )  # fmt: skip
    def acquire(self, namespace: int, path: Path, first: int, owner: int, use: bool) -> None:
        chain = prefixes(path)[min(first, len(path) - 1) :]
        bits = self.core.residency(namespace, hashes_of(chain))
        lease, offsets, headers, sequences, _ = self.core.acquire(
            self.owners[owner], namespace, hashes_of(chain), None, use
        )
        assert len(offsets) == [*(bits & 1).tolist(), 0].index(0)
        assert (lease != 0) == (len(offsets) > 0)
        if lease:
            keys = [(namespace, block) for block in chain]
            places = zip(keys, offsets.tolist(), headers.tolist(), sequences.tolist(), strict=False)
            self.leases[lease] = (self.owners[owner], list(places))

    @rule(namespace=NAMESPACES, path=PATHS)
    def acquire_for_no_time(self, namespace: int, path: Path) -> None:
        lease, *_ = self.core.acquire(
            self.owners[0], namespace, hashes_of(prefixes(path)), 0.0, True
        )
        assert self.core.expire_leases() == (1 if lease else 0)
        assert not self.core.release(self.owners[0], lease)

    @precondition(lambda self: bool(getattr(self, "leases", None)))
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        lease = sorted(self.leases)[pick % len(self.leases)]
        owner, _ = self.leases.pop(lease)
        assert not self.core.release(self.owners[owner == self.owners[0]], lease)
        assert self.core.release(owner, lease)
        assert not self.core.release(owner, lease)

    @rule(which=st.integers(0, 1))
    def release_owner(self, which: int) -> None:
        owner = self.owners[which]
        self.core.release_owner(owner)
        self.leases = {k: v for k, v in self.leases.items() if v[0] != owner}
        self.reservations = {k: v for k, v in self.reservations.items() if v[0] != owner}
        self.owners[which] = self.core.new_owner()

    # --- removing

    @rule(namespace=NAMESPACES, paths=st.lists(PATHS, min_size=1, max_size=2))
    def remove(self, namespace: int, paths: list[Path]) -> None:
        before = self.residency(namespace)
        linked = {
            path for path, bits in before.items() if bits and not self.was_unlinked(namespace, path)
        }
        removed = self.core.remove(namespace, hashes_of(paths))
        assert removed <= sum(before[path] != 0 for path in paths)
        after = self.residency(namespace)
        for path, bits in after.items():
            gone = any(
                path == top or (path[: len(top)] == top and path in linked and top in linked)
                for top in paths
            )
            assert bits == (0 if gone else before[path])

    @rule(namespace=NAMESPACES)
    def clear(self, namespace: int) -> None:
        self.core.clear(namespace)
        assert not any(self.residency(namespace).values())

    # --- the ssd's side

    @rule(namespace=NAMESPACES, path=PATHS, other_bytes=st.booleans())
    def set_ssd(self, namespace: int, path: Path, other_bytes: bool) -> None:
        rows = records_from(self.core.describe(namespace, hashes_of(prefixes(path))))
        before = self.residency(namespace)
        for row in rows:
            self.page += 1
            row["segment"], row["page"], row["stored_bytes"] = 1, self.page, BLOCK_BYTES
        if other_bytes:
            rows["checksum"] ^= np.uint64(1)
        self.core.set_ssd(rows)
        self.core.take_garbage()
        after = self.residency(namespace)
        for block in prefixes(path)[: len(rows)]:
            if other_bytes or not before[block] & 3:
                assert after[block] & 2 == before[block] & 2
            elif self.was_unlinked(namespace, block) or len(block) == 1:
                assert after[block] & 2

    @rule(namespace=NAMESPACES, pick=PICK, stale=st.booleans())
    def drop_ssd(self, namespace: int, pick: int, stale: bool) -> None:
        key = self.pick_on_ssd(namespace, pick)
        if key is None:
            return
        row = self.record(*key)
        page = int(row["page"]) + stale
        before = self.residency(namespace)
        self.core.drop_ssd(namespace, HASH[key[1]], int(row["segment"]), page)
        after = self.residency(namespace)
        if stale:
            assert after == before
        else:
            assert not after[key[1]] & 2

    @rule(namespace=NAMESPACES, pick=PICK)
    def move_ssd(self, namespace: int, pick: int) -> None:
        key = self.pick_on_ssd(namespace, pick)
        if key is None:
            return
        here = np.array([self.record(*key)])
        there = here.copy()
        self.page += 1
        there["segment"], there["page"] = 2, self.page
        assert self.core.survivors(here).shape == (1,)
        self.core.move_ssd(here, there)
        assert int(self.record(*key)["page"]) == self.page
        self.core.move_ssd(here, here)  # stale: it lies elsewhere by now
        assert int(self.record(*key)["page"]) == self.page

    def pick_on_ssd(self, namespace: int, pick: int) -> Key | None:
        paths = [path for path, bits in self.residency(namespace).items() if bits & 2]
        return (namespace, paths[pick % len(paths)]) if paths else None

    @rule(namespace=NAMESPACES, path=PATHS)
    def ssd_gap(self, namespace: int, path: Path) -> None:
        packed = self.core.ssd_gap(namespace, HASH[path])
        gap = [PATH[packed[i : i + 32]] for i in range(0, len(packed), 32)]
        bits = self.residency(namespace)
        assert all(not bits[block] & 2 for block in gap)
        assert gap == sorted(gap, key=len)
        if gap:
            assert gap[-1] == path

    # --- what always holds

    @precondition(lambda self: hasattr(self, "core"))
    @invariant()
    def matches_are_leading_runs(self) -> None:
        for ns in (0, 1):
            bits = self.residency(ns)
            for path in ALL_PATHS:
                if len(path) != DEPTH:
                    continue
                chain = prefixes(path)
                there = [bool(bits[block] & 3) for block in chain]
                for start in (0, 2):
                    run = [*there[start:], False].index(False)
                    hashes = hashes_of(chain[start:])
                    assert self.core.match(ns, hashes, start) == run
                    assert self.core.match(ns, hashes, -1) == run

    @precondition(lambda self: hasattr(self, "core"))
    @invariant()
    def ancestors_are_there(self) -> None:
        for ns in (0, 1):
            bits = self.residency(ns)
            for path, mine in bits.items():
                if not mine:
                    continue
                row = self.record(ns, path)
                assert (int(row["segment"]) != NOT_ON_SSD) == bool(mine & 2)
                if row["depth"] == 0:
                    continue
                assert int(row["depth"]) == len(path)
                if len(path) > 1:
                    assert row["parent"].tobytes() == HASH[path[:-1]]
                    above = bits[path[:-1]]
                    assert above
                    assert not mine & 3 or above & 3
                    assert not mine & 2 or above & 2
                    # Leaves leave first: nothing in a slot stands behind one without.
                    assert not mine & 1 or above & 3

    @precondition(lambda self: hasattr(self, "core"))
    @invariant()
    def bytes_are_those_that_were_written(self) -> None:
        seen: dict[int, Key] = {}
        words = self.core.arena.view(np.uint64)
        for _, blocks in self.leases.values():
            for key, offset, header, sequence in blocks:
                assert self.is_marked(key, offset)
                assert words[header // 8] == sequence
                assert seen.setdefault(offset, key) == key
        for _, reserved in self.reservations.values():
            for key, offset in reserved:
                assert self.is_marked(key, offset)
                assert offset not in seen
                seen[offset] = key
        owner = self.core.new_owner()
        for ns in (0, 1):
            for path, bits in self.residency(ns).items():
                if bits & 1:
                    lease, offsets, *_ = self.core.acquire(
                        owner, ns, hashes_of([path]), None, False
                    )
                    assert self.is_marked((ns, path), int(offsets[0]))
                    assert seen.setdefault(int(offsets[0]), (ns, path)) == (ns, path)
                    self.core.release(owner, lease)

    @precondition(lambda self: hasattr(self, "core"))
    @invariant()
    def events_tell_what_is_resident(self) -> None:
        packed = b"".join(self.core.events_after(ns, self.sequence[ns]) for ns in (0, 1))
        for row in np.frombuffer(packed, _EVENT):
            self.sequence[row["namespace"]] += 1
            assert row["sequence"] == self.sequence[row["namespace"]]
            if row["kind"] == 2:
                self.told = [{k for k in tier if k[0] != row["namespace"]} for tier in self.told]
                continue
            key = (int(row["namespace"]), PATH[row["hash"].tobytes()])
            tier = self.told[row["tier"]]
            if row["kind"] == 0:
                assert row["tier"] == 1 or key not in tier
                tier.add(key)
            else:
                tier.remove(key)
        assert self.told == [self.resident(1), self.resident(2)]

    @precondition(lambda self: hasattr(self, "core"))
    @invariant()
    def counts_agree(self) -> None:
        stats = self.core.stats()
        bits = [b for ns in (0, 1) for b in self.residency(ns).values()]
        assert stats["blocks"] == sum(b != 0 for b in bits)
        assert stats["ssd_blocks"] == sum(b & 2 != 0 for b in bits)
        assert stats["leases"] == len(self.leases)
        assert stats["reservations"] == len(self.reservations)
        in_slots = sum(b & 5 != 0 for b in bits)
        # Detached blocks: removed while somebody reads or writes them.
        held = {offset for _, blocks in self.leases.values() for _, offset, *_ in blocks}
        held |= {offset for _, blocks in self.reservations.values() for _, offset in blocks}
        used = stats["cpu_used_bytes"] // BLOCK_BYTES
        assert in_slots <= used <= in_slots + len(held)
        assert used <= self.capacity

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for owner in self.owners:
            self.core.release_owner(owner)
        for ns in (0, 1):
            self.core.clear(ns)
        stats = self.core.stats()
        for name in ("blocks", "cpu_blocks", "ssd_blocks", "cpu_used_bytes", "leases"):
            assert stats[name] == 0, name
        _, statuses, _ = self.core.reserve(self.owners[0], 0, ALL_HASHES, -1, None, False)
        assert int((statuses == RESERVED).sum()) == self.capacity


CoreModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCoreModel = CoreModel.TestCase

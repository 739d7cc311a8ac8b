"""Any number of processes after each other on one arena, against what each of them had said.

A process puts, removes, reserves, leases and lets blocks be evicted, in two namespaces of two block
sizes and one that only some processes know; then it is gone, at any point, and the next one adopts.
The model is the state just before: what could be had is had again, with exactly its bytes; what was
removed, given up, or only reserved is not; a foreign writer's slots are nobody's until it is done.
Now and then a bit flips in between: then blocks may be lost, and still none has other bytes.
"""

import json
import os
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore import _native
from kvstore.control import RESERVED
from kvstore.records import RECORD, records_from
from tests.core_support import View, flip, payload, rows

DEPTH = 4
SIZES = {"small": 4096, "large": 9000, "rare": 4096}  # namespaces by name
PATHS = st.text("01", min_size=1, max_size=DEPTH)
SPACES = st.sampled_from(sorted(SIZES))
PICK = st.integers(0, 1 << 20)
ALL = [bin(i)[3:] for i in range(2, 2 << DEPTH)]
CHUNK, CHUNKS = 1 << 15, 5
HEADERS = st.builds(
    lambda chunk, byte: 2 * 4096 + chunk * CHUNK + byte,
    st.integers(0, CHUNKS - 1),
    st.integers(0, 7 * 128 - 1),
)
# What may flip between two processes: chunk table, headers, anything behind the superblock.
FLIPS = st.tuples(
    st.integers(4096, 4096 + 8 * CHUNKS - 1)
    | HEADERS
    | st.integers(2 * 4096, 2 * 4096 + CHUNKS * CHUNK - 1),
    st.sampled_from([1 << bit for bit in range(8)]),
)


def prefixes(path: str) -> list[str]:
    return [path[: i + 1] for i in range(len(path))]


class AdoptionModel(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(_native.eviction_policy_names()))
    def start(self, policy: str) -> None:
        self.policy = policy
        self.view = View.create(CHUNK * CHUNKS, CHUNK, policy)
        self.numbers: dict[str, int] = {}
        self.writers: dict[int, int] = {}  # writer -> slots reserved by it and neither done
        self.open: dict[int, tuple[int, int, int]] = {}  # reservation -> owner, writer, slots
        self.next_writer = 1
        self.sequences: dict[int, set[int]] = {}  # header offset -> sequences granted there
        self.page = 0
        self.was_damaged = False
        for name in ("small", "large", "rare"):
            self.numbers[name] = self.core.add_namespace(SIZES[name])
        self.core.set_metadata(json.dumps(self.numbers).encode())

    @property
    def core(self) -> _native.StoreCore:
        return self.view.core

    def names(self, space: str, paths: list[str]) -> list[str]:
        return [f"{space} {path}" for path in paths]

    def hashes(self, paths: list[str]) -> Any:
        # The same in every namespace: a block of one must never be taken for another's.
        return rows(paths)

    def residency(self) -> dict[tuple[str, str], int]:
        return {
            (space, path): int(bits)
            for space, number in self.numbers.items()
            for path, bits in zip(
                ALL, self.core.residency(number, self.hashes(ALL)).tolist(), strict=True
            )
        }

    def data(self, space: str, path: str) -> Any:
        return payload(f"{space} {path}", SIZES[space])

    # --- a process at work

    @rule(space=SPACES, path=PATHS, linked=st.sampled_from([True, True, False]))
    def put(self, space: str, path: str, linked: bool) -> None:
        self.write(space, prefixes(path), linked, self.core.new_owner(), True)

    def write(
        self, space: str, chain: list[str], linked: bool, owner: int, commit: bool
    ) -> tuple[int, int]:
        if space not in self.numbers:
            return 0, 0
        reservation, statuses, offsets = self.core.reserve(
            owner, self.numbers[space], self.hashes(chain), 0 if linked else -1, None, False
        )
        sums = []
        for name, status, offset in zip(chain, statuses.tolist(), offsets.tolist(), strict=True):
            if status == RESERVED:
                data = self.data(space, name)
                self.core.arena[offset : offset + len(data)] = data
                sums.append(_native.xxh3(data))
        if reservation and commit:
            assert self.core.commit(owner, reservation, np.array(sums, np.uint64), None)
        return reservation, len(sums)

    @rule(space=SPACES, path=PATHS, foreign=st.booleans())
    def leave_open(self, space: str, path: str, foreign: bool) -> None:
        writer = 0
        if foreign:
            writer, self.next_writer = self.next_writer, self.next_writer + 1
        owner = self.core.new_owner(writer, 1000 + writer, 5)
        reservation, slots = self.write(space, prefixes(path), True, owner, False)
        if reservation:
            self.open[reservation] = owner, writer, slots

    @precondition(lambda self: bool(getattr(self, "open", None)))
    @rule(pick=PICK)
    def give_up(self, pick: int) -> None:
        reservation = sorted(self.open)[pick % len(self.open)]
        owner, _, _ = self.open.pop(reservation)
        self.core.abort(owner, reservation)

    @rule(space=SPACES, path=PATHS)
    def remove(self, space: str, path: str) -> None:
        if space in self.numbers:
            self.core.remove(self.numbers[space], self.hashes([path]))

    @rule(space=SPACES, path=PATHS)
    def lease(self, space: str, path: str) -> None:
        """Never given back: leases end with the process."""
        if space in self.numbers:
            chain = prefixes(path)
            _, _, headers, sequences, _ = self.core.acquire(
                self.core.new_owner(), self.numbers[space], self.hashes(chain), None, True
            )
            for header, sequence in zip(headers.tolist(), sequences.tolist(), strict=True):
                self.sequences.setdefault(header, set()).add(sequence)

    @rule(space=SPACES, path=PATHS)
    def write_behind(self, space: str, path: str) -> None:
        if space not in self.numbers:
            return
        records = records_from(self.core.describe(self.numbers[space], self.hashes(prefixes(path))))
        for record in records:
            self.page += 1
            record["segment"], record["page"], record["stored_bytes"] = 0, self.page, SIZES[space]
        self.core.set_ssd(records)
        self.core.take_garbage()

    @rule(cursor=st.integers(0, 100), size=st.integers(0, 50_000))
    def scrub(self, cursor: int, size: int) -> None:
        assert self.core.scrub(cursor, size)[2] == 0  # the invariant below has found it before

    # --- the next process

    @rule(
        order=st.permutations(sorted(SIZES)),
        forgotten=st.sampled_from([None, None, None, "rare"]),
        with_ssd=st.booleans(),
        metadata=st.booleans(),
        damage=st.none() | st.none() | FLIPS,
    )
    def die_and_adopt(
        self,
        order: list[str],
        forgotten: str | None,
        with_ssd: bool,
        metadata: bool,
        damage: tuple[int, int] | None,
    ) -> None:
        before = {key: bits for key, bits in self.residency().items() if bits}
        records = {key: self.record(*key) for key in before}
        for _, writer, slots in self.open.values():
            if writer:
                self.writers[writer] = self.writers.get(writer, 0) + slots
        self.open = {}
        fd = self.view.die()
        if damage is not None:
            flip(fd, *damage)
        core = self.view.core = _native.StoreCore.adopt(fd, self.policy)
        said = json.loads(core.metadata())
        self.numbers = {name: core.add_namespace(SIZES[name]) for name in order}
        said.pop(forgotten, None)
        if with_ssd:
            table = np.array([records[k] for k, bits in before.items() if bits & 2], RECORD)
            for row, key in zip(table, [k for k, bits in before.items() if bits & 2], strict=True):
                row["namespace"] = self.numbers[key[0]]
            core.restore(np.sort(table, order=["depth"]))
        found = core.recover({said[name]: self.numbers[name] for name in said})
        if metadata or forgotten:
            core.set_metadata(json.dumps(self.numbers).encode())

        if damage is None:
            there = {key for key, bits in before.items() if bits & (3 if with_ssd else 1)}
            there -= {key for key in there if key[0] not in said and not before[key] & 2}
            self.check_nothing_is_lost(there, said, records)
        else:  # a header may have become free, or one that is free another's
            self.writers = {row[0]: row[3] for row in core.quarantine()}
        self.was_damaged = self.was_damaged or damage is not None
        after = self.residency()
        for key, bits in after.items():
            if bits & 1 and not self.was_damaged:  # a chunk whose mark flips twice comes back
                assert before.get(key, 0) & 1, key
            assert not bits & 4
        in_slots = sum(bits & 1 for bits in after.values())
        assert found["adopted"] == in_slots
        assert found["quarantined"] == sum(self.writers.values())
        stats = core.stats()
        assert stats["cpu_blocks"] == stats["unverified"] == in_slots
        assert stats["leases"] == stats["reservations"] == 0

    def record(self, space: str, path: str) -> Any:
        return records_from(self.core.describe(self.numbers[space], self.hashes([path])))[0].copy()

    def check_nothing_is_lost(
        self, there: set[tuple[str, str]], said: dict[str, int], records: dict[Any, Any]
    ) -> None:
        """What was ready comes again, unless its chain hung on what is not there any more."""
        after = self.residency()
        for space, path in there:
            depth = int(records[space, path]["depth"])
            chain = prefixes(path)[:depth]
            if space in said and all((space, above) in there for above in chain):
                assert after[space, path] & 3, (space, path)

    @precondition(lambda self: bool(getattr(self, "writers", None)))
    @rule(pick=PICK)
    def writer_is_done(self, pick: int) -> None:
        held = {row[0]: row[3] for row in self.core.quarantine()}
        waiting = sorted(held)
        if waiting:
            writer = waiting[pick % len(waiting)]
            assert self.core.release_quarantine(writer) == self.writers.pop(writer)

    # --- what always holds

    @precondition(lambda self: hasattr(self, "view"))
    @invariant()
    def what_can_be_had_has_its_bytes(self) -> None:
        seen: set[int] = set()
        owner = self.core.new_owner()
        for (space, path), bits in self.residency().items():
            if not bits & 1:
                continue
            lease, offsets, *_, sums = self.core.acquire(
                owner, self.numbers[space], self.hashes([path]), None, False
            )
            if lease == 0:
                assert self.was_damaged
                assert not self.core.residency(self.numbers[space], self.hashes([path]))[0] & 1
                continue
            data = self.data(space, path)
            offset = int(offsets[0])
            assert (self.core.arena[offset : offset + len(data)] == data).all()
            assert int(sums[0]) == _native.xxh3(data)
            assert offset not in seen
            seen.add(offset)
            self.core.release(owner, lease)

    @precondition(lambda self: hasattr(self, "view"))
    @invariant()
    def quarantined_slots_are_counted(self) -> None:
        assert {row[0]: row[3] for row in self.core.quarantine()} == self.writers

    def teardown(self) -> None:
        if hasattr(self, "view"):
            os.close(self.view.die())


AdoptionModel.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAdoptionModel = AdoptionModel.TestCase

"""A core that takes over another's arena: what it finds, what it refuses, what it leaves alone.

The first core is dropped without a word, with a duplicate of its descriptor kept, which is what a
holder has after a kill -9. Between the two, tests change bytes of the memory at chosen places.
"""

import fcntl
import json
import os
import struct
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore import _native
from kvstore.control import NO_SPACE, PRESENT, RESERVED
from kvstore.events import _EVENT
from kvstore.records import NOT_ON_SSD, RECORD, records_from
from tests.core_support import (
    CHECKSUM,
    DEPTH,
    HASH,
    PAGE,
    PARENT,
    SEAL,
    SEQUENCE,
    STORED_ID,
    View,
    adopt,
    chain,
    flip,
    hash_of,
    memory,
    rows,
)

SIZE = 4096


@pytest.fixture
def view() -> Iterator[View]:
    made = View.create()
    made.core.add_namespace(SIZE)
    yield made
    os.close(made.keep)


# --- what is refused


def test_descriptor_that_is_no_memory_file_is_refused() -> None:
    for path in ("/dev/null", "/proc/self"):
        fd = os.open(path, os.O_RDONLY)
        with pytest.raises(ValueError, match="is no memory file"):
            _native.StoreCore.adopt(fd, "lru")
        os.close(fd)
    with pytest.raises(ValueError, match="is not open"):
        _native.StoreCore.adopt(987654, "lru")
    with tempfile.TemporaryFile() as file:
        file.write(bytes(PAGE * 4))
        with pytest.raises(ValueError, match="is not sealed"):
            _native.StoreCore.adopt(file.fileno(), "lru")


def copy_of(view: View, size: int | None = None, seal: bool = True) -> int:
    """A memory file with the arena's bytes, cut or filled up to `size`."""
    with memory(view.keep) as arena:
        raw = arena[:size]
    fd = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    os.write(fd, raw)
    os.ftruncate(fd, len(raw) if size is None else size)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def test_copy_that_is_not_sealed_truncated_or_too_long_is_refused(view: View) -> None:
    whole = os.fstat(view.keep).st_size
    for size, seal, message in (
        (None, False, "is not sealed"),
        (100, True, "is too short"),
        (PAGE, True, f"has {PAGE} bytes, its superblock says {whole}"),
        (whole - PAGE, True, f"has {whole - PAGE} bytes, its superblock says {whole}"),
        (whole + PAGE, True, f"has {whole + PAGE} bytes, its superblock says {whole}"),
    ):
        fd = copy_of(view, size, seal)
        with pytest.raises(ValueError, match=message):
            _native.StoreCore.adopt(fd, "lru")
        os.close(fd)
    fd = copy_of(view)
    assert _native.StoreCore.adopt(fd, "lru").arena_id == view.core.arena_id
    os.close(fd)


def test_sparse_copy_is_refused(view: View) -> None:
    with memory(view.keep) as arena:
        head = arena[:PAGE]
    fd = os.memfd_create("sparse", os.MFD_ALLOW_SEALING)
    os.write(fd, head)
    os.ftruncate(fd, os.fstat(view.keep).st_size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises(ValueError, match="has less memory than its size"):
        _native.StoreCore.adopt(fd, "lru")
    os.close(fd)


def test_descriptor_for_reading_only_is_refused(view: View) -> None:
    fd = os.open(f"/proc/self/fd/{view.keep}", os.O_RDONLY)
    with pytest.raises(ValueError, match="cannot be mapped for writing"):
        _native.StoreCore.adopt(fd, "lru")
    os.close(fd)


def test_other_version_is_named(view: View) -> None:
    with memory(view.keep) as arena:
        struct.pack_into("<I", arena, 8, 3)
    with pytest.raises(ValueError, match="has version 3, this is version 2"):
        _native.StoreCore.adopt(view.keep, "lru")


def test_every_flipped_bit_of_the_superblock_is_refused(view: View) -> None:
    checked = 88  # to the end of its checksum; what follows grows while the arena lives
    for offset in range(checked):
        for bit in (1, 128):
            flip(view.keep, offset, bit)
            with pytest.raises(ValueError, match="the descriptor"):
                _native.StoreCore.adopt(view.keep, "lru")
            flip(view.keep, offset, bit)
    assert _native.StoreCore.adopt(view.keep, "lru").arena_id == view.core.arena_id


def test_superblock_that_lies_about_its_geometry_is_refused(view: View) -> None:
    for offset, value in ((40, 0), (40, 1 << 62), (40, PAGE), (48, 1 << 60), (48, 0), (56, 8)):
        fd = copy_of(view)
        with memory(fd) as arena:
            struct.pack_into("<Q", arena, offset, value)
            arena[72:88] = _native.blake3(arena[:72])[:16]
        with pytest.raises(ValueError, match="makes no sense"):
            _native.StoreCore.adopt(fd, "lru")
        os.close(fd)


def test_unknown_policy_is_refused(view: View) -> None:
    with pytest.raises(ValueError, match="unknown eviction policy: best"):
        _native.StoreCore.adopt(view.keep, "best")


# --- what is found


def test_arena_is_private_and_named(view: View) -> None:
    assert os.fstat(view.keep).st_mode & 0o777 == 0o600
    other = View.create()
    assert len(view.core.arena_id) == 16
    assert other.core.arena_id != view.core.arena_id
    os.close(other.die())


def test_committed_blocks_are_found_with_their_bytes(view: View) -> None:
    names = chain("a", 20)
    view.put(names)
    view.put(["u", "v"], start=-1)
    view.put(["b20"], start=5, parent="a4")
    after, found = adopt(view.die(), [SIZE])
    assert found == {"adopted": 23, "discarded": 0, "quarantined": 0, "bytes": 23 * SIZE}
    assert after.core.match(0, rows(names), 0) == 20
    assert after.load(names) == 20
    assert after.load(["u"]) == after.load(["v"]) == after.load(["b20"]) == 1
    stats = after.core.stats()
    assert stats["cpu_blocks"] == 23
    assert stats["cpu_used_bytes"] == 23 * SIZE
    assert stats["unverified"] == stats["damaged"] == 0


def test_nothing_can_be_put_between_adopt_and_recover(view: View) -> None:
    view.put(chain("a", 3))
    core = _native.StoreCore.adopt(view.die(), "lru")
    core.add_namespace(SIZE)
    _, statuses, _ = core.reserve(core.new_owner(), 0, rows(["x"]), 0, None, False)
    assert statuses.tolist() == [NO_SPACE]
    assert core.recover({0: 0})["adopted"] == 3
    with pytest.raises(ValueError, match="adopted no arena, or has"):
        core.recover({0: 0})
    _, statuses, _ = core.reserve(core.new_owner(), 0, rows(["x"]), 0, None, False)
    assert statuses.tolist() == [RESERVED]


def test_recovery_checks_its_namespaces(view: View) -> None:
    core = _native.StoreCore.adopt(view.keep, "lru")
    core.add_namespace(SIZE)
    with pytest.raises(IndexError, match="namespace_id"):
        core.recover({0: 1})
    with pytest.raises(ValueError, match="two numbers become the same"):
        core.recover({0: 0, 1: 0})
    assert core.recover({7: 0})["adopted"] == 0


def test_block_that_was_adopted_is_put_as_present(view: View) -> None:
    view.put(chain("a", 3))
    after, _ = adopt(view.die(), [SIZE])
    _, statuses, _ = after.core.reserve(
        after.core.new_owner(), 0, rows(chain("a", 4)), 0, None, False
    )
    assert statuses.tolist() == [PRESENT] * 3 + [RESERVED]


def test_removed_and_evicted_blocks_do_not_come_back(view: View) -> None:
    view.put(chain("a", 5))
    view.put(chain("b", 5))
    owner = view.core.new_owner()
    view.core.acquire(owner, 0, rows(chain("b", 5)), None, True)  # still read when removed
    view.core.remove(0, rows(["a2", "b2"]))
    view.put(chain("c", 2))
    view.core.clear(0)
    view.put(chain("d", 2))
    after, found = adopt(view.die(), [SIZE])
    assert found["adopted"] == 2
    assert [after.load(chain(c, 5)) for c in "abcd"] == [0, 0, 0, 2]


def test_lineage_that_was_learned_late_is_kept(view: View) -> None:
    view.put(["a1"], start=-1)
    view.put(["a0"])
    view.put(chain("a", 3))  # a1 becomes the second of a chain
    after, found = adopt(view.die(), [SIZE])
    assert found["adopted"] == 3
    row = records_from(after.core.describe(0, rows(["a0", "a1", "a2"])))
    assert row["depth"].tolist() == [1, 2, 3]
    assert row["parent"][1].tobytes() == hash_of("a0")


def test_open_reservations_are_freed(view: View) -> None:
    view.put(chain("a", 2))
    owner = view.core.new_owner()
    view.core.reserve(owner, 0, rows(chain("a", 5)), 0, None, False)
    after, found = adopt(view.die(), [SIZE])
    assert found == {"adopted": 2, "discarded": 3, "quarantined": 0, "bytes": 2 * SIZE}
    assert after.core.stats()["cpu_used_bytes"] == 2 * SIZE
    assert after.put(chain("a", 5)) == 3
    assert after.load(chain("a", 5)) == 5


def test_committed_block_whose_parent_was_not_is_freed(view: View) -> None:
    owner = view.core.new_owner()
    view.core.reserve(owner, 0, rows(["a0"]), 0, None, False)
    second, statuses, _ = view.core.reserve(owner, 0, rows(["a1"]), 1, hash_of("a0"), False)
    assert statuses.tolist() == [RESERVED]
    view.core.commit(owner, second, np.zeros(1, np.uint64), None)
    after, found = adopt(view.die(), [SIZE])
    assert (found["adopted"], found["discarded"]) == (0, 2)
    assert after.core.stats()["cpu_used_bytes"] == 0


@pytest.mark.parametrize(
    "field", [SEQUENCE, SEQUENCE + 6, 8, CHECKSUM, STORED_ID, DEPTH, HASH + 5, PARENT, SEAL]
)
def test_flipped_header_is_a_miss_for_it_and_what_continues_it(view: View, field: int) -> None:
    names = chain("a", 4)
    view.put(names)
    header = view.header_of("a2")
    fd = view.die()
    flip(fd, header + field, 2)
    after, found = adopt(fd, [SIZE])
    assert (found["adopted"], found["discarded"]) == (2, 2)
    assert after.load(names) == 2
    assert after.put(names) == 2
    assert after.load(names) == 4


def test_header_half_written_is_a_miss(view: View) -> None:
    view.put(chain("a", 3))
    header = view.header_of("a2")
    fd = view.die()
    with memory(fd) as arena:
        arena[header + HASH : header + HASH + 40] = bytes(40)
    after, found = adopt(fd, [SIZE])
    assert (found["adopted"], found["discarded"]) == (2, 1)
    assert after.load(chain("a", 3)) == 2


def test_flipped_payload_is_a_miss_and_its_slot_is_freed(view: View) -> None:
    names = chain("a", 5)
    view.put(names)
    offset = view.offset_of("a3")
    fd = view.die()
    flip(fd, offset + 17)
    after, found = adopt(fd, [SIZE])
    assert found["adopted"] == 5
    assert after.core.match(0, rows(names), 0) == 5  # not known yet
    assert after.load(names) == 3
    stats = after.core.stats()
    assert (stats["damaged"], stats["cpu_blocks"], stats["unverified"]) == (1, 3, 0)
    assert after.core.match(0, rows(names), 0) == 3
    assert after.put(names) == 2
    assert after.load(names) == 5


def test_flipped_payload_is_found_by_a_lease_too(view: View) -> None:
    names = chain("a", 3)
    view.put(names)
    offset = view.offset_of("a0")
    fd = view.die()
    flip(fd, offset)
    after, _ = adopt(fd, [SIZE])
    lease, offsets, *_ = after.core.acquire(after.core.new_owner(), 0, rows(names), None, True)
    assert lease == 0
    assert len(offsets) == 0
    assert after.core.stats()["blocks"] == after.core.stats()["leases"] == 0


def test_damaged_copy_of_a_block_on_ssd_goes_alone(view: View) -> None:
    names = chain("a", 4)
    view.put(names)
    on_ssd = records_from(view.core.describe(0, rows(names)))
    on_ssd["segment"], on_ssd["page"], on_ssd["stored_bytes"] = 0, np.arange(4), SIZE
    offset = view.offset_of("a1")
    fd = view.die()
    flip(fd, offset)
    core = _native.StoreCore.adopt(fd, "lru")
    core.add_namespace(SIZE)
    assert core.restore(on_ssd) == 4
    assert core.recover({0: 0})["adopted"] == 4
    after = View(core, fd)
    assert after.load(names) == 1
    assert core.residency(0, rows(names)).tolist() == [3, 2, 3, 3]
    assert core.match(0, rows(names), 0) == 4


# --- chunks and classes


def test_several_classes_come_back_each_to_its_chunks() -> None:
    view = View.create(1 << 20, 1 << 16)
    sizes = [4096, 20000, 5000]
    for size in sizes:
        view.core.add_namespace(size)
    for namespace, n in enumerate((25, 6, 11)):
        assert view.put(chain("n", n), namespace) == n
    view.core.remove(1, rows(["n4"]))
    after, found = adopt(view.die(), sizes)
    assert found["adopted"] == 25 + 4 + 11
    assert [after.load(chain("n", 25), i) for i in range(3)] == [25, 4, 11]
    for namespace in range(3):  # every chunk is either taken or to be had
        assert after.put(chain("more", 10), namespace) == 10
    for namespace in range(3):
        after.core.clear(namespace)
    assert after.core.stats()["cpu_used_bytes"] == 0
    assert after.put(chain("all", 15 * 16), 0) == 15 * 16
    os.close(after.die())


def test_damaged_chunk_mark_costs_that_chunk_only(view: View) -> None:
    view.put(chain("a", 15))
    view.put(chain("b", 15))
    core_chunk = (view.header_of("b0") - 2 * PAGE) // (1 << 16)
    fd = view.die()
    flip(fd, PAGE + 8 * core_chunk)
    after, found = adopt(fd, [SIZE])
    assert found["adopted"] == 15
    assert after.load(chain("a", 15)) + after.load(chain("b", 15)) == 15
    _, statuses, _ = after.core.reserve(
        after.core.new_owner(), 0, rows(chain("x", 300)), 0, None, False
    )
    assert (statuses == RESERVED).sum() == 15 * 15  # 16 chunks but one


def test_chunk_of_a_size_that_is_gone_is_free_for_others() -> None:
    view = View.create(1 << 18, 1 << 16)
    view.core.add_namespace(20000)
    view.put(chain("a", 12))
    after, found = adopt(view.die(), [SIZE], {})
    assert found == {"adopted": 0, "discarded": 12, "quarantined": 0, "bytes": 0}
    assert after.put(chain("x", 60)) == 60
    os.close(after.die())


# --- namespaces


def test_namespaces_may_be_numbered_anew_again_and_again() -> None:
    view = View.create()
    names = ["one", "two", "three"]
    numbers = {name: view.core.add_namespace(SIZE) for name in names}
    for salt, name in enumerate(names):
        view.put(chain("same", 4), numbers[name], salt=salt)
    view.core.set_metadata(json.dumps(numbers).encode())
    for turn in range(4):
        core = _native.StoreCore.adopt(view.die(), "lru")
        before = json.loads(core.metadata())
        names = names[1:] + names[:1]  # another order each time
        numbers = {name: core.add_namespace(SIZE) for name in names}
        found = core.recover({before[name]: numbers[name] for name in names})
        assert found["adopted"] == 12, turn
        view.core = core
        for salt, name in enumerate(("one", "two", "three")):
            assert view.load(chain("same", 4), numbers[name], salt=salt) == 4
        if turn != 1:  # once, the process ends before it said how it numbers
            core.set_metadata(json.dumps(numbers).encode())
    os.close(view.die())


def test_blocks_of_namespaces_nobody_names_are_freed() -> None:
    view = View.create()
    for _ in range(3):
        view.core.add_namespace(SIZE)
    for namespace in range(3):
        view.put(chain("n", 4), namespace, salt=namespace)
    view.core.set_metadata(b"three")
    after, found = adopt(view.die(), [SIZE, SIZE], {1: 0})
    assert (found["adopted"], found["discarded"]) == (4, 8)
    assert after.load(chain("n", 4), 0, salt=1) == 4
    assert after.load(chain("n", 4), 1) == 0
    # Nor does the number of one that is gone pass to one that is new.
    after.put(chain("new", 2), 1, salt=9)
    after.core.set_metadata(b"two")
    last, found = adopt(after.die(), [SIZE, SIZE])
    assert found["adopted"] == 6
    assert last.load(chain("new", 2), 1, salt=9) == 2
    assert last.load(chain("n", 4), 0, salt=1) == 4
    os.close(last.die())


def test_namespace_of_another_block_size_gets_nothing(view: View) -> None:
    view.put(chain("a", 4))
    after, found = adopt(view.die(), [SIZE - 64])  # slots of the same size
    assert (found["adopted"], found["discarded"]) == (0, 4)
    assert after.put(chain("a", 4)) == 4


# --- metadata


def test_metadata_is_what_was_set_last(view: View) -> None:
    assert view.core.metadata() == b""
    for turn in range(5):
        view.core.set_metadata(b"x" * (turn * 1000))
        assert view.core.metadata() == b"x" * (turn * 1000)
        assert _native.StoreCore.adopt(view.keep, "lru").metadata() == b"x" * (turn * 1000)
    biggest = os.urandom(1 << 20)
    view.core.set_metadata(biggest)
    assert view.core.metadata() == biggest
    with pytest.raises(ValueError, match=r"1048577 bytes, at most 1048576"):
        view.core.set_metadata(biggest + b"x")
    assert view.core.metadata() == biggest


def test_damaged_metadata_falls_back_to_the_copy_before(view: View) -> None:
    view.core.set_metadata(b"first words")
    view.core.set_metadata(b"second words")
    fd = view.die()
    with memory(fd) as arena:
        offset = arena.rfind(b"second words")
        assert offset > 0
        before = arena.rfind(b"first words")
    flip(fd, offset)
    assert _native.StoreCore.adopt(fd, "lru").metadata() == b"first words"
    flip(fd, before)
    core = _native.StoreCore.adopt(fd, "lru")
    assert core.metadata() == b""
    core.add_namespace(SIZE)
    core.set_metadata(b"third")
    assert core.metadata() == b"third"


def test_blocks_are_freed_when_no_copy_says_whose_they_are(view: View) -> None:
    view.core.set_metadata(b"whose")
    view.put(chain("a", 3))
    fd = view.die()
    with memory(fd) as arena:
        offset = arena.rfind(b"whose")
    flip(fd, offset)
    _, found = adopt(fd, [SIZE])
    assert (found["adopted"], found["discarded"]) == (0, 3)


# --- quarantine


def test_slots_of_a_foreign_writer_stay_away_until_it_is_done(view: View) -> None:
    view.put(chain("a", 2))
    writer = view.core.new_owner(77, 4711, 123456789)
    view.core.reserve(writer, 0, rows(chain("a", 5)), 0, None, False)
    other = view.core.new_owner(78, 4712, 99)
    view.core.reserve(other, 0, rows(["z"]), -1, None, False)
    view.core.reserve(view.core.new_owner(), 0, rows(["y"]), -1, None, False)
    fd = view.die()
    for _ in range(2):  # the next process but one still knows
        after, found = adopt(fd, [SIZE])
        assert found == {"adopted": 2, "discarded": 1, "quarantined": 4, "bytes": 2 * SIZE}
        assert sorted(after.core.quarantine()) == [(77, 4711, 123456789, 3), (78, 4712, 99, 1)]
        after.put(["y"], start=-1)
        after.core.reserve(after.core.new_owner(), 0, rows(["y"]), -1, None, False)
        after.core.remove(0, rows(["y"]))
        after.put(["y"], start=-1)
        after.core.remove(0, rows(["y"]))
        fd = after.keep
        _, statuses, _ = after.core.reserve(
            after.core.new_owner(), 0, rows(chain("x", 300)), 0, None, False
        )
        assert (statuses == RESERVED).sum() == 16 * 15 - 4  # all else can be had
        after.die()
        after, found = adopt(fd, [SIZE])
        assert found["adopted"] == 0
        assert found["quarantined"] == 4
        after.put(chain("a", 2))
        after.core.reserve(after.core.new_owner(), 0, rows(["y"]), -1, None, False)
        after.die()
    after, _ = adopt(fd, [SIZE])
    assert after.core.stats()["quarantined"] == 4
    assert after.core.release_quarantine(77) == 3
    assert after.core.release_quarantine(77) == 0
    assert after.core.quarantine() == [(78, 4712, 99, 1)]
    assert after.core.release_quarantine(78) == 1
    assert after.put(chain("x", 16 * 15 - 2), start=0) == 16 * 15 - 2
    assert after.core.stats()["quarantined"] == 0


def test_slots_of_a_foreign_writer_are_done_with_when_it_committed_or_gave_up(view: View) -> None:
    writer = view.core.new_owner(77, 4711, 1)
    view.put(chain("a", 3), owner=writer)
    reservation, *_ = view.core.reserve(writer, 0, rows(chain("b", 3)), 0, None, False)
    view.core.abort(writer, reservation)
    view.core.reserve(writer, 0, rows(chain("c", 3)), 0, None, False)
    view.core.release_owner(writer)
    after, found = adopt(view.die(), [SIZE])
    assert (found["adopted"], found["quarantined"]) == (3, 0)
    assert after.core.quarantine() == []


def test_quarantine_of_a_size_that_is_gone_holds_its_chunk() -> None:
    view = View.create(1 << 17, 1 << 16)
    view.core.add_namespace(20000)
    view.core.reserve(view.core.new_owner(5, 6, 7), 0, rows(["a", "b"]), -1, None, False)
    after, found = adopt(view.die(), [SIZE], {})
    assert found["quarantined"] == 2
    assert after.put(chain("x", 30)) == 15
    assert after.core.release_quarantine(5) == 2
    after.core.clear(0)
    assert after.put(chain("x", 30)) == 30
    os.close(after.die())


# --- going on


def test_sequences_go_on_where_no_reader_has_been(view: View) -> None:
    seen: set[int] = set()
    fd = view.keep
    for _ in range(4):
        view.core.clear(0)
        view.put(chain("a", 10))
        owner = view.core.new_owner()
        _, _, headers, sequences, _ = view.core.acquire(owner, 0, rows(chain("a", 10)), None, True)
        assert not seen & set(sequences.tolist())
        seen |= set(sequences.tolist())
        view.die()
        view, _ = adopt(fd, [SIZE])
        # What a reader copied under the process before is still there, and so says its header.
        words = view.core.arena.view(np.uint64)
        assert words[headers // 8].tolist() == sequences.tolist()
    view.core.clear(0)
    with memory(fd) as arena:  # a ceiling that was damaged is not followed
        struct.pack_into("<Q", arena, 88, (1 << 64) - 8)
    view.die()
    view, _ = adopt(fd, [SIZE])
    view.put(chain("a", 10))
    *_, sequences, _ = view.core.acquire(view.core.new_owner(), 0, rows(chain("a", 10)), None, True)
    assert not seen & set(sequences.tolist())
    assert max(sequences.tolist()) < 1 << 62


@pytest.mark.parametrize("policy", _native.eviction_policy_names())
def test_oldest_chain_leaves_first_from_its_end(policy: str) -> None:
    view = View.create(1 << 17, 1 << 16, policy)
    view.core.add_namespace(SIZE)
    for name in "abc":
        view.put(chain(name, 10))
    after, _ = adopt(view.die(), [SIZE], policy=policy)
    after.put(chain("d", 4))
    left = [after.core.match(0, rows(chain(name, 10)), 0) for name in "abcd"]
    if policy == "lru":
        assert left == [6, 10, 10, 4]
    assert sum(left) == 30
    after.put(chain("e", 30))
    assert after.load(chain("e", 30)) == 30
    os.close(after.die())


def test_events_tell_of_adopted_blocks_parents_first(view: View) -> None:
    view.put(["u"], start=-1)
    view.put(chain("a", 3))
    core = _native.StoreCore.adopt(view.die(), "lru")
    core.add_namespace(SIZE)
    core.enable_events(100)
    core.recover({0: 0})
    rows_ = np.frombuffer(core.events_after(0, 0), _EVENT)
    assert rows_["sequence"].tolist() == [1, 2, 3, 4]
    assert rows_["kind"].tolist() == rows_["tier"].tolist() == [0] * 4
    assert [row.tobytes() for row in rows_["hash"]] == [
        hash_of(name) for name in ["u", "a0", "a1", "a2"]
    ]


def test_what_is_not_on_ssd_is_listed_parents_first(view: View) -> None:
    view.put(chain("a", 6))
    view.put(["b3"], start=2, parent="a1")
    view.put(["u"], start=-1)
    on_ssd = records_from(view.core.describe(0, rows(chain("a", 3))))
    on_ssd["segment"], on_ssd["page"], on_ssd["stored_bytes"] = 0, np.arange(3), SIZE
    core = _native.StoreCore.adopt(view.die(), "lru")
    core.add_namespace(SIZE)
    core.add_namespace(SIZE)
    core.restore(on_ssd)
    core.recover({0: 0})
    packed = core.recovered_not_on_ssd(0)
    found = [packed[i : i + 32] for i in range(0, len(packed), 32)]
    assert found[0] == hash_of("u")
    assert sorted(found) == sorted(hash_of(name) for name in ["a3", "a4", "a5", "b3", "u"])
    for above, below in (("a3", "a4"), ("a4", "a5")):
        assert found.index(hash_of(above)) < found.index(hash_of(below))
    assert core.recovered_not_on_ssd(1) == b""


def test_ssd_brings_the_parents_of_what_is_in_memory(view: View) -> None:
    """The head of a chain left DRAM; its tail is found behind the copies on ssd."""
    names = chain("a", 6)
    view.put(names)
    on_ssd = records_from(view.core.describe(0, rows(names[:4])))
    on_ssd["segment"], on_ssd["page"], on_ssd["stored_bytes"] = 0, np.arange(4), SIZE
    header = view.header_of("a1")
    fd = view.die()
    flip(fd, header + SEAL)  # as good as evicted
    _, found = adopt(os.dup(fd), [SIZE])
    assert found["adopted"] == 1  # without ssd, nothing behind a1 can be reached
    after = View.create()
    after.core.add_namespace(SIZE)
    after.put(names)
    header = after.header_of("a1")
    fd = after.die()
    flip(fd, header + SEAL)
    core = _native.StoreCore.adopt(fd, "lru")
    core.add_namespace(SIZE)
    core.restore(on_ssd)
    assert core.recover({0: 0})["adopted"] == 5
    assert core.residency(0, rows(names)).tolist() == [3, 2, 3, 3, 1, 1]
    assert core.match(0, rows(names), 0) == 6
    records = records_from(core.describe(0, rows(names)))
    assert records["depth"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (records["segment"] == NOT_ON_SSD).tolist() == [False] * 4 + [True] * 2
    os.close(fd)


def test_copy_on_ssd_with_other_bytes_wins_over_the_slot(view: View) -> None:
    view.put(chain("a", 2))
    on_ssd = records_from(view.core.describe(0, rows(["a0"])))
    on_ssd["segment"], on_ssd["page"], on_ssd["stored_bytes"] = 0, 1, SIZE
    on_ssd["checksum"] ^= np.uint64(1)
    core = _native.StoreCore.adopt(view.die(), "lru")
    core.add_namespace(SIZE)
    core.restore(on_ssd)
    found = core.recover({0: 0})
    assert (found["adopted"], found["discarded"]) == (1, 1)
    assert core.residency(0, rows(["a0", "a1"])).tolist() == [2, 1]


def test_ssd_record_dtype_is_the_one_used_here() -> None:
    assert RECORD.itemsize == 32 + 32 + 4 * 5 + 1 + 16


# --- scrubbing


def test_scrub_removes_damage_and_verifies_the_rest(view: View) -> None:
    for name in "abcdefgh":
        view.put(chain(name, 20))
    offsets = [view.offset_of(name) for name in ("c19", "e19", "e5")]
    fd = view.die()
    for offset in offsets:
        flip(fd, offset + 4095)
    after, found = adopt(fd, [SIZE])
    assert found["adopted"] == after.core.stats()["unverified"] == 160
    cursor, checked, removed, calls = 0, 0, 0, 0
    while True:
        cursor, num_bytes, damaged = after.core.scrub(cursor, 10 * SIZE)
        assert num_bytes <= 10 * SIZE
        checked, removed, calls = checked + num_bytes, removed + damaged, calls + 1
        if cursor == 0:
            break
    assert 14 <= calls < 40
    assert 1 < removed <= 3  # e19 went with e5, or before it
    assert [after.load(chain(name, 20)) for name in "abcdefgh"] == [20, 20, 19, 20, 5, 20, 20, 20]
    stats = after.core.stats()
    assert stats["unverified"] == stats["leases"] == 0
    assert stats["damaged"] == removed
    assert after.core.scrub(0, 1 << 30) == (0, 144 * SIZE, 0)


def test_scrub_finds_damage_of_blocks_that_were_not_adopted(view: View) -> None:
    view.put(chain("a", 4))
    flip(view.keep, view.offset_of("a2"))
    assert view.core.scrub(0, 1 << 30) == (0, 4 * SIZE, 1)
    assert view.load(chain("a", 4)) == 2


def test_scrub_leaves_what_is_being_written_and_goes_round(view: View) -> None:
    assert view.core.scrub(0, 1 << 30) == (0, 0, 0)
    view.core.reserve(view.core.new_owner(), 0, rows(["a"]), 0, None, False)
    assert view.core.scrub(0, 1 << 30) == (0, 0, 0)
    assert view.core.scrub(1 << 50, 1 << 30) == (0, 0, 0)
    view.put(["b"], start=-1)
    cursor, checked, _ = view.core.scrub(0, 0)
    assert (cursor, checked) == (cursor, SIZE)  # at least one


# --- watching


def test_reason_of_a_miss_is_told(view: View) -> None:
    absent, pending, evicted, available = range(4)
    capacity = 16 * 15
    assert view.core.why(0, hash_of("a0")) == absent
    view.put(chain("a", capacity))
    assert view.core.why(0, hash_of("a0")) == available
    view.put(chain("b", 10))
    assert view.core.why(0, hash_of(f"a{capacity - 1}")) == evicted
    assert view.core.why(0, hash_of("a0")) == available
    view.core.reserve(view.core.new_owner(), 0, rows(["c0"]), 0, None, False)
    assert view.core.why(0, hash_of("c0")) == pending
    view.core.remove(0, rows(["b0"]))
    assert view.core.why(0, hash_of("b0")) == absent


def test_change_count_moves_when_a_waiter_should_look_again(view: View) -> None:
    core = view.core
    owner = core.new_owner()

    def changed(before: int) -> bool:
        return core.wait_for_change(before, 0.0) != before

    seen = core.change_count
    assert core.wait_for_change(seen, 0.001) == seen
    reservation, *_ = core.reserve(owner, 0, rows(["a"]), 0, None, False)
    assert not changed(seen)
    assert core.commit(owner, reservation, np.zeros(1, np.uint64), None)
    assert changed(seen)
    seen = core.change_count
    lease, *_ = core.acquire(owner, 0, rows(["a"]), None, True)
    assert not changed(seen)
    core.release(owner, lease)
    assert changed(seen)
    for act in (
        lambda: core.remove(0, rows(["a"])),
        lambda: core.clear(0),
        lambda: core.release_owner(owner),
    ):
        seen = core.change_count
        act()
        assert changed(seen)

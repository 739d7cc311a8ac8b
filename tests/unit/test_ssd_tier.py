"""The SSD tier: exact bytes or a miss, a bounded directory, clear refusals of what is not ours.

Proved by writing blocks whose bytes follow from their number, with both kinds of queue, and by
making the directory wrong in every way the tier promises to survive.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvstore import _native
from kvstore.errors import (
    ConfigError,
    CorruptError,
    IncompatibleError,
    InUseError,
    KVStoreError,
    StoreClosedError,
)
from kvstore.tiers import ssd_format
from kvstore.tiers.ssd import Records, SsdConfig, SsdTier
from tests.ssd_support import (
    KINDS,
    NAMESPACE,
    Memory,
    contents,
    hash_of,
    hashes_of,
    keep,
    open_tier,
    payload_of,
    read,
    records,
    write,
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        _native.IoQueue(name, 1)
    except RuntimeError:
        pytest.skip(f"no {name} here")
    return name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A 6 MiB tmpfs."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", where], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def expect(numbers: list[int], size: int = 5000) -> list[bytes]:
    return [payload_of(number, size).tobytes() for number in numbers]


# -- blocks


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 70_000, 600_000])
@pytest.mark.parametrize("shift", [0, 8])
def test_blocks_come_back_exactly(tmp_path: Path, kind: str, size: int, shift: int) -> None:
    with open_tier(tmp_path / "ssd", kind) as tier:
        at = write(tier, [1, 2, 3], size, shift=shift)
        assert at.ok.all()
        assert read(tier, at, shift) == expect([1, 2, 3], size)
    with open_tier(tmp_path / "ssd", kind) as tier:
        assert contents(tier) == dict(
            zip([hash_of(n) for n in (1, 2, 3)], expect([1, 2, 3], size), strict=True)
        )


def test_memory_around_a_block_is_left_alone(tmp_path: Path, kind: str) -> None:
    with open_tier(tmp_path / "ssd", kind) as tier:
        at = write(tier, [1, 2], 5000)
        memory = Memory(2, 8192)
        memory.slots[:] = 0xAB
        assert tier.read(
            at.segments, at.pages, at.stored_bytes, at.stored_checksums, memory.addrs
        ).all()
        assert (memory.slots[:, 5000:] == 0xAB).all()


def test_records_carry_all_that_the_store_needs(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        at = write(tier, [7, 8, 9])
    with open_tier(tmp_path / "ssd") as tier:
        batch, i = records(tier)[hash_of(8)]
        assert tier.namespaces()[int(batch.namespace[i])] == (NAMESPACE, b"test")
        assert batch.parent[i].tobytes() == hash_of(1008)
        assert (batch.depth[i], batch.raw_bytes[i], batch.stored_bytes[i]) == (1, 5000, 5000)
        assert (batch.segment[i], batch.page[i]) == (at.segments[1], at.pages[1])
        assert batch.checksum[i] == _native.io_checksum(payload_of(8, 5000))
        assert batch.codec[i] == 0


def test_encoded_blocks_are_opaque(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        namespace = tier.register_namespace(NAMESPACE, b"")
        memory = Memory(1, 3000)
        memory.slots[0, :3000] = payload_of(1, 3000)
        at = tier.write(
            namespace,
            hashes_of([1]),
            hashes_of([0]),
            np.zeros(1, np.uint32),
            memory.addrs,
            np.array([9000], np.uint32),
            np.array([42], np.uint64),
            durable=True,
            codecs=np.array([3], np.uint8),
            stored_bytes=np.array([3000], np.uint32),
        )
        assert at.stored_checksums[0] == _native.io_checksum(payload_of(1, 3000))
        (batch,) = tier.recover()
        assert (batch.codec[0], batch.raw_bytes[0], batch.checksum[0]) == (3, 9000, 42)
        assert read(tier, batch) == expect([1], 3000)


def test_one_hash_in_two_namespaces_is_two_blocks(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        one = tier.register_namespace(b"one", b"first")
        two = tier.register_namespace(b"two", b"second")
        assert tier.register_namespace(b"one", b"again") == one
        write(tier, [1], 100, namespace=one)
        write(tier, [1], 200, namespace=two)
        tier.forget(np.array([one], np.uint32), hashes_of([1]))
    with open_tier(tmp_path / "ssd") as tier:
        assert tier.namespaces() == {one: (b"one", b"first"), two: (b"two", b"second")}
        assert contents(tier) == {hash_of(1): payload_of(1, 200).tobytes()}


def test_forgotten_blocks_stay_forgotten(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, [1, 2, 3])
        tier.forget(np.ones(3, np.uint32), hashes_of([1, 3, 99]))
        assert tier.segments()[0].live_blocks == 1
    with open_tier(tmp_path / "ssd") as tier:
        assert list(contents(tier)) == [hash_of(2)]


def test_the_last_write_of_a_key_counts(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, [1, 1, 2], 100)
        write(tier, [2], 5000)
        assert tier.segments()[0].live_blocks == 2
        assert contents(tier)[hash_of(2)] == payload_of(2, 5000).tobytes()
        assert list(tier.verify()) == []


def test_reads_run_beside_writes_and_reclaim(tmp_path: Path, kind: str) -> None:
    with open_tier(tmp_path / "ssd", kind) as tier:
        kept = write(tier, list(range(20)))
        wrong: list[object] = []
        done = threading.Event()

        def reader() -> None:
            while not done.is_set():
                for number, got in enumerate(read(tier, kept)):
                    if got not in (None, payload_of(number, 5000).tobytes()):
                        wrong.append(number)

        threads = [threading.Thread(target=reader) for _ in range(3)]
        for thread in threads:
            thread.start()
        for batch in range(1, 20):
            while tier.needs_reclaim(100 * 8192):
                assert tier.reclaim(keep(0.2)) is not None
            assert write(tier, list(range(batch * 100, batch * 100 + 100))).ok.all()
        done.set()
        for thread in threads:
            thread.join()
        assert wrong == []


# -- space


def test_a_full_tier_keeps_a_prefix_and_says_so(tmp_path: Path, kind: str) -> None:
    with open_tier(tmp_path / "ssd", kind) as tier:
        at = write(tier, list(range(2000)))
        assert at.reason == "full"
        ok = int(at.ok.sum())
        assert 0 < ok < 2000
        assert at.ok[:ok].all()
        assert tier.counters["write_full"] == 2000 - ok
        assert tier.used_bytes <= tier.capacity_bytes
        assert tier.needs_reclaim(8192)
        assert set(contents(tier).values()) == set(expect(list(range(ok))))


def test_reclaim_moves_survivors_and_frees_a_segment(tmp_path: Path, kind: str) -> None:
    with open_tier(tmp_path / "ssd", kind) as tier:
        stored = int(write(tier, list(range(2000))).ok.sum())
        seen: list[Records] = []

        def every_fourth(found: Records) -> npt.NDArray[np.bool_]:
            seen.append(found)
            chosen: npt.NDArray[np.bool_] = np.arange(len(found)) % 4 == 0
            return chosen

        used = tier.used_bytes
        done = tier.reclaim(every_fourth)
        assert done is not None
        assert done.segment == 1
        assert len(done.moved) + len(done.dropped) == len(seen[0])
        assert len(done.moved) == -(-len(seen[0]) // 4)
        assert tier.used_bytes <= used
        assert not (tmp_path / "ssd/segments/0000000001.seg").exists()
        assert read(tier, done.moved) == expect(
            [int.from_bytes(h[:8].tobytes(), "big") for h in done.moved.hash]
        )
        assert read(tier, done.dropped) == [None] * len(done.dropped)
        assert len(contents(tier)) == stored - len(done.dropped)
    with open_tier(tmp_path / "ssd", kind) as tier:
        assert len(contents(tier)) == stored - len(done.dropped)
        assert None not in contents(tier).values()


def test_survivors_are_bounded(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, list(range(2000)))
        done = tier.reclaim(keep(1.0), survive_fraction=0.25)
        assert done is not None
        assert len(done.moved) * 2 * 4096 <= 0.25 * (1 << 20)


def test_reclaim_prefers_garbage(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        at = write(tier, list(range(400)))
        second = np.flatnonzero(at.segments == 2)
        tier.forget(np.ones(len(second), np.uint32), hashes_of(second.tolist()))
        done = tier.reclaim(keep(1.0))
        assert done is not None
        assert (done.segment, len(done.moved), len(done.dropped)) == (2, 0, 0)


def test_an_endless_stream_fits(tmp_path: Path, kind: str) -> None:
    with open_tier(tmp_path / "ssd", kind, capacity_bytes=4 << 20) as tier:
        for batch in range(30):
            while tier.needs_reclaim(60 * 8192):
                assert tier.reclaim(keep(0.3)) is not None
            assert write(tier, list(range(batch * 60, batch * 60 + 60))).ok.all()
            assert tier.used_bytes <= tier.capacity_bytes
        assert None not in contents(tier).values()


def test_a_block_larger_than_a_segment_is_refused(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        assert write(tier, [1], 1 << 20).reason == "too_large"
        assert write(tier, [1], (1 << 20) - 8192).ok.all()


def test_a_full_disk_is_a_refusal_and_not_an_error(small_disk: Path, kind: str) -> None:
    with open_tier(small_disk / "ssd", kind, capacity_bytes=64 << 20) as tier:
        at = write(tier, list(range(1000)))
        assert at.reason == "no_space"
        ok = int(at.ok.sum())
        assert 0 < ok < 1000
        assert tier.needs_reclaim(1)
        assert contents(tier) == dict(
            zip(
                [hash_of(n) for n in range(ok)],
                expect(list(range(ok))),
                strict=True,
            )
        )
        assert tier.reclaim(keep(0.0)) is not None
        assert write(tier, [5000]).ok.all()
    with open_tier(small_disk / "ssd", kind, capacity_bytes=64 << 20) as tier:
        assert contents(tier)[hash_of(5000)] == payload_of(5000, 5000).tobytes()


def test_a_full_disk_on_opening_is_a_clear_error(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"")
    with open(small_disk / "ballast", "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(small_disk).f_bavail * 4096)
    with pytest.raises(KVStoreError, match="ssd"):
        open_tier(small_disk / "ssd")


def test_a_full_disk_can_still_be_opened_and_read(small_disk: Path, kind: str) -> None:
    with open_tier(small_disk / "ssd", kind, capacity_bytes=64 << 20) as tier:
        ok = int(write(tier, list(range(1000))).ok.sum())
    with open(small_disk / "ballast", "w+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(small_disk).f_bavail * 4096)
    with open_tier(small_disk / "ssd", kind, capacity_bytes=64 << 20) as tier:
        assert len(contents(tier)) == ok
        assert None not in contents(tier).values()
        assert not write(tier, [5000], 600_000).ok.any()
        # The first segment freed may go to the index.
        while not write(tier, [5000]).ok.all():
            assert tier.reclaim(keep(0.0)) is not None


_FILE_SIZE = """
import resource, sys
from pathlib import Path
from tests.ssd_support import open_tier, write, read
tier = open_tier(Path(sys.argv[1]))
first = write(tier, [1])
resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, resource.RLIM_INFINITY))
at = write(tier, list(range(2, 1000)))
print(first.ok.all(), at.reason, read(tier, first)[0] is not None)
"""


def test_a_limit_on_file_size_is_a_refusal(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run(
        [sys.executable, "-c", _FILE_SIZE, tmp_path / "ssd"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "True"
    assert done.stdout.split()[1] in ("no_space", "io_error", "index_error")
    assert done.stdout.split()[2] == "True"


# -- opening


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent does not exist; create it"):
        open_tier(tmp_path / "absent" / "ssd")


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "ssd").write_text("mine")
    with pytest.raises(ConfigError, match="not a directory"):
        open_tier(tmp_path / "ssd")
    assert (tmp_path / "ssd").read_text() == "mine"


def test_read_only_directory(small_disk: Path) -> None:
    open_tier(small_disk / "ssd", capacity_bytes=3 << 20).close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for name in ("ssd", "other"):
        with pytest.raises(ConfigError, match="Give a directory that this user can write to"):
            open_tier(small_disk / name)


def test_foreign_directory_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "photos"
    path.mkdir()
    (path / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(IncompatibleError, match=r"cat\.jpg"):
        open_tier(path)
    assert sorted(os.listdir(path)) == ["cat.jpg"]
    assert (path / "cat.jpg").read_bytes() == b"meow"


def test_an_interrupted_creation_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "ssd"
    path.mkdir()
    (path / "kvstore.json.tmp").write_text("{")
    (path / "lock").write_text("")
    with open_tier(path) as tier:
        assert write(tier, [1]).ok.all()


@pytest.mark.parametrize("version", [0, 2, 999, "x"])
def test_another_format_is_refused_untouched(tmp_path: Path, version: object) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, [1])
    body = {"magic": ssd_format.MAGIC, "format": version, "uuid": "00" * 16}
    ssd_format.write_checked_json(tmp_path / "ssd/kvstore.json", body)
    before = _tree(tmp_path / "ssd")
    with pytest.raises(IncompatibleError, match="format"):
        open_tier(tmp_path / "ssd")
    assert _tree(tmp_path / "ssd") == before


def test_a_superblock_of_something_else_is_refused(tmp_path: Path) -> None:
    open_tier(tmp_path / "ssd").close()
    (tmp_path / "ssd/kvstore.json").write_text(json.dumps({"body": {"a": 1}, "checksum": 5}))
    with pytest.raises(IncompatibleError, match="not a kvstore file"):
        open_tier(tmp_path / "ssd")
    (tmp_path / "ssd/kvstore.json").write_bytes(b"\x00\xff")
    with pytest.raises(CorruptError, match="damaged"):
        open_tier(tmp_path / "ssd")


def test_a_second_opener_is_told_who_has_it(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd"):
        with pytest.raises(InUseError, match=f"process {os.getpid()}"):
            open_tier(tmp_path / "ssd")
        code = "import sys; from pathlib import Path; from tests.ssd_support import open_tier\n"
        code += "open_tier(Path(sys.argv[1]))"
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "ssd"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "InUseError" in done.stderr
        assert str(os.getpid()) in done.stderr
    open_tier(tmp_path / "ssd").close()


def _tree(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_truncated_segment_costs_only_its_tail(tmp_path: Path, index: str) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        at = write(tier, list(range(10)))
        tier.verify()
    os.truncate(tmp_path / "ssd/segments/0000000001.seg", int(at.pages[5]) * 4096 + 100)
    if index == "lost":
        shutil.rmtree(tmp_path / "ssd/index")
    with open_tier(tmp_path / "ssd") as tier:
        assert contents(tier) == dict(
            zip([hash_of(n) for n in range(5)], expect(list(range(5))), strict=True)
        )
        assert write(tier, [77]).segments[0] == 2
        if index == "kept":
            assert tier.counters["recover_missing_data"] == 5


def test_missing_segment_costs_only_its_blocks(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        at = write(tier, list(range(400)))
    os.unlink(tmp_path / "ssd/segments/0000000004.seg")
    os.unlink(tmp_path / "ssd/segments/0000000002.seg")
    with open_tier(tmp_path / "ssd") as tier:
        left = np.flatnonzero((at.segments != 2) & (at.segments != 4))
        assert set(contents(tier)) == {hash_of(n) for n in left.tolist()}
        assert tier.counters["recover_missing_data"] == 400 - len(left)
        assert write(tier, [999]).segments[0] > 4 or 4 not in at.segments
    with open_tier(tmp_path / "ssd") as tier:
        assert tier.counters["recover_missing_data"] == 0


def test_a_segment_of_another_directory_is_left_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with open_tier(tmp_path / name) as tier:
            write(tier, [1 if name == "a" else 2])
    stray = tmp_path / "a/segments/0000000009.seg"
    shutil.copy(tmp_path / "b/segments/0000000001.seg", stray)
    (tmp_path / "a/segments/notes.txt").write_text("mine")
    shutil.rmtree(tmp_path / "a/index")
    with open_tier(tmp_path / "a") as tier:
        assert list(contents(tier)) == [hash_of(1)]
        assert write(tier, list(range(3000))).reason == "full"
        while tier.reclaim(keep(0.0)) is not None:
            pass
    assert stray.exists()
    assert (tmp_path / "a/segments/notes.txt").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "empty", "version"])
def test_a_lost_index_is_rebuilt_and_the_old_one_kept(tmp_path: Path, damage: str) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, list(range(300)))
        write(tier, [5], 100)
    data = tmp_path / "ssd/index/data.mdb"
    if damage == "missing":
        shutil.rmtree(data.parent)
    elif damage == "truncated":
        os.truncate(data, 20_000)
    elif damage == "garbage":
        data.write_bytes(np.random.default_rng(0).bytes(data.stat().st_size))
    elif damage == "empty":
        data.write_bytes(b"")
    else:
        raw = bytearray(data.read_bytes())
        raw[20] ^= 0xFF
        raw[4096 + 20] ^= 0xFF
        data.write_bytes(raw)
    with open_tier(tmp_path / "ssd") as tier:
        assert tier.counters["index_rebuilt"] == 1
        found = contents(tier)
        assert len(found) == 300
        assert found[hash_of(5)] == payload_of(5, 100).tobytes()
        assert None not in found.values()
        assert (tmp_path / "ssd/index.damaged-1").exists() == (damage != "missing")
        assert write(tier, [300]).ok.all()
    with open_tier(tmp_path / "ssd") as tier:
        assert len(contents(tier)) == 301
        assert tier.counters["index_rebuilt"] == 0


def test_a_lost_namespace_table_never_gives_a_number_away(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, [1])
    os.unlink(tmp_path / "ssd/namespaces.json")
    with open_tier(tmp_path / "ssd") as tier:
        assert contents(tier) == {hash_of(1): payload_of(1, 5000).tobytes()}
    shutil.rmtree(tmp_path / "ssd/index")
    with open_tier(tmp_path / "ssd") as tier:
        tier.register_namespace(b"somebody else's", b"")
        assert contents(tier) == {}
    shutil.rmtree(tmp_path / "ssd/index")
    with open_tier(tmp_path / "ssd") as tier:
        assert contents(tier) == {}
        assert tier.counters["rebuild_unknown_namespace"] == 1


def test_rebuild_prefers_the_newest_copy(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, list(range(2000)))
        done = tier.reclaim(keep(0.5))
        assert done is not None
        write(tier, [1999], 100)
        before = contents(tier)
    shutil.rmtree(tmp_path / "ssd/index")
    with open_tier(tmp_path / "ssd") as tier:
        assert contents(tier) == before


def test_a_small_map_grows(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd", capacity_bytes=256 << 20, segment_bytes=64 << 20) as tier:
        tier._index._env.set_mapsize(1 << 20)
        numbers = list(range(9000))
        assert write(tier, numbers, 16).ok.all()
        assert sum(len(batch) for batch in tier.recover()) == 9000


# -- checks


def test_a_flipped_payload_bit_is_a_miss_and_a_finding(tmp_path: Path, kind: str) -> None:
    with open_tier(tmp_path / "ssd", kind) as tier:
        at = write(tier, [1, 2, 3])
        with open(tmp_path / "ssd/segments/0000000001.seg", "r+b") as file:
            file.seek(int(at.pages[1]) * 4096 + 4999)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
            file.flush()
            os.fsync(file.fileno())
        assert read(tier, at) == [expect([1])[0], None, expect([3])[0]]
        assert tier.counters["read_checksum"] == 1
        findings = list(tier.verify(repair=True))
        assert [(f.kind, f.segment, f.page) for f in findings] == [("payload", 1, int(at.pages[1]))]
        assert list(tier.verify()) == []
        assert set(contents(tier)) == {hash_of(1), hash_of(3)}


def test_a_location_that_is_not_there_is_a_miss(tmp_path: Path, kind: str) -> None:
    with open_tier(tmp_path / "ssd", kind) as tier:
        at = write(tier, [1, 2, 3])
        memory = Memory(3, 5000)
        for segments, pages, found in (
            ([9, 1, 1], at.pages.tolist(), [False, True, True]),
            ([1, 1, 1], [0, 10**6, 2**32 - 1], [False, False, False]),
        ):
            ok = tier.read(
                np.array(segments, np.uint32),
                np.array(pages, np.uint32),
                at.stored_bytes,
                at.stored_checksums,
                memory.addrs,
            )
            assert ok.tolist() == found


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        at = write(tier, [1, 2])
        memory = Memory(2, 5000)
        with pytest.raises(ValueError, match="pages"):
            tier.read(at.segments, at.pages[:1], at.stored_bytes, at.stored_checksums, memory.addrs)
        with pytest.raises(ValueError, match="addrs"):
            tier.read(
                at.segments,
                at.pages,
                at.stored_bytes,
                at.stored_checksums,
                np.zeros(2, np.uint64),
            )
        with pytest.raises(ValueError, match="namespace: 9"):
            write(tier, [1], namespace=9)
        with pytest.raises(ValueError, match="namespaces"):
            tier.forget(np.ones(2, np.uint32), hashes_of([1]))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("io", "aio"),
        ("io_depth", 0),
        ("segment_bytes", 5000),
        ("segment_bytes", 4096),
        ("capacity_bytes", 1 << 20),
        ("map_bytes", -1),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, setting: str, value: object) -> None:
    settings: dict[str, Any] = {"capacity_bytes": 8 << 20, "segment_bytes": 1 << 20, setting: value}
    with pytest.raises(ConfigError, match=setting):
        SsdConfig(tmp_path / "ssd", **settings)
    assert not (tmp_path / "ssd").exists()


def test_use_after_close_is_an_error(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "ssd")
    at = write(tier, [1])
    tier.close()
    tier.close()
    for act in (
        lambda: read(tier, at),
        lambda: write(tier, [2], namespace=1),
        lambda: list(tier.recover()),
        lambda: tier.forget(np.ones(1, np.uint32), hashes_of([1])),
        lambda: tier.reclaim(keep(0.0)),
        lambda: tier.register_namespace(b"x", b""),
        lambda: list(tier.verify()),
        lambda: tier.needs_reclaim(1),
        tier.sync,
    ):
        with pytest.raises(StoreClosedError):
            act()


# -- queues


def test_queue_rejects_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="kind"):
        _native.IoQueue("aio", 4)
    with pytest.raises(ValueError, match="depth"):
        _native.IoQueue("threads", 0)
    queue = _native.IoQueue("threads", 2)
    one = np.ones(1, np.uint64)
    with pytest.raises(ValueError, match="offsets"):
        queue.read(np.zeros(1, np.int32), one, one, one)
    with pytest.raises(ValueError, match="bytes"):
        queue.read(np.zeros(1, np.int32), one * np.uint64(0), one, np.ones(2, np.uint64))
    with pytest.raises(TypeError):
        queue.read(np.zeros(1, np.int64), one, one, one)


def test_queue_reports_each_extent(tmp_path: Path, kind: str) -> None:
    queue = _native.IoQueue(kind, 3)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    memory = Memory(40, 4096)
    memory.slots[:] = np.arange(40)[:, None]
    offsets = (np.arange(40) * 4096).astype(np.uint64)
    sizes = np.full(40, 4096, np.uint64)
    assert not queue.write(np.full(40, fd, np.int32), offsets, memory.addrs, sizes).any()
    got = Memory(40, 4096)
    fds = np.full(40, fd, np.int32)
    fds[3] = 10_000
    sums = _native.io_checksum_at(memory.addrs, sizes)
    sums[5] += np.uint64(1)
    offsets[7] = 4096 * 100
    errors = queue.read(fds, offsets, got.addrs, sizes, sums)
    assert {int(i): int(errors[i]) for i in np.flatnonzero(errors)} == {3: 9, 5: 74, 7: 61}
    assert np.delete(got.slots, [3, 7], 0).tolist() == np.delete(memory.slots, [3, 7], 0).tolist()
    os.close(fd)


def test_signals_do_not_disturb_the_queue(tmp_path: Path, kind: str) -> None:
    with open_tier(tmp_path / "ssd", kind, capacity_bytes=64 << 20, segment_bytes=16 << 20) as tier:
        old = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            at = write(tier, list(range(10)), 1 << 20)
            assert at.ok.all()
            for _ in range(5):
                assert None not in read(tier, at)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)


def test_config_is_checked_where_it_is_made() -> None:
    with pytest.raises(ConfigError, match="at least 3 segments"):
        SsdTier(SsdConfig("/nowhere/at/all", 1 << 20))


def test_what_is_written_after_a_forgotten_tail_and_a_reopening_survives_a_lost_index(
    tmp_path: Path,
) -> None:
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, list(range(10)))
        tier.forget(np.ones(3, np.uint32), hashes_of([7, 8, 9]))
    with open_tier(tmp_path / "ssd") as tier:
        write(tier, [20, 21])
    shutil.rmtree(tmp_path / "ssd" / "index")
    with open_tier(tmp_path / "ssd") as tier:
        assert {hash_of(20), hash_of(21)} <= set(contents(tier))

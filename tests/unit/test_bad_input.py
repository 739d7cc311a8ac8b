"""Bad input: each a clear error that names the thing, or a miss; and nothing is lost by it."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import (
    BlockHashes,
    BlockSpec,
    ConfigError,
    ContiguousBlocks,
    IncompatibleError,
    InUseError,
    KVStoreError,
    Namespace,
    OutOfSpaceError,
    PagedBuffers,
    Store,
    StoreConfig,
    load_config,
)
from kvstore.tiers.local import LocalControl
from tests.store_support import (
    BLOCK_BYTES,
    NAMESPACE,
    SPEC,
    buffers_of,
    chain,
    load,
    open_store,
    put,
)

HASHES = chain(1, 4)


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store() as opened:
        put(opened, HASHES)
        yield opened
        assert load(opened, HASHES) == 4  # whatever was refused, nothing was lost
        assert opened.stats()["kvstore_leases"] == 0


# --- hashes


@pytest.mark.parametrize(
    ("hashes", "says"),
    [
        ([b"short"], r"hashes\[0\]: has 5 bytes"),
        (b"0" * 32, "one string of bytes"),
        (np.zeros((2, 32), np.int8), r"need \(n, 32\) uint8"),
        (np.zeros((2, 31), np.uint8), r"need \(n, 32\) uint8"),
        (np.zeros(32, np.uint8), r"need \(n, 32\) uint8"),
    ],
)
def test_hashes_that_are_none(store: Store, hashes: Any, says: str) -> None:
    blocks = buffers_of(HASHES)
    for use in (
        lambda: store.match(hashes),
        lambda: store.put(hashes, blocks),
        lambda: store.load(hashes, blocks),
        lambda: store.acquire(hashes),
        lambda: store.remove(hashes),
    ):
        with pytest.raises(ValueError, match=says):
            use()


def test_chains_without_the_hash_before_them() -> None:
    with pytest.raises(ValueError, match="parent"):
        BlockHashes.chain(HASHES.array, start=2)
    with pytest.raises(ValueError, match="parent: has 3 bytes"):
        BlockHashes.chain(HASHES.array, start=2, parent=b"abc")
    with pytest.raises(ValueError, match="start: -2"):
        BlockHashes.chain(HASHES.array, start=-2)


# --- buffers and block ids


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        ([0, 1, 2, 4], IndexError, "block id 4 "),
        ([0, 1, 2, -1], IndexError, "block id -1 "),
        ([0, 1, 2], ConfigError, "block_ids: 3 given for 4 hashes"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, "block_ids must be integers"),
        ([[0, 1], [2, 3]], ValueError, "block_ids must have one dimension"),
        (["a", "b", "c", "d"], TypeError, "block_ids must be integers"),
    ],
)
def test_block_ids_that_are_none(store: Store, ids: Any, error: type[Exception], says: str) -> None:
    blocks = buffers_of(HASHES)
    with pytest.raises(error, match=says):
        store.load(HASHES, blocks, ids)
    with pytest.raises(error, match=says):
        store.put(chain(2, 4), blocks, ids)
    assert store.match(chain(2, 4)) == 0
    with pytest.raises(error, match=says):
        store.put(chain(2, 4), blocks, ids, ack="ssd")
    assert store.stats()["kvstore_cpu_used_bytes"] == 4 * BLOCK_BYTES


def test_a_destination_given_twice(store: Store) -> None:
    with pytest.raises(ValueError, match="block id 2 is a destination twice"):
        store.load(HASHES, buffers_of(HASHES), [0, 2, 1, 2])
    with store.acquire(HASHES) as lease, pytest.raises(ValueError, match="2"):
        lease.load(buffers_of(HASHES), [0, 2, 1, 2])
    one = ContiguousBlocks(np.zeros((1, BLOCK_BYTES), np.uint8))
    assert store.put(chain(2, 2), one, [0, 0]).wait().num_stored == 2  # a source may be


def test_buffers_of_another_block_size(store: Store) -> None:
    wrong = ContiguousBlocks(np.zeros((4, 100), np.uint8))
    uses: list[Callable[[], object]] = [
        lambda: store.load(HASHES, wrong),
        lambda: store.put(chain(2, 4), wrong),
        lambda: store.put(chain(2, 4), wrong, ack="ssd"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="100"):
            use()
    with store.reserve(chain(2, 4)) as reservation, pytest.raises(ConfigError, match="100"):
        reservation.write(wrong, [0, 1, 2, 3])
    with store.acquire(HASHES) as lease, pytest.raises(ConfigError, match="100"):
        lease.load(wrong, [0, 1, 2, 3])
    assert store.stats()["kvstore_cpu_used_bytes"] == 4 * BLOCK_BYTES


def test_read_only_buffers_are_no_destination(store: Store) -> None:
    room = np.zeros((4, BLOCK_BYTES), np.uint8)
    room.flags.writeable = False
    blocks = ContiguousBlocks(room)
    with pytest.raises(ConfigError, match="read-only"):
        store.load(HASHES, blocks)
    with store.acquire(HASHES) as lease, pytest.raises(ConfigError, match="read-only"):
        lease.load(blocks, [0, 1, 2, 3])
    assert store.put(chain(2, 2), blocks, [0, 1]).wait().num_stored == 2


def test_buffers_that_overlap_the_arena(store: Store) -> None:
    control = store.control
    assert isinstance(control, LocalControl)
    arena = control.arena
    inside = ContiguousBlocks(arena[8192 : 8192 + 4 * BLOCK_BYTES].reshape(4, BLOCK_BYTES))
    with pytest.raises(ValueError, match="overlap"):
        store.load(HASHES, inside)
    with pytest.raises(ValueError, match="overlap"):
        store.put(chain(2, 4), inside)


def test_tensors_of_another_dtype_or_shape() -> None:
    shape = (8, 4, 2, 32, 1, 64)
    with pytest.raises(ConfigError, match=r"pool.*float64"):
        PagedBuffers.reference(np.zeros(shape, np.float64), SPEC)
    with pytest.raises(ConfigError, match="pool"):
        PagedBuffers.reference(np.zeros((8, 4, 2, 32, 1, 63), np.float32), SPEC)
    with pytest.raises(ConfigError, match="pool"):
        PagedBuffers.reference(np.zeros((8, 4, 2, 32, 64), np.float32), SPEC)
    with pytest.raises(ConfigError, match="array"):
        ContiguousBlocks("text")
    with pytest.raises(ConfigError, match="array"):
        ContiguousBlocks(np.zeros((0, 16), np.uint8))
    with pytest.raises(ConfigError, match="not contiguous"):
        ContiguousBlocks(np.zeros((4, 16), np.uint8)[:, ::2])


def test_levels_and_layers_that_are_none(store: Store) -> None:
    blocks = buffers_of(HASHES)
    with pytest.raises(ConfigError, match="ack: 'disk' is not one of memory, ssd, durable"):
        store.put(HASHES, blocks, ack="disk")  # type: ignore[arg-type]
    with store.reserve(chain(2, 1)) as reservation:
        with pytest.raises(ConfigError, match="ack: 'disk'"):
            reservation.commit("disk")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="block_ids: 2 given, 1 are wanted"):
            reservation.write(blocks, [0, 1])
        with pytest.raises(ConfigError, match="layers 0 to 9"):
            reservation.write(blocks, [0], layers=(0, 9))


# --- the native interface, for whoever calls it without the store


def test_the_core_checks_its_arguments() -> None:
    core = kvstore._native.StoreCore(1 << 20, 1 << 20, False, "lru")
    with pytest.raises(ValueError, match="block_bytes must be positive"):
        core.add_namespace(0)
    with pytest.raises(ValueError, match="does not fit"):
        core.add_namespace(1 << 20)
    ns, owner = core.add_namespace(4096), core.new_owner()
    array = HASHES.array
    with pytest.raises(IndexError, match="namespace_id"):
        core.match(7, array, 0)
    with pytest.raises(ValueError, match="hashes must have shape"):
        core.match(ns, array[:, :31], 0)
    with pytest.raises(ValueError, match="parent is needed"):
        core.reserve(owner, ns, array, 3, None, False)
    with pytest.raises(ValueError, match="parent must be 32 bytes"):
        core.reserve(owner, ns, array, 3, b"short", False)
    reservation, _, _ = core.reserve(owner, ns, array, 0, None, False)
    with pytest.raises(ValueError, match="checksums"):
        core.commit(owner, reservation, np.zeros(3, np.uint64), None)
    with pytest.raises(ValueError, match="ok"):
        core.commit(owner, reservation, np.zeros(4, np.uint64), np.ones(5, bool))
    assert core.commit(owner, reservation, np.zeros(4, np.uint64), np.ones(4, bool))
    with pytest.raises(ValueError, match="records"):
        core.set_ssd(np.zeros(3, np.uint8))
    assert not core.release(owner, 12345)
    core.abort(owner, 12345)
    assert not core.commit(owner, 12345, None, None)
    with pytest.raises(ValueError, match="chunk_bytes"):
        kvstore._native.StoreCore(1 << 20, 5000, False, "lru")
    with pytest.raises(ValueError, match="eviction policy: random"):
        kvstore._native.StoreCore(1 << 20, 1 << 20, False, "random")


# --- settings


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"cpu": "1KiB"}, "cpu: 1024 bytes is less than 1 MiB"),
        ({"cpu": "lots"}, "cpu: 'lots' is not a size"),
        ({"cpu": -1}, "cpu: -1 is negative"),
        ({"cpu": "9" * 400 + "TiB"}, "cpu: .* is too large"),
        ({"cpu": "4194304TiB"}, "cpu: .* is too large"),
        ({"chunk": "2MiB"}, "cpu: 1048576 bytes do not hold 1 x chunk"),
        ({"chunk": "x"}, "chunk: 'x' is not a size"),
        ({"eviction": "random"}, "eviction: 'random' is not one of lfu, lru"),
        ({"verify": "never"}, "verify: 'never' is not one of boundary, always"),
        ({"threads": 0}, "threads: 0 is not an integer between 1 and 1024"),
        ({"threads": "two"}, "threads: 'two' is not a number"),
        ({"threads": True}, "threads: True is not an integer"),
        ({"huge_pages": "perhaps"}, "huge_pages: 'perhaps' is not true or false"),
        ({"lease_seconds": 0}, "lease_seconds: 0 is not positive"),
        ({"lease_seconds": float("nan")}, "lease_seconds: nan is not positive"),
        ({"lease_seconds": "soon"}, "lease_seconds: 'soon' is not a number"),
        ({"ssd_io": "aio"}, "ssd_io: 'aio' is not one of auto, uring, threads"),
        ({"ssd_depth": 99999}, "ssd_depth: 99999 is not"),
        (
            {"ssd_capacity": "1MiB", "ssd": "here"},
            "ssd_capacity: 1048576 bytes do not hold 3 x ssd_segment",
        ),
        ({"codec": "lzma", "ssd": "here"}, "codec"),
        ({"colour": "blue"}, "colour: no such setting; there are chunk, codec"),
    ],
)
def test_settings_that_are_none(
    setting: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        kvstore.open(NAMESPACE, **{"cpu": "1MiB", **setting})


def test_settings_given_as_objects_are_checked_alike() -> None:
    with pytest.raises(ConfigError, match="lease_seconds: 'soon'"):
        StoreConfig(lease_seconds="soon")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="threads: '2'"):
        StoreConfig(threads="2")  # type: ignore[arg-type]


def test_the_environment_is_checked() -> None:
    assert load_config(environ={"KVSTORE_CPU": "2MiB", "HOME": "/"}).cpu == 2 << 20
    with pytest.raises(ConfigError, match="cpu: 'much'"):
        load_config(environ={"KVSTORE_CPU": "much"})
    with pytest.raises(ConfigError, match="KVSTORE_CUP: no such setting"):
        load_config(environ={"KVSTORE_CUP": "2MiB"})
    load_config(environ={"KVSTORE_UCX_LIB": "/x", "KVSTORE_BUILD_JOBS": "1"})  # others' names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"cpu = [1]", "cpu: .* is not a size"),
        (b"cup = '1GiB'", "cup: no such setting"),
        (b"[store]\ncpu = '1GiB'", "store: no such setting"),
        (b"cpu = ", "is not TOML"),
        (b"\xff\xfe\x00", "is not TOML"),
        (b"threads = 2.5", "threads: 2.5"),
    ],
)
def test_a_wrong_file_of_settings(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=says):
        load_config(path, environ={})
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.toml", environ={})
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path, environ={})


def test_a_model_without_a_spec() -> None:
    with pytest.raises(ConfigError, match="spec"):
        kvstore.open("model", cpu="1MiB")
    with pytest.raises(ConfigError, match="head_dim"):
        BlockSpec(num_layers=1, num_kv_heads=1, head_dim=0, block_tokens=1, dtype="float16")
    with pytest.raises(ConfigError, match="dtype: 'float12'"):
        BlockSpec(num_layers=1, num_kv_heads=1, head_dim=1, block_tokens=1, dtype="float12")


def test_a_block_larger_than_dram() -> None:
    huge = BlockSpec(num_layers=64, num_kv_heads=8, head_dim=128, block_tokens=16, dtype="float16")
    with pytest.raises(ConfigError, match="cpu: 1048576 bytes do not hold one block of 4194304"):
        kvstore.open(huge, cpu="1MiB")


def test_memory_that_is_not_there() -> None:
    with pytest.raises(OutOfSpaceError, match="cpu: 1125899906842624 bytes, this machine has"):
        kvstore.open(NAMESPACE, cpu=1 << 50)


# --- directories


def test_a_directory_that_cannot_be_made_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(KVStoreError, match="file"):
        open_store(tmp_path / "file")
    with pytest.raises(KVStoreError, match="file"):
        open_store(tmp_path / "file" / "below")
    with pytest.raises(KVStoreError, match="/proc"):
        open_store(Path("/proc/kvstore"))


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises((IncompatibleError, ConfigError), match=str(tmp_path)):
        open_store(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def _filled(path: Path) -> None:
    with open_store(path) as store:
        assert put(store, HASHES, ack="ssd").ack == "ssd"


def test_a_directory_of_a_newer_version_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "ssd"
    _filled(path)
    marker = next(file for file in sorted(path.iterdir()) if file.suffix == ".json")
    old = marker.read_text()
    assert '"version"' in old or "format" in old
    changed = old.replace('"version": 1', '"version": 99').replace('"version":1', '"version":99')
    changed = changed.replace('"format": 1', '"format": 99').replace('"format":1', '"format":99')
    assert changed != old
    marker.write_text(changed)
    before = _snapshot(path)
    with pytest.raises(IncompatibleError, match=str(path)):
        open_store(path)
    assert _snapshot(path) == before
    marker.write_text(old)
    with open_store(path) as store:
        assert load(store, HASHES) == 4


def _snapshot(path: Path) -> dict[str, bytes]:
    return {
        str(file): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and "lock" not in file.name
    }


@pytest.mark.parametrize("what", ["segment", "data.mdb", ".json"])
@pytest.mark.parametrize("size", [0, 10, 5000])
def test_truncated_files_are_misses_or_refused(tmp_path: Path, what: str, size: int) -> None:
    path = tmp_path / "ssd"
    _filled(path)
    files = [f for f in path.rglob("*") if f.is_file() and (what in f.name or what in str(f))]
    for file in files:
        with file.open("r+b") as opened:
            opened.truncate(min(size, file.stat().st_size))
    try:
        store = open_store(path)
    except KVStoreError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert str(path) in refused
        return
    with store:
        load(store, HASHES)  # compares every byte that comes
        assert put(store, HASHES, ack="ssd").num_blocks == 4
        assert load(store, HASHES) == 4


def test_two_processes_cannot_open_one_directory(tmp_path: Path) -> None:
    path = tmp_path / "ssd"
    opener = (
        "import sys, kvstore\n"
        "from tests.store_support import NAMESPACE\n"
        "try:\n"
        "    kvstore.open(NAMESPACE, cpu='1MiB', ssd=sys.argv[1])\n"
        "except kvstore.InUseError as error:\n"
        "    print(error)\n"
    )
    with open_store(path) as store:
        put(store, HASHES, ack="ssd")
        with pytest.raises(InUseError, match=str(path)):
            open_store(path)
        second = subprocess.run(
            [sys.executable, "-c", opener, str(path)], capture_output=True, text=True, check=True
        )
        assert str(path) in second.stdout
        assert load(store, HASHES) == 4
    with open_store(path) as store:
        assert load(store, HASHES) == 4


def test_a_directory_that_is_moved_while_closed_still_works(tmp_path: Path) -> None:
    _filled(tmp_path / "ssd")
    shutil.move(tmp_path / "ssd", tmp_path / "elsewhere")
    with open_store(tmp_path / "elsewhere") as store:
        assert load(store, HASHES) == 4


def test_namespaces_that_differ_never_share_a_block(tmp_path: Path) -> None:
    _filled(tmp_path / "ssd")
    others = [
        Namespace("model2", SPEC),
        Namespace("model", SPEC, revision="2"),
        Namespace("model", SPEC, lora="a"),
        Namespace("model", SPEC, salt=b"tenant"),
        Namespace("model", SPEC, tp_rank=1, tp_size=2),
        Namespace("model", SPEC, layout="engine-private"),
    ]
    for other in others:
        with open_store(tmp_path / "ssd", namespace=other) as store:
            assert load(store, HASHES) == 0

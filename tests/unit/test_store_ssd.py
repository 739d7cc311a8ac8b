"""The embedded store with an ssd below it: what it keeps over reopening, and what it gives up.

Proved on real directories: promised blocks are exact after reopening, removed ones are gone, and
faults (flipped bits, a full queue, a failed opening) cost misses at most. Several tests are named
after the bug that they once showed.
"""

import json
import threading
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
    DeadlineExceededError,
    Hit,
    Namespace,
    Store,
    StoreClosedError,
    StoreConfig,
)
from kvstore.records import NOT_ON_SSD, RECORD, records_from
from kvstore.tiers.local import LocalControl, Tiers
from tests.store_support import (
    BLOCK_BYTES,
    NAMESPACE,
    SLOTS,
    SPEC,
    WAIT_S,
    buffers_of,
    bytes_of,
    chain,
    load,
    open_store,
    put,
)


def hold_writer(store: Store) -> threading.Event:
    """Stop the write-behind thread before its next step until the event is set."""
    ssd = _tiers(store).ssd
    assert ssd is not None
    gate = threading.Event()
    write = ssd._writer._write

    def gated(jobs: Any) -> None:
        gate.wait(WAIT_S)
        write(jobs)

    ssd._writer._write = gated
    return gate


def _tiers(store: Store) -> Tiers:
    control = store.control
    assert isinstance(control, LocalControl)
    return control.tiers


@pytest.mark.parametrize("ack", ["ssd", "durable"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_acknowledged_blocks_are_exact_after_reopening(
    tmp_path: Path, ack: str, codec: str
) -> None:
    chains = [chain(seed, 3 + seed) for seed in range(1, 6)]
    with open_store(tmp_path / "ssd", codec=codec) as store:
        for hashes in chains:
            assert put(store, hashes, ack=ack).ack == ack
    with open_store(tmp_path / "ssd", codec=codec) as store:
        for hashes in chains:
            assert store.lookup(hashes) == Hit(len(hashes), 0, len(hashes))
            assert load(store, hashes) == len(hashes)
        assert store.stats()["kvstore_hit_ssd_blocks_total"] > 0


def test_close_writes_out_what_is_queued(tmp_path: Path) -> None:
    hashes = chain(1, 12)
    with open_store(tmp_path / "ssd") as store:
        put(store, hashes)
    with open_store(tmp_path / "ssd") as store:
        assert load(store, hashes) == 12


@pytest.mark.parametrize("how", ["remove", "clear"])
def test_removed_blocks_stay_removed_after_reopening(tmp_path: Path, how: str) -> None:
    hashes, other = chain(1, 5), chain(2, 5)
    with open_store(tmp_path / "ssd") as store:
        put(store, hashes, ack="ssd")
        if how == "remove":
            put(store, other, ack="ssd")
            store.remove(hashes[2:3])
        else:
            store.clear()
    with open_store(tmp_path / "ssd") as store:
        assert store.match(hashes) == (2 if how == "remove" else 0)
        assert load(store, other) == (5 if how == "remove" else 0)
        assert put(store, hashes, ack="ssd").ack == "ssd"
        assert load(store, hashes) == 5


def test_blocks_that_joined_their_chain_late_are_there_after_reopening(tmp_path: Path) -> None:
    hashes = chain(1, 6)
    with open_store(tmp_path / "ssd") as store:
        assert put(store, BlockHashes.of(hashes.array[:2]), ack="ssd").ack == "ssd"
        assert put(store, hashes, ack="ssd").ack == "ssd"
    with open_store(tmp_path / "ssd") as store:
        assert load(store, hashes) == 6
        longer = hashes + chain(2, 2, hashes)
        assert put(store, longer, ack="ssd").num_stored == 2
    with open_store(tmp_path / "ssd") as store:
        assert load(store, longer) == 8


def test_a_put_refused_in_part_is_acknowledged_for_what_was_stored(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        held, more = chain(1, SLOTS - 4), chain(2, 10)
        put(store, held)
        assert store.flush(WAIT_S)
        with store.acquire(held):
            result = put(store, more, ack="ssd")
            assert (result.num_stored, result.num_no_space, result.ack) == (4, 6, "ssd")
    with open_store(tmp_path / "ssd") as store:
        assert load(store, more) == 4


def test_a_block_that_left_dram_holds_up_no_promised_one(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        gate = hold_writer(store)
        put(store, chain(9, 1))  # the step that waits at the gate
        first, second = chain(1, 3), chain(2, 3)
        put(store, first)
        promised = store.put(second, buffers_of(second), ack="ssd")
        store.remove(first)
        gate.set()
        assert promised.wait(WAIT_S).ack == "ssd"


def test_bytes_of_a_removed_block_do_not_come_back_from_ssd(tmp_path: Path) -> None:
    hashes = chain(1, 2)
    other = np.zeros((2, BLOCK_BYTES), np.uint8)
    with open_store(tmp_path / "ssd", verify="always") as store:
        put(store, hashes, ack="ssd")
        store.remove(hashes)
        assert store.put(hashes, ContiguousBlocks(other), ack="ssd").wait(WAIT_S).ack == "ssd"
        put(store, chain(2, SLOTS))
        assert store.flush(WAIT_S)
        room = np.ones((2, BLOCK_BYTES), np.uint8)
        assert store.load(hashes, ContiguousBlocks(room)).wait(WAIT_S).num_blocks == 2
        assert not room.any()


def test_a_copy_of_other_bytes_becomes_garbage() -> None:
    core = kvstore._native.StoreCore(1 << 20, 1 << 20, False, "lru")
    ns, owner = core.add_namespace(4096), core.new_owner()
    hashes = chain(1, 1)
    buffers = ContiguousBlocks(np.zeros((1, 4096), np.uint8))  # a plan alone keeps no memory alive
    core.put(owner, ns, hashes.array, 0, None, buffers.plan, np.zeros(1, np.int64), 1)
    rows = records_from(core.describe(ns, hashes.array))
    rows["segment"], rows["checksum"] = 1, rows["checksum"] + np.uint64(1)
    core.set_ssd(rows)
    assert core.residency(ns, hashes.array).tolist() == [1]
    assert records_from(core.take_garbage())["segment"].tolist() == [1]
    rows["checksum"] -= np.uint64(1)
    core.set_ssd(rows)
    assert core.residency(ns, hashes.array).tolist() == [3]
    assert records_from(core.describe(ns, hashes.array))["segment"].tolist() != [NOT_ON_SSD]
    assert rows.dtype == RECORD


def test_a_failed_opening_gives_the_directory_back(tmp_path: Path) -> None:
    hashes = chain(1, 3)
    with open_store(tmp_path / "ssd") as store:
        put(store, hashes, ack="ssd")
    with pytest.raises(ConfigError, match="codec"):
        open_store(tmp_path / "ssd", codec="lzma")
    small = Namespace("small", BlockSpec(1, 1, 16, 16, "float32"))
    with pytest.raises(ConfigError, match="chunk"):  # the directory's blocks do not fit
        kvstore.open(small, cpu="1MiB", chunk="16KiB", ssd=str(tmp_path / "ssd"))
    with open_store(tmp_path / "ssd") as store:
        assert load(store, hashes) == 3


def test_closing_ends_a_prefetch_that_has_not_begun(tmp_path: Path) -> None:
    store = open_store(tmp_path / "ssd")
    hashes = chain(1, 3)
    put(store, hashes, ack="ssd")
    gate = threading.Event()
    _tiers(store)._promoter._pool.submit(gate.wait, WAIT_S)
    waiting = store.prefetch(hashes)
    with pytest.raises(DeadlineExceededError):
        waiting.wait(0.0)
    closing = threading.Thread(target=store.close)
    closing.start()
    while not _tiers_closed(store):
        pass
    gate.set()
    closing.join(WAIT_S)
    with pytest.raises(StoreClosedError, match="closed"):
        waiting.wait(WAIT_S)


def _tiers_closed(store: Store) -> bool:
    control = store._control
    assert isinstance(control, LocalControl)
    return control.tiers._promoter._pool._shutdown


def test_a_read_that_misses_its_deadline_is_a_miss(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        hashes = chain(1, 3)
        put(store, hashes, ack="ssd")
        put(store, chain(2, SLOTS), ack="ssd")
        gate = threading.Event()
        _tiers(store)._promoter._pool.submit(gate.wait, WAIT_S)
        assert load(store, hashes, timeout=0.0) == 0
        assert store.stats()["kvstore_deadline_exceeded_total"] == 1
        gate.set()
        assert load(store, hashes) == 3


def test_what_found_the_queue_full_is_written_when_there_is_room(tmp_path: Path) -> None:
    """A burst lost its copies on ssd for good."""
    with open_store(tmp_path / "ssd", write_behind=4 * BLOCK_BYTES) as store:
        gate = hold_writer(store)
        chains = [chain(1, 3), chain(2, 3), chain(3, 1)]
        for hashes in chains:
            put(store, hashes)
        assert store.stats()["kvstore_write_behind_bytes"] <= 4 * BLOCK_BYTES
        assert store.stats()["kvstore_write_behind_deferred_blocks_total"] == 3
        assert store.stats()["kvstore_write_behind_backlog_blocks"] == 3
        gate.set()
        assert store.flush(WAIT_S)
        assert store.stats()["kvstore_write_behind_backlog_blocks"] == 0
        assert store.stats()["kvstore_write_behind_dropped_blocks_total"] == 0
        for hashes in chains:
            assert store.lookup(hashes) == Hit(len(hashes), len(hashes), 0)
            assert (store.control.residency(hashes) == 3).all()


def test_flipped_bits_on_ssd_are_misses(tmp_path: Path) -> None:
    hashes = chain(1, 8)
    with open_store(tmp_path / "ssd") as store:
        assert put(store, hashes, ack="durable").ack == "durable"
    needle = bytes_of(hashes[3])[:64].tobytes()
    flipped = 0
    for file in (tmp_path / "ssd").rglob("*"):
        if file.is_file() and needle in (data := bytearray(file.read_bytes())):
            data[data.index(needle) + 5000] ^= 1
            file.write_bytes(data)
            flipped += 1
    assert flipped == 1
    with open_store(tmp_path / "ssd") as store:
        assert load(store, hashes) == 3
        assert store.stats()["kvstore_ssd_read_failures_total"] == 1
        assert store.match(hashes) == 3
        assert put(store, hashes, ack="ssd").ack == "ssd"
        assert load(store, hashes) == 8


def test_more_than_the_ssd_holds_is_reclaimed(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        chains = [chain(seed, 1 + seed % 9) for seed in range(1, 36)]
        for hashes in chains:
            put(store, hashes)
            store.flush(WAIT_S)
            load(store, chains[0])
        stats = store.stats()
        assert stats["kvstore_ssd_reclaimed_segments_total"] > 0
        assert stats["kvstore_ssd_used_bytes"] <= stats["kvstore_ssd_capacity_bytes"]
        found = [store.match(hashes) for hashes in chains]
        for hashes, count in zip(chains, found, strict=True):
            # Reading in may push out what reclaim has left in DRAM only.
            assert load(store, hashes) <= count
    with open_store(tmp_path / "ssd") as store:
        again = [load(store, hashes) for hashes in chains]
        assert sum(again) > 15


def test_a_chain_longer_than_the_ssd_ends(tmp_path: Path) -> None:
    # Every block but the last has one that continues it: none is worth less than another.
    with open_store(tmp_path / "ssd", ssd_capacity="2MiB") as store:
        hashes = chain(1, 120)
        for begin in range(0, 120, 5):
            put(store, hashes[begin : begin + 5])
            store.flush(WAIT_S)
        found = store.match(hashes)
        assert load(store, hashes) <= found


def test_namespaces_share_an_arena_and_never_a_block(tmp_path: Path) -> None:
    config = StoreConfig(cpu="1MiB", chunk="128KiB", ssd=str(tmp_path), ssd_capacity="4MiB",
                         ssd_segment="512KiB")  # fmt: skip
    small = Namespace("small", BlockSpec(1, 1, 16, 16, "float32"))
    tenant = Namespace("model", SPEC, salt=b"a tenant's long and random salt")
    hashes = chain(1, 4)
    tiers = Tiers(config, BLOCK_BYTES)
    stores = [
        Store(LocalControl(tiers, name, owns_tiers=False)) for name in (NAMESPACE, small, tenant)
    ]
    put(stores[0], hashes)
    assert [store.match(hashes) for store in stores] == [4, 0, 0]
    put(stores[1], hashes)
    assert tiers.core.stats()["blocks"] == 8
    assert [load(store, hashes) for store in stores] == [4, 4, 0]
    stores[0].clear()
    assert [load(store, hashes) for store in stores] == [0, 4, 0]
    for store in stores:
        store.close()
    tiers.close()
    with open_store(tmp_path) as store:
        assert store.match(hashes) == 0
    with open_store(tmp_path, namespace=small, chunk="128KiB") as store:
        assert load(store, hashes) == 4


def test_every_client_sees_every_event_of_its_namespace() -> None:
    config = StoreConfig(cpu="1MiB", chunk="1MiB")
    tenant = Namespace("model", SPEC, salt=b"a tenant's long and random salt")
    tiers = Tiers(config, BLOCK_BYTES)
    first, second, other = (
        Store(LocalControl(tiers, name, owns_tiers=False))
        for name in (NAMESPACE, NAMESPACE, tenant)
    )
    for store in (first, second, other):
        assert list(store.events()) == []
    seen = {id(store): 0 for store in (first, second, other)}
    counts = {id(store): 0 for store in (first, second, other)}
    for seed in range(1, 9):
        put((first, other)[seed % 2], chain(seed, 3))
        for store in (first, second, other)[: 1 + seed % 3]:
            for event in store.events():
                count = len(getattr(event, "block_hashes", [0]))
                assert seen[id(store)] in (0, event.sequence - count)  # no gap
                seen[id(store)] = event.sequence
                counts[id(store)] += count
    for store in (first, second, other):
        counts[id(store)] += sum(len(getattr(e, "block_hashes", [0])) for e in store.events())
    # 24 blocks were put to 15 slots; the nine that left did so in the order of the chains.
    assert counts[id(first)] == counts[id(second)] > 12
    assert sum(counts.values()) - counts[id(second)] == 24 + 9
    for store in (first, second, other):
        store.close()
    tiers.close()


def test_block_sizes_take_chunks_from_one_another() -> None:
    config = StoreConfig(cpu="1MiB", chunk="128KiB")
    small = Namespace("small", BlockSpec(1, 1, 64, 16, "float32"))  # 8 KiB
    tiers = Tiers(config, BLOCK_BYTES)
    large_store, small_store = (
        Store(LocalControl(tiers, name, owns_tiers=False)) for name in (NAMESPACE, small)
    )
    for seed in range(20):
        put(large_store, chain(seed, 2))
    # The arena is full of large blocks; the small ones get their share of the chunks, no more.
    few = [chain(100 + seed, 10) for seed in range(10)]
    assert [put(small_store, hashes).num_stored for hashes in few] == [10] * 10
    assert sum(load(small_store, hashes) for hashes in few) >= 4 * 14
    held = chain(200, 3)
    put(large_store, held)
    with large_store.acquire(held) as lease:
        for seed in range(300, 340):
            put(small_store, chain(seed, 7))
        assert len(lease) == 3
        assert load(large_store, held) == 3
    for store in (large_store, small_store):
        store.clear()
        store.close()
    assert tiers.core.stats()["cpu_used_bytes"] == 0
    assert tiers.core.stats()["blocks"] == 0
    tiers.close()


def test_a_namespace_that_names_itself_otherwise_is_refused(tmp_path: Path) -> None:
    described = NAMESPACE.describe()
    assert Namespace.from_description(json.loads(json.dumps(described))) == NAMESPACE
    with pytest.raises(kvstore.IncompatibleError):
        Namespace.from_description({**described, "version": 99})

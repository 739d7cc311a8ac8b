"""What moves between the tiers, and under whose name it is kept.

Promotion: a block that many wait for is read once, who waits comes before prefetches, and both are
bounded. Write-behind: a model of its queue and backlog, driven by Hypothesis. Names: tenants own
what they stored, over reopening, and a directory of version 0.1.0 belongs to the default one.
"""

import json
import os
import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import BlockHashes, IncompatibleError, Namespace, Store, StoreConfig, _native
from kvstore.metrics import Counters
from kvstore.tiers import promotion
from kvstore.tiers.admission import Origin
from kvstore.tiers.local import LocalControl, Tiers
from kvstore.tiers.names import (
    Tenant,
    describe_stored,
    pack_metadata,
    parse_stored,
    stored_key,
    unpack_metadata,
)
from kvstore.tiers.ssd_side import SsdSide
from kvstore.tiers.write_behind import Job, WriteBehind
from tests.store_support import (
    BLOCK_BYTES,
    NAMESPACE,
    SLOTS,
    SPEC,
    WAIT_S,
    chain,
    load,
    open_store,
    put,
)

OTHER = Namespace("other", SPEC)


def tiers_of(store: Store) -> Tiers:
    control = store.control
    assert isinstance(control, LocalControl)
    return control.tiers


def side_of(store: Store) -> SsdSide:
    ssd = tiers_of(store).ssd
    assert ssd is not None
    return ssd


def count(store: Store, name: str) -> int:
    return int(store.stats()[f"kvstore_{name}_total"])


def on_ssd_only(store: Store, chains: list[BlockHashes]) -> None:
    for hashes in chains:
        assert put(store, hashes, ack="ssd").ack == "ssd"
    assert put(store, chain(99, SLOTS)).num_stored == SLOTS
    assert store.flush(WAIT_S)


class Reads:
    """Stands between a store and its ssd: notes each read, and lets it go on when told to."""

    def __init__(self, store: Store, *, gated: bool = False) -> None:
        self.rows: list[list[bytes]] = []
        self.begun = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.gated = gated
        side = side_of(store)
        read = side.read

        def noted(number: int, rows: Any, addresses: Any) -> npt.NDArray[np.bool_]:
            self.rows.append([row["hash"].tobytes() for row in rows])
            self.begun.release()
            if self.gated:
                assert self.gate.acquire(timeout=WAIT_S)
            return read(number, rows, addresses)

        side.read = noted  # type: ignore[method-assign]

    def wait(self) -> None:
        assert self.begun.acquire(timeout=WAIT_S)

    def let_go(self) -> None:
        self.gated = False
        self.gate.release(1000)


# -- promotion


def test_blocks_that_many_wait_for_are_read_once(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        hashes = chain(1, 6)
        on_ssd_only(store, [hashes])
        reads = Reads(store, gated=True)
        tiers, number = tiers_of(store), store.control.namespace_id  # type: ignore[attr-defined]
        first = tiers.promote(number, hashes[:2])
        reads.wait()
        many = [tiers.promote(number, hashes) for _ in range(8)]
        many.append(tiers.prefetch(number, hashes))
        reads.let_go()
        assert first.result(WAIT_S).num_blocks == 2
        assert [future.result(WAIT_S).num_blocks for future in many] == [6] * 9
        read = [block for rows in reads.rows for block in rows]
        assert sorted(read) == sorted(hashes)
        assert store.stats()["kvstore_leases"] == 0


def test_small_promotions_go_to_the_disk_together(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        chains = [chain(seed, 1) for seed in range(1, 9)]
        on_ssd_only(store, chains)
        reads = Reads(store, gated=True)
        tiers, number = tiers_of(store), store.control.namespace_id  # type: ignore[attr-defined]
        futures = [tiers.promote(number, chains[0])]
        reads.wait()
        futures += [tiers.promote(number, hashes) for hashes in chains[1:]]
        reads.let_go()
        assert [future.result(WAIT_S).num_blocks for future in futures] == [1] * 8
        assert [len(rows) for rows in reads.rows] == [1, 7]


def test_who_waits_comes_before_a_prefetch_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "PREFETCH_BATCH_BYTES", BLOCK_BYTES)
    with open_store(tmp_path / "ssd") as store:
        large, small = chain(1, 6), chain(2, 2)
        on_ssd_only(store, [large, small])
        reads = Reads(store, gated=True)
        prefetch = store.prefetch(large)
        reads.wait()
        loading = threading.Thread(target=load, args=(store, small))
        loading.start()
        while not tiers_of(store)._promoter._waited_for:
            pass
        reads.let_go()
        loading.join(WAIT_S)
        assert prefetch.wait(WAIT_S).num_blocks == 6
        assert reads.rows[1] == list(small)
        assert [rows[0] for rows in reads.rows if len(rows) == 1] == list(large)


def test_those_who_wait_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "BATCH_BYTES", 2 * BLOCK_BYTES)
    with open_store(tmp_path / "ssd") as store:
        large, small = chain(1, 6), chain(2, 2)
        on_ssd_only(store, [large, small])
        reads = Reads(store, gated=True)
        tiers, number = tiers_of(store), store.control.namespace_id  # type: ignore[attr-defined]
        futures = [tiers.promote(number, large)]
        reads.wait()
        futures.append(tiers.promote(number, small))
        reads.let_go()
        assert [future.result(WAIT_S).num_blocks for future in futures] == [6, 2]
        assert reads.rows[1] == list(small)


def test_prefetches_over_the_bound_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "PREFETCHES_MAX", 2)
    with open_store(tmp_path / "ssd") as store:
        chains = [chain(seed, 2) for seed in range(1, 6)]
        on_ssd_only(store, chains)
        reads = Reads(store, gated=True)
        transfers = [store.prefetch(chains[0])]
        reads.wait()
        transfers += [store.prefetch(hashes) for hashes in chains[1:]]
        assert count(store, "prefetch_dropped_blocks") == 4
        assert [transfer.done() for transfer in transfers] == [False, False, False, True, True]
        reads.let_go()
        assert [transfer.wait(WAIT_S).num_blocks for transfer in transfers] == [2, 2, 2, 0, 0]
        assert load(store, chains[4]) == 2


def test_nothing_is_prefetched_from_a_stuck_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path / "ssd") as store:
        first, second = chain(1, 2), chain(2, 2)
        on_ssd_only(store, [first, second])
        reads = Reads(store, gated=True)
        begun = store.prefetch(first)
        reads.wait()
        monkeypatch.setattr(promotion, "STUCK_SECONDS", 0.0)
        assert store.prefetch(second).wait(0.0).num_blocks == 0
        assert count(store, "prefetch_dropped_blocks") == 2
        reads.let_go()
        assert begun.wait(WAIT_S).num_blocks == 2


def test_a_promotion_that_is_given_up_ends_after_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "BATCH_BYTES", BLOCK_BYTES)
    with open_store(tmp_path / "ssd") as store:
        hashes = chain(1, 5)
        on_ssd_only(store, [hashes])
        reads = Reads(store, gated=True)
        tiers, number = tiers_of(store), store.control.namespace_id  # type: ignore[attr-defined]
        future = tiers.promote(number, hashes)
        reads.wait()
        assert future.cancel()
        reads.let_go()
        other = chain(99, 1)
        assert tiers.promote(number, other).result(WAIT_S).num_blocks == 1
        assert len(reads.rows) == 1
        assert store.stats()["kvstore_leases"] == 0


def test_a_block_removed_meanwhile_costs_others_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        chains = [chain(seed, 2) for seed in range(1, 5)]
        on_ssd_only(store, chains)
        reads = Reads(store, gated=True)
        tiers, number = tiers_of(store), store.control.namespace_id  # type: ignore[attr-defined]
        futures = [tiers.promote(number, chains[0])]
        reads.wait()
        futures += [tiers.promote(number, hashes) for hashes in chains[1:]]
        store.remove(chains[1])
        reads.let_go()
        assert [future.result(WAIT_S).num_blocks for future in futures] == [2, 0, 2, 2]


def test_closing_ends_what_waits_and_what_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "BATCH_BYTES", BLOCK_BYTES)
    store = open_store(tmp_path / "ssd")
    hashes = chain(1, 3)
    on_ssd_only(store, [hashes, chain(2, 2)])
    reads = Reads(store, gated=True)
    tiers, number = tiers_of(store), store.control.namespace_id  # type: ignore[attr-defined]
    begun: Future[Any] = tiers.promote(number, hashes)
    reads.wait()
    waiting = tiers.promote(number, chain(2, 2))
    closing = threading.Thread(target=store.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(WAIT_S)
    reads.let_go()
    closing.join(WAIT_S)
    assert begun.result(WAIT_S).num_blocks == 1
    with pytest.raises(Exception, match="closed"):
        tiers.promote(number, hashes)


# -- write-behind


class Disk:
    """Takes batches when told to."""

    def __init__(self) -> None:
        self.turn = threading.Semaphore(0)
        self.open = False
        self.written: list[tuple[int, bytes]] = []

    def write(self, jobs: list[Job]) -> None:
        if not self.open:
            assert self.turn.acquire(timeout=WAIT_S)
        for job in jobs:
            assert not len(job.hashes) or job.num_bytes == 10 * len(job.hashes)
            self.written += [(job.namespace_id, row.tobytes()) for row in job.hashes]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12), st.booleans()), max_size=25),
    st.integers(10, 60),
    st.integers(5, 40),
)
@settings(deadline=None)
def test_what_does_not_fit_the_queue_is_written_later_or_counted(
    puts: list[tuple[int, int, bool]], max_bytes: int, backlog_max: int
) -> None:
    disk, counters = Disk(), Counters()
    writer = WriteBehind(disk.write, max_bytes, counters)
    writer.BACKLOG_BLOCKS_MAX = backlog_max
    offered: list[tuple[int, bytes]] = []
    for i, (number, length, later) in enumerate(puts):
        hashes = chain(i + 1, length).array
        job = Job(number, hashes, 10 * length, origin=Origin.USED)
        assert writer.offer_later(job) if later else writer.submit(job)
        offered += [(number, row.tobytes()) for row in hashes]
        assert writer.backlog_blocks <= backlog_max
        largest = 10 * max(length for _, length, _ in puts[: i + 1])
        assert writer.queued_bytes <= 2 * max(max_bytes, largest)
    disk.open = True
    disk.turn.release(1000)
    assert writer.flush(WAIT_S)
    assert writer.close(WAIT_S)
    dropped = counters.snapshot()["kvstore_write_behind_dropped_blocks_total"]
    assert len(disk.written) + dropped == len(offered)
    assert len(set(disk.written)) == len(disk.written)
    assert set(disk.written) <= set(offered)
    assert (writer.queued_bytes, writer.backlog_blocks) == (0, 0)


def test_what_was_put_off_longest_is_dropped_first() -> None:
    disk, counters = Disk(), Counters()
    writer = WriteBehind(disk.write, 10, counters)
    writer.BACKLOG_BLOCKS_MAX = 3
    for seed in range(1, 6):
        assert writer.offer_later(Job(seed, chain(seed, 1).array, 10))
    while writer.backlog_blocks > 3:
        pass
    disk.open = True
    disk.turn.release(1000)
    assert writer.close(WAIT_S)
    written = [number for number, _ in disk.written]
    assert written[-3:] == [3, 4, 5]


def test_a_promised_job_is_not_put_off() -> None:
    disk, counters = Disk(), Counters()
    writer = WriteBehind(disk.write, 20, counters)
    assert writer.submit(Job(0, chain(1, 2).array, 20))
    promised = Job(0, chain(2, 1).array, 10, ack="ssd", origin=Origin.PROMISED)
    assert not writer.submit(promised)
    assert counters.snapshot()["kvstore_write_behind_dropped_blocks_total"] == 1
    disk.open = True
    disk.turn.release(1000)
    assert writer.close(WAIT_S)


def test_removals_do_not_fill_the_queue() -> None:
    disk = Disk()
    writer = WriteBehind(disk.write, 20, Counters())
    for _ in range(1000):
        assert writer.submit(Job(0, np.empty((0, 32), np.uint8), 0))
    assert len(writer._jobs) <= 2
    disk.open = True
    disk.turn.release(1000)
    assert writer.close(WAIT_S)


def test_a_burst_keeps_its_copies_on_ssd(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd", write_behind=2 * BLOCK_BYTES) as store:
        chains = [chain(seed, 3) for seed in range(1, 6)]
        for hashes in chains:
            put(store, hashes)
        assert store.flush(WAIT_S)
        for hashes in chains:
            assert (store.control.residency(hashes) & 2).all()


def test_what_is_being_written_pins_a_quarter_of_dram_at_most(tmp_path: Path) -> None:
    """The arena's mapping is larger than what it holds in blocks: nearly all was pinned."""
    with open_store(tmp_path / "ssd") as store:
        sizes: list[int] = []
        tier = side_of(store)._tier
        write = tier.write

        def noted(number: int, hashes: Any, *rest: Any, **more: Any) -> Any:
            sizes.append(len(hashes))
            return write(number, hashes, *rest, **more)

        tier.write = noted  # type: ignore[method-assign, assignment]
        assert put(store, chain(1, SLOTS), ack="ssd").ack == "ssd"
        assert sizes
        assert max(sizes) <= (SLOTS + 1) // 4


# -- names


def test_the_default_tenants_names_are_those_of_version_0_1_0() -> None:
    assert stored_key("", NAMESPACE) == NAMESPACE.digest
    assert describe_stored("", NAMESPACE) == NAMESPACE.describe()
    assert parse_stored(json.loads(json.dumps(NAMESPACE.describe()))) == ("", NAMESPACE)


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_names_of_tenants_are_kept_apart(first: str, second: str) -> None:
    described = json.loads(json.dumps(describe_stored(first, NAMESPACE)))
    assert parse_stored(described) == (first, NAMESPACE)
    keys = {stored_key(name, NAMESPACE) for name in ("", first, second)}
    assert len(keys) == len({"", first, second})


def test_metadata_of_an_arena_is_read_back() -> None:
    other = Namespace("other", SPEC, salt=b"a long and random salt")
    names = [(0, "", NAMESPACE), (1, "team", NAMESPACE), (2, "", other)]
    packed = pack_metadata(reversed(names))
    found = unpack_metadata(packed)
    assert [(number, tenant) for number, tenant, _ in found] == [(0, ""), (1, "team"), (2, "")]
    assert [name.digest for *_, name in found] == [name.digest for *_, name in names]
    assert unpack_metadata(b"") == []


@given(st.one_of(st.binary(min_size=1, max_size=40), st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["version", "namespaces", "tenant", "x"]), inner),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_metadata_that_is_damaged_is_refused(data: bytes) -> None:
    try:
        body = json.loads(data)
        is_empty = body["version"] == 1 and not body["namespaces"]
    except (ValueError, LookupError, TypeError):
        is_empty = False
    if not is_empty:
        with pytest.raises(IncompatibleError, match="arena"):
            unpack_metadata(data)


def config_at(path: Path) -> StoreConfig:
    return StoreConfig(
        cpu="1MiB", chunk="1MiB", ssd=str(path / "ssd"), ssd_capacity="4MiB", ssd_segment="512KiB"
    )


def open_as(path: Path, tenants: list[Tenant], tenant: str) -> Store:
    config = config_at(path)
    tiers = Tiers(config, BLOCK_BYTES, tenants=tenants)
    control = LocalControl(tiers, NAMESPACE, owns_tiers=True, tenant=tiers.tenant(tenant))
    return Store(control)


def test_a_tenant_finds_its_own_blocks_after_reopening(tmp_path: Path) -> None:
    hashes = chain(1, 3)
    with open_store(tmp_path / "ssd") as store:
        put(store, hashes[:2], ack="ssd")
    teams = [Tenant("red"), Tenant("blue")]
    store = open_as(tmp_path, teams, "red")
    with store:
        assert store.match(hashes) == 0
        assert put(store, hashes, ack="ssd").ack == "ssd"
    for names, tenant, there in (
        (teams[::-1], "red", 3), (teams, "blue", 0), ([], "", 2), (teams[:1], "red", 3),
    ):  # fmt: skip
        store = open_as(tmp_path, names, tenant)
        with store:
            assert load(store, hashes) == there


def test_a_tenants_ssd_quota_holds_over_reopening(tmp_path: Path) -> None:
    teams = [Tenant("red", ssd_quota=3 * BLOCK_BYTES), Tenant("blue")]
    for seed in (1, 2):
        store = open_as(tmp_path, teams, "red")
        with store:
            put(store, chain(seed, 5))
            assert store.flush(WAIT_S)
            assert store.stats()["kvstore_ssd_blocks"] == 3
    store = open_as(tmp_path, teams, "blue")
    with store:
        assert put(store, chain(1, 5), ack="ssd").ack == "ssd"


# -- an arena that outlived its daemon


def left_behind(path: Path, tenants: list[Tenant]) -> int:
    """An arena as a killed daemon leaves it; what was put is not on ssd but for one chain."""
    config = StoreConfig(
        cpu="1MiB", chunk="1MiB", ssd=str(path / "ssd"), ssd_capacity="4MiB",
        ssd_segment="512KiB", ssd_admission="reuse",
    )  # fmt: skip
    tiers = Tiers(config, BLOCK_BYTES, tenants=tenants)
    for i, (namespace, tenant) in enumerate(
        [(OTHER, ""), (NAMESPACE, "red"), (NAMESPACE, "blue"), (NAMESPACE, "")]
    ):
        number = tiers.tenant(tenant)
        control = LocalControl(tiers, namespace, owns_tiers=False, tenant=number)
        assert put(Store(control), chain(i + 1, i + 1)).num_stored == i + 1
    assert put(Store(control), chain(9, 2), ack="ssd").ack == "ssd"
    fd = os.dup(tiers.core.arena_fd)
    assert tiers.ssd is not None
    tiers.ssd.close()  # a killed one would give the directory back too
    return fd


def test_an_adopted_arena_is_served_and_written_to_ssd(tmp_path: Path) -> None:
    red, blue = Tenant("red"), Tenant("blue")
    fd = left_behind(tmp_path, [red, blue])
    core = _native.StoreCore.adopt(fd, "lru")
    tiers = Tiers(config_at(tmp_path), BLOCK_BYTES, core=core, tenants=[blue])
    assert tiers.recovered is not None
    assert tiers.recovered["adopted"] == 1 + 3 + 4 + 2
    assert tiers.ssd is not None
    assert tiers.ssd.flush(WAIT_S)
    for namespace, tenant, hashes in (
        (OTHER, "", chain(1, 1)), (NAMESPACE, "blue", chain(3, 3)), (NAMESPACE, "", chain(4, 4)),
        (NAMESPACE, "", chain(9, 2)),
    ):  # fmt: skip
        control = LocalControl(tiers, namespace, owns_tiers=False, tenant=tiers.tenant(tenant))
        assert (control.residency(hashes) == 3).all()
        assert load(Store(control), hashes) == len(hashes)
    assert tiers.stats()["kvstore_cpu_blocks"] == 10  # those of the tenant that is gone are freed
    tiers.close()
    os.close(fd)


def test_an_arena_is_adopted_again_and_again(tmp_path: Path) -> None:
    teams = [Tenant("red"), Tenant("blue")]
    fd = left_behind(tmp_path, teams)
    for turn in range(3):
        tiers = Tiers(
            config_at(tmp_path),
            BLOCK_BYTES,
            core=_native.StoreCore.adopt(fd, "lru"),
            tenants=teams[:: 1 if turn % 2 else -1],
        )
        for i, tenant in enumerate(["red", "blue", ""]):
            control = LocalControl(tiers, NAMESPACE, owns_tiers=False, tenant=tiers.tenant(tenant))
            assert load(Store(control), chain(i + 2, i + 2)) == i + 2
        third = Namespace(f"turn {turn}", SPEC)
        control = LocalControl(tiers, third, owns_tiers=False)
        assert put(Store(control), chain(20 + turn, 1)).num_stored == 1
        for before in range(turn):
            name = Namespace(f"turn {before}", SPEC)
            control = LocalControl(tiers, name, owns_tiers=False)
            assert load(Store(control), chain(20 + before, 1)) == 1
        assert tiers.ssd is not None
        tiers.ssd.close()
    os.close(fd)


def test_a_failed_adoption_gives_the_directory_back(tmp_path: Path) -> None:
    fd = left_behind(tmp_path, [Tenant("red"), Tenant("blue")])
    core = _native.StoreCore.adopt(fd, "lru")
    core.set_metadata(b"{")
    with pytest.raises(IncompatibleError, match="arena"):
        Tiers(config_at(tmp_path), BLOCK_BYTES, core=core)
    with open_store(tmp_path / "ssd") as store:
        assert load(store, chain(9, 2)) == 2
    os.close(fd)

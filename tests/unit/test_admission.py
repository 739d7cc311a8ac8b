"""Which blocks are written to ssd: by policy, budget and quota.

The bucket is compared with a plain account of what came in and went out, driven by Hypothesis under
a clock of its own. Policies are tried below a real store, whose bucket has a clock of the test's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore import ConfigError, Store, StoreConfig
from kvstore.tiers.admission import (
    AdmitAll,
    AdmitReused,
    Origin,
    SeenBlocks,
    TokenBucket,
    make_admission,
)
from kvstore.tiers.local import LocalControl, Tiers
from kvstore.tiers.ssd_side import SsdSide
from tests.store_support import BLOCK_BYTES, SLOTS, WAIT_S, chain, load, open_store, put


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


# -- the bucket


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0, 100)),
        st.tuples(st.just("take"), st.integers(0, 50)),
        st.tuples(st.just("keep"), st.integers(0, 50)),
        st.tuples(st.just("draw"), st.integers(0, 5000)),
        st.tuples(st.just("back"), st.integers(0, 5000)),
    ),
    max_size=60,
)


@given(st.floats(0.1, 1000), st.floats(1, 4000), st.integers(1, 900), STEPS)
def test_a_bucket_grants_no_more_than_its_rate(
    rate: float, burst: float, unit: int, steps: list[tuple[str, float]]
) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    allowed, granted = burst + unit, 0.0
    for step, amount in steps:
        before = bucket.level
        if step == "wait":
            clock.seconds += amount
            allowed += rate * amount
            assert bucket.level == pytest.approx(min(burst, before + rate * amount))
        elif step in ("take", "keep"):
            keep = burst / 2 if step == "keep" else 0.0
            count = bucket.take(int(amount), unit, keep)
            assert 0 <= count <= amount
            granted += count * unit
            if count and before < burst:
                assert bucket.level >= keep - 1e-6
            if count < amount and before - keep >= (count + 1) * unit + 1e-6:
                pytest.fail(f"{before} bytes, {count} units granted of {amount}")
        elif step == "draw":
            bucket.draw(int(amount))
        else:
            bucket.give_back(int(amount))
            allowed += amount
        assert -burst - unit <= bucket.level <= burst
        assert granted <= allowed + 1e-6


def test_a_unit_larger_than_the_burst_is_granted_when_the_bucket_is_full() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 4, clock)
    assert bucket.take(3, 100) == 1
    assert bucket.take(1, 100) == 0
    clock.seconds = 99.9
    assert bucket.take(1, 100) == 0
    clock.seconds = 100.1
    assert bucket.take(1, 100) == 1


def test_a_clock_that_goes_back_gives_nothing() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 100, clock)
    bucket.draw(100)
    clock.seconds = -50
    assert bucket.level == 0
    clock.seconds = 1
    assert bucket.level == pytest.approx(10)


# -- what was seen


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(1, 9)), max_size=20))
def test_blocks_are_seen_by_namespace_and_only_after_they_were_added(
    puts: list[tuple[int, int, int]],
) -> None:
    seen = SeenBlocks(1 << 16)
    model: set[tuple[int, bytes]] = set()
    for namespace_id, seed, length in puts:
        hashes = chain(seed, length)
        got = seen.add(namespace_id, hashes.array)
        for block_hash, was_seen in zip(hashes, got, strict=True):
            assert not was_seen or (namespace_id, block_hash) in model  # it may forget
            model.add((namespace_id, block_hash))


def test_few_blocks_are_forgotten_while_the_table_has_room() -> None:
    seen = SeenBlocks(1 << 12)
    hashes = chain(1, 500).array
    assert not seen.add(0, hashes).any()
    assert seen.add(0, hashes).mean() > 0.85
    assert not seen.add(1, hashes).any()


# -- policies


def test_all_without_a_budget_needs_to_be_told_nothing() -> None:
    policy = make_admission("all", 0, 100)
    assert not policy.wants_used
    hashes = chain(1, 5).array
    ((origin, admitted),) = policy.stored(0, hashes)
    assert admitted is hashes
    assert policy.grant(origin, 10**9, 1 << 20) == 10**9


def test_reuse_admits_what_is_stored_again() -> None:
    policy = make_admission("reuse", 0, 100)
    hashes = chain(1, 5).array
    assert policy.stored(0, hashes[:3]) == []
    ((origin, admitted),) = policy.stored(0, hashes)
    assert origin is Origin.USED
    assert np.array_equal(admitted, hashes[:3])


def test_what_is_used_comes_before_what_is_stored_when_the_budget_is_low() -> None:
    clock = Clock()
    policy = make_admission("all", 100, 100, clock)  # a burst of 400
    assert policy.grant(Origin.STORED, 10, 50) == 4
    assert policy.grant(Origin.STORED, 10, 50) == 0
    assert policy.grant(Origin.USED, 10, 50) == 4
    assert policy.grant(Origin.USED, 10, 50) == 0
    assert policy.grant(Origin.PROMISED, 10, 50) == 10
    clock.seconds = 2
    assert policy.grant(Origin.USED, 10, 50) == 0  # still owed


def test_a_hot_block_that_does_not_fit_is_not_queued() -> None:
    bucket = TokenBucket(1, 1000, Clock())
    policy = AdmitAll(bucket)
    hashes = chain(1, 3).array
    assert len(policy.used(hashes, 400)) == 3
    bucket.draw(800)
    assert len(policy.used(hashes, 400)) == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [("ssd_admission", "some"), ("ssd_write_budget", "fast"), ("ssd_write_budget", -1)],
)
def test_a_wrong_setting_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        StoreConfig(**{setting: value})


def test_settings_come_from_text() -> None:
    environ = {"KVSTORE_SSD_ADMISSION": "reuse", "KVSTORE_SSD_WRITE_BUDGET": "2MiB"}
    config = kvstore.load_config(environ=environ)
    assert (config.ssd_admission, config.ssd_write_budget) == ("reuse", 2 << 20)


# -- below a store


def side_of(store: Store) -> SsdSide:
    ssd = tiers_of(store).ssd
    assert ssd is not None
    return ssd


def tiers_of(store: Store) -> Tiers:
    control = store.control
    assert isinstance(control, LocalControl)
    return control.tiers


def on_ssd(store: Store, hashes: kvstore.BlockHashes) -> list[int]:
    assert store.flush(WAIT_S)
    return [int(i) for i in np.flatnonzero(store.control.residency(hashes) & 2)]


def give_budget(store: Store, blocks: int) -> Callable[[float], None]:
    """A bucket with that burst under a clock of its own; returns what moves the clock."""
    clock = Clock()
    bucket = TokenBucket(BLOCK_BYTES, blocks * BLOCK_BYTES, clock)
    seen = SeenBlocks(1 << 12)
    is_all = not isinstance(side_of(store).admission, AdmitReused)
    side_of(store).admission = AdmitAll(bucket, seen) if is_all else AdmitReused(bucket, seen)
    tiers_of(store).wants_used = True

    def wait(seconds: float) -> None:
        clock.seconds += seconds

    return wait


def count(store: Store, name: str) -> int:
    return int(store.stats()[f"kvstore_{name}_total"])


@pytest.mark.parametrize("how", ["load", "acquire"])
def test_reuse_writes_a_block_at_its_first_read(tmp_path: Path, how: str) -> None:
    with open_store(tmp_path / "ssd", ssd_admission="reuse") as store:
        hashes = chain(1, 6)
        put(store, hashes)
        assert on_ssd(store, hashes) == []
        if how == "load":
            assert load(store, hashes[:4]) == 4
        else:
            store.acquire(hashes[:4]).release()
        assert on_ssd(store, hashes) == [0, 1, 2, 3]
        # Ancestors that were not read with it are written too.
        longer = hashes + chain(2, 3, hashes)
        put(store, longer[6:])
        assert load(store, longer[7:8]) == 1
        assert on_ssd(store, longer) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_reuse_writes_unlinked_blocks_one_by_one(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd", ssd_admission="reuse") as store:
        hashes = kvstore.BlockHashes.of(chain(1, 6).array)
        put(store, hashes)
        assert load(store, hashes[2:4]) == 2
        assert on_ssd(store, hashes) == [2, 3]


@pytest.mark.parametrize("ack", ["ssd", "durable"])
def test_a_promised_level_bypasses_admission_and_draws_on_the_budget(
    tmp_path: Path, ack: str
) -> None:
    with open_store(tmp_path / "ssd", ssd_admission="reuse") as store:
        wait = give_budget(store, 4)
        assert put(store, chain(1, 6), ack=ack).ack == ack
        other = chain(2, 2)
        put(store, other)
        assert load(store, other) == 2
        assert on_ssd(store, other) == []
        assert count(store, "ssd_admission_skipped_blocks") == 2
        wait(4)
        assert load(store, other) == 2
        assert on_ssd(store, other) == [0, 1]


def test_over_the_budget_all_becomes_reuse(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        wait = give_budget(store, 4)
        hashes = chain(1, 5)
        put(store, hashes)
        assert on_ssd(store, hashes) == [0, 1]  # the upper half
        assert count(store, "ssd_admission_skipped_blocks") == 3
        assert load(store, hashes[:3]) == 3
        assert on_ssd(store, hashes) == [0, 1, 2]
        assert load(store, hashes) == 5
        assert on_ssd(store, hashes) == [0, 1, 2, 3]
        assert count(store, "ssd_admission_skipped_blocks") == 4
        wait(1)
        assert load(store, hashes) == 5
        assert on_ssd(store, hashes) == [0, 1, 2, 3, 4]


def test_what_a_codec_saves_goes_back_to_the_budget(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd", codec="zstd") as store:
        give_budget(store, 5)
        zeros = kvstore.ContiguousBlocks(np.zeros((2, BLOCK_BYTES), np.uint8))
        for seed in range(1, 6):
            assert store.put(chain(seed, 2), zeros).wait(WAIT_S).num_stored == 2
            assert on_ssd(store, chain(seed, 2)) == [0, 1]


def test_a_quota_refuses_what_is_over_it(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd") as store:
        quota = 3 * BLOCK_BYTES

        def room() -> int:
            return quota - int(store.stats()["kvstore_ssd_blocks"]) * BLOCK_BYTES

        control = store.control
        assert isinstance(control, LocalControl)
        side_of(store)._quota_room[control.namespace_id] = room
        hashes = chain(1, 5)
        put(store, hashes)
        assert on_ssd(store, hashes) == [0, 1, 2]
        assert count(store, "ssd_quota_refused_blocks") == 2
        assert put(store, chain(2, 2), ack="ssd").ack == "memory"
        assert count(store, "ssd_quota_refused_blocks") == 4
        store.remove(hashes[1:2])
        assert store.flush(WAIT_S)
        assert put(store, chain(3, 2), ack="ssd").ack == "ssd"


def test_blocks_of_an_adopted_arena_are_written_in_the_background(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd", ssd_admission="reuse") as store:
        hashes = chain(1, SLOTS)
        put(store, hashes)
        side_of(store).admission = AdmitAll()
        control = store.control
        assert isinstance(control, LocalControl)
        tiers_of(store).adopted(control.namespace_id, hashes.array.tobytes())
        assert on_ssd(store, hashes) == list(range(SLOTS))


def test_notices_with_packed_hashes_do_what_reads_and_puts_do(tmp_path: Path) -> None:
    with open_store(tmp_path / "ssd", ssd_admission="reuse") as store:
        control, tiers = store.control, tiers_of(store)
        assert isinstance(control, LocalControl)
        first, second = chain(1, 3), chain(2, 3)
        put(store, first)
        put(store, second)
        tiers.used(control.namespace_id, first.array[:2].tobytes())
        assert on_ssd(store, first) == [0, 1]
        tiers.stored(control.namespace_id, second.array.tobytes())
        assert on_ssd(store, second) == [0, 1, 2]

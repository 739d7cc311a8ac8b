"""Counting: what a store counts by tier, in tokens and by reason adds up."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvstore
from kvstore.metrics import CLIENT_METRICS, STORE_METRICS, Counters
from tests.store_support import NAMESPACE, SLOTS, SPEC, WAIT_S, chain, load, open_store, put


def test_a_load_counts_blocks_tokens_and_bytes_by_tier() -> None:
    counters = Counters()
    counters.add_load(10, 4, 2, 6 * 100, block_tokens=16)
    counters.add_load(3, 0, 0, 0, block_tokens=16)
    counters.add_missed("deadline", 4)
    counters.add_missed("evicted", 0)
    values = {key: value for key, value in counters.snapshot().items() if value}
    assert values == {
        "kvstore_queried_blocks_total": 13,
        "kvstore_hit_cpu_blocks_total": 4,
        "kvstore_hit_ssd_blocks_total": 2,
        "kvstore_missed_blocks_total": 7,
        "kvstore_missed_deadline_blocks_total": 4,
        "kvstore_queried_tokens_total": 13 * 16,
        "kvstore_hit_cpu_tokens_total": 4 * 16,
        "kvstore_hit_ssd_tokens_total": 2 * 16,
        "kvstore_loaded_bytes_total": 600,
        "kvstore_loaded_ssd_bytes_total": 200,
    }


def test_a_name_that_is_not_declared_cannot_be_counted() -> None:
    with pytest.raises(KeyError):
        Counters().add("hits_blocks")
    with pytest.raises(KeyError):
        Counters().add("leases")


def test_each_part_counts_its_own() -> None:
    assert "kvstore_reconnects_total" in Counters(CLIENT_METRICS).snapshot()
    assert "kvstore_reconnects_total" not in Counters().snapshot()


def test_a_store_counts_tokens() -> None:
    with kvstore.open(NAMESPACE, cpu="1MiB") as store:
        put(store, chain(1, 3))
        assert load(store, chain(1, 5)) == 3
        stats = store.stats()
    assert stats["kvstore_queried_tokens_total"] == 5 * SPEC.block_tokens
    assert stats["kvstore_hit_cpu_tokens_total"] == 3 * SPEC.block_tokens


def test_blocks_from_ssd_are_counted_as_such_and_late_ones_by_reason(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for seed in range(3):
            put(store, chain(seed, SLOTS), ack="ssd")
        assert load(store, chain(0, SLOTS), timeout=WAIT_S) == SLOTS
        before = store.stats()
        assert before["kvstore_hit_ssd_tokens_total"] > 0
        assert 0 < before["kvstore_loaded_ssd_bytes_total"] <= before["kvstore_loaded_bytes_total"]
        loaded = load(store, chain(1, SLOTS), timeout=0.0)
        after = store.stats()
    late = after["kvstore_missed_deadline_blocks_total"]
    assert late == SLOTS - loaded
    assert late == after["kvstore_missed_blocks_total"] - before["kvstore_missed_blocks_total"]


def test_what_a_store_says_is_declared(tmp_path: Path) -> None:
    declared = {key for metric in STORE_METRICS for key in metric.stats_keys()}
    with open_store(tmp_path) as store:
        put(store, chain(1, 3), ack="ssd")
        assert set(store.stats()) <= declared

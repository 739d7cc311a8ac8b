"""Prefill and decode with a daemon each: the prefill side says where its peers find its daemon, the
decode side's lookup has its own daemon fetch the blocks from there, and its load may fetch again.

Real daemons in this process; blocks' bytes follow from their hashes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from kvstore_adapters.planning import handover
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.lookups import Lookups
from kvstore_adapters.planning.plan import LoadJob
from tests.transport.peers_support import address_of, serving

from .planning_support import FULL, HYBRID, WINDOW, Worker, chain_of, move, settings, wait_until
from .test_planner import BLOCK, HASHES, SOURCE, Bench

HOLDER = "tcp:10.0.0.1:9471"
COUNT = 12
TOKENS = COUNT * 16


def promise(**more: Any) -> dict[str, Any]:
    last = HASHES[3].hex()
    return {"kvstore": {"tokens": 64, "hash": last, "source": SOURCE, **more}}


def test_a_prefill_says_where_its_daemon_is_and_a_decode_asks_there() -> None:
    prefill = Bench(can_load=False, holder=HOLDER)
    prefill.arrive(70)
    prefill.planner.step([prefill.due(70)])
    params = prefill.planner.finished("a", 70, HASHES[:4])
    assert params == promise(holder=HOLDER)
    decode = Bench(holders=(HOLDER,))
    decode.arrive(70, params)
    assert decode.lookups.begun[0]["holder"] == HOLDER
    decode.lookups.found = 64
    assert decode.match(70) == 64
    decode.planner.allocated("a", 64, decode.table(64 // BLOCK))
    (job,) = decode.planner.step([]).loads
    assert job.holders == (HOLDER,)


@pytest.mark.parametrize("holder", ["tcp:10.0.0.2:9471", 7, ["x"], {}])
def test_a_request_cannot_name_a_holder_that_is_not_configured(
    holder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(holders=(HOLDER,))
    with caplog.at_level(logging.WARNING):
        bench.arrive(70, promise(holder=holder))
    assert bench.lookups.begun[0]["want"] == 64
    assert bench.lookups.begun[0]["holder"] == ""
    assert "holder" in caplog.text
    assert handover.holder_of({"kvstore": "x"}, ()) == ("", None)


@pytest.mark.parametrize("groups", [(FULL,), HYBRID], ids=["full", "window"])
def test_a_decode_waits_for_blocks_of_another_daemon_and_loads_them(
    tmp_path: Path, groups: tuple[Group, ...]
) -> None:
    chain = chain_of(1, COUNT)
    with serving(tmp_path, "p") as theirs, serving(tmp_path, "d") as ours:
        holder = address_of(theirs)
        prefill = Worker(settings(theirs.config.listen), groups)
        decode = Worker(settings(ours.config.listen, holders=[holder]), groups)
        lookups = Lookups(decode.shards, groups, timeout=20.0)
        try:
            lookups.begin("r", chain, TOKENS, want_tokens=TOKENS, wait_seconds=20.0, holder=holder)
            moves = [move(group, chain, 0, COUNT) for group in groups]
            for number, end in enumerate((5, COUNT)):  # the prefill saves as it computes
                assert lookups.result("r") is None
                for group in groups:
                    prefill.save(2 * number + group.group_id, move(group, chain, 0, end))
            wait_until(lambda: lookups.result("r") is not None)
            assert lookups.result("r") == TOKENS
            if WINDOW in groups:  # of a window the last blocks are fetched
                moves = [moves[0], move(WINDOW, chain, COUNT - 3, COUNT, at=20)]
            decode.transfers.load(LoadJob("r", moves, True, (holder,)))
            outcomes: dict[str, Any] = {}
            wait_until(lambda: bool(outcomes.update(decode.transfers.take_loaded()) or outcomes))
            assert outcomes["r"].is_complete
            assert all(decode.memory[one.group_id].holds(one) for one in moves)
        finally:
            lookups.close()
            prefill.close()
            decode.close()


def test_a_load_fetches_what_our_daemon_lost_meanwhile(tmp_path: Path) -> None:
    chain = chain_of(1, COUNT)
    with serving(tmp_path, "p") as theirs, serving(tmp_path, "d") as ours:
        holder = address_of(theirs)
        prefill = Worker(settings(theirs.config.listen))
        decode = Worker(settings(ours.config.listen, holders=[holder]))
        try:
            wanted = move(FULL, chain, 0, COUNT)
            assert prefill.save(0, wanted) == COUNT
            decode.transfers.load(LoadJob("r", [wanted], True, (holder,)))
            outcomes: dict[str, Any] = {}
            wait_until(lambda: bool(outcomes.update(decode.transfers.take_loaded()) or outcomes))
            assert outcomes["r"].num_tokens == TOKENS
            assert decode.memory[0].holds(wanted)
        finally:
            prefill.close()
            decode.close()


def test_a_holder_that_is_away_costs_the_wait_and_no_more(tmp_path: Path) -> None:
    chain = chain_of(1, COUNT)
    with serving(tmp_path, "d") as ours:
        holder = "tcp:127.0.0.1:1"
        decode = Worker(settings(ours.config.listen, holders=[holder]))
        lookups = Lookups(decode.shards, (FULL,), timeout=20.0)
        try:
            lookups.begin("r", chain, TOKENS, want_tokens=TOKENS, wait_seconds=0.3, holder=holder)
            wait_until(lambda: lookups.result("r") is not None, 10.0)
            assert lookups.result("r") == 0
        finally:
            lookups.close()
            decode.close()

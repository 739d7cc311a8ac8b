"""Prefill and decode workers as real processes: same tokens in every mode, whoever dies.

The model is the smallest random one. Kills happen in the callback that the router makes between
two requests, so that no test depends on time; the deadline test stops a worker and sees the request
end by it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import kvstore
from kvstore_adapters.reference.cluster_settings import ClusterSettings, Mode
from kvstore_adapters.reference.messages import (
    FRAME_BYTES_MAX,
    Attach,
    Cancel,
    Frames,
    ModelSource,
    Submit,
    ToWorker,
    frame,
)
from kvstore_adapters.reference.pd import Cluster
from kvstore_adapters.reference.results import Prompt, RequestResult, RunResult
from kvstore_adapters.reference.worker_handle import Role

NANO = ModelSource(size="nano", seed=5)
SESSIONS = [
    [
        Prompt(f"{name} {turn}", [(key + i * i) % 250 for i in range(100 + 60 * turn)], 8)
        for turn in range(3)
    ]
    for key, name in enumerate("ab")
]


def cluster(mode: Mode, **changes: Any) -> ClusterSettings:
    return replace(ClusterSettings(mode, NANO, store={"cpu": "16MiB"}), **changes)


def tokens_of(result: RunResult) -> dict[str, list[int]]:
    assert [request.error for request in result.requests] == [None] * len(result.requests)
    return {request.request_id: request.token_ids for request in result.requests}


@pytest.fixture(scope="module")
def colocated() -> Iterator[Cluster]:
    with Cluster(cluster(Mode.COLOCATED)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(colocated: Cluster) -> dict[str, list[int]]:
    return tokens_of(colocated.run(SESSIONS))


def test_tokens_are_the_same_disaggregated_cached_and_from_ssd_when_opened_again(
    expected: dict[str, list[int]], tmp_path: Path
) -> None:
    assert len({tuple(tokens) for tokens in expected.values()}) == 6
    assert all(len(tokens) == 8 for tokens in expected.values())
    with Cluster(cluster(Mode.PD)) as disaggregated:
        run = disaggregated.run(SESSIONS)
    assert tokens_of(run) == expected
    assert run.prefill.loaded_bytes == 0
    assert all(r.decode_cached_tokens >= r.prompt_tokens - 16 for r in run.requests)
    on_ssd = cluster(Mode.PD_CACHE, store={"cpu": "16MiB", "ssd": str(tmp_path)})
    with Cluster(on_ssd) as cached:
        cold = cached.run(SESSIONS)
        warm = cached.run(SESSIONS)
        assert cached.store is not None
        assert cached.store.flush()
    assert tokens_of(cold) == tokens_of(warm) == expected
    assert 0 < cold.prefill.hit_cpu_blocks < cold.prefill.queried_blocks
    assert warm.prefill.hit_cpu_blocks == warm.prefill.queried_blocks
    finished: list[RequestResult] = []
    with Cluster(on_ssd) as reopened:
        fresh = reopened.run(SESSIONS, finished.append)
    assert tokens_of(fresh) == expected
    assert fresh.prefill.hit_ssd_blocks > 0
    hits = fresh.prefill.hit_cpu_blocks + fresh.prefill.hit_ssd_blocks
    assert hits == fresh.prefill.queried_blocks
    assert finished == fresh.requests


def run_and_kill(settings: ClusterSettings, victims: Callable[[Role], bool]) -> RunResult:
    """Run, and kill the workers of these roles after the first request."""
    with Cluster(settings) as running:

        def kill(_: RequestResult) -> None:
            for worker in running.workers:
                if victims(worker.role):
                    worker.process.kill()
                    worker.process.wait()

        return running.run(SESSIONS, kill)


def test_requests_of_a_killed_prefill_worker_go_elsewhere(expected: dict[str, list[int]]) -> None:
    run = run_and_kill(cluster(Mode.PD_CACHE), lambda role: role is Role.PREFILL)
    assert tokens_of(run) == expected
    assert sum(request.retries for request in run.requests) > 0


@pytest.mark.slow
def test_requests_of_a_killed_decode_worker_go_elsewhere(expected: dict[str, list[int]]) -> None:
    run = run_and_kill(cluster(Mode.PD), lambda role: role is Role.DECODE)
    assert tokens_of(run) == expected


@pytest.mark.slow
def test_requests_fail_clearly_when_no_worker_is_left() -> None:
    run = run_and_kill(cluster(Mode.PD), lambda role: True)
    errors = [request.error for request in run.requests]
    assert errors[0] is None
    assert errors[1:] == ["no worker is left"] * 5


@pytest.mark.slow
def test_a_stopped_worker_costs_one_deadline(expected: dict[str, list[int]]) -> None:
    with Cluster(cluster(Mode.PD_CACHE, request_timeout_s=10.0)) as running:
        running.workers[0].process.send_signal(signal.SIGSTOP)
        # The counters of the run are asked for too, and must not wait for the stopped one forever.
        run = running.run(SESSIONS)
    late = [request for request in run.requests if request.error is not None]
    assert late
    assert {request.error for request in late} == {"not done within 10 s"}
    done = {r.request_id: r.token_ids for r in run.requests if r.error is None}
    assert done == {name: expected[name] for name in done}
    assert len(done) >= 4


def test_a_request_that_cannot_run_is_refused_with_the_reason(colocated: Cluster) -> None:
    bad = Prompt("too long", [1] * 40_000, 4)
    good = Prompt("good", [1] * 20, 4)
    results = {r.request_id: r for r in colocated.run([[bad, good]]).requests}
    assert "positions" in str(results["too long"].error)
    assert results["good"].error is None
    assert len(results["good"].token_ids) == 4


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(kvstore.ConfigError, match=r"not a checkpoint directory: .*config.json"),
        Cluster(cluster(Mode.PD, model=ModelSource(directory=str(tmp_path)))),
    ):
        pass


def test_wrong_numbers_of_workers_are_refused() -> None:
    with pytest.raises(kvstore.ConfigError, match="prefill_workers"):
        cluster(Mode.PD, prefill_workers=0)
    with pytest.raises(kvstore.ConfigError, match="decode_workers"):
        cluster(Mode.PD, decode_workers=65)


MESSAGES: list[ToWorker] = [
    Submit("a", [1, 2, 3], 4, [], [257]),
    Cancel("a"),
    Attach(None),
    Submit("b", list(range(500)), 4, [5], []),
]


@given(st.lists(st.integers(1, 400), max_size=30))
@settings(deadline=None)
def test_frames_survive_any_split(cuts: list[int]) -> None:
    stream = b"".join(map(frame, MESSAGES))
    frames: Frames[ToWorker] = Frames(ToWorker)
    received: list[ToWorker] = []
    for size in [*cuts, len(stream)]:
        received += frames.feed(stream[:size])
        stream = stream[size:]
    assert received == MESSAGES


def test_frames_refuse_foreign_bytes_and_lengths() -> None:
    with pytest.raises(kvstore.IncompatibleError, match="at most"):
        Frames(ToWorker).feed((FRAME_BYTES_MAX + 1).to_bytes(4, "little"))
    with pytest.raises(kvstore.IncompatibleError, match="not a message"):
        Frames(ToWorker).feed(b"\x02\x00\x00\x00{}")


def test_the_router_needs_no_torch() -> None:
    code = (
        "import sys, kvstore_adapters.reference.pd, kvstore_adapters.reference.demo\n"
        "assert 'torch' not in sys.modules"
    )
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=os.environ | path, check=True, timeout=60)

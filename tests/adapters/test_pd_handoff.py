"""Prefill and decode workers as processes that hand KV off from pool to pool: the same tokens as
colocated, whichever worker is killed in mid-transfer and when the cable between two hosts is cut.

Workers are killed, and the cable is cut, when the router passes on a hand-off's message, so that
nothing depends on time. One cluster runs in the default suite; the others are slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

import kvstore
from kvstore.bench.two_hosts import HostsUnavailableError, TwoHosts
from kvstore.transport import Endpoint, TransportSettings
from kvstore.transport.handoff import Grant, Ready
from kvstore_adapters.reference.cluster_settings import ClusterSettings, Mode
from kvstore_adapters.reference.messages import ModelSource, Relay
from kvstore_adapters.reference.pd import Cluster
from kvstore_adapters.reference.results import Prompt, RunResult
from kvstore_adapters.reference.scheduler import WorkerSettings
from kvstore_adapters.reference.worker_handle import Role, WorkerProcess

NANO = ModelSource(size="nano", seed=5)
SESSIONS = [
    [
        Prompt(f"{name} {turn}", [(key + i * i) % 250 for i in range(100 + 60 * turn)], 8)
        for turn in range(2)
    ]
    for key, name in enumerate("ab")
]
# Several chunks to a prompt, so that a kill after the first layer is in mid-transfer.
CHUNKED = WorkerSettings(batch_tokens_max=48, sequences_max=16)


def cluster(handoff: str, transport: str = "shm", **changes: Any) -> ClusterSettings:
    made = ClusterSettings(
        Mode.PD, NANO, worker=CHUNKED, handoff=handoff, transport=transport, request_timeout_s=60.0
    )
    return replace(made, **changes)


def tokens_of(result: RunResult) -> dict[str, list[int]]:
    assert [request.error for request in result.requests] == [None] * len(result.requests)
    return {request.request_id: request.token_ids for request in result.requests}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """Of one worker with a random model, in this process."""
    import torch

    from kvstore_adapters.reference import checkpoint
    from kvstore_adapters.reference.scheduler import Request
    from kvstore_adapters.reference.worker import ReferenceWorker

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worker = ReferenceWorker(checkpoint.make_random(size="nano", seed=5))
    stop = worker._model.config.end_token_ids
    tokens: dict[str, list[int]] = {}
    for session in SESSIONS:
        for prompt in session:
            request = Request(
                prompt.request_id,
                tuple(prompt.token_ids),
                prompt.max_new_tokens,
                stop_token_ids=frozenset(stop),
            )
            worker.add_request(request)
            while worker.has_work:
                for output in worker.step():
                    tokens.setdefault(output.request_id, []).append(output.token_id)
    torch.set_num_threads(threads)
    return tokens


def strike(
    running: Cluster, when: type, act: Callable[[WorkerProcess], None]
) -> Callable[[WorkerProcess, Relay], bool]:
    """Act on whoever says the first message of that kind, once. What one that is killed by it has
    said after that is lost, so it always dies in mid-transfer."""
    struck: list[WorkerProcess] = []

    def on_relay(source: WorkerProcess, relay: Relay) -> bool:
        if isinstance(relay.message, when) and not struck:
            struck.append(source)
            act(source)
        return source.process.returncode is None

    return on_relay


def kill(worker: WorkerProcess) -> None:
    worker.process.kill()
    worker.process.wait()


def check_whole(run: RunResult, transport: str) -> None:
    assert all(r.decode_cached_tokens >= r.prompt_tokens - 16 for r in run.requests)
    assert all(r.recomputes == r.retries == 0 for r in run.requests)
    handoff = run.handoff
    assert (handoff.received, handoff.receive_failures) == (len(run.requests), 0)
    assert handoff.moved_bytes == {transport: handoff.received_bytes}
    assert 0 <= handoff.early_bytes <= handoff.received_bytes


def test_pushed_kv_gives_the_same_tokens_and_a_prefill_worker_killed_in_mid_transfer_a_recompute(
    expected: dict[str, list[int]],
) -> None:
    with Cluster(cluster("push")) as running:
        run = running.run(SESSIONS)
        assert tokens_of(run) == expected
        check_whole(run, "shm")
        running.on_relay = strike(running, Ready, kill)
        again = running.run(SESSIONS)
    assert tokens_of(again) == expected
    assert sum(request.recomputes for request in again.requests) > 0


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
def test_tokens_are_the_same_and_any_worker_may_be_killed_in_mid_transfer(
    expected: dict[str, list[int]], handoff: str, transport: str
) -> None:
    settings = cluster(handoff, transport, prefill_workers=2, decode_workers=2)
    with Cluster(settings) as running:
        run = running.run(SESSIONS)
        assert tokens_of(run) == expected
        check_whole(run, transport)
        # The prefill workers say Ready; the decode workers have something to lose after it.
        running.on_relay = strike(running, Ready, kill)
        assert tokens_of(running.run(SESSIONS)) == expected
        decode = [worker for worker in running.workers if worker.role is Role.DECODE]
        running.on_relay = strike(running, Ready, lambda source: kill(decode[0]))
        last = running.run(SESSIONS)
        assert tokens_of(last) == expected
        assert [worker.alive for worker in running.workers].count(True) == 2


@pytest.mark.slow
def test_a_decode_worker_killed_when_it_grants_pages_costs_a_recompute(
    expected: dict[str, list[int]],
) -> None:
    with Cluster(cluster("push", decode_workers=2)) as running:
        running.on_relay = strike(running, Grant, kill)
        run = running.run(SESSIONS)
    assert tokens_of(run) == expected
    assert sum(request.recomputes for request in run.requests) > 0


@pytest.mark.slow
@pytest.mark.parametrize("handoff", ["push", "pull"])
def test_a_prefill_worker_may_have_a_store_too(
    expected: dict[str, list[int]], handoff: str
) -> None:
    settings = cluster(handoff, mode=Mode.PD_CACHE, store={"cpu": "16MiB"})
    with Cluster(settings) as running:
        cold, warm = running.run(SESSIONS), running.run(SESSIONS)
    assert tokens_of(cold) == tokens_of(warm) == expected
    assert warm.prefill.hit_cpu_blocks == warm.prefill.queried_blocks
    check_whole(warm, "shm")


@pytest.fixture
def need_hosts() -> None:
    try:
        TwoHosts().close()
    except HostsUnavailableError as error:
        pytest.skip(f"no two hosts: {error}")


def need_mover(name: str) -> None:
    try:
        Endpoint(TransportSettings(movers=(name,))).close()
    except (kvstore.KVStoreError, ImportError) as error:
        pytest.skip(f"no {name} here: {error}")


@pytest.mark.slow
@pytest.mark.usefixtures("need_hosts")
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
def test_two_hosts_give_the_same_tokens(
    expected: dict[str, list[int]], handoff: str, transport: str
) -> None:
    with Cluster(cluster(handoff, transport, hosts=2)) as running:
        run = running.run(SESSIONS)
        assert tokens_of(run) == expected
        check_whole(run, transport)


@pytest.mark.slow
@pytest.mark.usefixtures("need_hosts")
@pytest.mark.parametrize("transport", ["tcp", "ucx"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
def test_a_cable_cut_in_mid_transfer_costs_a_recompute_within_the_timeout(
    expected: dict[str, list[int]], handoff: str, transport: str
) -> None:
    need_mover(transport)
    with Cluster(cluster(handoff, transport, hosts=2, handoff_timeout_s=1.0)) as running:
        assert running.hosts is not None
        cut = running.hosts.cut
        running.on_relay = strike(running, Ready, lambda source: cut())
        began = time.monotonic()
        run = running.run(SESSIONS)
        assert time.monotonic() - began < 45
    assert tokens_of(run) == expected
    assert sum(request.recomputes for request in run.requests) > 0
    assert sum(request.retries for request in run.requests) == 0, "no worker died"


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(kvstore.ConfigError, match="hosts: 2 only with"):
        cluster("store", hosts=2)
    with pytest.raises(kvstore.ConfigError, match="hosts: 3"):
        cluster("push", hosts=3)
    with pytest.raises(kvstore.ConfigError, match="direction"):
        cluster("throw")
    with pytest.raises(kvstore.ConfigError, match="transport"):
        cluster("push", "pigeon")
    with pytest.raises(kvstore.ConfigError, match="codec"):
        cluster("push", codec="zip")
    with pytest.raises(kvstore.ConfigError, match="colocated"):
        cluster("push", mode=Mode.COLOCATED)

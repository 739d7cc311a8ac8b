"""The connector against vLLM's own scheduler, block pool, factory and hashes, with a real daemon.

No model runs: blocks get bytes that follow from the tokens up to their end, and each forward pass
compares all that it rests on (`instance.py`). So every test here proves as well that nothing wrong
was loaded or saved.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what vLLM imports
    pytest.importorskip("vllm.v1.worker.utils")

import torch
from vllm.config import KVEventsConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, supports_hma
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import RequestStatus

from kvstore import ConfigError
from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.settings import AdapterSettings
from kvstore_adapters.vllm import connector, namespaces, plugin
from kvstore_adapters.vllm.connector import KVStoreConnector
from kvstore_adapters.vllm.scheduler_side import SchedulerSide
from tests.adapters.vllm.configs import full, window
from tests.adapters.vllm.instance import BLOCK, KV_CONNECTOR, Instance, instances, prompt

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(120),
]

Make = Callable[..., Instance]
HYBRID = [full(), window(2 * BLOCK + 16)]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    directory = tmp_path_factory.mktemp("daemon")
    with PrivateDaemon(directory, cpu="64MiB", chunk="1MiB") as served:
        served.start()
        yield served


@pytest.fixture
def make(model: Path, daemon: PrivateDaemon, request: pytest.FixtureRequest) -> Iterator[Make]:
    """`make(**options)`: an instance. Each test's blocks go by a name of its own."""
    name = request.node.name
    with instances() as made:
        yield lambda **options: made(model, daemon.address, **{"name": name, **options})


def remove(instance: Instance, first_block: int = 0, rank: int = 0) -> None:
    """Remove a prompt's blocks from the store, from the given one on."""
    for store in instance.stores(rank).values():
        chain = instance.scheduler.requests["b"].block_hashes
        store.remove(chain[first_block:])


# --- the interface


def test_overridden_methods_take_what_the_base_class_says() -> None:
    assert not inspect.isabstract(KVStoreConnector)
    assert supports_hma(KVStoreConnector)
    for name, theirs in inspect.getmembers(KVConnectorBase_V1):
        ours = getattr(KVStoreConnector, name)
        if not callable(theirs) or ours is theirs or name in ("__init__", "__init_subclass__"):
            continue
        if getattr(ours, "__func__", ours) is getattr(theirs, "__func__", theirs):
            continue
        if name.startswith("_"):
            continue
        wanted, found = (inspect.signature(f).parameters.values() for f in (theirs, ours))
        assert [(p.name, p.kind, p.default) for p in found] == [
            (p.name, p.kind, p.default) for p in wanted
        ], name


def test_vllm_knows_the_connector_by_name_and_by_module(make: Make) -> None:
    plugin.register()
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name(plugin.NAME) is KVStoreConnector
    instance = make()
    assert type(instance.connector) is KVStoreConnector
    assert [type(worker) for worker in instance.workers] == [KVStoreConnector]
    assert not instance.scheduler.requires_kv_delivery


def test_what_crosses_between_processes_can_be_pickled(make: Make) -> None:
    instance = make()
    seen: list[Any] = []
    instance.on_scheduled = lambda output: seen.append(output.kv_connector_metadata)
    instance.run("a", prompt(3 * BLOCK))
    plan = pickle.loads(pickle.dumps(next(m.plan for m in seen if m.plan.saves)))  # noqa: S301
    assert plan.saves[0].num_blocks == 3
    told = pickle.loads(pickle.dumps(instance.workers[0].get_handshake_metadata()))  # noqa: S301
    assert told.shards


# --- loads


@pytest.mark.parametrize("load", ["async", "sync"])
def test_a_prompt_of_one_instance_is_loaded_by_another(make: Make, load: str) -> None:
    first = make(load=load)
    assert first.run("a", prompt(100)) == 101
    first.settle()
    second = make(load=load)
    assert second.run("b", prompt(100)) == 101 - 96
    assert second.run("c", [*prompt(64), 9, 9, 9]) == 3 + 1  # here by now


def test_a_whole_prompt_is_loaded_and_its_last_token_computed(make: Make) -> None:
    first = make()
    first.run("a", prompt(96))
    first.settle()
    assert make().run("b", prompt(96)) == 1 + 1


def test_a_request_waits_aside_while_its_blocks_come(make: Make) -> None:
    first = make()
    first.run("a", prompt(100))
    first.settle()
    second = make()
    release = second.hold_loads()
    second.add("b", prompt(100))
    second.until(lambda: second.status("b") == RequestStatus.WAITING_FOR_REMOTE_KVS)
    assert second.run("c", prompt(40, seed=1)) == 41
    assert second.status("b") == RequestStatus.WAITING_FOR_REMOTE_KVS
    release()
    second.settle()
    assert second.computed["b"] == 101 - 96


def test_generated_blocks_are_saved_only_where_that_is_wanted(make: Make) -> None:
    generated = prompt(BLOCK) + [7] * BLOCK
    for save_decode, computed in ((False, BLOCK + 9), (True, 9)):
        first = make(save_decode=save_decode, name=f"save_decode {save_decode}")
        first.run("a", prompt(BLOCK), max_tokens=BLOCK + 4)
        first.settle()
        second = make(name=f"save_decode {save_decode}")
        assert second.run("b", [*generated, *[7] * 8]) == computed


@pytest.mark.parametrize("budget", [48, 96])
def test_a_chunked_prompt_is_saved_and_its_rest_computed(make: Make, budget: int) -> None:
    def chunked(config: Any) -> None:
        config.scheduler_config.max_num_batched_tokens = budget

    first = make(alter=chunked)
    assert first.run("a", prompt(300)) == 301
    first.settle()
    second = make(alter=chunked)
    assert second.run("b", [*prompt(200), *prompt(90, seed=5)]) == 291 - 192


def test_a_prompt_that_the_engine_still_has_is_not_loaded(make: Make) -> None:
    instance = make()
    instance.run("a", prompt(100))
    seen: list[Any] = []
    instance.on_scheduled = lambda output: seen.extend(output.kv_connector_metadata.plan.loads)
    assert instance.run("b", prompt(100)) == 5
    assert not seen


@pytest.mark.parametrize("changed", [{"salt": "other"}, {"lora": "adapter"}])
def test_another_salt_or_lora_finds_nothing_and_its_own_again(
    make: Make, changed: dict[str, str]
) -> None:
    first = make()
    first.run("a", prompt(100))
    first.run("b", prompt(100), **changed)
    first.settle()
    second = make()
    assert second.run("c", prompt(100), **dict.fromkeys(changed, "third")) == 101
    assert second.run("d", prompt(100), **changed) == 101 - 96


def test_another_model_layout_or_dtype_finds_nothing(make: Make) -> None:
    first = make()
    first.run("a", prompt(100))
    first.settle()

    def quantized(config: Any) -> None:
        config.cache_config.cache_dtype = "fp8_e4m3"

    assert make(alter=quantized).run("b", prompt(100)) == 101
    assert make(name="another").run("b", prompt(100)) == 101


# --- roles


def test_a_producer_only_saves_and_a_consumer_only_loads(make: Make) -> None:
    producer = make(role="kv_producer")
    producer.run("a", prompt(100))
    producer.settle()
    assert make(role="kv_producer").run("b", prompt(100)) == 101
    consumer = make(role="kv_consumer")
    assert consumer.run("c", prompt(100)) == 101 - 96
    consumer.run("d", prompt(100, seed=1))
    consumer.settle()
    assert make(role="kv_consumer").run("e", prompt(100, seed=1)) == 101


def test_a_prefill_tells_and_a_decode_waits_for_its_blocks(make: Make) -> None:
    prefill = make(role="kv_producer")
    request = prefill.add("a", prompt(100), max_tokens=1, params={})
    told: list[Any] = []
    side = prefill.connector._scheduler
    finish = side.finished

    def finished(request: Any) -> Any:
        told.append(finish(request))
        return told[-1]

    side.finished = finished
    prefill.until(lambda: bool(told))
    assert told[0]["kvstore"]["tokens"] == 96
    assert told[0]["kvstore"]["hash"] == request.block_hashes[2].hex()
    decode = make(role="kv_consumer")
    decode.add("b", prompt(100), params=told[0])
    decode.step()
    prefill.settle()  # the saves end after the decode was asked
    decode.settle()
    assert decode.computed["b"] == 101 - 96


# --- failures


@pytest.mark.parametrize("load", ["async", "sync"])
@pytest.mark.parametrize("first_gone", [0, 2])
def test_blocks_gone_between_lookup_and_load_are_computed(
    make: Make, load: str, first_gone: int
) -> None:
    first = make(load=load)
    first.run("a", prompt(100))
    first.settle()
    second = make(load=load)

    def lose(output: Any) -> None:
        if output.kv_connector_metadata.plan.loads:
            remove(second, first_gone)

    second.on_scheduled = lose
    second.add("b", prompt(100))
    second.settle()
    assert second.computed["b"] >= 101 - first_gone * BLOCK
    assert second.free_blocks == second.all_blocks
    # What was computed again is in the store again.
    assert make(load=load).run("c", prompt(100)) == 101 - 96


def test_who_shares_blocks_that_did_not_come_saves_nothing_wrong(make: Make) -> None:
    first = make(load="sync")
    first.run("a", prompt(64))
    first.settle()
    second = make(load="sync", lookup_wait=1.0)

    def lose(output: Any) -> None:
        if output.kv_connector_metadata.plan.loads:
            assert len(output.num_scheduled_tokens) == 2
            remove(second)

    second.on_scheduled = lose
    # Both rest on the same blocks, and compute others in the step whose load fails.
    second.add("b", prompt(100))
    second.add("c", [*prompt(64), *prompt(40, seed=1)])
    second.settle()
    third = make(load="sync")
    assert third.run("d", prompt(100)) == 101 - 96
    assert third.run("e", [*prompt(64), *prompt(40, seed=1)]) == 41 - 32


def test_a_request_whose_loads_fail_again_and_again_is_computed(make: Make) -> None:
    first = make(specs=HYBRID)
    first.run("a", prompt(200))
    first.settle()
    second = make(specs=HYBRID)
    tries: list[int] = []

    def nothing(store: Any, chain: Any, block_ids: Any, deadline: float) -> int:
        tries.append(len(block_ids))
        return 0

    for pages in second.workers[0]._worker._transfers._pages.values():
        object.__setattr__(pages, "load", nothing)
    assert second.run("b", prompt(200)) == 201
    assert len(tries) <= 2
    second.settle()
    assert second.free_blocks == second.all_blocks


def test_a_failed_load_of_several_groups_is_told_by_request(make: Make) -> None:
    first = make(specs=HYBRID)
    first.run("a", prompt(200))
    first.settle()
    second = make(specs=HYBRID)

    def lose(output: Any) -> None:
        if output.kv_connector_metadata.plan.loads:
            remove(second)

    second.on_scheduled = lose
    second.add("b", prompt(200))
    second.settle()
    assert second.computed["b"] == 201
    assert second.free_blocks == second.all_blocks


@pytest.mark.parametrize("load", ["async", "sync"])
@pytest.mark.parametrize("first_gone", [0, 4])
def test_of_a_lone_window_group_nothing_is_kept_of_a_load_that_failed(
    make: Make, load: str, first_gone: int
) -> None:
    # Of its prefix only the window was to come: there is no beginning to go on from.
    first = make(specs=[window(2 * BLOCK + 16)], load=load)
    first.run("a", prompt(200))
    first.settle()
    second = make(specs=[window(2 * BLOCK + 16)], load=load)

    def lose(output: Any) -> None:
        if output.kv_connector_metadata.plan.loads:
            remove(second, first_gone)

    second.on_scheduled = lose
    second.add("b", prompt(200))
    second.settle()
    assert second.computed["b"] == 201
    assert second.free_blocks == second.all_blocks
    assert make(specs=[window(2 * BLOCK + 16)], load=load).run("c", prompt(200)) == 201 - 192


def test_a_request_aborted_while_its_blocks_come_frees_them_when_they_have(make: Make) -> None:
    first = make()
    first.run("a", prompt(100))
    first.settle()
    second = make()
    release = second.hold_loads()
    second.add("b", prompt(100))
    second.until(lambda: second.status("b") == RequestStatus.WAITING_FOR_REMOTE_KVS)
    second.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    for _ in range(3):
        second.step()
    assert second.free_blocks == second.all_blocks - 3
    release()
    second.settle()
    assert second.free_blocks == second.all_blocks
    assert second.run("c", prompt(100)) == 101 - 96


def test_a_dead_daemon_costs_nothing_but_the_hits(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with PrivateDaemon(tmp_path, cpu="16MiB", chunk="1MiB") as served, instances() as made:
        served.start()
        first = made(model, served.address, load_deadline=1.0, timeout=0.2)
        first.run("a", prompt(100))
        first.settle()
        second = made(model, served.address, load_deadline=1.0, timeout=0.2)
        second.on_scheduled = lambda output: (
            served.kill() if output.kv_connector_metadata.plan.loads else None
        )
        assert second.run("b", prompt(100)) == 101
        assert second.run("c", prompt(100, seed=1)) == 101
        second.settle()
        assert second.free_blocks == second.all_blocks


# --- saves


def test_blocks_stay_referenced_until_their_save_was_reported(make: Make) -> None:
    instance = make()
    transfers = instance.workers[0]._worker._transfers
    held: list[Any] = []
    save, transfers.save = transfers.save, lambda *job: held.append(job)
    instance.run("a", prompt(100))
    assert instance.free_blocks == instance.all_blocks - 3
    assert instance.connector.has_pending_push_work()
    assert instance.connector.has_pending_block_frees()
    assert instance.scheduler.has_requests()
    # Whoever comes now gets other blocks: what is to be saved stays as it is.
    instance.run("b", prompt(12 * BLOCK - 5, seed=1))
    for job in held:
        save(*job)
    instance.settle()
    assert instance.free_blocks == instance.all_blocks
    assert not instance.connector.has_pending_push_work()
    assert make().run("c", prompt(100)) == 101 - 96


def test_saves_hold_no_more_blocks_than_they_may(make: Make) -> None:
    instance = make(max_pinned_fraction=0.25)
    transfers = instance.workers[0]._worker._transfers
    held: list[Any] = []
    save, transfers.save = transfers.save, lambda *job: held.append(job)
    instance.run("a", prompt(300))
    assert instance.free_blocks == instance.all_blocks - 4
    for job in held:
        save(*job)
    instance.settle()
    assert instance.free_blocks == instance.all_blocks


def test_preempted_requests_come_back_from_the_store(make: Make) -> None:
    instance = make(num_blocks=10)
    preempted: set[str] = set()
    loads: list[str] = []

    def watch(output: Any) -> None:
        preempted.update(output.preempted_req_ids or ())
        loads.extend(job.request_id for job in output.kv_connector_metadata.plan.loads)

    instance.on_scheduled = watch
    for i in range(3):
        instance.add(f"r{i}", prompt(70, seed=i), max_tokens=60)
    instance.settle()
    assert preempted
    assert set(loads) & preempted
    assert instance.free_blocks == instance.all_blocks


# --- several groups and ranks


@pytest.mark.parametrize("num_tokens", [96, 130, 300])
def test_full_and_window_groups_come_back_together(make: Make, num_tokens: int) -> None:
    first = make(specs=HYBRID, num_blocks=40)
    first.run("a", prompt(num_tokens))
    first.settle()
    assert first.free_blocks == first.all_blocks
    second = make(specs=HYBRID, num_blocks=40)
    # A window leaves a token of the prompt, so of one that ends with a block the whole block.
    loaded = (num_tokens - 1) // BLOCK * BLOCK
    assert second.run("b", prompt(num_tokens)) == num_tokens + 1 - loaded
    second.settle()
    assert second.free_blocks == second.all_blocks
    third = make(specs=HYBRID, num_blocks=40)
    assert third.run("c", [*prompt(80), *prompt(20, seed=3)]) == 101 - 64


def test_all_ranks_must_have_a_block(make: Make) -> None:
    first = make(num_ranks=2)
    first.run("a", prompt(100))
    first.settle()
    assert make(num_ranks=2).run("c", prompt(100)) == 101 - 96
    second = make(num_ranks=2)
    second.add("b", prompt(200))
    remove(second, 1, rank=1)
    second.settle()
    assert second.computed["b"] >= 201 - 96
    third = make(num_ranks=2)
    assert third.run("d", prompt(64, seed=2)) == 65
    assert make(num_ranks=1).run("e", prompt(100)) == 101  # shards of another size


def test_a_rank_that_fails_makes_all_compute(make: Make) -> None:
    first = make(num_ranks=2)
    first.run("a", prompt(100))
    first.settle()
    second = make(num_ranks=2)

    def lose(output: Any) -> None:
        if output.kv_connector_metadata.plan.loads:
            remove(second, 1, rank=1)

    second.on_scheduled = lose
    second.add("b", prompt(100))
    second.settle()
    assert second.computed["b"] == 101 - BLOCK
    assert second.free_blocks == second.all_blocks


# --- the rest


def test_two_connectors_beside_each_other_serve_as_one(
    make: Make, daemon: PrivateDaemon, request: pytest.FixtureRequest
) -> None:
    both = {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {
            "connectors": [
                {
                    **KV_CONNECTOR,
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {
                        "address": daemon.address,
                        "model": f"{request.node.name} {i}",
                    },
                }
                for i in range(2)
            ]
        },
    }
    first = make(connector=both)
    first.run("a", prompt(100))
    first.settle()
    assert first.free_blocks == first.all_blocks
    assert make(connector=both).run("b", prompt(100)) == 101 - 96


def test_a_reset_empties_the_store_for_all(make: Make) -> None:
    first = make()
    first.run("a", prompt(100))
    first.settle()
    assert first.scheduler.reset_prefix_cache(reset_connector=True)
    assert make().run("b", prompt(100)) == 101


def test_saves_that_outlast_a_reset_leave_nothing_behind(make: Make) -> None:
    instance = make()
    transfers = instance.workers[0]._worker._transfers
    held: list[Any] = []
    save, transfers.save = transfers.save, lambda *job: held.append(job)
    instance.run("a", prompt(100))
    late = held.copy()
    instance.connector.reset_cache()
    # The instance is busy: others' saves are under way all the time.
    instance.run("b", prompt(100, seed=1))
    assert len(held) > len(late)
    for job in late:
        save(*job)
    # Nothing is loaded meanwhile, and then there is nothing.
    pinned = instance.connector._scheduler._planner
    instance.until(lambda: len(set(pinned.saves_under_way()) & {j[0].job_id for j in late}) == 0)
    assert make().run("c", prompt(100)) == 101
    for job in held[len(late) :]:
        save(*job)
    instance.settle()
    assert instance.free_blocks == instance.all_blocks


def test_events_tell_of_blocks_once_they_are_stored(make: Make) -> None:
    def with_events(config: Any) -> None:
        config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")

    instance = make(alter=with_events)
    request = instance.add("a", prompt(70))
    instance.settle()
    (event,) = [event for event in instance.published if event.medium == "CPU"]
    assert event.token_ids == prompt(64)
    assert (event.block_size, event.group_idx, event.parent_block_hash) == (BLOCK, 0, None)
    (own,) = [event for event in instance.published if event.medium == "GPU"]
    assert event.block_hashes == own.block_hashes
    assert len(request.block_hashes) == 2


def test_a_model_that_cannot_be_kept_is_served_with_one_warning(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    state = MambaSpec(
        block_size=BLOCK, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode="align"
    )
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}, is_kv_producer=True)
    )
    caches = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=state)],
        transfer_group_ids=(0,),
        prefix_cacheable_group_ids=(0,),
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    with caplog.at_level(logging.WARNING, "kvstore_adapters"):
        deciding = KVStoreConnector(config, KVConnectorRole.SCHEDULER, caches)
        moving = KVStoreConnector(config, KVConnectorRole.WORKER, caches)
    assert len([r for r in caplog.records if r.name.startswith("kvstore_adapters")]) == 1
    assert "mamba" in caplog.text
    request = SimpleNamespace(request_id="a")
    deciding.bind_kv_cache_manager(SimpleNamespace(block_pool=None))
    deciding.on_new_request(request)
    assert deciding.get_num_new_matched_tokens(request, 0) == (0, False)
    deciding.update_state_after_alloc(request, None, 0)
    moving.register_kv_caches({})
    moving.bind_connector_metadata(deciding.build_connector_meta(None))
    moving.start_load_kv(None)
    moving.wait_for_save()
    assert moving.get_transfer_results(set()).finished_recving == set()
    assert moving.get_block_ids_with_load_errors() == set()
    assert deciding.request_finished(request, []) == (False, None)
    assert not deciding.has_pending_push_work()
    assert not list(deciding.take_events())
    for half in (deciding, moving):
        half.get_kv_connector_stats()
        half.shutdown()


@pytest.mark.parametrize("algorithm", ["xxhash", "xxhash_cbor"])
def test_hashes_that_do_not_name_blocks_for_good_are_refused(make: Make, algorithm: str) -> None:
    def with_algorithm(config: Any) -> None:
        config.cache_config.prefix_caching_hash_algo = algorithm

    with pytest.raises(ConfigError, match=algorithm):
        make(alter=with_algorithm)


def test_loads_that_end_requests_are_warned_of_at_start(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvstore_adapters"):
        make(policy="recompute")
        assert "kv_load_failure_policy" not in caplog.text
        make(policy="fail")
    assert '"recompute"' in caplog.text


def test_no_step_waits_for_a_load_where_the_next_is_scheduled_before_it_ends(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def ahead(config: Any) -> None:
        config.scheduler_config.async_scheduling = True

    with caplog.at_level(logging.WARNING, "kvstore_adapters"):
        instance = make(load="sync", alter=ahead)
    assert "async is used" in caplog.text
    assert instance.connector._scheduler._is_async


@pytest.mark.parametrize(
    ("drops", "specs", "drop_blocks", "can_load"),
    [(False, [], 0, True), (True, [], 1, True), (True, HYBRID, 1, False)],
)
def test_a_drafter_that_wants_the_last_block_computed_gets_it(
    make: Make, drops: bool, specs: list[Any], drop_blocks: int, can_load: bool
) -> None:
    instance = make(specs=specs)
    config = copy.copy(instance.scheduler.vllm_config)
    config.speculative_config = SimpleNamespace(
        method="eagle", use_eagle_block_drop=lambda: drops, draft_model_config=None
    )
    side = SchedulerSide(config, instance.caches, AdapterSettings())
    side.close()
    assert side._planner._settings.drop_blocks == drop_blocks
    assert side._planner._settings.can_load == can_load


def with_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers know more of how blocks lie than the scheduler does."""
    guessed = namespaces.namespaces_of

    def known(*arguments: Any) -> Any:
        return {
            key: dataclasses.replace(name, layout=f"{name.layout}, surely")
            for key, name in guessed(*arguments).items()
        }

    monkeypatch.setattr(connector, "namespaces_of", known)


def test_the_scheduler_looks_where_the_workers_say_that_they_save(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_another_backend(monkeypatch)
    first = make()
    first.run("a", prompt(100))
    first.settle()
    assert make().run("b", prompt(100)) == 101 - 96


def test_one_of_several_connectors_leaves_the_handshake_to_the_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_another_backend(monkeypatch)
    monkeypatch.setattr(connector, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(connector, "get_kv_transfer_group", object)
    first = make()
    assert first.workers[0].get_handshake_metadata() is None
    first.run("a", prompt(100))
    first.settle()
    second = make()
    assert second.run("b", prompt(100, seed=1)) == 101  # the first step tells
    assert second.run("c", prompt(100)) == 101 - 96

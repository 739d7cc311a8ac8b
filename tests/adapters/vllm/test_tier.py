"""KVStoreTier below vLLM's real TieringOffloadingManager, SharedOffloadRegion and tier factory.

The manager is driven as OffloadingConnector drives it, without a model: chunks of known bytes are
stored through a pool that holds a quarter of them, so that every chunk found again came from a
kvstore daemon. Damage is done to the daemon's own bytes, in the memory that it lets us map.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what vLLM imports
    pytest.importorskip("vllm.v1.kv_offload.tiering.manager")

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    TierFilter,
    TierMatcher,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

import kvstore
from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.vllm.tier import names_of, namespace_of
from tests.daemon.daemon_support import RawClient

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

POOL_CHUNKS = 16
NUM_CHUNKS = 64
BATCH = 8
CHUNK_BYTES = 64 << 10
SECONDS = 30.0  # a bound for what must come


def offloading_config(**changes: Any) -> OffloadingConfig:
    values: dict[str, Any] = {
        "groups": (OffloadingGroupConfig(16, ("layer.0", "layer.1"), 0),),
        "worker_kv_bytes_per_block": CHUNK_BYTES,
        "enable_kv_cache_events": False,
        "extra_config": {},
        "engine_id": "engine",
        "model": OffloadingModelConfig("some/model", "float16"),
        "cache": OffloadingCacheConfig(16, 1),
        "parallel": OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
        "kv_cache_layout": "BLHNC",
    }
    return OffloadingConfig(**{**values, **changes})


class Spec:
    """The part of an OffloadingSpec that tiers read."""

    def __init__(self, config: OffloadingConfig) -> None:
        self.config = config


def key(number: int, group: int = 0) -> OffloadKey:
    return make_offload_key(hashlib.sha256(str(number).encode()).digest(), group)


def content(number: int) -> npt.NDArray[np.int8]:
    return np.random.default_rng(number).integers(-128, 128, CHUNK_BYTES, np.int8)


class Offloading:
    """vLLM's tiering over a region of its own, and the steps that its connector takes."""

    def __init__(
        self, address: str, config: OffloadingConfig | None = None, **settings: Any
    ) -> None:
        self._region = SharedOffloadRegion(
            f"test{os.getpid()}-{time.monotonic_ns()}", POOL_CHUNKS, None, CHUNK_BYTES, CHUNK_BYTES
        )
        Path(self._region.mmap_path).unlink()  # it stays mapped, and is gone whatever happens
        primary = CPUPrimaryTierOffloadingManager(POOL_CHUNKS, self._region)
        view = primary.get_kv_memoryview()
        # No engine's configuration is about that says more of the model than its name.
        named = (config or offloading_config()).model.name
        tier = {
            "type": "KVStoreTier",
            "module_path": "kvstore_adapters.vllm.tier",
            "model": named,
        }
        self.tier = SecondaryTierFactory.create_secondary_tier(
            {**tier, "address": address, **settings}, view, Spec(config or offloading_config())
        )
        self.rows: npt.NDArray[np.int8] | None = np.asarray(view)
        self.manager = TieringOffloadingManager(primary, [self.tier])
        self._count = 0

    def request(self) -> ReqContext:
        self._count += 1
        context = ReqContext(req_id=f"request-{self._count}")
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def step_until(self, condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < give_up, "did not happen in time"
            self.step()
            time.sleep(0.001)

    def store(self, first: int, count: int) -> None:
        context, keys = self.request(), [key(number) for number in range(first, first + count)]
        prepared = self.manager.prepare_store(keys, context)
        assert prepared is not None
        assert self.rows is not None
        for stored, chunk in zip(prepared.keys_to_store, ids_of(prepared.store_spec), strict=True):
            self.rows[chunk] = content(first + keys.index(stored))
        self.manager.complete_store(prepared.keys_to_store, context)
        self.manager.on_request_finished(context)
        self.step_until(lambda: not self.manager.has_pending_work())

    def store_all(self) -> None:
        for first in range(0, NUM_CHUNKS, BATCH):
            self.store(first, BATCH)

    def find(self, number: int) -> LookupResult:
        """What a new request gets of a chunk. If it gets any, it is the right one."""
        context, keys = self.request(), [key(number)]
        found: list[LookupResult] = []

        def is_known() -> bool:
            found[:] = [self.manager.lookup(keys[0], context)]
            return found[0] in (LookupResult.HIT, LookupResult.MISS)

        self.step_until(is_known)
        if found[0] is LookupResult.HIT:
            (chunk,) = ids_of(self.manager.prepare_load(keys, context))
            assert self.rows is not None
            assert np.array_equal(self.rows[chunk], content(number)), number
            self.manager.complete_load(keys, context)
        self.manager.on_request_finished(context)
        self.step()
        return found[0]

    def forget_pool(self) -> None:
        self.manager.reset_cache()

    def close(self) -> None:
        self.rows = None
        self.manager.shutdown()


def ids_of(spec: Any) -> list[int]:
    return [int(chunk) for chunk in spec.chunk_ids]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[PrivateDaemon]:
    with PrivateDaemon(tmp_path, cpu="16MiB", verify="always") as running:
        running.start()
        yield running


@pytest.fixture
def offloading(daemon: PrivateDaemon) -> Iterator[Callable[..., Offloading]]:
    made: list[Offloading] = []

    def make(**settings: Any) -> Offloading:
        made.append(Offloading(daemon.address, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def damage(address: str, number: int) -> None:
    """Change a byte of a chunk in the daemon's memory."""
    namespace = namespace_of(offloading_config(), CHUNK_BYTES, ("some/model", ""))
    with (
        kvstore.connect(address, namespace) as store,
        store.acquire(names_of([key(number)])) as lease,
        RawClient(address, namespace) as client,
    ):
        client.memory[int(lease._granted.offsets[0]) + 5] ^= 1


def test_chunks_that_left_the_pool_come_back_equal(offloading: Callable[..., Offloading]) -> None:
    engine = offloading()
    engine.store_all()
    for number in range(NUM_CHUNKS):
        assert engine.find(number) is LookupResult.HIT
    assert engine.find(NUM_CHUNKS) is LookupResult.MISS


def test_another_engine_finds_what_the_first_stored(offloading: Callable[..., Offloading]) -> None:
    offloading().store(0, BATCH)
    assert offloading().find(3) is LookupResult.HIT


@pytest.mark.parametrize(
    "changes",
    [
        {"model": OffloadingModelConfig("other/model", "float16")},
        {"model": OffloadingModelConfig("some/model", "bfloat16")},
        {"groups": (OffloadingGroupConfig(32, ("layer.0", "layer.1"), 0),)},
        {"cache": OffloadingCacheConfig(16, 2)},
        {"parallel": OffloadingParallelConfig(0, 2, 2, 1, 1, 1, 0, 1, None, False)},
        {"kv_cache_layout": "LBHNC"},
        {"canonical_layout": True},
    ],
)
def test_an_engine_with_another_model_or_layout_misses(
    offloading: Callable[..., Offloading], changes: dict[str, Any]
) -> None:
    offloading().store(0, 1)
    assert offloading(config=offloading_config(**changes)).find(0) is LookupResult.MISS


def test_a_model_of_which_only_the_path_is_known_is_refused(
    offloading: Callable[..., Offloading],
) -> None:
    with pytest.raises(kvstore.ConfigError, match="some/model"):
        offloading(model="")


def test_groups_of_a_hybrid_model_are_kept_apart() -> None:
    names = names_of([key(1, 0), key(1, 1), make_offload_key(b"short", 0)])
    assert len({*names}) == 3


def test_a_damaged_chunk_is_computed_anew(
    daemon: PrivateDaemon, offloading: Callable[..., Offloading]
) -> None:
    engine = offloading()
    engine.store(0, BATCH)
    engine.forget_pool()
    damage(daemon.address, 2)
    assert engine.find(2) is LookupResult.MISS
    assert engine.find(3) is LookupResult.HIT
    engine.store(2, 1)  # what vLLM does after computing it
    engine.forget_pool()
    assert engine.find(2) is LookupResult.HIT


def test_of_a_promotion_that_fails_in_part_the_rest_is_kept(
    daemon: PrivateDaemon, offloading: Callable[..., Offloading]
) -> None:
    engine = offloading()
    engine.store(0, BATCH)
    engine.forget_pool()
    damage(daemon.address, 2)
    context, keys = engine.request(), [key(number) for number in range(4)]
    states: list[LookupResult] = []

    def is_settled() -> bool:
        states[:] = [engine.manager.lookup(one, context) for one in keys]
        return set(states) <= {LookupResult.HIT, LookupResult.MISS}

    engine.step_until(is_settled)
    hit, miss = LookupResult.HIT, LookupResult.MISS
    assert states == [hit, hit, miss, hit]
    engine.manager.on_request_finished(context)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_without_the_daemon_lookups_miss_and_stores_end(
    daemon: PrivateDaemon, offloading: Callable[..., Offloading], how: signal.Signals
) -> None:
    engine = offloading(timeout=0.3, load_deadline=0.3)
    engine.store(0, BATCH)
    engine.forget_pool()
    os.kill(daemon.pid, how)
    try:
        for number in range(BATCH):
            assert engine.find(number) is LookupResult.MISS
        engine.store(BATCH, BATCH)
        assert engine.find(BATCH) is LookupResult.HIT  # from vLLM's own pool
        engine.forget_pool()
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_a_daemon_that_comes_later_is_used(tmp_path: Path) -> None:
    with PrivateDaemon(tmp_path, cpu="16MiB") as daemon:
        engine = Offloading(daemon.address)
        try:
            assert engine.find(0) is LookupResult.MISS
            daemon.start()

            def is_kept() -> bool:
                engine.forget_pool()
                engine.store(0, 1)
                engine.forget_pool()
                return engine.find(0) is LookupResult.HIT

            engine.step_until(is_kept)
        finally:
            engine.close()


def test_stores_that_would_hold_the_pool_are_dropped(
    daemon: PrivateDaemon, offloading: Callable[..., Offloading]
) -> None:
    engine = offloading(timeout=2.0, max_pinned_fraction=0.5)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        context = engine.request()
        for first in range(0, POOL_CHUNKS, 4):
            prepared = engine.manager.prepare_store([key(first + i) for i in range(4)], context)
            assert prepared is not None
            engine.manager.complete_store(prepared.keys_to_store, context)
        dropped = engine.tier.get_finished_jobs()
        assert [result.success for result in dropped] == [False, False]
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_a_request_may_leave_the_tier_out(offloading: Callable[..., Offloading]) -> None:
    engine = offloading(locality="REMOTE")
    engine.store(0, 1)
    engine.forget_pool()
    here = TierFilter((TierMatcher(locality=Locality.LOCAL),))
    context = engine.request()
    context.load_tier_filter = here
    assert engine.manager.lookup(key(0), context) is LookupResult.MISS
    engine.manager.on_request_finished(context)
    assert engine.find(0) is LookupResult.HIT


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(kvstore.ConfigError, match="adress"):
        Offloading(f"unix:{tmp_path}/s", adress="unix:/s")

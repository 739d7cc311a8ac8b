"""SGLang's calls end as misses or failed writes, in time and without an exception, when the daemon
is not there yet, dies, or hangs; and the cache is found again when it is back.

A real daemon that is killed (SIGKILL) or stopped (SIGSTOP), and real pools.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("sglang")
pytest.importorskip("torch")

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageFailureInjector, PoolName

from kvstore.bench.serving import PrivateDaemon
from tests.adapters.sglang import support
from tests.adapters.sglang.support import Engine, keys

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]

TIMEOUT_S = 0.5
WAIT_S = 60.0  # a bound for what must come


@pytest.fixture(scope="module", autouse=True)
def _published() -> None:
    support.publish()


@pytest.fixture
def private_daemon(tmp_path: Path) -> Iterator[PrivateDaemon]:
    with PrivateDaemon(tmp_path, cpu="16MiB") as daemon:
        yield daemon


@pytest.fixture
def make(private_daemon: PrivateDaemon) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make_one(is_v1: int = 1) -> Engine:
        extra = {"timeout": TIMEOUT_S, "interface_v1": is_v1}
        pool = support.mha_pool("page_first")
        engines.append(support.make_engine(private_daemon.address, "m", pool, extra=extra))
        return engines[-1]

    yield make_one
    for engine in engines:
        engine.backend.close()


def stop(daemon: PrivateDaemon) -> None:
    os.kill(daemon.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WNOWAIT)  # until it really stands still


def assert_all_missed(engine: Engine) -> None:
    """Every call misses."""
    slots = engine.slots(2)
    assert engine.backend.batch_exists(keys(2)) == 0
    assert not engine.backend.exists(keys(1)[0])
    found = engine.backend.batch_exists_v2(keys(2), None, None)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (0, [])
    assert engine.get(keys(2), slots) == [False, False]
    assert not engine.put(keys(2), slots)
    assert engine.backend.clear() is False
    engine.backend.get_stats()
    engine.pool.free(slots)


def wait_until_found(engine: Engine, count: int) -> None:
    give_up = time.monotonic() + WAIT_S
    while engine.backend.batch_exists(keys(count)) != count:
        assert time.monotonic() < give_up, "the engine did not find the daemon again"


def wait_until_written(engine: Engine, slots: object) -> None:
    give_up = time.monotonic() + WAIT_S
    while not engine.put(keys(2), slots):  # type: ignore[arg-type]
        assert time.monotonic() < give_up, "the engine did not find the daemon"


@pytest.mark.parametrize("is_v1", [1, 0])
def test_attach_before_the_daemon_is_there(
    private_daemon: PrivateDaemon, make: Callable[..., Engine], is_v1: int
) -> None:
    engine = make(is_v1)
    assert_all_missed(engine)
    private_daemon.start()
    slots = engine.slots(2)
    support.fill(engine.pool, 1)
    wanted = engine.contents(slots)
    wait_until_written(engine, slots)
    target = engine.slots(2)
    assert engine.get(keys(2), target) == [True, True]
    assert [bytes(page.numpy()) for page in engine.contents(target)] == [
        bytes(page.numpy()) for page in wanted
    ]


@pytest.mark.parametrize("is_v1", [1, 0])
def test_the_daemon_is_killed_and_comes_back(
    private_daemon: PrivateDaemon, make: Callable[..., Engine], is_v1: int
) -> None:
    private_daemon.start()
    engine = make(is_v1)
    slots = engine.slots(2)
    assert engine.put(keys(2), slots)
    private_daemon.kill()
    assert_all_missed(engine)
    private_daemon.start()
    wait_until_found(engine, 2)  # with the memory that the killed one left
    assert engine.get(keys(2), slots) == [True, True]


def test_the_daemon_hangs_and_wakes_up(
    private_daemon: PrivateDaemon, make: Callable[..., Engine]
) -> None:
    private_daemon.start()
    engine = make()
    slots = engine.slots(2)
    assert engine.put(keys(2), slots)
    stop(private_daemon)
    try:
        assert_all_missed(engine)
    finally:
        os.kill(private_daemon.pid, signal.SIGCONT)
    wait_until_found(engine, 2)
    assert engine.get(keys(2), slots) == [True, True]


def test_attach_to_a_daemon_that_hangs(
    private_daemon: PrivateDaemon, make: Callable[..., Engine]
) -> None:
    private_daemon.start()
    stop(private_daemon)
    try:
        engine = make()
        assert_all_missed(engine)
    finally:
        os.kill(private_daemon.pid, signal.SIGCONT)
    wait_until_written(engine, engine.slots(2))


@pytest.mark.parametrize("is_failing", [True, False])
def test_sglangs_failure_injector_around_the_backend(
    private_daemon: PrivateDaemon, is_failing: bool
) -> None:
    """SGLang's own proxy, as its environment variables put it around a backend."""
    from sglang.srt.environ import envs

    private_daemon.start()
    pool = support.mha_pool("page_first")
    config = support.storage_config(private_daemon.address, "m")
    failures = envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE
    with failures.override(1.0 if is_failing else 0.5):
        backend = support.make_backend(config, pool)
    assert isinstance(backend, HiCacheStorageFailureInjector)
    engine = Engine(pool, backend)
    slots, target = engine.slots(4), engine.slots(4)
    support.fill(pool, 1)
    wanted = engine.contents(slots)
    if is_failing:
        assert not engine.put(keys(4), slots)
    else:
        while not engine.put(keys(4), slots):  # every other call fails
            pass
        while engine.get(keys(4), target) != [True] * 4:
            pass
        assert [bytes(page.numpy()) for page in engine.contents(target)] == [
            bytes(page.numpy()) for page in wanted
        ]
    assert set(backend.batch_get_v2([])) == set()
    assert backend.batch_exists_v2(keys(4)).extra_pool_hit_pages.get(PoolName.KV, 0) in (0, 4)
    backend.get_stats()
    backend.clear()
    backend.close()

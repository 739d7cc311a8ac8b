"""KV that went through a real kvstore gives the very tokens of a run without one.

The oracle is a worker with NoTransfer. The controls prove that hits are real: a double between
store and pool zeroes what was loaded, and the tokens change. Lost and full stores must cost time
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvstore  # noqa: E402
from kvstore_adapters.reference import checkpoint  # noqa: E402
from kvstore_adapters.reference.scheduler import Request, WorkerSettings  # noqa: E402
from kvstore_adapters.reference.store_transfer import (  # noqa: E402
    RETRY_SECONDS,
    StoreTransfer,
    namespace_of,
)
from kvstore_adapters.reference.transfer import KVTransfer  # noqa: E402
from kvstore_adapters.reference.worker import ReferenceWorker  # noqa: E402

PAGE_TOKENS = 16
NEW_TOKENS = 20
CAPACITY = WorkerSettings(page_tokens=PAGE_TOKENS, num_pages=64, batch_tokens_max=96)
PREFIX = tuple((7 * i * i + i) % 251 for i in range(200))
PROMPTS = (PREFIX, PREFIX[:130] + tuple(range(60)), tuple(range(5, 100)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> checkpoint.Checkpoint:
    return checkpoint.make_random(size="nano", seed=3)


@pytest.fixture
def open_store(model: checkpoint.Checkpoint) -> Iterator[Callable[..., kvstore.Store]]:
    stores: list[kvstore.Store] = []

    def open_one(**settings: Any) -> kvstore.Store:
        store = kvstore.open(namespace_of(model, PAGE_TOKENS), **({"cpu": "8MiB"} | settings))
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()


def generate(
    model: checkpoint.Checkpoint, transfer: KVTransfer | None, prompts: Sequence[tuple[int, ...]]
) -> list[list[int]]:
    """The tokens of each prompt, one after the other, by a worker of its own."""
    worker = ReferenceWorker(model, CAPACITY, transfer)
    tokens = []
    for index, prompt in enumerate(prompts):
        worker.add_request(Request(str(index), prompt, NEW_TOKENS))
        tokens.append([output.token_id for output in run(worker)])
    assert worker.pages_free == CAPACITY.num_pages
    return tokens


def run(worker: ReferenceWorker) -> Iterator[Any]:
    while worker.has_work:
        yield from worker.step()


@pytest.fixture(scope="module")
def expected(model: checkpoint.Checkpoint) -> list[list[int]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tokens = generate(model, None, PROMPTS)
    torch.set_num_threads(before)
    return tokens


@pytest.mark.parametrize("layerwise", [False, True])
def test_tokens_are_those_of_a_run_without_store_cold_and_cached(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
    layerwise: bool,
) -> None:
    store = open_store()
    cold = StoreTransfer(store, layerwise=layerwise)
    assert generate(model, cold, PROMPTS) == expected
    shared = 130 // PAGE_TOKENS
    assert cold.counters.hit_cpu_blocks == shared
    warm = StoreTransfer(store, layerwise=layerwise)
    assert generate(model, warm, PROMPTS) == expected
    assert warm.counters.hit_cpu_blocks == warm.counters.queried_blocks > shared
    assert warm.counters.saved_blocks == 0
    cold.close()
    warm.close()


def test_layers_and_whole_blocks_store_the_same_bytes(
    model: checkpoint.Checkpoint, open_store: Callable[..., kvstore.Store]
) -> None:
    hashes = kvstore.hash_blocks(list(PREFIX), PAGE_TOKENS)
    held = []
    for layerwise in (False, True):
        store = open_store()
        transfer = StoreTransfer(store, layerwise=layerwise)
        generate(model, transfer, PROMPTS[:1])
        transfer.close()
        with store.acquire(hashes) as lease:
            assert len(lease) == len(hashes)
            held.append([lease.block(index).copy() for index in range(len(lease))])
    assert np.array_equal(held[0], held[1])
    assert np.any(held[0])


class LateExecutor:
    """Runs nothing until somebody waits for it: the slowest helper thread there can be."""

    def submit(self, work: Callable[..., None], *arguments: Any) -> Any:
        class Late:
            def exception(self) -> BaseException | None:
                work(*arguments)
                return None

        return Late()

    def shutdown(self, wait: bool) -> None:
        pass


def test_layers_that_are_copied_late_are_in_the_block_that_is_committed(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = open_store()
    transfer = StoreTransfer(store, layerwise=True)
    transfer.close()
    monkeypatch.setattr(transfer, "_copier", LateExecutor())
    assert generate(model, transfer, PROMPTS) == expected
    assert transfer.counters.hit_cpu_blocks > 0


def test_eviction_costs_hits_and_no_tokens(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
) -> None:
    block_bytes = namespace_of(model, PAGE_TOKENS).spec.block_bytes
    store = open_store(cpu="1MiB")
    fillers = [
        tuple((seed * 13 + i * i) % 251 for i in range(900))
        for seed in range(1 + (2 << 20) // (56 * block_bytes))
    ]
    for _ in range(2):
        assert generate(model, StoreTransfer(store), PROMPTS) == expected
        generate(model, StoreTransfer(store), fillers)
    assert store.stats()["kvstore_evicted_cpu_blocks_total"] > 0


def test_a_new_process_state_is_served_from_ssd(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    with open_store(ssd=str(tmp_path), ssd_segment="4MiB", ssd_capacity="64MiB") as store:
        assert generate(model, StoreTransfer(store), PROMPTS) == expected
        assert store.flush()
    store = open_store(ssd=str(tmp_path), ssd_segment="4MiB", ssd_capacity="64MiB")
    transfer = StoreTransfer(store)
    assert generate(model, transfer, PROMPTS) == expected
    counters = transfer.counters
    assert counters.hit_ssd_blocks > 0
    assert counters.hit_cpu_blocks + counters.hit_ssd_blocks == counters.queried_blocks


class Zeroing:
    """A store whose loads arrive as zeroes: between the real store and the pool."""

    def __init__(self, store: kvstore.Store) -> None:
        self._store = store
        self.pool: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def load(self, hashes: Any, buffers: Any, ids: list[int], **options: Any) -> kvstore.Transfer:
        transfer = self._store.load(hashes, buffers, ids, **options)
        result = transfer.wait()
        self.pool[ids] = 0.0
        return kvstore.Transfer(result)


def test_zeroed_kv_changes_the_tokens(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
) -> None:
    store = open_store()
    assert generate(model, StoreTransfer(store), PROMPTS) == expected

    class Attaching(StoreTransfer):
        def attach(self, pool: Any, pages: Any) -> None:
            zeroing.pool = pool
            super().attach(pool, pages)

    zeroing: Any = Zeroing(store)
    tokens = generate(model, Attaching(zeroing), PROMPTS)
    assert all(got != want for got, want in zip(tokens, expected, strict=True))


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_store_that_closes_in_between_costs_time_only(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
    layerwise: bool,
) -> None:
    store = open_store()
    transfer = StoreTransfer(store, layerwise=layerwise)
    worker = ReferenceWorker(model, CAPACITY, transfer)
    worker.add_request(Request("0", PROMPTS[0], NEW_TOKENS))
    tokens = [output.token_id for output in worker.step()]
    store.close()
    tokens += [output.token_id for output in run(worker)]
    assert tokens == expected[0]
    assert transfer.counters.errors > 0
    transfer.close()


def test_a_lost_store_is_left_alone_for_a_while(
    model: checkpoint.Checkpoint, open_store: Callable[..., kvstore.Store]
) -> None:
    now = 0.0
    store = open_store()
    transfer = StoreTransfer(store, clock=lambda: now)
    ReferenceWorker(model, CAPACITY, transfer)
    store.close()
    assert [transfer.match("a", PREFIX, 3) for _ in range(4)] == [0, 0, 0, 0]
    assert transfer.counters.errors == 1
    now += RETRY_SECONDS
    assert transfer.match("a", PREFIX, 3) == 0
    assert transfer.counters.errors == 2


def test_a_load_that_fails_on_its_way_is_computed(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
) -> None:
    store = open_store()
    generate(model, StoreTransfer(store), PROMPTS[:1])

    class Failing(Zeroing):
        def load(
            self, hashes: Any, buffers: Any, ids: list[int], **options: Any
        ) -> kvstore.Transfer:
            from concurrent.futures import Future

            future: Future[kvstore.TransferResult] = Future()
            future.set_exception(kvstore.PeerUnavailableError("gone"))
            return kvstore.Transfer(future=future)

    failing: Any = Failing(store)
    transfer = StoreTransfer(failing)
    assert generate(model, transfer, PROMPTS[:1]) == expected[:1]
    assert transfer.counters.errors == 1
    assert transfer.counters.hit_cpu_blocks == 0


def test_a_store_full_of_pins_takes_nothing_and_tokens_stay(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
) -> None:
    store = open_store(cpu="1MiB")
    block_bytes = store.namespace.spec.block_bytes
    blocks = np.zeros(((1 << 20) // block_bytes, block_bytes), np.uint8)
    fill = kvstore.hash_blocks([9] * (len(blocks) * PAGE_TOKENS), PAGE_TOKENS)
    store.put(fill, kvstore.ContiguousBlocks(blocks)).wait()
    store.pin(fill[: store.match(fill)])
    for layerwise in (False, True):
        transfer = StoreTransfer(store, layerwise=layerwise)
        assert generate(model, transfer, PROMPTS) == expected
        assert transfer.counters.saved_blocks * block_bytes < 1 << 20
        assert transfer.counters.errors == 0
        transfer.close()


def test_reading_and_writing_can_be_left_out(
    model: checkpoint.Checkpoint,
    open_store: Callable[..., kvstore.Store],
    expected: list[list[int]],
) -> None:
    store = open_store()
    generate(model, StoreTransfer(store, write=False), PROMPTS)
    assert store.stats()["kvstore_cpu_blocks"] == 0
    generate(model, StoreTransfer(store), PROMPTS)
    unread = StoreTransfer(store, read=False)
    assert generate(model, unread, PROMPTS) == expected
    assert unread.counters.loaded_bytes == 0
    assert unread.counters.queried_blocks > 0

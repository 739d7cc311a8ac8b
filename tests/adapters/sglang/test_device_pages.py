"""Pages of a device pool come back layer by layer with exactly their bytes, straight and through
staging memory, and one layer's load touches nothing else.

The pools are tensors in host memory that look like SGLang's `DevicePoolEntry`; the oracle reads
them by plain indexing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvstore  # noqa: E402
from kvstore import Namespace, Store  # noqa: E402
from kvstore_adapters.sglang import device_pages  # noqa: E402
from kvstore_adapters.sglang.device_pages import DevicePages, LoadError, Pieces  # noqa: E402
from kvstore_adapters.sglang.pins import PinnedPages  # noqa: E402
from tests.store_support import WAIT_S  # noqa: E402

PAGE_TOKENS, LAYERS, PAGES = 4, 3, 10


def entry(kind: str, seed: int) -> Any:
    """A pool of `kind`, every byte random."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    rows, rows_are_pages = PAGES * PAGE_TOKENS, False
    if kind == "mha":
        # K and V of a layer are two halves of one allocation, as in SGLang.
        fused = [tensor(2, rows + 3, 2, 8) for _ in range(LAYERS)]
        buffers = [both[i, :rows] for i in range(2) for both in fused]
        mapping: dict[int, Any] = {i: (i, LAYERS + i) for i in range(LAYERS)}
        components = [buffers]
    elif kind == "mla":
        components = [[tensor(rows, 1, 24) for _ in range(LAYERS)]]
        mapping = {i: i for i in range(LAYERS)}
    elif kind == "pages":
        components, rows_are_pages = [[tensor(PAGES, 2, PAGE_TOKENS, 4) for _ in range(2)]], True
        mapping = {0: 0, 2: 1}  # no layer 1 in this pool
    else:
        components = [[tensor(rows, 6) for _ in range(2)], [tensor(rows, 2) for _ in range(2)]]
        mapping = {1: 0, 2: 1}
    span = 1 if rows_are_pages else PAGE_TOKENS
    meta = [
        [(t.data_ptr(), t.stride(0) * 4, t.nbytes // len(t) * span) for t in component]
        for component in components
    ]

    def rows_of(slots: Any) -> list[int]:
        first = slots.reshape(-1, PAGE_TOKENS)[:, 0]
        return list((first // PAGE_TOKENS if rows_are_pages else first).tolist())

    return SimpleNamespace(
        components=components, layer_mapping=mapping, buffer_meta=meta, prepare_locations=rows_of
    )


def slots(pages: list[int]) -> Any:
    return (torch.tensor(pages)[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()


def snapshot(pool: Any) -> list[Any]:
    return [tensor.clone() for component in pool.components for tensor in component]


def page_of(tensor: Any, page: int) -> Any:
    span = len(tensor) // PAGES
    return tensor[page * span : (page + 1) * span]


@pytest.fixture(params=["mha", "mla", "pages", "uneven"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["straight", "staged"])
def is_staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(device_pages, "_STAGING_BYTES", 2000)  # chunks of one to three pages
    return bool(request.param)


@pytest.fixture
def store(kind: str) -> Iterator[Store]:
    spec = Pieces.of(entry(kind, 0)).spec
    with kvstore.open(Namespace("model", spec), cpu="1MiB", chunk="1MiB") as opened:
        yield opened


def keys(count: int) -> list[str]:
    return [f"{i:064x}" for i in range(count)]


def pinned(pages: DevicePages, names: list[str]) -> PinnedPages:
    """Held by a lease for each two pages."""
    held = PinnedPages(names)
    for begin in range(0, len(names), 2):
        held.leases.append(pages.store.acquire(pages.hashes(names[begin : begin + 2])))
    return held


def load_all(pages: DevicePages, held: PinnedPages, ids: list[int]) -> None:
    for layer in range(LAYERS):
        pages.load_layer(layer, held, np.array(ids))


def test_pages_come_back_layer_by_layer(kind: str, is_staged: bool, store: Store) -> None:
    source = DevicePages(entry(kind, 1), store, is_staged=is_staged)
    names, from_pages, to_pages = keys(5), [7, 2, 3, 9, 0], [1, 8, 0, 4, 5]
    assert source.put(names, source.page_ids(slots(from_pages)))
    for reader in (False, True):
        pool = entry(kind, 2)
        target = DevicePages(pool, store, is_staged=reader)
        held = pinned(target, names)
        ids = target.page_ids(slots(to_pages))
        expected = snapshot(pool)
        flat = [tensor for component in pool.components for tensor in component]
        theirs = [tensor for component in source.entry.components for tensor in component]
        is_first = True
        for layer in range(LAYERS):
            target.load_layer(layer, held, ids)
            arrived = pool.layer_mapping.get(layer, ())
            numbers = [arrived] if isinstance(arrived, int) else list(arrived)
            if kind == "uneven":  # whole with its first layer
                numbers = [0, 1] if numbers and is_first else []
                is_first = is_first and not numbers
            for part in range(len(pool.components)):
                for number in numbers:
                    at = part * len(pool.components[0]) + number
                    for one, other in zip(to_pages, from_pages, strict=True):
                        page_of(expected[at], one)[:] = page_of(theirs[at], other)
            for mine, wanted in zip(flat, expected, strict=True):
                assert torch.equal(mine, wanted)
        held.release()


def test_fewer_pages_than_are_pinned_can_be_loaded(store: Store, kind: str) -> None:
    source = DevicePages(entry(kind, 1), store)
    assert source.put(keys(5), np.arange(5))
    target = DevicePages(entry(kind, 2), store)
    held = pinned(target, keys(5))
    before = snapshot(target.entry)
    load_all(target, held, [6, 7, 8])
    after = snapshot(target.entry)
    theirs = snapshot(source.entry)
    for old, new, stored in zip(before, after, theirs, strict=True):
        for page in range(PAGES):
            wanted = page_of(stored, page - 6) if page in (6, 7, 8) else page_of(old, page)
            assert torch.equal(page_of(new, page), wanted)
    held.release()


def test_an_ended_lease_is_a_failed_load(store: Store, kind: str, is_staged: bool) -> None:
    pages = DevicePages(entry(kind, 1), store, is_staged=is_staged)
    assert pages.put(keys(2), np.arange(2))
    held = PinnedPages(keys(2))
    held.acquire(pages, ttl=0.001, timeout=WAIT_S)
    assert held.num_pages == 2
    others = itertools.count()
    while held.are_intact(2):  # when its time is over, others may take its place
        room = np.zeros((8, store.namespace.spec.block_bytes), np.uint8)
        hashes = kvstore.hash_blocks(np.array([next(others) for _ in range(8)]), 1)
        store.put(hashes, kvstore.ContiguousBlocks(room))
    with pytest.raises(LoadError):
        load_all(pages, held, [0, 1])


def test_a_full_store_is_no_success(kind: str) -> None:
    pages_bytes = Pieces.of(entry(kind, 0)).spec.block_bytes
    spec = Pieces.of(entry(kind, 0)).spec
    with kvstore.open(Namespace("model", spec), cpu="1MiB", chunk="1MiB") as small:
        pages = DevicePages(entry(kind, 1), small)
        room = np.zeros((2 * (1 << 20) // pages_bytes, pages_bytes), np.uint8)
        hashes = kvstore.hash_blocks(np.arange(len(room)), 1)
        small.put(hashes, kvstore.ContiguousBlocks(room))
        with small.acquire(hashes) as lease:
            assert len(lease)
            assert not pages.put(keys(1), np.array([0]))
        assert pages.put(keys(1), np.array([0]))

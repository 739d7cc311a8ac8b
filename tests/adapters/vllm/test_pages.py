"""Blocks as bytes: in every KV layout that vLLM lays out, a block that is put and loaded elsewhere
is the same block in every layer, and nothing else in the engine's memory has changed.

The tensors are those that vLLM's own `allocate_kv_cache` makes. The path for devices is driven over
host memory: the gathering, batching and scattering are the same, the streams are not there.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what vLLM imports
    pytest.importorskip("vllm.v1.worker.utils")

import torch
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs, group_kernel_blocks

import kvstore
from kvstore import BlockSpec, ConfigError
from kvstore_adapters.planning.pages import Pages
from kvstore_adapters.vllm.namespaces import groups_of, layers_of, page_bytes
from kvstore_adapters.vllm.pages import block_views, pages_of, recorder, staged_pages
from tests.adapters.vllm.configs import (
    NUM_BLOCKS,
    allocated,
    cache_config,
    full,
    vllm_config,
    window,
)
from tests.store_support import chain

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


class Cache:
    """Registered tensors with random content, and their groups' pages."""

    def __init__(self, model: Path, layout: str, specs: Any = (), **options: Any) -> None:
        config = vllm_config(model, layout)
        self.caches = cache_config(config, specs)
        self.tensors = allocated(config, self.caches, **options)
        self.groups = groups_of(self.caches)
        self.bytes = next(iter(self.tensors.values())).untyped_storage()
        memory = torch.tensor([], dtype=torch.uint8).set_(self.bytes)
        memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8))
        self.memory = memory

    def views(self, group_id: int = 0) -> list[torch.Tensor]:
        names = layers_of(self.caches, group_id)
        return block_views([self.tensors[name] for name in names], NUM_BLOCKS)

    def layers(self, group_id: int = 0) -> list[torch.Tensor]:
        """Each layer's tensor with the scheduler's blocks as its first dimension."""
        names = layers_of(self.caches, group_id)
        return [group_kernel_blocks(self.tensors[name], NUM_BLOCKS) for name in names]

    def block(self, block_id: int, group_id: int = 0) -> list[torch.Tensor]:
        return [layer[block_id].clone().view(torch.uint8) for layer in self.layers(group_id)]

    def block_bytes(self, group_id: int = 0) -> int:
        return sum(map(page_bytes, layers_of(self.caches, group_id).values()))


@pytest.fixture(scope="module", autouse=True)
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def moved_as_they_were(cache: Cache, pages: Pages, group_id: int = 0) -> None:
    """Put blocks, load them over others, and compare every layer and all other memory."""
    assert pages.block_bytes == cache.block_bytes(group_id)
    hashes = chain(1, 5)
    sources, targets = np.array([3, 1, 7, 2, 9]), np.array([11, 4, 14, 6, 12])
    before = [cache.block(int(i), group_id) for i in sources]
    rest = [i for i in range(NUM_BLOCKS) if i not in targets]
    others = [cache.block(i, group_id) for i in rest]
    with kvstore.open(BlockSpec.of_bytes(pages.block_bytes), cpu="32MiB") as store:
        assert pages.put(store, hashes, sources).num_blocks == 5
        assert pages.put(store, hashes, sources).num_present == 5
        more = np.append(targets, [13, 15, 10])  # three that the store does not have
        loaded = pages.load(store, chain(1, 8), more, time.monotonic() + 60)
        assert loaded == 5
    for block_id, expected in zip([*targets.tolist(), *rest], before + others, strict=True):
        assert all(map(torch.equal, cache.block(block_id, group_id), expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_move_whole_in_every_layout(model: Path, layout: str) -> None:
    cache = Cache(model, layout)
    moved_as_they_were(cache, pages_of(cache.tensors, cache.caches, cache.groups)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocks_of_stage", [1, 2, 100])
def test_the_path_for_devices_moves_the_same(
    model: Path, layout: str, blocks_of_stage: int
) -> None:
    cache = Cache(model, layout)
    size = blocks_of_stage * cache.block_bytes()
    moved_as_they_were(cache, staged_pages({0: cache.views()}, size)[0])


def test_what_one_path_put_the_other_loads(model: Path) -> None:
    cache = Cache(model, "LHBNC")
    host = pages_of(cache.tensors, cache.caches, cache.groups)[0]
    staged = staged_pages({0: cache.views()})[0]
    expected = cache.block(3)
    with kvstore.open(BlockSpec.of_bytes(host.block_bytes), cpu="32MiB") as store:
        host.put(store, chain(1, 1), np.array([3]))
        assert staged.load(store, chain(1, 1), np.array([5]), time.monotonic() + 60) == 1
    assert all(map(torch.equal, cache.block(5), expected))


@pytest.mark.parametrize(
    ("layout", "num_pieces"),
    [("LBHNC", 3), ("LBNHC", 3), ("LHBNC", 6), ("BLHNC", 1), ("BLNHC", 1), ("BHLNC", 1)],
)
def test_a_block_is_as_few_pieces_as_its_layout_allows(
    model: Path, layout: str, num_pieces: int
) -> None:
    assert len(Cache(model, layout).views()) == num_pieces


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_kernel_blocks_are_moved_as_the_schedulers_blocks(model: Path, layout: str) -> None:
    cache = Cache(model, layout, kernel_tokens=8)
    assert all(len(tensor) == 4 * NUM_BLOCKS for tensor in cache.tensors.values())
    moved_as_they_were(cache, pages_of(cache.tensors, cache.caches, cache.groups)[0])


def test_padding_is_not_moved(model: Path) -> None:
    page = full().page_size_bytes
    cache = Cache(model, "LBHNC", [full(page_size_padded=page + 4096)])
    assert cache.block_bytes() == 3 * page
    memory = cache.memory.clone()
    moved_as_they_were(cache, pages_of(cache.tensors, cache.caches, cache.groups)[0])
    strided = memory.view(3, NUM_BLOCKS, page + 4096)
    now = cache.memory.view(3, NUM_BLOCKS, page + 4096)
    assert torch.equal(now[:, :, page:], strided[:, :, page:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_group_has_pages_of_its_own(model: Path, layout: str) -> None:
    cache = Cache(model, layout, [full(), window()])
    pages = pages_of(cache.tensors, cache.caches, cache.groups)
    for group_id in (0, 1):
        moved_as_they_were(cache, pages[group_id], group_id)


def test_layers_of_several_sizes_are_one_block(model: Path) -> None:
    specs = {f"group0.layer{i}": full(heads=i + 1) for i in range(3)}
    cache = Cache(model, "BLHNC", [UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=specs)])
    moved_as_they_were(cache, pages_of(cache.tensors, cache.caches, cache.groups)[0])


def test_the_order_of_layers_does_not_follow_their_addresses(model: Path) -> None:
    """Where layers are allocations of their own, two processes have them in any order."""
    generator = np.random.default_rng(2)
    first = [torch.from_numpy(generator.standard_normal((4, 2, 8, 16))) for _ in range(3)]
    second = [tensor.clone() for tensor in reversed(first)][::-1]
    found = [
        torch.cat([view[2] for view in block_views(tensors, 4)]).numpy().tobytes()
        for tensors in (first, second)
    ]
    expected = b"".join(tensor[2].numpy().tobytes() for tensor in first)
    assert found == [expected, expected]


def test_past_its_deadline_nothing_is_begun(model: Path) -> None:
    cache = Cache(model, "LBHNC")
    before = cache.memory.clone()
    for pages in (
        pages_of(cache.tensors, cache.caches, cache.groups)[0],
        staged_pages({0: cache.views()})[0],
    ):
        with kvstore.open(BlockSpec.of_bytes(pages.block_bytes), cpu="32MiB") as store:
            pages.put(store, chain(1, 2), np.array([1, 2]))
            late = time.monotonic() - 1
            assert pages.load(store, chain(1, 2), np.array([3, 4]), late) == 0
    assert torch.equal(cache.memory, before)


def test_a_layer_that_was_not_registered_is_named(model: Path) -> None:
    cache = Cache(model, "LBHNC")
    del cache.tensors["group0.layer1"]
    with pytest.raises(ConfigError, match=r"group0\.layer1"):
        pages_of(cache.tensors, cache.caches, cache.groups)
    with pytest.raises(ConfigError, match="15 kernel blocks"):
        block_views([torch.zeros(15, 2, 8, 16)], NUM_BLOCKS)


def test_memory_that_is_nobodys_to_copy_is_refused(model: Path) -> None:
    cache = Cache(model, "LBHNC")
    elsewhere = {name: tensor.to("meta") for name, tensor in cache.tensors.items()}
    with pytest.raises(ConfigError, match="meta"):
        pages_of(elsewhere, cache.caches, cache.groups)


def test_the_cpus_work_needs_no_event(model: Path) -> None:
    assert recorder(Cache(model, "LBHNC").tensors) is None

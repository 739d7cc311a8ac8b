"""KVStoreLinker in SGLang's own radix tree: pages that one engine computed come back in another,
layer by layer and bit by bit, and whatever goes wrong costs a recomputation, not a request.

The tree, its pools and the layer counter are SGLang's; the steps (insert, match, load back, forward
through the layers, finish) are those of its scheduler. Only a load that fails after it began may
abort a request, and then SGLang says so.
"""

from __future__ import annotations

import os
import signal
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")
pytest.importorskip("torch")

import sglang.test.kits.unified_radix_cache.fixtures as kit
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import PoolTransfer
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams

import kvstore
from kvstore import ConfigError
from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.sglang import linker as linker_module
from kvstore_adapters.sglang.device_pages import DevicePages, LoadError, Pieces
from kvstore_adapters.sglang.linker import KVStoreLinker
from kvstore_adapters.sglang.linker_pools import block_of, pool_group
from kvstore_adapters.sglang.pins import PinnedPages
from tests.adapters.sglang import radix_support, support
from tests.adapters.sglang.radix_support import FULL, STATE, WAIT_S, WINDOW, prompt

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.001)


@dataclass
class Load:
    """What became of a request that matched."""

    num_promised: int  # tokens
    num_loaded: int
    slots: torch.Tensor
    aborted: list[Any]


class LinkedTree(radix_support.Radix):
    """One engine's cache with a linker instead of SGLang's own host cache."""

    __test__ = False

    def link(self, address: str, model: str, **settings: Any) -> None:
        topology = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        topology.__enter__()
        self.addCleanup(topology.__exit__, None, None, None)
        config = {
            "linker": "KVStoreLinker",
            "linker_module_path": "kvstore_adapters.sglang.linker",
            "linker_extra_config": {
                "address": address,
                "model": model,
                "lookup_wait": 1.0,
                **settings,
            },
        }
        self.args = support.publish(
            page_size=self.cfg.page_size,
            enable_unified_cache_external_linker=True,
            unified_cache_external_linker_backend="dynamic",
            unified_cache_external_linker_config=config,
        )
        made = create_unified_cache_linker(
            self.args,
            self.cache.cache_init_params,
            backend="dynamic",
            config=config,
            components=set(self.cache.components),
        )
        self.cache.init_cache_linker(made)
        self.addCleanup(self.cache.release_host_resources)

    @property
    def linker(self) -> KVStoreLinker:
        found = self.cache.linker.cache_linker
        assert isinstance(found, KVStoreLinker)
        return found

    def compute_and_store(self, tokens: Sequence[int], seed: int) -> list[torch.Tensor]:
        """As a request that is computed: its pages are in the store on return."""
        generator = torch.Generator().manual_seed(seed)
        for buffer in self._buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=generator).to(buffer.dtype))
        self._insert(self.cache, self.allocator, self.requests, list(tokens))
        self.settle()
        return self.kv_of(tokens)

    def forget(self) -> None:
        """As `flush_cache` does."""
        self.cache.reset()
        self.allocator.clear()

    def settle(self) -> None:
        self.wait(lambda: not self.cache.linker.pending_offloads)

    def _buffers(self) -> Iterator[torch.Tensor]:
        for entry in self.linker.pools.values():
            yield from entry.kv_buffer

    def request(self, tokens: Sequence[int]) -> Any:
        self._count += 1
        made = Req(
            rid=f"request-{self._count}",
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        )
        self.requests.alloc([made])
        return made

    def match(self, request: Any) -> int:
        """Match as the scheduler does; return how many tokens the linker promises."""
        key = RadixKey(array("q", request.origin_input_ids))
        found = self.cache.match_prefix(MatchPrefixParams(key=key, req=request))
        request.prefix_len = found.device_prefix_len
        request.last_node = found.last_device_node
        request.best_match_node = found.best_match_node
        request.host_hit_length = found.host_hit_length
        return int(found.host_hit_length)

    def load(self, request: Any, promised: int) -> Load:
        """Admit the request and run through the layers as a forward pass does."""
        num_loaded, _ = self.cache.init_load_back(
            InitLoadBackParams(
                best_match_node=request.best_match_node, host_hit_length=promised, req=request
            )
        )
        slots = self.cache.linker.private_load_indices.get(request.rid, torch.zeros(0)).clone()
        counter = self.linker.layer_done_counter
        counter.set_consumer(self.cache.ready_to_load_host_cache())
        for layer in range(counter.num_layers):
            counter.wait_until(layer)
        aborted = self.cache.finish_external_linker_loads([request])
        return Load(promised, int(num_loaded), slots, aborted)

    def consume(self, tokens: Sequence[int]) -> Load:
        request = self.request(tokens)
        return self.load(request, self.match(request))

    def full_kv(self, slots: torch.Tensor) -> list[torch.Tensor]:
        pool = self.allocator.get_kvcache()
        full = getattr(pool, "full_kv_pool", pool)
        return [buffer[slots].clone() for buffer in (*full.k_buffer, *full.v_buffer)]


def paged_allocator(*, kvcache: Any, **named: Any) -> Any:
    return PagedTokenToKVPoolAllocator(page_size=kvcache.page_size, kvcache=kvcache, **named)


Make = Callable[..., LinkedTree]


@pytest.fixture
def make(
    daemon: PrivateDaemon, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Make]:
    radix_support.use_cpu(monkeypatch)
    # The kit's allocator hands out single slots; an engine with pages hands out pages.
    monkeypatch.setattr(kit, "TokenToKVPoolAllocator", paged_allocator)
    made: list[LinkedTree] = []

    def make_one(config: Any = FULL, address: str = daemon.address, **settings: Any) -> LinkedTree:
        tree = LinkedTree(config)
        made.append(tree)
        tree.link(address, **{"model": request.node.name, **settings})
        return tree

    yield make_one
    for tree in reversed(made):
        tree.close()


def test_kv_crosses_engines_layer_by_layer_and_bit_by_bit(make: Make) -> None:
    tokens = prompt(FULL, 6)
    wanted = make().compute_and_store(tokens, 1)
    reader = make()
    for _ in range(2):  # the first time by asking the store, then by the index
        load = reader.consume(tokens)
        assert (load.num_promised, load.num_loaded) == (len(tokens), len(tokens))
        assert load.aborted == []
        assert all(map(torch.equal, reader.full_kv(load.slots), wanted))
    assert any(bool(buffer.any()) for buffer in wanted)


def test_only_the_common_prefix_is_promised(make: Make) -> None:
    tokens = prompt(FULL, 6)
    make().compute_and_store(tokens, 2)
    reader = make()
    other = tokens[: 4 * FULL.page_size] + prompt(FULL, 2, 1000)
    assert reader.consume(other).num_loaded == 4 * FULL.page_size
    assert reader.consume(prompt(FULL, 6, 5000)).num_promised == 0


def test_what_the_device_has_is_not_loaded_again(make: Make) -> None:
    tokens = prompt(FULL, 6)
    wanted = make().compute_and_store(tokens, 3)
    reader = make()
    reader.compute_and_store(tokens[: 2 * FULL.page_size], 4)
    load = reader.consume(tokens)
    assert load.num_loaded == 4 * FULL.page_size
    begin = 2 * FULL.page_size
    loaded = reader.full_kv(load.slots)
    assert all(torch.equal(one, all_[begin:]) for one, all_ in zip(loaded, wanted, strict=True))


def test_a_model_with_windows_comes_back_with_both_of_its_pools(make: Make) -> None:
    tokens = prompt(WINDOW, 6)
    writer = make(WINDOW)
    wanted = writer.compute_and_store(tokens, 5)
    layouts = {name: one.store.namespace.layout for name, one in writer.linker._pages.items()}
    assert layouts == {"kv": "canonical-1", "swa": "canonical-1;pool=swa"}
    reader = make(WINDOW)
    for _ in range(2):
        load = reader.consume(tokens)
        assert load.num_loaded == len(tokens)
        assert load.aborted == []
        got = reader.full_kv(load.slots)
        last = load.slots[-WINDOW.sliding_window_size :]
        window = reader.allocator.full_to_swa_index_mapping[last]
        pool = reader.allocator.get_kvcache().swa_kv_pool
        got += [buffer[window] for buffer in (*pool.k_buffer, *pool.v_buffer)]
        assert len(got) == len(wanted) == 2 * WINDOW.num_layers
        assert all(map(torch.equal, got, wanted))


def test_a_window_gates_what_a_prefix_may_end_at(make: Make) -> None:
    tokens = prompt(WINDOW, 6)
    writer = make(WINDOW)
    writer.compute_and_store(tokens, 5)
    transfers = lookup_transfers(writer, tokens)
    names = list(transfers[0].keys or ())
    assert writer.linker.lookup("all", transfers) == [1, 2, 3, 4, 5, 6]
    writer.linker._indexes["swa"].discard([names[2]])
    assert writer.linker.lookup("all", transfers) == [1, 2, 5, 6]  # a window is two pages
    writer.linker._indexes["kv"].discard([names[4]])
    assert writer.linker.lookup("all", transfers) == [1, 2]
    writer.linker._is_alone = False
    assert writer.linker.lookup("all", transfers) == [2]  # one window is pinned, the longest


def lookup_transfers(tree: LinkedTree, tokens: Sequence[int]) -> list[PoolTransfer]:
    from sglang.srt.mem_cache.unified_cache.components import LinkerTransferPhase
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    keys = get_storage_hash_str(RadixKey(array("q", tokens)), page_size=tree.cfg.page_size)
    return [
        component.build_external_linker_transfer(LinkerTransferPhase.LOOKUP, None, keys)
        for component in tree.cache.components.values()
    ]


def test_a_model_whose_pools_a_linker_cannot_reach_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="HiCache"):
        make(STATE)


@pytest.mark.parametrize("layout", ["nhd", "hnd", "latent"])
def test_pools_of_one_layout_become_blocks(layout: str) -> None:
    """Pages go from one pool to another of its kind; where rows are not slots, they are opaque."""
    dtype, heads, dim = torch.bfloat16, support.HEADS, support.HEAD_DIM

    def pool() -> Any:
        common: dict[str, Any] = {
            "size": 8 * support.PAGE_TOKENS,
            "page_size": support.PAGE_TOKENS,
            "dtype": dtype,
            "layer_num": support.LAYERS,
            "device": "cpu",
            "enable_memory_saver": False,
        }
        if layout == "latent":
            return MLATokenToKVPool(
                kv_lora_rank=support.LORA_RANK, qk_rope_head_dim=support.ROPE_DIM, **common
            )
        made = MHATokenToKVPool(head_num=heads, head_dim=dim, **common)
        if layout == "hnd":
            # As on a GPU with that layout; on a CPU SGLang does not choose it.
            shape = (9, heads, support.PAGE_TOKENS, dim)
            made.kv_cache_layout = "hnd"
            made.k_buffer = [torch.zeros(shape, dtype=dtype) for _ in range(support.LAYERS)]
            made.v_buffer = [torch.zeros(shape, dtype=dtype) for _ in range(support.LAYERS)]
        return made

    def group_of(found: Any) -> Any:
        return pool_group(
            SimpleNamespace(
                token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: found),
                page_size=support.PAGE_TOKENS,
                sidecar_draft_device_pools=(),
                mtp_draft_device_pools=(),
            ),
            {ComponentType.FULL},
        )

    support.publish()
    (entry,), (other,) = group_of(pool()).entries, group_of(pool()).entries
    assert group_of(pool()).rank_replicated == (layout == "latent")
    for buffer in entry.kv_buffer:
        buffer.copy_(torch.randn(buffer.shape).to(dtype))
    block = block_of(entry, Pieces.of(entry))
    assert (block.layout == "canonical-1") == (layout != "hnd")
    assert block.spec.kind == ("kv" if layout == "nhd" else "latent")
    with kvstore.open(kvstore.Namespace("pools", block.spec), cpu="4MiB") as store:
        source, target = DevicePages(entry, store), DevicePages(other, store)
        keys = [f"{i:064x}" for i in range(8)]
        slots = torch.arange(support.PAGE_TOKENS, 9 * support.PAGE_TOKENS)
        assert source.put(keys, source.page_ids(slots))
        pinned = PinnedPages(keys)
        pinned.acquire(target, ttl=WAIT_S, timeout=WAIT_S)
        for layer in range(support.LAYERS):
            target.load_layer(layer, pinned, target.page_ids(slots))
        pinned.release()
        begin = 1 if layout == "hnd" else support.PAGE_TOKENS
        for mine, theirs in zip(entry.kv_buffer, other.kv_buffer, strict=True):
            assert torch.equal(mine[begin:], theirs[begin:])
            assert not theirs[:begin].any()


def test_an_unknown_setting_is_named(make: Make) -> None:
    with pytest.raises(ConfigError, match="adress"):
        make(adress="unix:/nowhere")


def test_a_linker_and_hicache_have_the_same_blocks(make: Make, daemon: PrivateDaemon) -> None:
    tokens = prompt(FULL, 6)
    writer = make(model="shared")
    wanted = writer.compute_and_store(tokens, 6)
    other = radix_support.Radix(FULL)
    try:
        other.start("page_first", daemon.address, model="shared")
        assert other.prefetch(tokens) == len(tokens)
        assert other.load_back(tokens) == len(tokens)
        assert all(map(torch.equal, other.kv_of(tokens), wanted))
    finally:
        other.close()


def test_a_prefix_that_is_known_in_part_is_known_whole_next_time(make: Make) -> None:
    tokens = prompt(FULL, 6)
    make().compute_and_store(tokens, 20)
    reader = make()
    transfers = lookup_transfers(reader, tokens)
    names = list(transfers[0].keys or ())
    reader.linker._indexes["kv"].add(names[:2])
    assert reader.linker.lookup("first", transfers) == [1, 2]
    wait_until(lambda: reader.linker.lookup("next", transfers) == [1, 2, 3, 4, 5, 6])
    assert reader.consume(tokens).num_loaded == len(tokens)


def test_blocks_that_go_between_lookup_and_load_are_computed(make: Make) -> None:
    """The index still knows them; admission finds out, and the next lookup knows better."""
    tokens = prompt(FULL, 6)
    make().compute_and_store(tokens, 7)
    reader = make()
    assert reader.consume(tokens).num_loaded == len(tokens)
    reader.linker._pages["kv"].store.clear()
    request = reader.request(tokens)
    keys = lookup_transfers(reader, tokens)[0].keys
    reader.linker._indexes["kv"].add(keys)  # as if the events had not come yet
    load = reader.load(request, reader.match(request))
    assert load.num_loaded == 0
    assert load.aborted == []
    assert reader.linker._indexes["kv"].leading(keys) == 0


def test_what_was_promised_stays_until_it_is_loaded(make: Make) -> None:
    tokens = prompt(FULL, 6)
    wanted = make().compute_and_store(tokens, 8)
    reader = make()
    request = reader.request(tokens)
    promised = reader.match(request)
    assert promised == len(tokens)
    reader.linker._pages["kv"].store.clear()  # leases go on to read what they hold
    load = reader.load(request, promised)
    assert load.num_loaded == len(tokens)
    assert load.aborted == []
    assert all(map(torch.equal, reader.full_kv(load.slots), wanted))


def test_a_load_that_fails_once_is_tried_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(FULL, 6)
    wanted = make().compute_and_store(tokens, 9)
    reader = make()
    fail_at(monkeypatch, layer=2, times=1)
    load = reader.consume(tokens)
    assert load.num_loaded == len(tokens)
    assert load.aborted == []
    assert all(map(torch.equal, reader.full_kv(load.slots), wanted))


def test_a_load_that_fails_for_good_aborts_its_request_and_no_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt(FULL, 6)
    make().compute_and_store(tokens, 10)
    reader = make()
    fail_at(monkeypatch, layer=2, times=2)
    load = reader.consume(tokens)
    assert load.num_loaded == len(tokens)
    (aborted,) = load.aborted
    assert aborted.discard_output_reason.status_code == 503
    assert reader.consume(tokens).aborted == []


def fail_at(monkeypatch: pytest.MonkeyPatch, layer: int, times: int) -> None:
    original, left = DevicePages.load_layer, [times]

    def failing(self: DevicePages, number: int, *arguments: Any) -> None:
        if number == layer and left[0]:
            left[0] -= 1
            raise LoadError("made to fail")
        original(self, number, *arguments)

    monkeypatch.setattr(DevicePages, "load_layer", failing)


def test_a_daemon_that_hangs_or_dies_costs_hits_only(make: Make, daemon: PrivateDaemon) -> None:
    tokens, more = prompt(FULL, 6), prompt(FULL, 4, 1000)
    settings = {"timeout": 0.2, "load_deadline": 0.2, "lookup_wait": 0.01}
    writer = make(**settings)
    writer.compute_and_store(tokens, 11)
    reader = make(**settings)
    wait_until(lambda: reader.consume(tokens).num_loaded == len(tokens))
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        load = reader.consume(tokens)
        assert load.aborted == []
        assert load.num_loaded in (0, len(tokens))
        assert reader.consume(more).num_promised == 0
        writer.compute_and_store(more, 12)  # ends, and the pages stay unstored
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    daemon.kill()
    assert reader.consume(tokens).aborted == []
    daemon.start()
    wait_until(lambda: reader.consume(tokens).aborted == [])


def test_a_daemon_that_is_not_there_at_start_is_found_later(
    make: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = prompt(FULL, 6)
    with PrivateDaemon(tmp_path_factory.mktemp("late"), cpu="16MiB") as late:
        tree = make(address=late.address, timeout=0.2)
        tree.compute_and_store(tokens, 13)
        assert tree.consume(prompt(FULL, 3, 2000)).num_promised == 0
        late.start()
        reader = make(address=late.address, timeout=0.2)

        def is_stored() -> bool:
            tree.forget()
            tree.compute_and_store(tokens, 13)
            return reader.consume(tokens).num_loaded == len(tokens)

        wait_until(is_stored)


def test_what_others_store_is_known_without_asking(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linker_module, "EVENT_SECONDS", 0.01)
    reader = make()
    (pages,) = reader.linker._pages.values()
    index = reader.linker._indexes["kv"]
    other = kvstore.connect(address_of(reader), pages.store.namespace)
    with other:
        rows = torch.zeros((1, pages.store.namespace.spec.block_bytes), dtype=torch.uint8)
        named = iter(range(1 << 20))

        def is_known() -> bool:  # events begin with the linker's first look at them
            name = bytes([7]) * 28 + next(named).to_bytes(4, "big")
            other.put([name], kvstore.ContiguousBlocks(rows))
            return len(index) > 0

        wait_until(is_known)
        other.clear()
        wait_until(lambda: len(index) == 0)


def address_of(tree: LinkedTree) -> str:
    return str(tree.linker._settings.address)


def test_ranks_that_must_agree_promise_only_what_is_pinned(make: Make) -> None:
    tokens = prompt(FULL, 6)
    wanted = make().compute_and_store(tokens, 14)
    reader = make()
    reader.linker._is_alone = False
    transfers = lookup_transfers(reader, tokens)
    assert reader.linker.lookup("pinned", transfers) == list(range(1, 7))
    reader.linker._pages["kv"].store.clear()
    reader.linker._indexes["kv"].add(transfers[0].keys)
    assert reader.linker.lookup("gone", transfers) == []
    writer = make()
    writer.compute_and_store(prompt(FULL, 3, 3000), 15)
    load = reader.consume(prompt(FULL, 3, 3000))
    assert load.num_loaded == 3 * FULL.page_size
    assert load.aborted == []
    assert len(wanted) == 2 * FULL.num_layers


def test_offloads_end_in_their_order_also_those_that_are_not_stored(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make()
    tree.linker._saver._max_pages = 4
    results: list[bool] = []
    original = tree.linker._saver.pop_result

    def noted() -> bool:
        results.append(original())
        return results[-1]

    monkeypatch.setattr(tree.linker._saver, "pop_result", noted)
    tree.compute_and_store(prompt(FULL, 4), 16)
    tree.compute_and_store(prompt(FULL, 6, 1000), 17)  # alone it may be larger than the bound
    assert results == [True, True]
    tree.linker._saver._num_pages = 1
    tree.compute_and_store(prompt(FULL, 6, 2000), 18)
    assert results == [True, True, False]


def test_a_flushed_engine_still_finds_its_pages(make: Make) -> None:
    tokens = prompt(FULL, 6)
    tree = make()
    wanted = tree.compute_and_store(tokens, 19)
    tree.forget()
    for buffer in tree._buffers():
        buffer.zero_()
    load = tree.consume(tokens)
    assert load.num_loaded == len(tokens)
    assert all(map(torch.equal, tree.full_kv(load.slots), wanted))

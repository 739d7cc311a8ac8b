"""Through SGLang's own radix tree, controller and threads, KV that one engine computed reaches
another bit by bit: device to host to storage, and back.

Also what only this path shows: which calls the controller makes, that keys of pairs of tokens and
of salts are apart, that storage can be attached and detached while the engine runs, and that a
daemon that dies costs the engine its hits and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")
pytest.importorskip("torch")

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from kvstore.bench.serving import PrivateDaemon
from tests.adapters.sglang import radix_support
from tests.adapters.sglang.radix_support import FULL, STATE, WINDOW, Radix, extra_config, prompt

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

Make = Callable[..., Radix]


@pytest.fixture
def make(
    daemon: PrivateDaemon, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Make]:
    radix_support.use_cpu(monkeypatch)
    made: list[Radix] = []

    def make_one(config: Any, layout: str, address: str = daemon.address, **extra: Any) -> Radix:
        radix = Radix(config)
        made.append(radix)
        radix.start(layout, address, model=request.node.name, **extra)
        return radix

    yield make_one
    for radix in reversed(made):
        radix.close()


@pytest.mark.parametrize("is_v1", [1, 0])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_kv_crosses_engines_bit_by_bit(make: Make, layout: str, is_v1: int) -> None:
    tokens = prompt(FULL, 6)
    first = make(FULL, layout, interface_v1=is_v1)
    wanted = first.compute(tokens, 1)
    first.write(tokens)
    second = make(FULL, layout, interface_v1=is_v1)
    assert second.prefetch(tokens) == len(tokens)
    assert second.load_back(tokens) == len(tokens)
    assert all(map(torch.equal, second.kv_of(tokens), wanted))
    assert any(bool(buffer.any()) for buffer in wanted)


def test_kv_crosses_engines_of_different_host_layouts(make: Make) -> None:
    tokens = prompt(FULL, 6)
    first = make(FULL, "layer_first")
    wanted = first.compute(tokens, 2)
    first.write(tokens)
    second = make(FULL, "page_first")
    assert second.prefetch(tokens) == len(tokens)
    assert second.load_back(tokens) == len(tokens)
    assert all(map(torch.equal, second.kv_of(tokens), wanted))


def test_only_the_common_prefix_comes(make: Make) -> None:
    first = make(FULL, "page_first")
    tokens = prompt(FULL, 6)
    first.compute(tokens, 3)
    first.write(tokens)
    second = make(FULL, "page_first")
    other = tokens[: 4 * FULL.page_size] + prompt(FULL, 2, 1000)
    assert second.prefetch(other) == 4 * FULL.page_size


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
@pytest.mark.parametrize("config", [WINDOW, STATE], ids=["window", "state"])
def test_hybrid_models_come_back_with_all_of_their_pools(
    make: Make, config: Any, layout: str
) -> None:
    tokens = prompt(config, 6)
    first = make(config, layout)
    wanted = first.compute(tokens, 4)
    first.write(tokens)
    second = make(config, layout)
    assert second.prefetch(tokens) == len(tokens)
    assert second.load_back(tokens) == len(tokens)
    got = second.kv_of(tokens)
    assert len(got) == len(wanted)
    assert all(map(torch.equal, got, wanted))
    assert all(pool.pages.buffers is not None for pool in second.backend._pools.values())


def test_storage_is_attached_and_detached_while_the_engine_runs(
    make: Make, daemon: PrivateDaemon
) -> None:
    tokens = prompt(FULL, 4)
    radix = make(FULL, "page_first", address="")
    for seed in (5, 6):
        config = extra_config(daemon.address, model="attached")
        is_attached, message = radix.cache.attach_storage_backend("dynamic", config, "attached")
        assert is_attached, message
        radix.allow_prefetch()
        mine = prompt(FULL, 4, 1000 * seed)
        radix.compute(mine, seed)
        radix.write(mine)
        is_detached, message = radix.cache.detach_storage_backend()
        assert is_detached, message
        assert radix.backend is None
    refused, message = radix.cache.attach_storage_backend(
        "dynamic", extra_config(daemon.address, adress="unix:/nowhere"), "attached"
    )
    assert not refused
    assert "adress" in message
    is_attached, message = radix.cache.attach_storage_backend(
        "dynamic", extra_config(daemon.address, model="attached"), "attached"
    )
    assert is_attached, message
    assert radix.cache.clear_storage_backend()
    assert radix.prefetch(tokens) == 0


def test_a_daemon_that_dies_costs_hits_only(make: Make, tmp_path: Path) -> None:
    tokens, more = prompt(FULL, 4), prompt(FULL, 4, 1000)
    with PrivateDaemon(tmp_path, cpu="16MiB") as private:
        private.start()
        radix = make(FULL, "page_first", address=private.address, timeout=0.5)
        radix.compute(tokens, 7)
        radix.write(tokens)
        private.kill()
        radix.compute(more, 8)
        radix.write(more)  # returns: SGLang's threads went on
        second = make(FULL, "page_first", address=private.address, timeout=0.5)
        assert second.prefetch(tokens) == 0


def test_names_differ_by_pairs_of_tokens_and_by_salt() -> None:
    """What is not in our namespace is in SGLang's hash: EAGLE's pairs, LoRA and cache salt."""
    from array import array

    tokens = array("q", prompt(FULL, 2))
    plain = get_storage_hash_str(RadixKey(tokens), page_size=16)
    pairs = get_storage_hash_str(RadixKey(tokens, is_bigram=True), page_size=16)
    lora = get_storage_hash_str(RadixKey(tokens, extra_key="lora"), page_size=16)
    salted = get_storage_hash_str(RadixKey(tokens, cache_salt="salt"), page_size=16)
    names = [*plain, *pairs, *lora, *salted]
    assert len(set(names)) == len(names)
    assert {len(name) for name in names} == {64}

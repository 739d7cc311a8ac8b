"""What a linker's loader declares to be there is there, whatever its pin holds; and its threads
can be waited for after they have ended.

Real pages and stores, SGLang's real layer counter; the pool is a tensor in host memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (  # noqa: E402
    LayerWiseLoadCounter,
)

import kvstore  # noqa: E402
from kvstore import Namespace, Store  # noqa: E402
from kvstore_adapters.sglang.device_pages import DevicePages, Pieces  # noqa: E402
from kvstore_adapters.sglang.linker_workers import Loader, LoadJob, Move, Saver  # noqa: E402
from kvstore_adapters.sglang.pins import Pin, PinnedPages  # noqa: E402
from tests.adapters.sglang.test_device_pages import (  # noqa: E402
    LAYERS,
    entry,
    keys,
    slots,
    snapshot,
)
from tests.store_support import WAIT_S  # noqa: E402

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]

POOL = "kv"


class Now:
    def synchronize(self) -> None:
        pass


@pytest.fixture
def store() -> Iterator[Store]:
    spec = Pieces.of(entry("mha", 0)).spec
    with kvstore.open(Namespace("model", spec), cpu="1MiB", chunk="1MiB") as opened:
        yield opened


class Side:
    """A pool and its loader."""

    def __init__(self, store: Store) -> None:
        self.pool = entry("mha", 2)
        self.pages = DevicePages(self.pool, store)
        self.counter = LayerWiseLoadCounter(LAYERS)
        self.loader = Loader(
            {POOL: self.pages}, self.counter, Pin.release, lease_seconds=30.0, acquire_seconds=0.1
        )

    def load(self, pin: Pin, names: list[str], to_pages: list[int]) -> bool:
        job = LoadJob([Move(POOL, names, slots(to_pages))], pin)
        return bool(self.counter.finish(self.loader.submit([job], Now())))


@pytest.fixture
def side(store: Store) -> Iterator[Side]:
    made = Side(store)
    yield made
    made.loader.close(WAIT_S)


def done(pin: Pin) -> Pin:
    pin.finish()
    return pin


def nothing(_: Side) -> Pin:
    return done(Pin({}))


def pages_that_were_not_there(_: Side) -> Pin:
    return done(Pin({POOL: PinnedPages(keys(3))}))


def only_the_first(side: Side) -> Pin:
    held = PinnedPages(keys(3), [side.pages.store.acquire(side.pages.hashes(keys(1)))])
    return done(Pin({POOL: held}))


def other_pages(side: Side) -> Pin:
    names = keys(5)[::-1]
    held = PinnedPages(names, [side.pages.store.acquire(side.pages.hashes(names))])
    return done(Pin({POOL: held}))


PINS: list[Callable[[Side], Pin]] = [
    nothing,
    pages_that_were_not_there,
    only_the_first,
    other_pages,
]


@pytest.mark.parametrize("pin_of", PINS)
def test_a_load_brings_its_pages_whatever_its_pin_holds(
    side: Side, store: Store, pin_of: Callable[[Side], Pin]
) -> None:
    source = DevicePages(entry("mha", 1), store)
    assert source.put(keys(5), np.arange(5))
    assert side.load(pin_of(side), keys(3), [7, 2, 9])
    for mine, theirs in zip(snapshot(side.pool), snapshot(source.entry), strict=True):
        for to_page, from_page in zip([7, 2, 9], range(3), strict=True):
            rows = slots([to_page]), slots([from_page])
            assert torch.equal(mine[rows[0]], theirs[rows[1]])


@pytest.mark.parametrize("num_stored", [0, 2])
def test_a_load_of_pages_that_are_gone_fails(side: Side, store: Store, num_stored: int) -> None:
    names = keys(3)
    if num_stored:
        source: Any = DevicePages(entry("mha", 1), store)
        assert source.put(names[:num_stored], np.arange(num_stored))
    assert not side.load(done(Pin({})), names, [7, 2, 9])


def test_ended_threads_can_be_waited_for(side: Side) -> None:
    """As a linker does that is reset, or closed again, after it was closed."""
    saver = Saver({POOL: side.pages}, lambda *_: None, 10)

    def end() -> None:
        for worker in (side.loader, saver) * 2:
            worker.close(WAIT_S)
            worker.join()

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(WAIT_S)
    assert not ending.is_alive()

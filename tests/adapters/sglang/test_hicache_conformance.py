"""The HiCache backend does what SGLang's controller expects of any storage backend.

Real classes throughout: SGLang's loader makes the backend, the pools are its MHA and MLA host pools
in every layout, the daemon is a process. What a page holds is read by plain indexing of the pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("sglang")
pytest.importorskip("torch")

import torch
from sglang.srt.mem_cache.hicache_storage import STORAGE_BATCH_SIZE

from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters import compat
from tests.adapters.sglang import support
from tests.adapters.sglang.support import Engine, keys

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]

Make = Callable[..., Engine]

POOLS = [
    *[pytest.param(support.mha_pool, layout, id=f"mha-{layout}") for layout in support.MHA_LAYOUTS],
    *[pytest.param(support.mla_pool, layout, id=f"mla-{layout}") for layout in support.MLA_LAYOUTS],
]
# SGLang itself has no flat pages of its newest layout.
FLAT_POOLS = [param for param in POOLS if "page_unified" not in param.values]


@pytest.fixture(scope="module", autouse=True)
def _published() -> None:
    support.publish()


@pytest.fixture
def make(daemon: PrivateDaemon, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Make engines of one model, named after the test, on the module's daemon."""
    engines: list[Engine] = []

    def make_one(pool: Any, model: str = "", **changes: Any) -> Engine:
        name = f"{request.node.name}/{model}"
        changes.setdefault("is_mla_model", not hasattr(pool, "head_num"))
        engines.append(support.make_engine(daemon.address, name, pool, **changes))
        return engines[-1]

    yield make_one
    for engine in engines:
        engine.backend.close()


@pytest.mark.parametrize("is_v1", [1, 0])
@pytest.mark.parametrize(("pool_of", "layout"), POOLS)
def test_pages_come_back_as_they_were(
    make: Make, pool_of: Callable[[str], Any], layout: str, is_v1: int
) -> None:
    if not is_v1 and layout == "page_unified":
        pytest.skip("SGLang has no flat pages of this layout")
    engine = make(pool_of(layout), extra={"interface_v1": is_v1})
    source, target = engine.slots(6), engine.slots(6)
    support.fill(engine.pool, 1)
    wanted, untouched = engine.contents(source), engine.contents(target)
    names = keys(6)
    assert engine.backend.batch_exists(names) == 0
    assert engine.put(names[:2], source[: 2 * support.PAGE_TOKENS])
    assert engine.put(
        names[3:4], source[3 * support.PAGE_TOKENS : 4 * support.PAGE_TOKENS]
    )  # a hole at 2
    assert engine.backend.batch_exists(names) == 2
    assert [engine.backend.exists(name) for name in names] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    found = engine.backend.batch_exists_v2(names, None, None)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (2, [1, 2])
    assert engine.get(names[:4], target[: 4 * support.PAGE_TOKENS]) == [True, True, False, True]
    got = engine.contents(target)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[3], wanted[3])
    assert torch.equal(got[4], untouched[4])
    assert torch.equal(got[5], untouched[5])


@pytest.mark.parametrize("layouts", [support.MHA_LAYOUTS, support.MLA_LAYOUTS], ids=["mha", "mla"])
def test_host_layouts_of_one_model_share_pages(make: Make, layouts: tuple[str, ...]) -> None:
    pool_of = support.mha_pool if layouts is support.MHA_LAYOUTS else support.mla_pool
    writers = [make(pool_of(layout)) for layout in layouts]
    for number, writer in enumerate(writers):
        slots = writer.slots(2)
        support.fill(writer.pool, number)
        assert writer.put(keys(2, 10 * number), slots)
        wanted = writer.contents(slots)
        for reader in writers:
            target = reader.slots(2)
            assert reader.get(keys(2, 10 * number), target) == [True, True]
            for want, got in zip(wanted, reader.contents(target), strict=True):
                assert torch.equal(want, got), f"{writer.pool.layout} to {reader.pool.layout}"


@pytest.mark.parametrize(("pool_of", "layout"), FLAT_POOLS)
def test_flat_pages_and_pages_in_place_are_the_same_blocks(
    make: Make, pool_of: Callable[[str], Any], layout: str
) -> None:
    in_place = make(pool_of(layout))
    flat = make(pool_of(layout), extra={"interface_v1": 0})
    slots = in_place.slots(3)
    support.fill(in_place.pool, 2)
    assert in_place.put(keys(3), slots)
    target = flat.slots(3)
    assert flat.get(keys(3), target) == [True] * 3
    for want, got in zip(in_place.contents(slots), flat.contents(target), strict=True):
        assert torch.equal(want, got)
    one = flat.backend.get(keys(1)[0], flat.pool.get_dummy_flat_data_page())
    page = flat.pool.get_data_page(int(target[0]))
    assert torch.equal(one.view(torch.uint8), page.view(torch.uint8))  # random bytes may be NaN
    assert flat.backend.get(keys(1, 99)[0]) is None
    assert flat.backend.set(keys(1, 50)[0], one)
    assert in_place.backend.exists(keys(1, 50)[0])


@pytest.mark.parametrize("layout", support.MHA_LAYOUTS)
def test_scattered_pages(make: Make, layout: str) -> None:
    engine = make(support.mha_pool(layout))
    support.fill(engine.pool, 3)
    pages = engine.slots(16).view(16, -1)
    source, target = pages[[5, 1, 7, 2]].reshape(-1), pages[[8, 15, 11, 9]].reshape(-1)
    wanted = engine.contents(source)
    assert engine.put(keys(4), source)
    assert engine.get(keys(4), target) == [True] * 4
    for want, got in zip(wanted, engine.contents(target), strict=True):
        assert torch.equal(want, got)


def test_empty_and_repeated_calls(make: Make) -> None:
    engine = make(support.mha_pool("page_first"))
    slots = engine.slots(1)
    nothing = torch.empty(0, dtype=torch.int64)
    assert engine.put(keys(1), slots)
    assert engine.put(keys(1), slots)
    assert engine.backend.batch_exists(keys(1)) == 1
    assert engine.backend.batch_exists([]) == 0
    assert engine.backend.batch_set_v1([], nothing) == []
    assert engine.backend.batch_get_v1([], nothing) == []
    assert engine.backend.batch_get([]) == []
    assert engine.backend.batch_set([], [])


def test_the_largest_batch(make: Make) -> None:
    engine = make(support.mha_pool("page_first"))
    names = keys(STORAGE_BATCH_SIZE)
    for begin in range(0, STORAGE_BATCH_SIZE, 32):
        slots = engine.slots(32)
        assert engine.put(names[begin : begin + 32], slots)
        engine.pool.free(slots)
    assert engine.backend.batch_exists(names) == STORAGE_BATCH_SIZE
    # One call may name more pages than a host pool has: existence asks for whole prompts.
    assert engine.backend.batch_exists(names + keys(4000, 10_000)) == STORAGE_BATCH_SIZE


def test_wrong_indices_are_a_miss_and_a_failed_write(make: Make) -> None:
    engine = make(support.mha_pool("page_first"))
    slots = engine.slots(2)
    assert engine.backend.batch_set_v1(keys(2), slots[:-1]) == [False, False]
    assert engine.backend.batch_get_v1(keys(2), slots[:-1]) == [False, False]
    outside = slots + 10 * support.TOKENS
    assert engine.backend.batch_set_v1(keys(2), outside) == [False, False]
    assert engine.backend.batch_exists(keys(2)) == 0


def test_ranks_of_mha_are_apart_and_ranks_of_mla_share(make: Make) -> None:
    ranks = [make(support.mha_pool("page_first"), tp_rank=rank, tp_size=2) for rank in (0, 1)]
    assert ranks[0].put(keys(1), ranks[0].slots(1))
    assert [rank.backend.batch_exists(keys(1)) for rank in ranks] == [1, 0]
    latent = [make(support.mla_pool("page_first"), tp_rank=rank, tp_size=2) for rank in (0, 1)]
    alone = make(support.mla_pool("layer_first"))
    assert latent[0].put(keys(1), latent[0].slots(1))
    assert [rank.backend.batch_exists(keys(1)) for rank in (*latent, alone)] == [1, 1, 1]


def test_only_the_writer_of_a_replicated_pool_writes(make: Make) -> None:
    follower = make(support.mla_pool("page_first"), tp_rank=1, tp_size=2)
    assert follower.put(keys(1), follower.slots(1))  # no failure: it is another rank's to do
    assert follower.backend.batch_exists(keys(1)) == 0


def test_stages_and_context_ranks_are_apart(make: Make) -> None:
    first = make(support.mha_pool("page_first"), pp_rank=0, pp_size=2)
    second = make(support.mha_pool("page_first", first_layer=4), pp_rank=1, pp_size=2)
    other_cut = make(support.mha_pool("page_first", first_layer=5), pp_rank=1, pp_size=2)
    context = make(support.mha_pool("page_first"), attn_cp_rank=1, attn_cp_size=2)
    assert first.put(keys(1), first.slots(1))
    assert second.put(keys(1, 1), second.slots(1))
    everyone = (first, second, other_cut, context)
    found = [[engine.backend.exists(key) for engine in everyone] for key in keys(2)]
    assert found == [[True, False, False, False], [False, True, False, False]]


def test_models_are_apart(make: Make) -> None:
    one, two = make(support.mha_pool("page_first"), "a"), make(support.mha_pool("page_first"), "b")
    assert one.put(keys(1), one.slots(1))
    assert two.backend.batch_exists(keys(1)) == 0


def test_dtypes_of_one_size_are_apart(make: Make) -> None:
    """SGLang #33268: its own file backend serves bfloat16 pages to a float16 pool."""
    one = make(support.mha_pool("page_first"))
    other = make(support.mha_pool("page_first", dtype=torch.float16))
    assert one.put(keys(1), one.slots(1))
    assert other.backend.batch_exists(keys(1)) == 0
    assert other.get(keys(1), other.slots(1)) == [False]


def test_quantised_dtypes_that_are_bytes_to_the_pool_are_apart(make: Make) -> None:
    found = []
    for kind in ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3"):
        support.publish(kv_cache_dtype=kind)
        try:
            engine = make(support.mha_pool("page_first", dtype=torch.float8_e4m3fn))
        finally:
            support.publish()
        found.append(engine.backend.batch_exists(keys(1)))
        assert engine.put(keys(1), engine.slots(1))
    assert found == [0, 0, 1]


def test_page_sizes_and_layer_counts_are_apart(make: Make) -> None:
    engine = make(support.mha_pool("page_first"))
    # As many bytes in a page, of half the tokens and twice the heads.
    shorter = make(support.mha_pool("page_first", page_tokens=8, heads=4))
    shallower = make(support.mha_pool("page_first", layers=2, heads=4))
    assert engine.put(keys(1), engine.slots(1))
    assert shorter.backend.batch_exists(keys(1)) == 0
    assert shallower.backend.batch_exists(keys(1)) == 0


@pytest.mark.parametrize("layout", support.MHA_LAYOUTS)
def test_sizes_of_tensor_parallelism_share_pages_by_groups_of_heads(
    make: Make, layout: str
) -> None:
    """With `tp_lcm_size` 4 one rank's two heads are the heads of ranks 2 and 3 of four."""
    whole = make(support.mha_pool(layout), tp_rank=1, tp_size=2, tp_lcm_size=4)
    halves = [
        make(support.mha_pool("page_first", heads=1), tp_rank=rank, tp_size=4) for rank in (2, 3)
    ]
    support.fill(whole.pool, 4)
    slots = whole.slots(2)
    assert whole.put(keys(2), slots)
    for head, half in enumerate(halves):
        target = half.slots(2)
        assert half.get(keys(2), target) == [True, True]
        for want, got in zip(whole.contents(slots), half.contents(target), strict=True):
            assert torch.equal(want[:, :, :, head : head + 1], got)
    # A page of which one group is missing is not there.
    assert halves[0].put(keys(1, 9), halves[0].slots(1))
    assert whole.backend.batch_exists(keys(1, 9)) == 0
    assert whole.get(keys(1, 9), whole.slots(1)) == [False]


def test_heads_that_cannot_be_split_fail_the_attach(make: Make) -> None:
    with pytest.raises(Exception, match="tp_lcm_size"):
        make(support.mha_pool("page_first", heads=1), tp_lcm_size=4)


def test_another_release_of_sglang_is_told_at_start(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(support.mha_pool("page_first"))
    assert "tested with" not in caplog.text
    monkeypatch.setitem(compat.TESTED, "sglang", ("0.4.0", "0.4.9"))
    make(support.mha_pool("page_first"))
    assert "sglang 0.5.23: kvstore was tested with sglang 0.4.0 to 0.4.9" in caplog.text


def test_an_unknown_setting_fails_the_attach(make: Make) -> None:
    with pytest.raises(Exception, match="adress"):
        make(support.mha_pool("page_first"), extra={"adress": "unix:/nowhere"})


def test_no_torn_pages_under_concurrency(make: Make) -> None:
    """Two threads write pages of one value each under the same names, a third reads: what it gets
    is a whole page or a miss, K and V of one writer."""
    engine = make(support.mha_pool("page_first"))
    sources = [engine.slots(1) for _ in range(8)]
    for value, slots in enumerate(sources):
        engine.pool.kv_buffer[:, slots] = float(value + 1)
    target = engine.slots(1)
    names = keys(16)
    stop = threading.Event()

    def write(start: int) -> None:
        turn = start
        while not stop.is_set():
            engine.put([names[turn % 16]], sources[turn % 7])
            turn += 3
            if turn % 97 < 3:
                engine.backend.clear()

    writers = [threading.Thread(target=write, args=(start,)) for start in (0, 1)]
    for writer in writers:
        writer.start()
    try:
        num_read = 0
        for turn in range(400):
            if engine.get([names[turn % 16]], target)[0]:
                num_read += 1
                page = engine.contents(target)[0].view(torch.bfloat16)
                assert page.min() == page.max()
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert num_read


def test_all_of_sglangs_threads_at_once(make: Make) -> None:
    """The query, load, write and statistics calls from threads of their own."""
    engine = make(support.mha_pool("page_first"), enable_storage_metrics=True)
    slots = [engine.slots(4) for _ in range(2)]
    support.fill(engine.pool, 5)
    wanted = engine.contents(slots[0])
    assert engine.put(keys(4), slots[0])
    wrong: list[str] = []

    def run(work: Callable[[int], bool]) -> None:
        for turn in range(100):
            if not work(turn):
                wrong.append(str(work))

    def load(turn: int) -> bool:
        arrived = engine.get(keys(4), slots[1])
        got = engine.contents(slots[1])
        return arrived == [True] * 4 and all(map(torch.equal, got, wanted))

    works: list[Callable[[int], bool]] = [
        load,
        lambda turn: engine.backend.batch_exists(keys(5)) == 4,
        lambda turn: engine.put(keys(4, 100 + 4 * (turn % 8)), slots[0]),
        lambda turn: engine.backend.get_stats() is not None,
    ]
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_clear_removes_this_models_pages_only(make: Make) -> None:
    one, two = make(support.mha_pool("page_first"), "a"), make(support.mha_pool("page_first"), "b")
    assert one.put(keys(2), one.slots(2))
    assert two.put(keys(2), two.slots(2))
    assert one.backend.clear()
    assert (one.backend.batch_exists(keys(2)), two.backend.batch_exists(keys(2))) == (0, 2)


def test_statistics_are_taken_once(make: Make) -> None:
    engine = make(support.mha_pool("page_first"), enable_storage_metrics=True)
    slots = engine.slots(3)
    assert engine.put(keys(3), slots)
    assert engine.get(keys(3), slots) == [True] * 3
    stats = engine.backend.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [3])
    assert stats.backup_bandwidth[0] > 0
    assert engine.backend.get_stats().prefetch_pgs == []
    assert make(support.mha_pool("page_first")).backend.get_stats() is None


def test_after_close_all_is_a_miss(make: Make) -> None:
    engine = make(support.mha_pool("page_first"))
    slots = engine.slots(1)
    assert engine.put(keys(1), slots)
    engine.backend.close()
    engine.backend.close()
    assert engine.backend.batch_exists(keys(1)) == 0
    assert engine.get(keys(1), slots) == [False]
    assert not engine.put(keys(1), slots)


def test_before_a_pool_is_registered_all_is_a_miss(daemon: PrivateDaemon) -> None:
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    config = support.storage_config(daemon.address, "unregistered")
    backend = StorageBackendFactory.create_backend("dynamic", config, None)
    assert backend.batch_exists(keys(1)) == 0
    assert backend.get(keys(1)[0]) is None
    assert not backend.set(keys(1)[0], torch.zeros(4))
    backend.close()

"""ReferenceWorker puts out the same tokens in every mode, and its scheduler keeps its promises.

The oracle of tokens is transformers' greedy `generate`; the modes (cached, disaggregated,
preempted, late or lost loads) are then compared with a cold run of each request alone. KV passes
through DictTransfer, an in-memory store that checks the order of the calls. Page pool and scheduler
run against models, driven by Hypothesis, without a neural network.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

torch = pytest.importorskip("torch")

from kvstore.errors import ConfigError, OutOfSpaceError  # noqa: E402
from kvstore_adapters.reference import checkpoint  # noqa: E402
from kvstore_adapters.reference.pages import PagePool  # noqa: E402
from kvstore_adapters.reference.sampling import sample  # noqa: E402
from kvstore_adapters.reference.scheduler import (  # noqa: E402
    Request,
    Scheduler,
    Work,
    WorkerSettings,
)
from kvstore_adapters.reference.scheduler import Sequence as Running  # noqa: E402
from kvstore_adapters.reference.transfer import (  # noqa: E402
    BlockSave,
    NoTransfer,
    PendingLoad,
    WholeLoad,
)
from kvstore_adapters.reference.worker import (  # noqa: E402
    FinishReason,
    Output,
    ReferenceWorker,
)

PAGE_TOKENS = 16


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> checkpoint.Checkpoint:
    return checkpoint.make_random(size="nano", seed=1)


class Load(WholeLoad):
    """Done after `polls` calls of done(), or once it is waited for."""

    def __init__(self, transfer: DictTransfer, names: list[bytes], pages: list[int]) -> None:
        self._transfer, self._names, self._pages = transfer, names, pages
        self._polls = transfer.polls
        self._loaded: int | None = None

    def done(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def wait(self) -> int:
        if self._loaded is None:
            found = [self._transfer.blocks.get(name) for name in self._names]
            found = list(itertools.takewhile(lambda block: block is not None, found))
            for page, block in zip(self._pages, found, strict=False):
                self._transfer.pool[page].copy_(block)
            self._loaded = len(found)
            self._transfer.loaded += len(found)
        return self._loaded


class DictTransfer:
    """Blocks by chain hash, shared by the transfers that are given the same dict. Layers are copied
    when announced.
    """

    def __init__(self, blocks: dict[bytes, Any] | None = None, polls: int = 0) -> None:
        self.blocks: dict[bytes, Any] = {} if blocks is None else blocks
        self.polls = polls
        self.loaded = 0
        self.lose_after: int | None = None  # blocks beyond this vanish between match and load
        self._saves: list[tuple[bytes, int, Any]] | None = None
        self._next_layer = 0

    def attach(self, pool: Any, pages: PagePool) -> None:
        self.pool = pool

    def poll(self) -> None:
        pass

    def match(self, request_id: str, token_ids: Sequence[int], blocks_max: int) -> int:
        names = self._names(token_ids)[:blocks_max]
        return sum(1 for _ in itertools.takewhile(self.blocks.__contains__, names))

    def load(self, request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> PendingLoad:
        assert self.pool is not None
        names = self._names(token_ids)[: len(pages)]
        if self.lose_after is not None:
            for name in names[self.lose_after :]:
                self.blocks.pop(name, None)
        return Load(self, names, list(pages))

    def begin_save(self, saves: Sequence[BlockSave]) -> None:
        assert self._saves is None, "saves do not nest"
        self._saves = []
        for save in saves:
            assert len(save.token_ids) == (save.first_block + len(save.pages)) * PAGE_TOKENS
            names = self._names(save.token_ids)[save.first_block :]
            for name, page in zip(names, save.pages, strict=True):
                self._saves.append((name, page, torch.full_like(self.pool[page], float("nan"))))
        assert self._saves
        self._next_layer = 0

    def save_layer(self, layer: int) -> None:
        assert self._saves is not None
        assert layer == self._next_layer
        self._next_layer += 1
        for _, page, block in self._saves:
            block[layer] = self.pool[page, layer]

    def end_save(self) -> None:
        assert self._saves is not None
        assert self._next_layer == self.pool.shape[1]
        for name, _, block in self._saves:
            assert torch.equal(block, self.blocks.setdefault(name, block)), "same prefix, other KV"
        self._saves = None

    def abort_save(self) -> None:
        self._saves = None

    @staticmethod
    def _names(token_ids: Sequence[int]) -> list[bytes]:
        names, parent = [], b""
        for begin in range(0, len(token_ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
            text = repr(list(token_ids[begin : begin + PAGE_TOKENS])).encode()
            parent = hashlib.sha256(parent + text).digest()
            names.append(parent)
        return names


def new_worker(
    model: checkpoint.Checkpoint, transfer: Any = None, clock: Any = None, **changes: Any
) -> ReferenceWorker:
    chosen = WorkerSettings(**({"page_tokens": PAGE_TOKENS, "num_pages": 96} | changes))
    if clock is not None:
        return ReferenceWorker(model, chosen, transfer, clock)
    return ReferenceWorker(model, chosen, transfer)


def run(worker: ReferenceWorker, requests: Sequence[Request]) -> dict[str, list[Output]]:
    pages_free = worker.pages_free
    for request in requests:
        worker.add_request(request)
    outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    for _ in range(2000):
        if not worker.has_work:
            break
        for output in worker.step():
            outputs[output.request_id].append(output)
    assert not worker.has_work
    assert worker.pages_free == pages_free
    return outputs


def tokens(outputs: dict[str, list[Output]]) -> dict[str, list[int]]:
    return {name: [output.token_id for output in of] for name, of in outputs.items()}


def metrics(outputs: list[Output]) -> Any:
    assert [output.metrics is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    return outputs[-1].metrics


SYSTEM = b"You are a patient guide to an old library. Answer in one line.\n"
PROMPTS = [
    SYSTEM + b"Where are the maps?",
    SYSTEM + b"Who wrote the long green book about rivers, and when did it arrive here?",
    b"x",
    bytes(range(200)),
    SYSTEM,
    (SYSTEM * 2)[:64],  # full blocks to the last token
    b"A different beginning altogether, so that nothing of the prefix is shared. " * 2,
]
REQUESTS = [
    Request(f"r{index}", tuple(prompt), max_new_tokens=12 + 3 * index)
    for index, prompt in enumerate(PROMPTS)
]


@pytest.fixture(scope="module")
def cold(model: checkpoint.Checkpoint) -> dict[str, list[int]]:
    """Each request alone, whole prompt in one step, nothing shared."""
    worker = new_worker(model, sequences_max=1)
    return {r.request_id: tokens(run(worker, [r]))[r.request_id] for r in REQUESTS}


def test_tokens_equal_transformers_generate_under_batching_chunks_and_preemption(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = checkpoint.make_random(tmp_path, "tiny", seed=1)
    worker = new_worker(ours, num_pages=18, batch_tokens_max=40, sequences_max=5)
    outputs = run(worker, REQUESTS)
    assert sum(metrics(of).preemptions for of in outputs.values()) > 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for request in REQUESTS:
        prompt = torch.tensor([request.prompt_token_ids])
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens(outputs)[request.request_id] == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_tokens_max": 7, "sequences_max": 3},
        {"batch_tokens_max": 64, "sequences_max": 7},
        {"num_pages": 17, "sequences_max": 7},
    ],
    ids=["small chunks", "wide batch", "preemption"],
)
@pytest.mark.parametrize("polls", [0, 3], ids=["ready loads", "late loads"])
def test_tokens_are_identical_with_a_cold_then_a_warm_store(
    model: checkpoint.Checkpoint, cold: dict[str, list[int]], changes: dict[str, int], polls: int
) -> None:
    transfer = DictTransfer(polls=polls)
    first = run(new_worker(model, transfer, **changes), REQUESTS)
    again = run(new_worker(model, transfer, **changes), REQUESTS)
    assert tokens(first) == tokens(again) == cold
    for request in REQUESTS:
        full_blocks = (len(request.prompt_token_ids) - 1) // PAGE_TOKENS
        assert metrics(again[request.request_id]).cached_tokens == full_blocks * PAGE_TOKENS


@pytest.mark.parametrize("warm", [False, True], ids=["PD", "PD with prefix cache"])
def test_disaggregated_workers_put_out_the_tokens_of_one(
    model: checkpoint.Checkpoint, cold: dict[str, list[int]], warm: bool
) -> None:
    blocks: dict[bytes, Any] = {}
    for _ in range(2 if warm else 1):
        prefill_transfer, decode_transfer = DictTransfer(blocks), DictTransfer(blocks, polls=2)
        prefill = new_worker(model, prefill_transfer, batch_tokens_max=50)
        decode = new_worker(model, decode_transfer, sequences_max=4)
        first = tokens(run(prefill, [replace(r, max_new_tokens=1) for r in REQUESTS]))
        rest = run(
            decode, [replace(r, output_token_ids=tuple(first[r.request_id])) for r in REQUESTS]
        )
    for request in REQUESTS:
        name = request.request_id
        assert first[name] + tokens(rest)[name] == cold[name]
        full = len(request.prompt_token_ids) // PAGE_TOKENS * PAGE_TOKENS
        assert metrics(rest[name]).cached_tokens >= full
        assert metrics(rest[name]).output_tokens == request.max_new_tokens
    assert decode_transfer.loaded > 0
    if warm:
        assert prefill_transfer.loaded >= 20


def test_next_turn_reuses_blocks_that_decode_produced(model: checkpoint.Checkpoint) -> None:
    transfer = DictTransfer()
    turn = Request("turn 1", tuple(SYSTEM), 60)
    answer = tokens(run(new_worker(model, transfer), [turn]))["turn 1"]
    follow_up = Request("turn 2", (*SYSTEM, *answer, *b"Go on."), 20)
    warm = run(new_worker(model, transfer), [follow_up])
    assert metrics(warm["turn 2"]).cached_tokens > len(SYSTEM) + PAGE_TOKENS
    assert tokens(warm) == tokens(run(new_worker(model), [follow_up]))


def test_blocks_lost_between_match_and_load_are_computed(
    model: checkpoint.Checkpoint, cold: dict[str, list[int]]
) -> None:
    transfer = DictTransfer()
    run(new_worker(model, transfer), REQUESTS)
    transfer.lose_after = 2
    outputs = run(new_worker(model, transfer), REQUESTS)
    assert tokens(outputs) == cold
    assert all(metrics(of).cached_tokens <= 2 * PAGE_TOKENS for of in outputs.values())


def test_zeroed_kv_changes_the_tokens(
    model: checkpoint.Checkpoint, cold: dict[str, list[int]]
) -> None:
    """The control: a store that returned wrong bytes would be noticed by every test above."""
    transfer = DictTransfer()
    run(new_worker(model, transfer), REQUESTS)
    zeroed = DictTransfer(
        {name: torch.zeros_like(block) for name, block in transfer.blocks.items()}
    )
    zeroed.end_save = lambda: setattr(zeroed, "_saves", None)  # type: ignore[method-assign]
    outputs = tokens(run(new_worker(model, zeroed), REQUESTS))
    cached = [r.request_id for r in REQUESTS if len(r.prompt_token_ids) > PAGE_TOKENS]
    assert len(cached) == len(REQUESTS) - 1
    assert all(outputs[name] != cold[name] for name in cached)


def test_seeded_temperature_does_not_depend_on_the_batch(model: checkpoint.Checkpoint) -> None:
    requests = [replace(r, temperature=0.8, seed=7) for r in REQUESTS]
    together = tokens(run(new_worker(model, batch_tokens_max=30), requests))
    worker = new_worker(model)
    assert together == {r.request_id: tokens(run(worker, [r]))[r.request_id] for r in requests}
    assert together != tokens(run(worker, [replace(r, seed=8) for r in requests]))


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = Counter(sample(logits, 1.0, 0, position) for position in range(4000))
    for token, probability in enumerate(torch.softmax(logits, 0).tolist()):
        assert abs(drawn[token] / 4000 - probability) < 0.04
    assert sample(logits, 0.0, 0, 0) == 2


def test_stop_token_ends_a_request_and_is_put_out(
    model: checkpoint.Checkpoint, cold: dict[str, list[int]]
) -> None:
    stop = cold["r0"][5]
    outputs = run(new_worker(model), [replace(REQUESTS[0], stop_token_ids=frozenset({stop}))])["r0"]
    assert [o.token_id for o in outputs] == cold["r0"][: cold["r0"].index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_metrics_count_tokens_and_read_the_clock(model: checkpoint.Checkpoint) -> None:
    ticks = itertools.count(100.0)
    worker = new_worker(model, DictTransfer(), clock=lambda: next(ticks))
    [of] = run(worker, [Request("a", tuple(SYSTEM), 3)]).values()
    assert of[-1].finish_reason is FinishReason.LENGTH
    found = metrics(of)
    assert (found.arrival_s, found.first_token_s, found.finish_s) == (100.0, 101.0, 102.0)
    assert (found.prompt_tokens, found.output_tokens) == (len(SYSTEM), 3)
    assert (found.cached_tokens, found.preemptions) == (0, 0)


def test_cancel_frees_pages_in_every_state(model: checkpoint.Checkpoint) -> None:
    transfer = DictTransfer()
    run(new_worker(model, transfer), REQUESTS)
    transfer.polls = 1000
    worker = new_worker(model, transfer, sequences_max=3, batch_tokens_max=20)
    before = worker.pages_free
    for request in [Request("fresh", tuple(range(100)), 5), *REQUESTS]:
        worker.add_request(request)
    worker.step()  # "fresh" prefills, two are loading, the rest wait
    for name in ["fresh", *(r.request_id for r in REQUESTS), "unknown"]:
        worker.cancel(name)
    assert not worker.has_work
    assert worker.pages_free == before
    assert worker.step() == []


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"prompt_token_ids": ()}, "prompt_token_ids"),
    "token out of range": ({"prompt_token_ids": (258,)}, "prompt_token_ids"),
    "negative token": ({"prompt_token_ids": (-1,)}, "prompt_token_ids"),
    "nothing to generate": ({"max_new_tokens": 0}, "max_new_tokens"),
    "all generated": ({"max_new_tokens": 1, "output_token_ids": (5,)}, "max_new_tokens"),
    "beyond the model": ({"max_new_tokens": 1 << 20}, "max_new_tokens"),
    "beyond the pool": ({"max_new_tokens": 96 * PAGE_TOKENS}, "num_pages"),
    "negative temperature": ({"temperature": -1.0}, "temperature"),
    "temperature not a number": ({"temperature": float("nan")}, "temperature"),
    "huge seed": ({"seed": 1 << 60}, "seed"),
    "duplicate": ({"request_id": "running"}, "request_id"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_refused_and_harms_no_other(
    model: checkpoint.Checkpoint, cold: dict[str, list[int]], case: str
) -> None:
    change, message = BAD_REQUESTS[case]
    worker = new_worker(model)
    worker.add_request(replace(REQUESTS[2], request_id="running"))
    with pytest.raises(ConfigError, match=message):
        worker.add_request(replace(Request("bad", (1, 2, 3), 4), **change))
    outputs = []
    while worker.has_work:
        outputs += worker.step()
    assert [output.token_id for output in outputs] == cold["r2"]


@pytest.mark.parametrize("name", ["page_tokens", "num_pages", "sequences_max", "batch_tokens_max"])
def test_bad_setting_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        WorkerSettings(**{name: 0})  # type: ignore[arg-type]


class PagePoolModel(RuleBasedStateMachine):
    """PagePool against a Counter of references."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(7)
        self.references: Counter[int] = Counter()

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        if count > 7 - len(self.references):
            with pytest.raises(OutOfSpaceError):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert all(0 <= page < 7 and page not in self.references for page in pages)
        self.references.update(pages)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.references)))
        self.pool.retain([page])
        self.references[page] += 1

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.references)))
        self.pool.release([page])
        self.references -= Counter([page])

    @rule(page=st.integers(0, 6))
    def misuse_of_a_free_page_is_caught(self, page: int) -> None:
        if page not in self.references:
            for misuse in (self.pool.release, self.pool.retain):
                with pytest.raises(AssertionError):
                    misuse([page])

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.pages_free == 7 - len(self.references)


TestPagePool = PagePoolModel.TestCase
TestPagePool.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


class ChanceTransfer(NoTransfer):
    """Matches and loads at random; moves nothing."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def match(self, request_id: str, token_ids: Sequence[int], blocks_max: int) -> int:
        return self._chance.randint(0, blocks_max)

    def load(self, request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> PendingLoad:
        chance, count = self._chance, len(pages)

        class Load(WholeLoad):
            def done(self) -> bool:
                return chance.random() < 0.5

            def wait(self) -> int:
                return chance.randint(0, count)

        return Load()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    sequences_max=st.integers(1, 4),
    spare_tokens=st.integers(0, 10),
    num_pages=st.integers(6, 12),
    lengths=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 8)), min_size=1, max_size=8),
)
def test_scheduler_keeps_its_budgets_and_finishes_everything(
    seed: int,
    sequences_max: int,
    spare_tokens: int,
    num_pages: int,
    lengths: list[tuple[int, int]],
) -> None:
    chance = random.Random(seed)
    chosen = WorkerSettings(4, num_pages, sequences_max + spare_tokens, sequences_max)
    scheduler = Scheduler(chosen, ChanceTransfer(chance))
    todo = [Running(Request(str(i), (1,) * n, new), i) for i, (n, new) in enumerate(lengths)]
    unfinished, arrived = len(todo), 0
    for _ in range(2000):
        if arrived < len(todo) and chance.random() < 0.3:
            scheduler.add(todo[arrived])
            arrived += 1
        plan = scheduler.schedule()
        if not plan and scheduler.running:
            loading = next(s for s in scheduler.running if s.loading is not None)
            scheduler.finish_load(loading)
            plan = scheduler.schedule()
            assert plan, "a finished load makes progress possible"
        check_plan(scheduler, chosen, plan)
        for work in plan:
            work.sequence.computed += work.count
            if work.sequence.computed == len(work.sequence.tokens):
                work.sequence.tokens.append(2)
                if work.sequence.output_count == work.sequence.request.max_new_tokens:
                    scheduler.remove(work.sequence)
                    unfinished -= 1
        if not unfinished:
            break
    assert unfinished == 0, "starved"
    assert scheduler.pages.pages_free == chosen.num_pages


def check_plan(scheduler: Scheduler, chosen: WorkerSettings, plan: list[Work]) -> None:
    assert sum(work.count for work in plan) <= chosen.batch_tokens_max
    assert len(scheduler.running) <= chosen.sequences_max
    planned = [work.sequence for work in plan]
    assert planned == [s for s in scheduler.running if s.loading is None]
    for work in plan:
        sequence = work.sequence
        assert work.count > 0
        assert sequence.computed + work.count <= len(sequence.tokens)
        assert sequence.computed + work.count <= len(sequence.pages) * chosen.page_tokens
    held = [page for sequence in scheduler.running for page in sequence.pages]
    assert len(held) == len(set(held)) == chosen.num_pages - scheduler.pages.pages_free
    assert not any(sequence.pages for sequence in scheduler.waiting)
    order = [s.arrival_s for s in (*scheduler.running, *scheduler.waiting)]
    assert order == sorted(order), "first come, first served"

"""A small engine with the scheduling of a real one: block tables with references, a local prefix
cache, chunked prefill, decoding, preemption, aborts, loads beside the steps or within them.

Blocks hold what was written to them: the name of the prefix whose KV they are, or garbage. Every
save that runs is compared with that, so a plan that would store a block before it is computed,
after it was handed on, or on top of a failed load, fails the test.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore_adapters.planning.chains import Chain
from kvstore_adapters.planning.groups import Group, alignment_tokens, hit_tokens, needed_blocks
from kvstore_adapters.planning.plan import LoadJob, SaveJob, StepReport
from kvstore_adapters.planning.planner import Planner
from kvstore_adapters.planning.tracking import PlannerSettings, ScheduledRequest

HASH_TOKENS = 4
SHARED_HASHES = 6  # prompts of one family share so many
GARBAGE = b"garbage"


@dataclass
class Request:
    request_id: str
    family: int
    num_prompt: int
    num_tokens: int
    status: str = "waiting"  # loading, running
    num_computed: int = 0
    tables: tuple[list[int], ...] = ()
    failed_loads: int = 0

    @property
    def hashes(self) -> list[bytes]:
        count = self.num_tokens // HASH_TOKENS
        return [self._hash(i) for i in range(count)]

    def _hash(self, i: int) -> bytes:
        of = f"{self.family}/{i}" if i < SHARED_HASHES else f"{self.request_id}/{i}"
        return hashlib.sha256(of.encode()).digest()


def first_visible(group: Group, num_tokens: int) -> int:
    """The first block that the token behind `num_tokens` sees something of."""
    if group.kind == "full":
        return 0
    return max(0, num_tokens - group.window_tokens + 1) // group.block_tokens


class Lookups:
    """Answers only when told to; looks at the store at that moment."""

    def __init__(self, groups: Sequence[Group], store: set[tuple[int, bytes]]) -> None:
        self.groups, self.store = groups, store
        self.asked: dict[str, tuple[Chain, int]] = {}
        self.known: dict[str, int] = {}

    def begin(
        self,
        request_id: str,
        chain: Chain,
        limit_tokens: int,
        *,
        want_tokens: int = 0,
        wait_seconds: float = 0.0,
        holder: str = "",
    ) -> None:
        assert limit_tokens > 0
        assert 0 <= want_tokens <= limit_tokens
        self.known.pop(request_id, None)
        self.asked[request_id] = chain, limit_tokens

    def result(self, request_id: str, wait_seconds: float = 0.0) -> int | None:
        return self.known.get(request_id)

    def forget(self, request_id: str) -> None:
        self.asked.pop(request_id, None)
        self.known.pop(request_id, None)

    def answer(self, request_id: str) -> None:
        chain, limit = self.asked.pop(request_id)
        present = [
            np.array(
                [
                    (group.group_id, name) in self.store
                    for name in chain.blocks(group, 0, chain.num_blocks(group))
                ],
                dtype=np.bool_,
            )
            for group in self.groups
        ]
        self.known[request_id] = hit_tokens(self.groups, present, limit)


@dataclass
class Running:
    """A save under way, and the ranks that are still at it."""

    job: SaveJob
    ranks_left: int


@dataclass
class Engine:
    groups: tuple[Group, ...]
    settings: PlannerSettings
    num_blocks: int
    chunk: int
    now: float = 0.0
    store: set[tuple[int, bytes]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lookups = Lookups(self.groups, self.store)
        self.planner = Planner(
            self.groups, HASH_TOKENS, self.lookups, self.settings, lambda: self.now
        )
        self.step_tokens = alignment_tokens(self.groups)
        self.content: list[bytes] = [GARBAGE] * self.num_blocks
        self.references: Counter[int] = Counter()
        self.requests: dict[str, Request] = {}
        self.orphans: dict[str, tuple[list[int], ...]] = {}  # aborted while they were loading
        self.loads: dict[str, LoadJob] = {}
        self.saves: dict[int, Running] = {}
        self.preempted: set[str] = set()
        self.seen_jobs: set[int] = set()
        self.being_loaded: dict[bytes, int] = {}  # by the step itself; shared before it has run

    # --- blocks: number 0 is null

    def free_blocks(self) -> list[int]:
        return [b for b in range(1, self.num_blocks) if self.references[b] == 0]

    def release(self, tables: Sequence[Sequence[int]]) -> None:
        for table in tables:
            for block in table:
                if block:
                    assert self.references[block] > 0
                    self.references[block] -= 1

    def name(self, request: Request, group: Group, index: int) -> bytes:
        return request.hashes[(index + 1) * group.block_tokens // HASH_TOKENS - 1]

    def local_hit(self, request: Request) -> int:
        """Tokens that other blocks of the engine hold; their blocks join the request's table."""
        if len(self.groups) > 1:
            return 0
        (group,) = self.groups
        loading = {b for job in self.loads.values() for m in job.moves for b in m.block_ids}
        held = self.being_loaded | {
            content: block
            for block, content in enumerate(self.content)
            if content != GARBAGE and block not in loading
        }
        table: list[int] = []
        for index in range((request.num_tokens - 1) // group.block_tokens):
            block = held.get(self.name(request, group, index))
            if block is None:
                break
            table.append(block)
        self.references.update(table)
        request.tables = (table,)
        return len(table) * group.block_tokens

    def allocate(self, request: Request, num_tokens: int, num_computed: int) -> bool:
        """Room for `num_tokens`, of which the first `num_computed` are or will be there."""
        tables = request.tables or tuple([] for _ in self.groups)
        grown: list[list[int]] = []
        free = self.free_blocks()
        for group, table in zip(self.groups, tables, strict=True):
            want = -(-num_tokens // group.block_tokens)
            first = first_visible(group, num_computed)
            new = list(table)
            while len(new) < want:
                if len(new) < first:
                    new.append(0)
                    continue
                if not free:
                    return False
                new.append(free.pop())
            grown.append(new)
        for table, new in zip(tables, grown, strict=True):
            for block in new[len(table) :]:
                if block:
                    self.references[block] += 1
                    self.content[block] = GARBAGE
        request.tables = tuple(grown)
        return True

    def forget_before_windows(self, request: Request) -> None:
        for group, table in zip(self.groups, request.tables, strict=True):
            for index in range(min(first_visible(group, request.num_computed), len(table))):
                self.release([[table[index]]])
                table[index] = 0

    # --- what happens to requests

    def add(self, request: Request, params: dict[str, object] | None = None) -> None:
        self.requests[request.request_id] = request
        self.planner.arrive(request.request_id, request.hashes, request.num_prompt, params)

    def preempt(self, request: Request) -> None:
        self.release(request.tables)
        request.tables, request.num_computed, request.status = (), 0, "waiting"
        self.preempted.add(request.request_id)

    def abort(self, request: Request) -> None:
        self.planner.finished(request.request_id, request.num_computed, request.hashes)
        del self.requests[request.request_id]
        self.preempted.discard(request.request_id)
        if request.status == "loading":
            self.orphans[request.request_id] = request.tables
        else:
            self.release(request.tables)

    def step(self, sync_good_blocks: int | None = None) -> None:
        """Schedule and compute. `sync_good_blocks`: of every load in this step; None: all."""
        self.being_loaded = {}
        scheduled: dict[str, int] = {}
        for request in self.running():
            self.forget_before_windows(request)
            more = min(self.chunk, request.num_tokens - request.num_computed)
            if more and self.allocate(request, request.num_computed + more, request.num_computed):
                scheduled[request.request_id] = more
        for request in [r for r in self.requests.values() if r.status == "waiting"]:
            more = self._admit(request)
            if more and request.status == "running":
                scheduled[request.request_id] = more
        due = [
            ScheduledRequest(
                request_id,
                self.requests[request_id].num_computed + more,
                self.requests[request_id].hashes,
                self.requests[request_id].tables,
            )
            for request_id, more in scheduled.items()
        ]
        plan = self.planner.step(due, self.preempted)
        self.preempted = set()
        for load in plan.loads:
            assert load.request_id not in self.loads, "a second load beside the first"
            assert load.is_async == self.settings.is_async
            self.loads[load.request_id] = load
        for job in plan.saves:
            self._start_save(job)
        assert self.planner.take_pinned() == [
            block for job in plan.saves for move in job.moves for block in move.block_ids
        ]
        if self.settings.is_async:
            self._compute(scheduled)
            return
        assert not (plan.loads and plan.saves)
        failed = [self._load_now(load, sync_good_blocks) for load in plan.loads]
        self._compute(scheduled)
        for request_id, good, bad in failed:
            if bad:
                self._take_back(request_id, good, bad)

    def running(self) -> list[Request]:
        return [r for r in self.requests.values() if r.status == "running"]

    def _admit(self, request: Request) -> int:
        """The tokens to compute now; 0 when the request must wait, or waits for its load."""
        request_id = request.request_id
        if request.num_computed:  # back from a load, wholly or in part
            external = 0
            local = request.num_computed
        else:
            self.release(request.tables)
            request.tables = ()
            local = self.local_hit(request)
            matched = self.planner.match(request_id, request.hashes, request.num_tokens, local)
            if matched is None:
                self.release(request.tables)
                request.tables = ()
                return 0
            external = matched
            assert external % self.step_tokens == 0
            if external:
                assert local + external <= self.lookups.known[request_id]
        total = local + external
        if external and self.settings.is_async:
            more = 0
        else:
            assert total < request.num_tokens
            more = min(self.chunk, request.num_tokens - total)
        if not self.allocate(request, total + more, total):
            if request.num_computed == 0:
                self.release(request.tables)
                request.tables = ()
            return 0
        self.planner.allocated(request_id, external, request.tables)
        request.num_computed = total
        request.status = "running"
        if external and self.settings.is_async:
            request.status = "loading"
        elif external:
            (group,), (table,) = self.groups, request.tables
            for index in needed_blocks(group, local, total):
                self.being_loaded[self.name(request, group, index)] = table[index]
        return more

    def _start_save(self, job: SaveJob) -> None:
        assert job.job_id not in self.seen_jobs
        self.seen_jobs.add(job.job_id)
        assert job.num_blocks > 0
        for move in job.moves:
            assert len(set(move.block_ids.tolist())) == len(move) == len(move.hashes) // 32
            for block in move.block_ids.tolist():
                assert block != 0
                self.references[block] += 1
        self.saves[job.job_id] = Running(job, self.settings.num_ranks)

    def _compute(self, scheduled: dict[str, int]) -> None:
        """The forward pass: a block that is whole has its name, if what it rests on is right."""
        for request_id, more in scheduled.items():
            request = self.requests[request_id]
            before = request.num_computed
            request.num_computed += more
            is_right = self.is_right(request, before)
            for group, table in zip(self.groups, request.tables, strict=True):
                first = before // group.block_tokens
                for index in range(first, request.num_computed // group.block_tokens):
                    if table[index]:
                        name = self.name(request, group, index) if is_right else GARBAGE
                        self.content[table[index]] = name
            if request.num_computed >= request.num_tokens:
                request.num_tokens += 1

    def is_right(self, request: Request, num_tokens: int) -> bool:
        """Whether all whole blocks that a token behind `num_tokens` sees hold what they should."""
        for group, table in zip(self.groups, request.tables, strict=True):
            for index in range(first_visible(group, num_tokens), num_tokens // group.block_tokens):
                if self.content[table[index]] != self.name(request, group, index):
                    return False
        return True

    # --- what the workers do

    def end_load(self, request_id: str, good_blocks: int) -> None:
        """A load ends with so many blocks of each move, all if there are no more."""
        job = self.loads.pop(request_id)
        counts = [min(good_blocks, len(move)) for move in job.moves]
        is_whole = all(n == len(move) for n, move in zip(counts, job.moves, strict=True))
        has_windows = any(group.kind == "window" for group in self.groups)
        for move, count in zip(job.moves, counts, strict=True):
            names = [move.hashes[i : i + 32] for i in range(0, len(move.hashes), 32)]
            for i, block in enumerate(move.block_ids.tolist()):
                self.content[block] = names[i] if i < count else GARBAGE
        arrived = 0
        if not is_whole:
            tokens = [
                n * self.groups[move.group_id].block_tokens
                for n, move in zip(counts, job.moves, strict=True)
            ]
            arrived = 0 if has_windows else min(tokens)
            self.planner.report(StepReport(failed={request_id: arrived}))
        if request_id in self.orphans:
            self.release(self.orphans.pop(request_id))
            return
        request = self.requests[request_id]
        if is_whole:
            request.status = "waiting"
            if request.num_computed == request.num_tokens:
                request.num_computed -= 1
            return
        request.failed_loads += 1
        assert request.failed_loads <= 2, "a request that fails again and again"
        request.status = "waiting"
        first = job.moves[0].first * self.groups[0].block_tokens
        request.num_computed = 0 if len(self.groups) > 1 else first + arrived
        if request.num_computed == 0:
            self.release(request.tables)
            request.tables = ()

    def _load_now(self, job: LoadJob, good_blocks: int | None) -> tuple[str, int, set[int]]:
        """Before the forward pass: the request, blocks that arrived, and those that did not."""
        del self.loads[job.request_id]
        (move,) = job.moves
        good = len(move) if good_blocks is None else min(good_blocks, len(move))
        names = [move.hashes[i : i + 32] for i in range(0, len(move.hashes), 32)]
        for i, block in enumerate(move.block_ids.tolist()):
            self.content[block] = names[i] if i < good else GARBAGE
        return job.request_id, good, set(move.block_ids[good:].tolist())

    def _take_back(self, request_id: str, good_blocks: int, bad: set[int]) -> None:
        """As vLLM's policy "recompute": whoever rests on a bad block goes back to before it."""
        (group,) = self.groups
        self.planner.report(StepReport(failed={request_id: good_blocks * group.block_tokens}))
        for request in self.running():
            for index, block in enumerate(request.tables[0]):
                if block in bad and index * group.block_tokens < request.num_computed:
                    request.num_computed = index * group.block_tokens
                    break

    def run_save(self, job_id: int, num_stored: int) -> None:
        """One rank reads the blocks of a save now, and reports it."""
        running = self.saves[job_id]
        left = num_stored
        for move in running.job.moves:
            names = [move.hashes[i : i + 32] for i in range(0, len(move.hashes), 32)]
            for name, block in zip(names, move.block_ids.tolist(), strict=True):
                assert self.content[block] == name, "a block is saved that is not what it is called"
                if left > 0:
                    self.store.add((move.group_id, name))
                    left -= 1
        running.ranks_left -= 1
        ended = self.planner.report(StepReport(saved={job_id: 1}, stored={job_id: num_stored}))
        if running.ranks_left:
            assert not ended
            return
        del self.saves[job_id]
        (end,) = ended
        assert end.job is running.job
        assert end.num_stored <= num_stored
        assert sorted(end.block_ids) == sorted(
            block for move in end.job.moves for block in move.block_ids.tolist()
        )
        self.release([end.block_ids])

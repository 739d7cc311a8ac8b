"""Transfers: the loads and saves of one worker, on threads of its own.

A load is queued, or runs on the caller's thread (sync); it ends exactly once, as a LoadOutcome:

    queued --a loader takes it--> running --copied, or not--> ended --take_loaded--> gone
       '------ its deadline passes, or we close ---------------^

A running load is not given up: its thread may still write into engine blocks. It ends at the
latest one call of the store after its deadline.

Saves run one after the other on one thread, in the order given: blocks of a chain are stored only
after those before them. How many wait is bounded by whoever plans them, as their source blocks stay
pinned until they are reported.

Nothing raises into the engine: what fails counts as not loaded, or as not stored, and is said once
in a while.

Thread safety: all methods may be called from any thread. `_lock` guards all that is not set once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvstore import Store
from kvstore_adapters.settings import AdapterSettings

from .counters import TransferCounters
from .groups import Group
from .notices import Notices
from .pages import Pages
from .plan import BlockMove, LoadJob, SaveJob, StepReport

_Ready = Callable[[], None]


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """How a load ended.

    Args:
        num_tokens: leading tokens of the load that arrived, in all groups. With a group of kind
            "window" all or none: a shorter prefix needs other blocks of its window.
        failed_block_ids: engine blocks that may hold anything; empty when all arrived.
    """

    num_tokens: int
    failed_block_ids: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return not self.failed_block_ids


@dataclass(frozen=True, slots=True)
class _Load:
    job: LoadJob
    deadline: float
    ready: _Ready | None


class Transfers:
    """See above."""

    def __init__(
        self,
        groups: Sequence[Group],
        stores: Callable[[int], Store],
        push_stores: Callable[[str, int], Store],
        pages: Mapping[int, Pages],
        settings: AdapterSettings,
    ) -> None:
        """
        Args:
            stores: group to its store on this rank; may raise.
            push_stores: name of a target and group to the store there; may raise.
            pages: by group.
        """
        self._groups = {group.group_id: group for group in groups}
        self._stores = stores
        self._push_stores = push_stores
        self._pages = pages
        self._load_seconds = settings.load_deadline
        self._notices = Notices(logging.getLogger(__name__))
        self._lock = threading.Lock()
        self._has_loads = threading.Condition(self._lock)
        self._has_saves = threading.Condition(self._lock)
        self._loads: deque[_Load] = deque()
        self._outcomes: list[tuple[str, LoadOutcome]] = []
        self._saves: deque[tuple[SaveJob, _Ready | None]] = deque()
        self._report = StepReport()
        self._counters = TransferCounters()
        self._save_until = float("inf")  # of time.monotonic; finite once we close
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run_loads, name=f"kvstore-load-{i}", daemon=True)
            for i in range(settings.threads)
        ]
        self._threads.append(
            threading.Thread(target=self._run_saves, name="kvstore-save", daemon=True)
        )
        for thread in self._threads:
            thread.start()

    # --- loading

    def load(self, job: LoadJob, ready: _Ready | None = None) -> None:
        """Start a load; one that is not async has ended when this returns. `ready` is called before
        blocks are written, and waits until nobody else does."""
        load = _Load(job, time.monotonic() + self._load_seconds, ready)
        if not job.is_async:
            self._end(load, *self._perform(load))
            return
        with self._lock:
            if not self._is_closed:
                self._loads.append(load)
                self._has_loads.notify()
                return
        self._end(load, *self._nothing_of(load))

    def take_loaded(self) -> dict[str, LoadOutcome]:
        """Return by request the loads that ended since the last call.

        What `take_report` says of a request that failed is there from this call on. Of two loads
        of one request that ended, the second is kept for the next call.
        """
        self._expire()
        taken: dict[str, LoadOutcome] = {}
        with self._lock:
            kept = []
            for request_id, outcome in self._outcomes:
                if request_id in taken:
                    kept.append((request_id, outcome))
                    continue
                taken[request_id] = outcome
                if not outcome.is_complete:
                    self._report.failed[request_id] = outcome.num_tokens
            self._outcomes = kept
        return taken

    def _expire(self) -> None:
        """End queued loads whose deadline passed: all loaders may be waiting for a store."""
        now = time.monotonic()
        late: list[_Load] = []
        with self._lock:
            # All have the same time, so the first is the first to be late.
            while self._loads and self._loads[0].deadline <= now:
                late.append(self._loads.popleft())
        for load in late:
            self._end(load, *self._nothing_of(load))

    def _run_loads(self) -> None:
        while True:
            with self._lock:
                while not self._loads and not self._is_closed:
                    self._has_loads.wait()
                if not self._loads:
                    return
                load = self._loads.popleft()
            self._end(load, *self._perform(load))

    def _perform(self, load: _Load) -> tuple[LoadOutcome, TransferCounters]:
        began = time.monotonic()
        counted = TransferCounters()
        arrived: list[int] = []
        try:
            if load.ready is not None:
                load.ready()
            for move in load.job.moves:
                if not self._is_useful(load.job, arrived):
                    break
                arrived.append(self._load_move(load.job, move, load.deadline, counted))
        except Exception as error:  # noqa: BLE001  a cache that fails is a miss
            self._notices.warn("blocks were not loaded", f"{type(error).__name__}: {error}")
        counted.load_seconds = time.monotonic() - began
        return self._outcome(load.job, arrived), counted

    def _load_move(
        self, job: LoadJob, move: BlockMove, deadline: float, counted: TransferCounters
    ) -> int:
        pages, store = self._pages[move.group_id], self._stores(move.group_id)
        count = pages.load(store, move.chain(), move.block_ids, deadline, job.holders)
        counted.load_blocks += count
        counted.load_bytes += count * pages.block_bytes
        return count

    def _is_useful(self, job: LoadJob, arrived: Sequence[int]) -> bool:
        """Whether what came so far, one count a move, may end as some tokens."""
        is_whole = all(count == len(move) for count, move in zip(arrived, job.moves, strict=False))
        return is_whole or all(self._groups[move.group_id].kind == "full" for move in job.moves)

    def _outcome(self, job: LoadJob, arrived: Sequence[int]) -> LoadOutcome:
        """`arrived`: leading blocks of each move; fewer counts than moves: the others have none."""
        counts = [*arrived, *[0] * (len(job.moves) - len(arrived))]
        tokens = [self._tokens_of(move, n) for move, n in zip(job.moves, counts, strict=True)]
        if all(n == len(move) for move, n in zip(job.moves, counts, strict=True)):
            return LoadOutcome(max(tokens, default=0))
        num_tokens = min(tokens) if self._is_useful(job, counts) else 0
        failed: list[int] = []
        for move in job.moves:
            good = num_tokens // self._groups[move.group_id].block_tokens
            failed += move.block_ids[good:].tolist()
        return LoadOutcome(num_tokens, failed)

    def _tokens_of(self, move: BlockMove, num_blocks: int) -> int:
        return num_blocks * self._groups[move.group_id].block_tokens

    def _nothing_of(self, load: _Load) -> tuple[LoadOutcome, TransferCounters]:
        return self._outcome(load.job, []), TransferCounters()

    def _end(self, load: _Load, outcome: LoadOutcome, counted: TransferCounters) -> None:
        counted.loads = 1
        counted.loads_failed = 0 if outcome.is_complete else 1
        with self._lock:
            self._outcomes.append((load.job.request_id, outcome))
            self._counters.add(counted)

    # --- saving

    def save(self, job: SaveJob, ready: _Ready | None = None) -> None:
        """Queue a save. `ready` is called before blocks are read, and waits until they are
        computed."""
        with self._lock:
            if not self._is_closed:
                self._saves.append((job, ready))
                self._has_saves.notify()
                return
        self._saved(job, 0, TransferCounters(dropped_blocks=job.num_blocks))

    def skip(self, job: SaveJob) -> None:
        """Report a job that others do for us: of what is stored we know nothing."""
        with self._lock:
            self._report.saved[job.job_id] = 1

    def take_report(self) -> StepReport:
        """Return what ended since the last call."""
        with self._lock:
            report, self._report = self._report, StepReport()
        return report

    def _run_saves(self) -> None:
        while True:
            with self._lock:
                while not self._saves and not self._is_closed:
                    self._has_saves.wait()
                if not self._saves:
                    return
                job, ready = self._saves.popleft()
                is_late = time.monotonic() >= self._save_until
            if is_late:
                self._saved(job, 0, TransferCounters(dropped_blocks=job.num_blocks))
            else:
                self._save(job, ready)

    def _save(self, job: SaveJob, ready: _Ready | None) -> None:
        began = time.monotonic()
        counted = TransferCounters()
        leading = 0
        try:
            if ready is not None:
                ready()
            is_leading = True
            for move in job.moves:
                if job.push_to:
                    self._push(job.push_to, move, counted)
                there = self._put(move, self._stores(move.group_id), counted)
                if is_leading:
                    leading += there
                    is_leading = there == len(move)
        except Exception as error:  # noqa: BLE001  the engine does not depend on its cache
            self._notices.warn("blocks were not saved", f"{type(error).__name__}: {error}")
            counted.dropped_blocks = max(counted.dropped_blocks, job.num_blocks - leading)
        counted.save_seconds = time.monotonic() - began
        self._saved(job, leading, counted)

    def _push(self, target: str, move: BlockMove, counted: TransferCounters) -> None:
        try:
            self._put(move, self._push_stores(target, move.group_id), counted)
        except Exception as error:  # noqa: BLE001  as above; and our own store still gets them
            self._notices.warn(f"blocks were not pushed to {target}", error)

    def _put(self, move: BlockMove, store: Store, counted: TransferCounters) -> int:
        """Return how many leading blocks are in the store now."""
        pages = self._pages[move.group_id]
        result = pages.put(store, move.chain(), move.block_ids)
        counted.save_blocks += result.num_stored
        counted.save_bytes += result.num_stored * pages.block_bytes
        counted.dropped_blocks += result.num_no_space + result.num_orphan + result.num_unavailable
        return result.num_blocks

    def _saved(self, job: SaveJob, leading: int, counted: TransferCounters) -> None:
        counted.saves = 1
        with self._lock:
            self._report.saved[job.job_id] = 1
            self._report.stored[job.job_id] = leading
            self._counters.add(counted)

    # --- both

    def take_counters(self) -> TransferCounters:
        """Return what was moved since the last call."""
        with self._lock:
            counters, self._counters = self._counters, TransferCounters()
        return counters

    def close(self, timeout: float = 5.0) -> None:
        """End queued loads, go on with queued saves, and wait at most `timeout` seconds for what
        runs. Safe to call twice."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            self._save_until = min(self._save_until, deadline)
            queued, self._loads = list(self._loads), deque()
            self._has_loads.notify_all()
            self._has_saves.notify_all()
        for load in queued:
            self._end(load, *self._nothing_of(load))
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

"""Planner: the scheduler side of a connector, for all requests of one engine.

    arrive --match--> nothing to load -----------------------------.
       |      |                                                    v
       |      '--> allocated --step--> a LoadJob --report: failed--> step, step, ... --> finished
       |                                                            (SaveJobs)
       '-- preempted: its lookup begins anew, what it saved stays saved

Rules that always hold:
  * A load never goes beyond what a lookup found; after a failed load never beyond what arrived, and
    after a second one nothing is loaded: a request cannot fail for ever.
  * A block is saved only when the step that is being planned has computed it whole and its hash is
    known, and not in a step that waits for a load: should that load fail, all that the step
    computed is wrong.
  * Every SaveJob pins its source blocks, `num_pinned_blocks` of them is never above the bound, and
    `report` gives each pin back exactly once, whatever became of the request.

Not thread-safe: all methods are called by the engine's scheduler.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvstore import BlockHashes

from . import handover
from .chains import Chain
from .groups import Group, alignment_tokens, needed_blocks
from .pins import EndedSave, Pins
from .plan import BlockMove, LoadJob, SaveJob, StepPlan, StepReport
from .tracking import (
    NO_LIMIT,
    BlockTable,
    LookupsLike,
    PlannerCounters,
    PlannerSettings,
    ScheduledRequest,
    TrackedRequest,
)

_LOG = logging.getLogger(__name__)

# A request that waits for long is looked up again: others have stored meanwhile, or evicted.
LOOKUP_SECONDS_MAX = 5.0

_ID = np.dtype(np.int64)
NULL_BLOCK = 0  # where an engine's table has no block: of a window, those before it


class Planner:
    """See above."""

    def __init__(
        self,
        groups: Sequence[Group],
        hash_tokens: int,
        lookups: LookupsLike,
        settings: PlannerSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._groups = tuple(groups)
        self._hash_tokens = hash_tokens
        self._step_tokens = alignment_tokens(self._groups)
        self._step_blocks = sum(self._step_tokens // g.block_tokens for g in self._groups)
        # Of each group: blocks to where all end together, hashes a block, whether it is linked.
        self._save_groups = [
            (
                g.group_id,
                self._step_tokens // g.block_tokens,
                g.block_tokens // hash_tokens,
                g.kind == "full",
            )
            for g in self._groups
        ]
        self._has_windows = any(group.kind == "window" for group in self._groups)
        self._lookups = lookups
        self._settings = settings
        self.source = settings.source  # may be known better later
        self._clock = clock
        self._requests: dict[str, TrackedRequest] = {}
        self._loads: list[LoadJob] = []
        self._pins = Pins(settings.max_pinned_blocks, settings.num_ranks)
        self._wait_left = settings.lookup_wait
        self._warned: set[str] = set()
        self._counters = PlannerCounters()
        # Request -> computed tokens from which it has something to save. The engine's shell reads
        # it in every step for every running request, so it is a plain dict.
        self.save_at: dict[str, int] = {}

    @property
    def num_pinned_blocks(self) -> int:
        return self._pins.num_blocks

    @property
    def num_saves(self) -> int:
        """Saves under way."""
        return len(self._pins)

    def take_pinned(self) -> list[int]:
        """Return the engine blocks that were pinned since the last call."""
        return self._pins.take_started()

    def saves_under_way(self) -> Iterator[int]:
        """Yield their job ids."""
        return self._pins.jobs()

    def pinned_blocks(self) -> Iterator[int]:
        """Yield the engine blocks that saves hold."""
        return self._pins.blocks()

    @property
    def is_full(self) -> bool:
        """Whether no more blocks may be pinned for now."""
        return self._pins.room < self._step_blocks

    # --- arriving

    def arrive(
        self,
        request_id: str,
        hashes: Sequence[bytes],
        num_prompt_tokens: int,
        transfer_params: Mapping[str, Any] | None,
    ) -> None:
        """Take in a request, and start to look its prompt up.

        Raises:
            ConfigError: hashes are not 32 bytes.
        """
        settings = self._settings
        chain = Chain(self._hash_tokens)
        chain.extend(hashes)
        save_limit = NO_LIMIT if settings.save_decode else num_prompt_tokens
        request = TrackedRequest(chain, num_prompt_tokens, save_limit)
        self._requests[request_id] = request
        request.wants_params = not settings.can_load or transfer_params is not None
        request.push_to, wrong = handover.push_target(transfer_params, settings.push_targets)
        self._warn(wrong)
        if settings.can_load:
            want, wrong = handover.promised_tokens(transfer_params, chain, self.source)
            self._warn(wrong)
            if want:
                request.holder, wrong = handover.holder_of(transfer_params, settings.holders)
                self._warn(wrong)
            self._look_up(request_id, request, want)
        if settings.can_save:
            self._set_save_at(request_id, request)

    def _look_up(self, request_id: str, request: TrackedRequest, want_tokens: int = 0) -> None:
        request.found = None
        request.asked_at = self._clock()
        limit = min(request.load_limit, request.num_tokens - self._tokens_to_leave())
        if limit < self._step_tokens:
            self._lookups.forget(request_id)
            request.found = 0
            return
        self._lookups.begin(
            request_id,
            request.chain,
            limit,
            want_tokens=min(want_tokens, limit),
            wait_seconds=self._settings.pd_wait,
            holder=request.holder,
        )

    def _whole(self, tokens: int) -> int:
        """`tokens` or fewer: whole blocks in every group."""
        return tokens // self._step_tokens * self._step_tokens

    def _tokens_to_leave(self) -> int:
        """A step must compute something, so sync loads leave a token. Beside async ones the engine
        computes the last token again where all are loaded; that one sees a token further back than
        the next would, which a window may not have loaded."""
        return 0 if self._settings.is_async and not self._has_windows else 1

    # --- loading

    def match(
        self, request_id: str, hashes: Sequence[bytes], num_tokens: int, num_computed_tokens: int
    ) -> int | None:
        """Return how many tokens to load beyond those that are computed; None: ask again later.

        Args:
            hashes: all of the request's so far.
            num_tokens: that it has, generated ones included.
            num_computed_tokens: that the engine holds, whole blocks in every group.
        """
        request = self._requests.get(request_id)
        if request is None or not self._settings.can_load:
            return 0
        found = request.found
        if found is None or self._clock() - request.asked_at > LOOKUP_SECONDS_MAX:
            found = self._found(request_id, request, hashes, num_tokens)
            if found is None:
                return None
        end = self._usable(request, found, num_tokens)
        request.begin = num_computed_tokens
        return max(0, end - num_computed_tokens)

    def _found(
        self, request_id: str, request: TrackedRequest, hashes: Sequence[bytes], num_tokens: int
    ) -> int | None:
        """Return what the request's lookup found, having begun it anew if it is old."""
        if request.found is not None or num_tokens != request.num_tokens:
            request.num_tokens = num_tokens
            request.chain.extend(hashes)
            self._look_up(request_id, request)
            if request.found is not None:
                return request.found
        found = self._lookups.result(request_id)
        if found is None and self._wait_left > 0:
            began = self._clock()
            found = self._lookups.result(request_id, self._wait_left)
            self._wait_left -= self._clock() - began
        if found is None:
            return None
        request.found = found
        if not request.is_counted:
            request.is_counted = True
            self._counters.lookups += 1
            self._counters.lookup_tokens += num_tokens
            self._counters.hit_tokens += found
        if not request.push_to:
            request.saved = max(request.submitted, self._whole(found))
            self._set_save_at(request_id, request)
        return found

    def _usable(self, request: TrackedRequest, found: int, num_tokens: int) -> int:
        """Return where a load ends, of what was found."""
        end = min(found, request.load_limit, num_tokens - self._tokens_to_leave())
        end = self._whole(end)
        if end < found and self._has_windows:
            return 0  # a window's blocks before an earlier end need not be there
        return max(0, end - self._settings.drop_blocks * self._step_tokens)

    def allocated(
        self, request_id: str, num_external_tokens: int, block_ids: Sequence[BlockTable]
    ) -> None:
        """The engine has made room for the tokens of the last match, or for fewer, or none.

        Args:
            block_ids: the request's whole table, by group.
        """
        request = self._requests.get(request_id)
        if request is None or num_external_tokens <= 0:
            return
        request.is_failed = False
        begin, end = request.begin, request.begin + num_external_tokens
        moves = []
        for group in self._groups:
            blocks = needed_blocks(group, begin, end)
            move = self._move(group, request.chain, blocks, block_ids[group.group_id])
            if len(move):
                moves.append(move)
        holders = (request.holder,) if request.holder else ()
        self._loads.append(LoadJob(request_id, moves, self._settings.is_async, holders))

    def _move(self, group: Group, chain: Chain, blocks: range, table: BlockTable) -> BlockMove:
        """Return the move of those `blocks` that the engine has."""
        own = table[blocks.start : blocks.stop]
        ids = np.array(own, dtype=np.int64)
        if NULL_BLOCK not in own:
            names, parent = chain.names(group, blocks.start, blocks.stop)
            is_linked = group.kind == "full"
            return BlockMove(group.group_id, names, blocks.start, parent, is_linked, ids)
        hashes = chain.blocks(group, blocks.start, blocks.stop)
        has_block = ids != NULL_BLOCK
        kept = BlockHashes(hashes.array[has_block])
        first = blocks.start + int(has_block.argmax())
        return BlockMove.of(group.group_id, first, kept, ids[has_block])

    # --- stepping

    def step(
        self, scheduled: Iterable[ScheduledRequest], preempted: Iterable[str] = ()
    ) -> StepPlan:
        """Return what the step that is being planned starts.

        Args:
            scheduled: those of `save_at` that have come so far, or any of the step's requests.
            preempted: since the last step; some may have been scheduled again by now.
        """
        plan = StepPlan(self._loads, [])
        self._loads = []
        self._wait_left = self._settings.lookup_wait
        for request_id in preempted:
            request = self._requests.get(request_id)
            if request is not None and all(job.request_id != request_id for job in plan.loads):
                request.found, request.num_tokens = None, 0
        if plan.loads and not self._settings.is_async:
            return plan
        for of in scheduled:
            if of.request_id in self.save_at:
                self._save(self._requests[of.request_id], of, plan.saves)
        return plan

    def _save(self, request: TrackedRequest, of: ScheduledRequest, saves: list[SaveJob]) -> None:
        step, hashes, tables = self._step_tokens, of.hashes, of.block_ids
        known = len(hashes) * self._hash_tokens
        begin = request.saved // step
        end = min(of.num_computed_after, known, request.save_limit) // step
        end = min(end, begin + self._pins.room // self._step_blocks)
        if end <= begin:
            return
        moves = []
        for group_id, blocks, pieces, is_linked in self._save_groups:
            # Straight from the engine's own hashes and blocks: a step does this for each request
            # that filled a block, so it makes no arrays but one.
            first, last = begin * blocks, end * blocks
            names = hashes[first * pieces + pieces - 1 : last * pieces : pieces]
            ids = tables[group_id][first:last]
            if NULL_BLOCK in ids:
                kept = [i for i, block in enumerate(ids) if block != NULL_BLOCK]
                if not kept:
                    continue
                first += kept[0]
                names, ids = [names[i] for i in kept], [ids[i] for i in kept]
            parent = hashes[first * pieces - 1] if is_linked and first else None
            moves.append(
                BlockMove(group_id, b"".join(names), first, parent, is_linked, np.array(ids, _ID))
            )
        request.saved = request.submitted = end * step
        if (end + 1) * step <= request.save_limit:
            self.save_at[of.request_id] = (end + 1) * step
        else:
            del self.save_at[of.request_id]
        if moves:
            saves.append(self._pins.start(of.request_id, moves, request.push_to))

    def _set_save_at(self, request_id: str, request: TrackedRequest) -> None:
        at = request.saved + self._step_tokens
        if self._settings.can_save and at <= request.save_limit:
            self.save_at[request_id] = at
        else:
            self.save_at.pop(request_id, None)

    # --- what became of it

    def report(self, report: StepReport) -> list[EndedSave]:
        """Take in what the workers did; return the saves that ended, whose pins end now."""
        for request_id, arrived in report.failed.items():
            self._failed(request_id, arrived)
        return self._pins.report(report)

    def _failed(self, request_id: str, arrived: int) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if not request.is_failed:  # else another rank says so too
            request.is_failed = True
            request.failures += 1
        good = self._whole(request.begin + arrived) if request.failures == 1 else 0
        request.load_limit = min(request.load_limit, good)
        request.submitted = min(request.submitted, good)
        request.saved = min(request.saved, good)
        request.found, request.num_tokens = None, 0
        self._set_save_at(request_id, request)

    def finished(
        self, request_id: str, num_computed_tokens: int, hashes: Sequence[bytes]
    ) -> dict[str, Any] | None:
        """Forget a request; return what to tell whoever continues it.

        Its loads and saves go on: the workers report them.

        Args:
            hashes: all of the request's.
        """
        request = self._requests.pop(request_id, None)
        self.save_at.pop(request_id, None)
        if request is None:
            return None
        self._lookups.forget(request_id)
        if self._settings.can_save:
            known = len(hashes) * self._hash_tokens
            end = min(num_computed_tokens, known, request.save_limit)
            left = max(0, end - request.saved) // self._step_tokens
            self._counters.dropped_blocks += left * self._step_blocks
        if not (self._settings.can_save and request.wants_params and request.saved):
            return None
        request.chain.extend(hashes)
        holder = self._settings.holder
        return handover.describe(request.saved, request.chain, self.source, holder)

    def clear(self) -> None:
        """The store was emptied, say because the weights are others now: requests that are here
        neither load nor save any more. Saves under way still end as they do."""
        for request_id, request in self._requests.items():
            request.load_limit = request.save_limit = request.saved = 0
            request.found = 0
            self._lookups.forget(request_id)
        self.save_at.clear()

    def take_counters(self) -> PlannerCounters:
        """Return the counts since the last call."""
        counters, self._counters = self._counters, PlannerCounters()
        return counters

    def _warn(self, wrong: str | None) -> None:
        """Once for each kind: what requests say comes from anybody."""
        if wrong is not None and wrong not in self._warned:
            self._warned.add(wrong)
            _LOG.warning("kv_transfer_params: %s; ignored", wrong)

"""What the planner is told, may do, and keeps of each request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from .chains import Chain


class BlockTable(Protocol):
    """The engine's blocks of one request in one group, by their place in the prompt: a list, or
    what makes one of the slice that is asked for."""

    def __getitem__(self, at: slice, /) -> list[int]: ...


class LookupsLike(Protocol):
    """What the planner wants of `Lookups`."""

    def begin(
        self,
        request_id: str,
        chain: Chain,
        limit_tokens: int,
        *,
        want_tokens: int = 0,
        wait_seconds: float = 0.0,
        holder: str = "",
    ) -> None: ...
    def result(self, request_id: str, wait_seconds: float = 0.0) -> int | None: ...
    def forget(self, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """What the planner may do.

    num_ranks: that report every job.
    save_decode: save blocks of generated tokens too.
    is_async: requests wait for their loads beside the steps, and may load their whole prompt.
    max_pinned_blocks: engine blocks that saves under way may hold.
    lookup_wait: seconds that the matches of one step may wait for lookups, in all.
    pd_wait: seconds that a decode waits for what the prefill promised.
    drop_blocks: last blocks of every hit that are given up, counted where all groups' blocks end
        together: what a drafter of speculative decoding wants computed anew.
    source: names our namespace in promises to other instances.
    push_targets: names that requests may use.
    holder: where the peers of our daemon find it, for promises; "": it is not told.
    holders: the same of other instances' daemons: those that a request may name.
    """

    num_ranks: int
    can_load: bool
    can_save: bool
    save_decode: bool
    is_async: bool
    max_pinned_blocks: int
    lookup_wait: float
    pd_wait: float
    drop_blocks: int = 0
    source: str = ""
    push_targets: Collection[str] = ()
    holder: str = ""
    holders: Collection[str] = ()


@dataclass(slots=True)
class ScheduledRequest:
    """A request in a step that has something to save: see `Planner.save_at`."""

    request_id: str
    num_computed_after: int
    hashes: Sequence[bytes]
    block_ids: Sequence[BlockTable]  # by group


@dataclass(slots=True)
class PlannerCounters:
    """Since they were last taken."""

    lookups: int = 0
    lookup_tokens: int = 0  # of all prompts that were looked up
    hit_tokens: int = 0
    dropped_blocks: int = 0  # not saved, as too many were pinned


NO_LIMIT: Final = 1 << 62  # tokens


class TrackedRequest:
    """What the planner knows of one request. Counts of tokens are whole blocks in every group."""

    __slots__ = (
        "asked_at",
        "begin",
        "chain",
        "failures",
        "found",
        "holder",
        "is_counted",
        "is_failed",
        "load_limit",
        "num_tokens",
        "push_to",
        "save_limit",
        "saved",
        "submitted",
        "wants_params",
    )

    def __init__(self, chain: Chain, num_tokens: int, save_limit: int) -> None:
        self.chain = chain
        self.num_tokens = num_tokens  # that it had when it was last looked up; 0: do so anew
        self.save_limit = save_limit  # tokens; none beyond are saved
        self.load_limit = NO_LIMIT  # tokens; none beyond are loaded
        self.found: int | None = None  # tokens that the last lookup found
        self.asked_at = 0.0
        self.begin = 0  # tokens that the engine had when it last asked for a match
        self.submitted = 0  # tokens whose blocks went into saves
        self.saved = 0  # those, or what the lookup found
        self.is_failed = False  # its last load
        self.failures = 0
        self.push_to = ""
        self.holder = ""  # a daemon that was promised to have its blocks
        self.wants_params = False
        self.is_counted = False

"""Continuous batching: which tokens of which sequences run in the next step.

First come, first served. Rules that always hold:
  * a step computes at most `batch_tokens_max` tokens of at most `sequences_max` sequences;
  * every running sequence that can run gets at least one token in each step; the oldest takes what
    is left. One that is loading cannot, nor one that was prefilled elsewhere and still awaits its
    first token from there;
  * when nothing else can run, the oldest of which the first layer has come runs behind its load:
    the forward waits for each layer. So it never keeps the others waiting;
  * when pages run out, the youngest running sequence gives up its pages and is computed (or loaded)
    again later, so the oldest always advances and nothing starves: `add` refuses what could not run
    alone. But when enough pages wait only for a transfer to end, the step goes by without it;
  * everything in `running` came before everything in `waiting`.
No clock and no randomness: the same calls give the same plan. Not thread-safe.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvstore import ConfigError

from .pages import PagePool
from .transfer import KVTransfer, PendingLoad


@dataclass(frozen=True)
class Request:
    """What to generate.

    output_token_ids: tokens that another worker has generated already; a decode worker gets the
    prefill worker's first token here. They count towards max_new_tokens and are not put out again.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    output_token_ids: tuple[int, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class WorkerSettings:
    page_tokens: int = 16
    num_pages: int = 1024
    batch_tokens_max: int = 512
    sequences_max: int = 16
    device: str = "cpu"  # of weights and pool, in torch's words: "cuda", "cuda:1"

    def __post_init__(self) -> None:
        for name in ("page_tokens", "num_pages", "sequences_max"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive")
        if self.batch_tokens_max < self.sequences_max:
            raise ConfigError(
                "batch_tokens_max: must be at least sequences_max, or some would starve"
            )


@dataclass(eq=False)
class Sequence:
    """A request under way. Positions before `computed` have their KV in `pages`."""

    request: Request
    arrival_s: float
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    loading: PendingLoad | None = None
    loading_blocks: int = 0
    awaits_token: bool = False  # prefilled elsewhere; its KV may come before
    cached_tokens: int | None = None  # of the first admission; None before it
    first_token_s: float | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens += [*self.request.prompt_token_ids, *self.request.output_token_ids]

    @property
    def can_run(self) -> bool:
        return self.loading is None and not self.awaits_token

    @property
    def output_count(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


@dataclass(frozen=True)
class Work:
    """Compute `count` tokens of a sequence, from its position `computed` on."""

    sequence: Sequence
    count: int


class Scheduler:
    def __init__(self, settings: WorkerSettings, transfer: KVTransfer) -> None:
        self._settings = settings
        self._transfer = transfer
        self.pages = PagePool(settings.num_pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        longest = len(request.prompt_token_ids) + request.max_new_tokens
        if self._pages_for(longest) > self._settings.num_pages:
            raise ConfigError(
                f"num_pages: {self._settings.num_pages} pages of {self._settings.page_tokens} "
                f"tokens cannot hold request {request.request_id!r} of up to {longest} tokens"
            )
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finished or cancelled: its pages are free after this."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Work]:
        """The next step's work; empty when nothing is left or all that could run is loading."""
        for sequence in self.running:
            if sequence.loading is not None and sequence.loading.done():
                self.finish_load(sequence)
        plan: list[Work] = []
        budget = self._settings.batch_tokens_max
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if not sequence.can_run:
                continue
            younger = sum(other.can_run for other in self.running[index:])
            count = min(len(sequence.tokens) - sequence.computed, budget - younger)
            if self._grow(sequence, sequence.computed + count):
                plan.append(Work(sequence, count))
                budget -= count
        while budget > 0 and self._admit():
            sequence = self.running[-1]
            if sequence.can_run:
                count = min(len(sequence.tokens) - sequence.computed, budget)
                plan.append(Work(sequence, count))
                budget -= count
        return plan or self._behind_a_load()

    def _behind_a_load(self) -> list[Work]:
        for sequence in self.running:
            if sequence.awaits_token or sequence.loading is None:
                continue
            if not sequence.loading.layers_ready():
                continue
            computed = sequence.loading_blocks * self._settings.page_tokens
            left = len(sequence.tokens) - computed
            count = min(left, self._settings.batch_tokens_max)
            if self._pages_for(computed + count) <= len(sequence.pages) + self.pages.pages_free:
                sequence.computed = computed
                self._grow(sequence, computed + count)
                return [Work(sequence, count)]
        return []

    def finish_load(self, sequence: Sequence) -> None:
        """Wait for a sequence's load. What it did not bring is computed."""
        assert sequence.loading is not None
        loaded = sequence.loading.wait()
        sequence.computed = loaded * self._settings.page_tokens
        sequence.loading = None
        if any(map(self.pages.is_held, sequence.pages[loaded : sequence.loading_blocks])):
            # What did not come may still be written: those pages are left to the transfer.
            self.pages.release(sequence.pages[loaded:])
            del sequence.pages[loaded:]
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed

    def _admit(self) -> bool:
        """Move the oldest waiting sequence to `running` if there are pages for all its tokens."""
        if not self.waiting or len(self.running) >= self._settings.sequences_max:
            return False
        sequence = self.waiting[0]
        needed = self._pages_for(len(sequence.tokens))
        if needed > self.pages.pages_free:
            return False
        self.running.append(self.waiting.popleft())
        sequence.pages = self.pages.allocate(needed)
        # One token at least is left to compute: logits come from a forward, not from the cache.
        computable = len(sequence.tokens) - (not sequence.awaits_token)
        blocks_max = computable // self._settings.page_tokens
        request_id = sequence.request.request_id
        blocks = self._transfer.match(request_id, sequence.tokens, blocks_max)
        if blocks:
            sequence.loading_blocks = blocks
            sequence.loading = self._transfer.load(
                request_id, sequence.tokens, sequence.pages[:blocks]
            )
            if sequence.loading.done():
                self.finish_load(sequence)
        elif sequence.cached_tokens is None:
            sequence.cached_tokens = 0
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence pages for `tokens` positions; False if it had to give way itself or has
        to wait for pages that are held."""
        missing = self._pages_for(tokens) - len(sequence.pages)
        if self.pages.pages_free < missing <= self.pages.pages_free + self.pages.pages_held:
            return False
        while missing > self.pages.pages_free:
            victim = self.running.pop()
            self._release(victim)
            victim.preemptions += 1
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages += self.pages.allocate(missing)
        return True

    def _release(self, sequence: Sequence) -> None:
        if sequence.loading is not None:
            sequence.loading.abandon()  # it still writes to the pages, or holds them
            sequence.loading = None
            if sequence.cached_tokens is None:
                sequence.cached_tokens = 0
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.computed = 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._settings.page_tokens)

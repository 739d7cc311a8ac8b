"""One worker of the reference inference server: requests in, tokens out, KV through a KVTransfer.

The same class prefills, decodes, or does both. Disaggregated: the prefill worker gets the request
with max_new_tokens=1, saves its full blocks and puts out the first token; the decode worker gets
the request with that token in output_token_ids, loads the blocks, computes the prompt's tail, and
goes on.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvstore import ConfigError

from .checkpoint import Checkpoint
from .model import Bytes, Chunk, Model, new_bytes, new_pool
from .sampling import sample
from .scheduler import Request, Scheduler, Sequence, Work, WorkerSettings
from .transfer import BlockSave, KVTransfer, NoTransfer


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class RequestMetrics:
    """Times are of the worker's clock, in seconds."""

    arrival_s: float
    first_token_s: float  # the first one that this worker put out
    finish_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int  # came from the store when the request first started
    preemptions: int


@dataclass(frozen=True)
class Output:
    """One new token. The last one of a request carries why it ended, and its metrics."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    metrics: RequestMetrics | None = None


class _LayerMissingError(Exception):
    """A load that a forward ran behind has failed."""


class ReferenceWorker:
    """Call `step` while `has_work`; after one that stalled, when there is news. Not thread-safe.

    `allocate` gives the KV pool's memory where that is the CPU's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: WorkerSettings | None = None,
        transfer: KVTransfer | None = None,
        clock: Callable[[], float] = time.monotonic,
        allocate: Callable[[int], Bytes] = new_bytes,
    ) -> None:
        self._settings = settings or WorkerSettings()
        self._transfer = transfer or NoTransfer()
        self._clock = clock
        settings = self._settings
        sizes = (settings.num_pages, settings.page_tokens)
        pool = new_pool(checkpoint.config, *sizes, allocate, settings.device)
        self._model = Model(checkpoint.on(settings.device), pool)
        self._scheduler = Scheduler(self._settings, self._transfer)
        self._sequences: dict[str, Sequence] = {}
        self._transfer.attach(pool, self._scheduler.pages)
        self.is_stalled = False  # the last step had nothing to compute

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def pages_free(self) -> int:
        return self._scheduler.pages.pages_free

    def add_request(self, request: Request, *, awaits_token: bool = False) -> None:
        """`awaits_token`: it is prefilled elsewhere, and goes on by `continue_request`."""
        self._check(request)
        sequence = Sequence(request, self._clock(), awaits_token=awaits_token)
        self._scheduler.add(sequence)
        self._sequences[request.request_id] = sequence

    def continue_request(self, request: Request) -> bool:
        """What was added to await its token has it: the same request, with the token. False: there
        is no such request."""
        sequence = self._sequences.get(request.request_id)
        if sequence is None or not sequence.awaits_token:
            return False
        sequence.request = request
        sequence.tokens += request.output_token_ids
        sequence.awaits_token = False
        return True

    def cancel(self, request_id: str) -> None:
        """Drop a request; one that is unknown or has finished is ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def step(self) -> list[Output]:
        """Compute one batch and return the new tokens: none, maybe, while prompts are prefilled."""
        self._transfer.poll()
        plan = self._scheduler.schedule()
        if not plan:
            plan = self._wait_for_a_load()
        self.is_stalled = not plan
        logits = self._compute(plan) if plan else None
        if logits is None:
            return []
        outputs = []
        for row, work in enumerate(plan):
            sequence, request = work.sequence, work.sequence.request
            sequence.computed += work.count
            position = len(sequence.tokens)
            if sequence.computed == position:
                token = sample(logits[row], request.temperature, request.seed, position)
                outputs.append(self._put_out(sequence, token))
        return outputs

    def _wait_for_a_load(self) -> list[Work]:
        """Wait for the oldest sequence that has nothing else to wait for."""
        for sequence in self._scheduler.running:
            if sequence.loading is not None and not sequence.awaits_token:
                if not sequence.loading.wait_layer(0):
                    self._scheduler.finish_load(sequence)
                return self._scheduler.schedule()
        return []

    def _compute(self, plan: list[Work]) -> Tensor | None:
        """The logits; None when a layer did not come that this ran behind."""
        saves = [save for work in plan for save in self._completed_blocks(work)]
        chunks = [_chunk(work) for work in plan]
        behind = [work.sequence for work in plan if work.sequence.loading is not None]

        def before_layer(layer: int) -> None:
            for sequence in behind:
                if sequence.loading is not None and not sequence.loading.wait_layer(layer):
                    raise _LayerMissingError

        if saves:
            self._transfer.begin_save(saves)
        try:
            on_layer = self._transfer.save_layer if saves else None
            logits = self._model.forward(chunks, on_layer, before_layer)
        except _LayerMissingError:
            if saves:
                self._transfer.abort_save()
            logits = None
        else:
            if saves:
                self._transfer.end_save()
        for sequence in behind:
            self._scheduler.finish_load(sequence)
        return logits

    def _check(self, request: Request) -> None:
        config = self._model.config
        tokens = request.prompt_token_ids + request.output_token_ids
        if request.request_id in self._sequences:
            raise ConfigError(f"request_id: {request.request_id!r} is already running")
        if not request.prompt_token_ids:
            raise ConfigError("prompt_token_ids: empty")
        if not all(0 <= token < config.vocab_size for token in tokens):
            raise ConfigError(f"prompt_token_ids: not all in 0..{config.vocab_size - 1}")
        if request.max_new_tokens <= len(request.output_token_ids):
            raise ConfigError(
                f"max_new_tokens: {request.max_new_tokens} leaves nothing to generate"
            )
        if len(request.prompt_token_ids) + request.max_new_tokens > config.positions_max:
            raise ConfigError(f"max_new_tokens: the model has {config.positions_max} positions")
        if not request.temperature >= 0 or not 0 <= request.seed < 1 << 32:
            raise ConfigError("temperature: must not be negative; seed: must fit 32 bits")

    def _completed_blocks(self, work: Work) -> list[BlockSave]:
        sequence, page_tokens = work.sequence, self._settings.page_tokens
        first = sequence.computed // page_tokens
        end = (sequence.computed + work.count) // page_tokens
        if first == end:
            return []
        tokens = sequence.tokens[: end * page_tokens]
        pages = sequence.pages[first:end]
        return [BlockSave(sequence.request.request_id, tokens, first, pages)]

    def _put_out(self, sequence: Sequence, token: int) -> Output:
        request = sequence.request
        sequence.tokens.append(token)
        if sequence.first_token_s is None:
            sequence.first_token_s = self._clock()
        if token in request.stop_token_ids:
            reason = FinishReason.STOP
        elif sequence.output_count >= request.max_new_tokens:
            reason = FinishReason.LENGTH
        else:
            return Output(request.request_id, token)
        self._scheduler.remove(sequence)
        del self._sequences[request.request_id]
        metrics = RequestMetrics(
            arrival_s=sequence.arrival_s,
            first_token_s=sequence.first_token_s,
            finish_s=self._clock(),
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=sequence.output_count,
            cached_tokens=sequence.cached_tokens or 0,
            preemptions=sequence.preemptions,
        )
        return Output(request.request_id, token, reason, metrics)


def _chunk(work: Work) -> Chunk:
    sequence = work.sequence
    tokens = sequence.tokens[sequence.computed : sequence.computed + work.count]
    return Chunk(tokens, sequence.computed, sequence.pages)

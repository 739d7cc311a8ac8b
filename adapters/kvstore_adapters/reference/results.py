"""What a cluster is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.transport.handoff import HandoffCounters

from .counters import TransferCounters


@dataclass(frozen=True)
class Prompt:
    request_id: str
    token_ids: list[int]
    max_new_tokens: int


@dataclass
class RequestResult:
    """Times are seconds since the request was submitted."""

    request_id: str
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    submitted_s: float = 0.0  # since the run began
    latency_s: float = 0.0
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int = 0
    retries: int = 0
    recomputes: int = 0  # of its prompt, in whole or in part, because of a worker or link that died
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] if self.token_times_s else float("nan")

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first; the hand-over to the decode worker is in it."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else float("nan")


@dataclass
class RunResult:
    """Requests in the order of completion, and what moved while they ran."""

    requests: list[RequestResult]
    wall_s: float
    prefill: TransferCounters
    decode: TransferCounters
    store: dict[str, float]  # change of the store's counters; empty without one
    handoff: HandoffCounters = field(default_factory=HandoffCounters)

"""`kvstore demo --transport ...`: KV handed off from prefill to decode workers, on one host or two.

The same requests colocated, then with a hand-off by push and by pull, and, when asked for, once
more each with the first prefill worker killed as soon as the first layer of its first hand-off has
gone. Tokens must be the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore import ConfigError
from kvstore.bench.report import commit, machine
from kvstore.transport.handoff import HandoffCounters, Ready

from . import tokenizer as tokenizers
from .cluster_settings import ClusterSettings, Mode
from .demo_report import DemoRun, figure, mebibytes, number, run_figures, tokens_identical
from .messages import ModelSource, Relay
from .pd import Cluster
from .results import Prompt, RequestResult
from .scheduler import WorkerSettings
from .worker_handle import WorkerProcess
from .workload import make_sessions

if TYPE_CHECKING:
    from rich.console import Group

DIRECTIONS = ("push", "pull")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HandoffDemoSettings:
    """`directions`: of "push" and "pull", those to show."""

    model: ModelSource
    transport: str = "auto"
    hosts: int = 1
    directions: tuple[str, ...] = DIRECTIONS
    kill_prefill: bool = False
    num_requests: int = 10
    prefill_workers: int = 1
    decode_workers: int = 1
    max_new_tokens: int = 16
    document_tokens: int | None = None
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("num_requests", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive")
        if self.max_new_tokens < 2:
            raise ConfigError("max_new_tokens: of one token nothing is handed off")
        for direction in self.directions:
            if direction not in DIRECTIONS:
                raise ConfigError(f"handoff: {direction!r} is not push, pull or both")
            self.cluster(Mode.PD, direction, WorkerSettings())

    def cluster(
        self, mode: Mode, direction: str = "store", worker: WorkerSettings | None = None
    ) -> ClusterSettings:
        return ClusterSettings(
            mode,
            self.model,
            self.prefill_workers,
            self.decode_workers,
            worker or WorkerSettings(),
            handoff=direction,
            transport=self.transport,
            hosts=1 if mode is Mode.COLOCATED else self.hosts,
            start_timeout_s=self.start_timeout_s,
            request_timeout_s=300.0,
        )

    @property
    def num_runs(self) -> int:
        return 1 + len(self.directions) * (1 + self.kill_prefill)


@dataclass(frozen=True)
class HandoffRun:
    """A run, and the bytes that went over the cable from the prefill workers' host; None: there was
    one host."""

    run: DemoRun
    cable_bytes: int | None = None

    @property
    def handoff(self) -> HandoffCounters:
        return self.run.result.handoff

    @property
    def tail_ms(self) -> float:
        """What a decode worker waited for KV after its last layer was computed, on average."""
        return self.handoff.tail_seconds * 1e3 / max(1, self.handoff.received)

    @property
    def overlap(self) -> float:
        """The part of the bytes that had arrived when the last layer was computed."""
        return self.handoff.early_bytes / max(1, self.handoff.received_bytes)

    @property
    def recomputes(self) -> int:
        return sum(request.recomputes for request in self.run.result.requests)


def run_handoff_demo(
    settings: HandoffDemoSettings, on_progress: Progress = lambda *_: None
) -> list[HandoffRun]:
    """All runs, in order. `on_progress(run, done, total)` is called as requests finish.

    Raises:
        KVStoreError: workers or hosts could not be started. Single requests that fail do not raise.
    """
    directory = settings.model.directory
    tokenizer = tokenizers.load(Path(directory) if directory is not None else None)
    sessions = make_sessions(
        tokenizer, settings.num_requests, settings.max_new_tokens, settings.document_tokens
    )
    longest = [max(len(p.token_ids) + p.max_new_tokens for p in s) for s in sessions]
    page_tokens = WorkerSettings().page_tokens
    # Room for the longest request of every session, and for one that is still being handed off.
    pages = 2 * sum(-(-tokens // page_tokens) for tokens in longest)
    worker = WorkerSettings(num_pages=pages, sequences_max=max(16, len(sessions)))
    runs: list[HandoffRun] = []
    total = settings.num_runs * settings.num_requests

    def run(name: str, cluster: Cluster) -> None:
        done = len(runs) * settings.num_requests
        on_progress(name, done, total)

        def finished(_: RequestResult) -> None:
            nonlocal done
            done += 1
            on_progress(name, done, total)

        runs.append(_run(name, cluster, sessions, finished))

    with Cluster(settings.cluster(Mode.COLOCATED, worker=worker)) as colocated:
        run("colocated", colocated)
    for direction in settings.directions:
        with Cluster(settings.cluster(Mode.PD, direction, worker)) as cluster:
            run(direction, cluster)
            if settings.kill_prefill:
                cluster.on_relay = _kill_once
                run(f"{direction}, killed", cluster)
    return runs


def _run(
    name: str,
    cluster: Cluster,
    sessions: list[list[Prompt]],
    finished: Callable[[RequestResult], None],
) -> HandoffRun:
    source = cluster.hosts.a if cluster.hosts is not None else None
    before = source.sent_bytes() if source is not None else 0
    result = cluster.run(sessions, finished)
    sent = source.sent_bytes() - before if source is not None else None
    return HandoffRun(DemoRun(name, cluster.settings.mode, result), sent)


def _kill_once(source: WorkerProcess, relay: Relay) -> bool:
    """Kill the first worker that says that a layer is there. What it said after that, and may be
    on its way already, is lost: so it always dies in mid-transfer."""
    if isinstance(relay.message, Ready) and source.index == 0:
        source.process.kill()
        source.process.wait()
    return source.process.returncode is None


def handoff_report(settings: HandoffDemoSettings, runs: list[HandoffRun]) -> dict[str, Any]:
    identical = tokens_identical([each.run for each in runs])
    handed = [each for each in runs[1:] if not each.recomputes]
    moved = HandoffCounters()
    for each in runs:
        moved += each.handoff
    colocated = runs[0].run
    figures = [figure("tokens_identical", identical, "bool")]
    for mover, count in sorted(moved.moved_bytes.items()):
        figures.append(figure(f"bytes_moved_{mover}", count, "bytes"))
    for each in handed:
        name = each.run.name
        figures += [
            figure(f"handoff_tail_{name}_ms", each.tail_ms, "ms"),
            figure(f"overlap_{name}", each.overlap, "ratio"),
            figure(f"ttft_{name}_ms", each.run.ttft_ms, "ms", colocated.ttft_ms, "colocated"),
            figure(f"tpot_{name}_ms", each.run.tpot_ms, "ms", colocated.tpot_ms, "colocated"),
        ]
    return {
        "commit": commit(),
        "machine": machine(),
        "figures": figures,
        "tokens_identical": identical,
        "transport": settings.transport,
        "hosts": settings.hosts,
        "bytes_moved": moved.moved_bytes,
        "recomputes": sum(each.recomputes for each in runs),
        "runs": [_figures_of(each) for each in runs],
    }


def _figures_of(each: HandoffRun) -> dict[str, Any]:
    handoff = each.handoff
    return run_figures(each.run) | {
        "handoffs": handoff.received,
        "handoffs_failed": handoff.receive_failures,
        "handoff_bytes": handoff.received_bytes,
        "bytes_moved": handoff.moved_bytes,
        "cable_bytes": each.cable_bytes,
        "handoff_tail_ms": number(each.tail_ms),
        "overlap": number(each.overlap),
        "recomputes": each.recomputes,
    }


def handoff_table(runs: list[HandoffRun], result: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = "Means, times in ms; tail: what was waited for KV after the prefill"
    shown = Table(title=title)
    for header in (
        "run",
        "TTFT",
        "TPOT",
        "tail",
        "overlap",
        "MiB",
        "by",
        "cable MiB",
        "recomputed",
    ):
        shown.add_column(header, justify="left" if header in ("run", "by") else "right")
    for each in runs:
        has = each.handoff.received > 0
        shown.add_row(
            each.run.name,
            f"{each.run.ttft_ms:.1f}",
            f"{each.run.tpot_ms:.1f}",
            f"{each.tail_ms:.1f}" if has else "",
            f"{each.overlap:.0%}" if has else "",
            mebibytes(each.handoff.received_bytes) if has else "",
            ", ".join(sorted(each.handoff.moved_bytes)),
            mebibytes(each.cable_bytes) if each.cable_bytes is not None else "",
            str(each.recomputes) if each.recomputes else "",
        )
    same = result["tokens_identical"]
    text = f"tokens identical in all {len(runs)} runs: {'yes' if same else 'NO'}"
    return Group(shown, Text(text, style="green" if same else "bold red"))

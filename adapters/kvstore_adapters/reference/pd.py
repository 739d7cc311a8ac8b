"""Prefill and decode workers as processes, and the router that owns their store.

    colocated  each worker prefills and decodes; no store
    pd         prefill workers put a prompt's KV in the store, decode workers go on from there; no
               request reuses what was computed for another
    pd+cache   the same, and prefill workers load what is in the store already

With a hand-off by push or pull, KV goes from pool to pool instead (`kvstore.transport.handoff`):
the router tells a decode worker of a request when a prefill worker gets it, and passes on what the
two say to each other; only pd+cache has a store then, for the prefill workers.

Workers connect to a daemon (`address`), or the router opens a store and shares its tiers with them
(`kvstore.share`). Tokens and metrics go over a socket to each. The router needs no torch.

What holds: a request ends by its deadline, with its tokens or with an error that says why. A worker
that dies or hangs is given up, and what it had is tried again on another one, of its role while one
is left, else of any; decoding goes on behind the tokens that were put out already.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvstore import ConfigError, KVStoreError, Store

from .cluster_counting import ask, what_moved
from .cluster_settings import ClusterSettings, Mode
from .cluster_store import open_hosts, open_store
from .messages import (
    Attach,
    Attached,
    Cancel,
    Counters,
    Failed,
    FromWorker,
    NewToken,
    PeerLost,
    Prepare,
    Ready,
    Refused,
    Relay,
    Setup,
    Submit,
    Tokens,
)
from .results import Prompt, RequestResult, RunResult
from .routes import Job, Routes
from .worker_handle import Role, WorkerProcess

if TYPE_CHECKING:
    from kvstore.bench.two_hosts import TwoHosts

ATTEMPTS_MAX = 3  # of one request in one stage; a request that kills its worker stops here


class WorkerError(KVStoreError):
    """Workers could not be started, or none is left."""


class Cluster:
    """Workers and their store. Use it as a context manager. Not thread-safe.

    Raises (on entering):
        WorkerError: a worker did not start in time; with the reason that it gave.
        ConfigError: the same, because of a wrong setting.
        KVStoreError: the store cannot be opened.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.workers: list[WorkerProcess] = []
        self.store: Store | None = None
        self.hosts: TwoHosts | None = None
        self.model: Ready
        # Sees what hand-offs say before it is passed on; False: it is lost.
        self.on_relay: Callable[[WorkerProcess, Relay], bool] = lambda source, relay: True
        self._routes = Routes()
        self._stack = ExitStack()
        self._selector = selectors.DefaultSelector()
        self._jobs: dict[str, Job] = {}
        self._finished: list[RequestResult] = []
        self._on_finish: Callable[[RequestResult], None] = lambda result: None
        self._began_s = 0.0

    # --- starting and ending

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        settings = self.settings
        self._stack.callback(self._selector.close)
        self.hosts = open_hosts(settings, self._stack)
        hosts = self.hosts.hosts if self.hosts is not None else None
        for index, role in enumerate(settings.roles()):
            host = hosts[role is Role.DECODE] if hosts else None
            worker = WorkerProcess(role, index, *([host.command] if host else []))
            self.workers.append(worker)
            self._stack.callback(worker.close)
            self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        for worker in self.workers:
            worker.send(Setup(settings.model, settings.worker, settings.revision))
        self.model = self._gather(Ready)[0]
        address = None
        if settings.has_store:
            self.store, address = open_store(settings, self.model, self._stack)
        for worker in self.workers:
            is_decode = worker.role is Role.DECODE
            reads = settings.mode is Mode.PD_CACHE or is_decode
            setup = settings.handoff_setup(hosts[is_decode].address if hosts else "127.0.0.1")
            near = None if hosts and is_decode else address
            worker.send(Attach(near, setup, read=reads, layerwise=settings.layerwise))
        self._gather(Attached)

    def _gather(self, kind: type[Any]) -> list[Any]:
        """One message of this kind from every worker."""
        deadline = time.monotonic() + self.settings.start_timeout_s
        waiting, replies = {id(worker): worker for worker in self.workers}, []
        while waiting:
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                late = next(iter(waiting.values()))
                raise WorkerError(
                    f"{late.name} did not start within {self.settings.start_timeout_s:g} s: "
                    + late.last_words()
                )
            for key, _ in ready:
                worker: WorkerProcess = key.data
                messages = worker.receive()
                if messages is None:
                    raise WorkerError(f"{worker.name} ended while starting: {worker.last_words()}")
                for message in messages:
                    if isinstance(message, Failed):
                        kind_of_error = ConfigError if message.wrong_setting else WorkerError
                        raise kind_of_error(f"{worker.name}: {message.reason}")
                    assert isinstance(message, kind), message
                    replies.append(message)
                    waiting.pop(id(worker), None)
        return replies

    # --- running

    def run(
        self,
        sessions: Sequence[Sequence[Prompt]],
        on_finish: Callable[[RequestResult], None] | None = None,
    ) -> RunResult:
        """Run sessions beside one another, the requests of each one after the other.

        A request that fails carries its error; the rest of its session runs all the same.
        """
        assert not self._jobs, "one run at a time"
        self._on_finish = on_finish or (lambda result: None)
        self._finished = []
        before, stored = self._counters(), self._store_counters()
        self._began_s = time.monotonic()
        for session in sessions:
            self._next_of(list(session))
        while self._jobs:
            self._step()
        wall_s = time.monotonic() - self._began_s
        prefill, decode, handoff = what_moved(before, self._counters())
        store = {name: n - stored.get(name, 0) for name, n in self._store_counters().items()}
        return RunResult(self._finished, wall_s, prefill, decode, store, handoff)

    def _step(self) -> None:
        """Handle what arrives until the next deadline."""
        deadline = min(job.deadline_s for job in self._jobs.values())
        for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
            worker: WorkerProcess = key.data
            messages = worker.receive()
            if messages is None:
                self._lose(worker)
                continue
            for message in messages:
                self._handle(worker, message)
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.deadline_s <= now]:
            if self._jobs.get(job.prompt.request_id) is job:  # one that timed out may end others
                self._time_out(job)

    def _handle(self, worker: WorkerProcess, message: FromWorker) -> None:
        if isinstance(message, Tokens):
            for token in message.tokens:
                job = worker.jobs.get(token.request_id)
                if job is not None:  # else it was cancelled meanwhile
                    self._take_token(job, token, message.at_s)
        elif isinstance(message, Relay):
            self._pass_on(worker, message)
        elif isinstance(message, Refused):
            job = worker.jobs.get(message.request_id)
            if job is not None:
                self._finish(job, message.reason)

    def _pass_on(self, source: WorkerProcess, relay: Relay) -> None:
        if not self.on_relay(source, relay):
            return
        target = self._routes.target(source, relay)
        if target is not None and target.alive and not target.send(relay):
            self._lose(target)

    def _take_token(self, job: Job, token: NewToken, at_s: float) -> None:
        result = job.result
        result.token_ids.append(token.token_id)
        result.token_times_s.append(at_s - job.submitted_s)
        if token.finish_reason is None:
            return
        if job.role is Role.DECODE:
            result.decode_cached_tokens = token.cached_tokens
            if self.settings.hands_off:
                whole = result.prompt_tokens - result.prompt_tokens % self.model.block_tokens
                result.recomputes += token.cached_tokens < whole
        else:
            result.prefill_cached_tokens = token.cached_tokens
        more = len(result.token_ids) < job.prompt.max_new_tokens
        if job.role is Role.PREFILL and token.finish_reason == "length" and more:
            self._detach(job)
            job.role, job.attempts = Role.DECODE, 0
            self._dispatch(job)
        else:
            self._finish(job, None)

    def _next_of(self, session: list[Prompt]) -> None:
        """Submit the session's first prompt."""
        if not session:
            return
        prompt, now = session.pop(0), time.monotonic()
        assert prompt.request_id not in self._jobs, prompt.request_id
        job = Job(
            prompt,
            RequestResult(
                prompt.request_id, len(prompt.token_ids), submitted_s=now - self._began_s
            ),
            Role.BOTH if self.settings.mode is Mode.COLOCATED else Role.PREFILL,
            session,
            submitted_s=now,
            deadline_s=now + self.settings.request_timeout_s,
        )
        self._jobs[prompt.request_id] = job
        self._dispatch(job)

    def _dispatch(self, job: Job) -> None:
        """Give the job to the least loaded worker of its role, or of any if none is left."""
        alive = [worker for worker in self.workers if worker.alive]
        if not alive:
            self._finish(job, "no worker is left")
            return
        if job.attempts >= ATTEMPTS_MAX:
            self._finish(job, f"{ATTEMPTS_MAX} workers died or hung over it")
            return
        fitting = [worker for worker in alive if worker.role is job.role] or alive
        worker = min(fitting, key=_load_of)
        if job.role is Role.DECODE and job.receiver is not None:
            worker = job.receiver
            self._unprepare(job)
        if job.role is Role.PREFILL and self.settings.hands_off and worker.role is Role.DECODE:
            job.role = Role.BOTH  # no prefill worker is left, and it would not hand off to itself
        job.attempts += 1
        job.worker, job.dispatched_s = worker, time.monotonic()
        worker.jobs[job.prompt.request_id] = job
        submit = Submit(
            send_as=self._prepare(job, worker),
            request_id=job.prompt.request_id,
            prompt_token_ids=job.prompt.token_ids,
            max_new_tokens=1 if job.role is Role.PREFILL else job.prompt.max_new_tokens,
            output_token_ids=job.result.token_ids,
            stop_token_ids=self.model.end_token_ids,
        )
        if not worker.send(submit):
            self._lose(worker)

    def _prepare(self, job: Job, sender: WorkerProcess) -> str:
        """Let a decode worker receive what the sender will compute; the name of that hand-off, or
        empty where there is none."""
        prompt, name = job.prompt, ""
        blocks = len(prompt.token_ids) // self.model.block_tokens
        if job.role is not Role.PREFILL or not self.settings.hands_off or not blocks:
            return name
        receivers = [w for w in self.workers if w.alive and w.role is Role.DECODE]
        while receivers and not name and prompt.max_new_tokens > 1:
            receiver = min(receivers, key=_load_of)
            receivers.remove(receiver)
            name = self._routes.open(prompt.request_id, sender, receiver)
            job.receiver = receiver
            receiver.prepared[prompt.request_id] = job
            prepare = Prepare(prompt.request_id, prompt.token_ids, prompt.max_new_tokens, name)
            if not receiver.send(prepare):
                self._lose(receiver)
                name = ""
        return name

    def _unprepare(self, job: Job, *, tell: bool = False) -> None:
        receiver, job.receiver = job.receiver, None
        if receiver is not None:
            receiver.prepared.pop(job.prompt.request_id, None)
            if tell and receiver.alive and not receiver.send(Cancel(job.prompt.request_id)):
                self._lose(receiver)

    def _detach(self, job: Job) -> None:
        if job.worker is not None:
            job.worker.jobs.pop(job.prompt.request_id, None)
            job.worker = None

    def _finish(self, job: Job, error: str | None) -> None:
        self._detach(job)
        self._unprepare(job, tell=True)
        del self._jobs[job.prompt.request_id]
        job.result.error = error
        job.result.latency_s = time.monotonic() - job.submitted_s
        self._finished.append(job.result)
        self._on_finish(job.result)
        self._next_of(job.session)

    def _lose(self, worker: WorkerProcess) -> None:
        """The worker is dead or hung: its requests go elsewhere."""
        if not worker.alive:
            return
        is_dead = worker.give_up()
        self._selector.unregister(worker.connection)
        for handoff_id, other in self._routes.lose(worker):
            # Of one that may still live nothing is said: it may still write.
            if is_dead and other.alive and not other.send(PeerLost(handoff_id)):
                self._lose(other)
        for job in list(worker.prepared.values()):
            self._unprepare(job)
        for job in list(worker.jobs.values()):
            self._detach(job)
            self._unprepare(job, tell=True)
            job.result.retries += 1
            job.result.recomputes += job.role is not Role.DECODE
            self._dispatch(job)

    def _time_out(self, job: Job) -> None:
        worker = job.worker
        self._finish(job, f"not done within {self.settings.request_timeout_s:g} s")
        if worker is None or not worker.alive:
            return
        # Nothing was heard since it got the request, half a deadline ago or more: it is hung. One
        # that got the request late, from a worker that was lost, may just be busy.
        long_ago = time.monotonic() - self.settings.request_timeout_s / 2
        hung = max(worker.heard_s, job.dispatched_s) < long_ago
        if hung or not worker.send(Cancel(job.prompt.request_id)):
            self._lose(worker)

    # --- counting

    def _counters(self) -> dict[WorkerProcess, Counters]:
        return ask(self.workers, self._selector, self._pass_on, self._lose)

    def wait_for_store(self, timeout: float) -> bool:
        """Wait until every worker reaches the store; return whether they all do.

        Between runs only: tokens that arrive meanwhile are lost.
        """
        deadline = time.monotonic() + timeout
        while True:
            reports = self._counters().values()
            if reports and all(report.reaches_store for report in reports):
                return True
            if not reports or time.monotonic() > deadline:
                return False
            time.sleep(0.05)

    def kill_workers(self) -> None:
        """SIGKILL to every worker: an engine that crashes. Nothing can be run afterwards."""
        for worker in self.workers:
            worker.give_up()

    def _store_counters(self) -> dict[str, float]:
        if self.store is None:
            return {}
        stats = self.store.stats()
        return {name: value for name, value in stats.items() if name.endswith("_total")}


def _load_of(worker: WorkerProcess) -> int:
    return len(worker.jobs) + len(worker.prepared)

"""Prefill and decode workers as processes, and the router that owns their store.

    colocated  each worker prefills and decodes; no store
    pd         prefill workers put a prompt's KV in the store, decode workers go on from there; no
               request reuses what was computed for another
    pd+cache   the same, and prefill workers load what is in the store already

Workers connect to a daemon (`address`), or the router opens a store and shares its tiers with them
(`kvstore.share`). Tokens and metrics go over a socket to each. The router needs no torch.

What holds: a request ends by its deadline, with its tokens or with an error that says why. A worker
that dies or hangs is given up, and what it had is tried again on another one, of its role while one
is left, else of any; decoding goes on behind the tokens that were put out already.
"""

from __future__ import annotations

import enum
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any

import kvstore
from kvstore import BlockSpec, ConfigError, IncompatibleError, KVStoreError, Namespace, Store

from .counters import TransferCounters
from .messages import (
    Attach,
    Attached,
    Cancel,
    Counters,
    Failed,
    Frames,
    FromWorker,
    ModelSource,
    NewToken,
    Ready,
    Refused,
    Report,
    Setup,
    Submit,
    Tokens,
    ToWorker,
    frame,
)
from .scheduler import WorkerSettings

ATTEMPTS_MAX = 3  # of one request in one stage; a request that kills its worker stops here
SEND_SECONDS_MAX = 10.0  # a worker that does not read for so long is hung


class Mode(enum.Enum):
    COLOCATED = "colocated"
    PD = "pd"
    PD_CACHE = "pd+cache"


class Role(enum.Enum):
    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class WorkerError(KVStoreError):
    """Workers could not be started, or none is left."""


@dataclass(frozen=True)
class ClusterSettings:
    """Colocated, as many workers run as with PD.

    `address` is a daemon's; without one, `store` are settings of `kvstore.open`. `revision` sets
    this cluster's blocks apart from those of the same model that others put there.
    """

    mode: Mode
    model: ModelSource = field(default_factory=ModelSource)
    prefill_workers: int = 1
    decode_workers: int = 1
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    store: dict[str, str] = field(default_factory=lambda: {"cpu": "256MiB"})
    address: str = ""
    revision: str = ""
    layerwise: bool = False
    start_timeout_s: float = 120.0
    request_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("prefill_workers", "decode_workers"):
            if not 1 <= getattr(self, name) <= 64:
                raise ConfigError(f"{name}: {getattr(self, name)} is not between 1 and 64")

    def roles(self) -> list[Role]:
        if self.mode is Mode.COLOCATED:
            return [Role.BOTH] * (self.prefill_workers + self.decode_workers)
        return [Role.PREFILL] * self.prefill_workers + [Role.DECODE] * self.decode_workers


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


def child_command(module: str, fd: int) -> list[str]:
    """What runs `main` of a module beside this one in a new process, with `fd` as its argument.

    It looks for modules where this process does, so both run the same code however this one found
    it.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.{module} import main; main()"
    )
    return [sys.executable, "-c", code, str(fd)]


class WorkerProcess:
    """One worker as the router sees it."""

    def __init__(self, role: Role, index: int) -> None:
        self.role = role
        self.name = f"worker {index}" if role is Role.BOTH else f"{role.value} worker {index}"
        self.jobs: dict[str, _Job] = {}
        self.alive = True
        self.heard_s = time.monotonic()
        self._frames: Frames[FromWorker] = Frames(FromWorker)
        # A file and not a pipe: nobody has to read it for the worker to go on.
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                child_command("worker_process", theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                start_new_session=True,  # an interrupt is for the router, which ends the workers
            )
        self.connection.settimeout(SEND_SECONDS_MAX)

    def send(self, message: ToWorker) -> bool:
        """False when the worker is gone or hung."""
        try:
            self.connection.sendall(frame(message))
        except OSError:
            return False
        return True

    def receive(self) -> list[FromWorker] | None:
        """What has arrived; None when the worker is gone or talks nonsense."""
        self.heard_s = time.monotonic()
        try:
            return self._frames.receive(self.connection)
        except (OSError, IncompatibleError):
            return None

    def give_up(self) -> None:
        self.alive = False
        self.process.kill()

    def last_words(self) -> str:
        """The last line that it wrote, for error messages."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it wrote no message"

    def close(self) -> None:
        """The end of the socket tells the worker to stop; one that does not is killed."""
        self.connection.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stderr.close()


@dataclass(eq=False)
class _Job:
    prompt: Prompt
    result: RequestResult
    role: Role
    session: list[Prompt]  # what comes after it
    submitted_s: float
    deadline_s: float
    attempts: int = 0
    worker: WorkerProcess | None = None
    dispatched_s: float = 0.0


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
        self.model: Ready
        self._stack = ExitStack()
        self._selector = selectors.DefaultSelector()
        self._jobs: dict[str, _Job] = {}
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
        for index, role in enumerate(settings.roles()):
            worker = WorkerProcess(role, index)
            self.workers.append(worker)
            self._stack.callback(worker.close)
            self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        for worker in self.workers:
            worker.send(Setup(settings.model, settings.worker, settings.revision))
        self.model = self._gather(Ready)[0]
        address = None
        if settings.mode is not Mode.COLOCATED:
            address = self._open_store()
        for worker in self.workers:
            reads = settings.mode is Mode.PD_CACHE or worker.role is Role.DECODE
            worker.send(Attach(address, read=reads, layerwise=settings.layerwise))
        self._gather(Attached)

    def _open_store(self) -> str:
        model = self.model
        spec = BlockSpec(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_tokens=model.block_tokens,
            dtype=model.dtype,
        )
        namespace = Namespace(model=model.model, spec=spec, revision=model.revision)
        if self.settings.address:
            self.store = kvstore.connect(self.settings.address, namespace)
            self._stack.callback(self.store.close)
            return self.settings.address
        store: dict[str, Any] = dict(self.settings.store)
        self.store = kvstore.open(namespace, **store)
        self._stack.callback(self.store.close)
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-"))
        address = f"unix:{folder}/store.sock"
        self._stack.enter_context(kvstore.share(self.store, address))
        return address

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
        before = self._counters(), self._store_counters()
        self._began_s = time.monotonic()
        for session in sessions:
            self._next_of(list(session))
        while self._jobs:
            self._step()
        wall_s = time.monotonic() - self._began_s
        after = self._counters(), self._store_counters()
        return RunResult(
            self._finished,
            wall_s,
            prefill=after[0][0] - before[0][0],
            decode=after[0][1] - before[0][1],
            store={name: value - before[1].get(name, 0) for name, value in after[1].items()},
        )

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
        elif isinstance(message, Refused):
            job = worker.jobs.get(message.request_id)
            if job is not None:
                self._finish(job, message.reason)

    def _take_token(self, job: _Job, token: NewToken, at_s: float) -> None:
        result = job.result
        result.token_ids.append(token.token_id)
        result.token_times_s.append(at_s - job.submitted_s)
        if token.finish_reason is None:
            return
        if job.role is Role.DECODE:
            result.decode_cached_tokens = token.cached_tokens
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
        job = _Job(
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

    def _dispatch(self, job: _Job) -> None:
        """Give the job to the least loaded worker of its role, or of any if none is left."""
        alive = [worker for worker in self.workers if worker.alive]
        if not alive:
            self._finish(job, "no worker is left")
            return
        if job.attempts >= ATTEMPTS_MAX:
            self._finish(job, f"{ATTEMPTS_MAX} workers died or hung over it")
            return
        fitting = [worker for worker in alive if worker.role is job.role] or alive
        worker = min(fitting, key=lambda worker: len(worker.jobs))
        job.attempts += 1
        job.worker, job.dispatched_s = worker, time.monotonic()
        worker.jobs[job.prompt.request_id] = job
        submit = Submit(
            request_id=job.prompt.request_id,
            prompt_token_ids=job.prompt.token_ids,
            max_new_tokens=1 if job.role is Role.PREFILL else job.prompt.max_new_tokens,
            output_token_ids=job.result.token_ids,
            stop_token_ids=self.model.end_token_ids,
        )
        if not worker.send(submit):
            self._lose(worker)

    def _detach(self, job: _Job) -> None:
        if job.worker is not None:
            job.worker.jobs.pop(job.prompt.request_id, None)
            job.worker = None

    def _finish(self, job: _Job, error: str | None) -> None:
        self._detach(job)
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
        worker.give_up()
        self._selector.unregister(worker.connection)
        for job in list(worker.jobs.values()):
            self._detach(job)
            job.result.retries += 1
            self._dispatch(job)

    def _time_out(self, job: _Job) -> None:
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

    def _counters(self) -> tuple[TransferCounters, TransferCounters]:
        """Sums over the prefill (or both-role) workers, and over the decode workers."""
        sums = {True: TransferCounters(), False: TransferCounters()}
        for worker, report in self._reports():
            sums[worker.role is Role.DECODE] += report.counters
        return sums[False], sums[True]

    def _reports(self) -> list[tuple[WorkerProcess, Counters]]:
        """What each worker that answers says of itself."""
        reports: list[tuple[WorkerProcess, Counters]] = []
        asked = {id(w): w for w in self.workers if w.alive and w.send(Report())}
        deadline = time.monotonic() + SEND_SECONDS_MAX
        while asked and (ready := self._selector.select(max(0.0, deadline - time.monotonic()))):
            for key, _ in ready:
                worker: WorkerProcess = key.data
                messages = worker.receive()
                if messages is None:
                    self._lose(worker)
                    asked.pop(id(worker), False)
                for message in messages or ():
                    if isinstance(message, Counters) and asked.pop(id(worker), False):
                        reports.append((worker, message))
        return reports

    def wait_for_store(self, timeout: float) -> bool:
        """Wait until every worker reaches the store; return whether they all do.

        Between runs only: tokens that arrive meanwhile are lost.
        """
        deadline = time.monotonic() + timeout
        while True:
            reports = self._reports()
            if reports and all(report.reaches_store for _, report in reports):
                return True
            if not reports or time.monotonic() > deadline:
                return False
            time.sleep(0.05)

    def kill_workers(self) -> None:
        """SIGKILL to every worker: an engine that crashes. Nothing can be run afterwards."""
        for worker in self.workers:
            worker.give_up()
            worker.process.wait()

    def _store_counters(self) -> dict[str, float]:
        if self.store is None:
            return {}
        stats = self.store.stats()
        return {name: value for name, value in stats.items() if name.endswith("_total")}


def failures(results: Iterable[RequestResult]) -> list[str]:
    """One line for each request that failed."""
    return [f"{r.request_id}: {r.error}" for r in results if r.error is not None]

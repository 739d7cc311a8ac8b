"""The runs of the demo, one after the other, on a daemon that it owns or is told of."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvstore import ConfigError, DeadlineExceededError
from kvstore.bench.serving import PrivateDaemon, RunningDaemon

from . import tokenizer as tokenizers
from .cluster_settings import ClusterSettings, Mode
from .demo_report import DemoRun, Name
from .messages import ModelSource
from .pd import Cluster
from .results import Prompt, RequestResult
from .scheduler import WorkerSettings
from .workload import make_sessions

FLUSH_SECONDS_MAX = 60.0
RECONNECT_SECONDS_MAX = 30.0


@dataclass(frozen=True)
class DemoSettings:
    """`connect` is the address of a daemon; without one, the demo runs its own, of `cpu` bytes of
    DRAM and an ssd directory below `ssd`. `kill_daemon` is for a daemon that it does not own."""

    model: ModelSource
    num_requests: int = 10
    prefill_workers: int = 1
    decode_workers: int = 1
    max_new_tokens: int = 16
    document_tokens: int | None = None
    cpu: str = "512MiB"
    ssd: Path | None = None
    connect: str = ""
    kill_daemon: bool = False
    layerwise: bool = False
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("num_requests", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive")
        if self.kill_daemon and not self.connect:
            raise ConfigError("kill_daemon: only with connect; the demo's own is killed anyway")

    @property
    def names(self) -> list[str]:
        """The runs that there will be."""
        names = [Name.COLOCATED, Name.PD, Name.COLD, Name.DRAM, Name.SHARED, Name.ENGINE_KILLED]
        if self.kill_daemon or not self.connect:
            names.append(Name.DAEMON_KILLED)
        if not self.connect:
            names.append(Name.SSD)
        return names


@dataclass
class _Demo:
    settings: DemoSettings
    sessions: list[list[Prompt]]
    on_progress: Callable[[str, int, int], None]
    done: int = 0
    runs: list[DemoRun] = field(default_factory=list)
    # A daemon may be warm from an earlier demo: blocks of this one are its own.
    revision: str = field(default_factory=lambda: f"demo-{secrets.token_hex(8)}")

    def run(self, name: str, cluster: Cluster) -> None:
        total = len(self.settings.names) * self.settings.num_requests

        def finished(_: RequestResult) -> None:
            self.done += 1
            self.on_progress(name, self.done, total)

        self.on_progress(name, self.done, total)
        result = cluster.run(self.sessions, finished)
        self.runs.append(DemoRun(name, cluster.settings.mode, result))

    def cluster(self, mode: Mode, address: str = "", revision: str = "") -> Cluster:
        settings = self.settings
        page_tokens = WorkerSettings().page_tokens
        # Room for the longest request of every session at once, so that none is preempted.
        longest = [max(len(p.token_ids) + p.max_new_tokens for p in s) for s in self.sessions]
        pages = sum(-(-tokens // page_tokens) for tokens in longest)
        return Cluster(
            ClusterSettings(
                mode,
                settings.model,
                settings.prefill_workers,
                settings.decode_workers,
                WorkerSettings(num_pages=pages, sequences_max=max(16, len(self.sessions))),
                address=address,
                revision=revision or self.revision,
                layerwise=settings.layerwise,
                start_timeout_s=settings.start_timeout_s,
                request_timeout_s=300.0,
            )
        )

    def run_all(self) -> None:
        with self.cluster(Mode.COLOCATED) as cluster:
            self.run(Name.COLOCATED, cluster)
        with _daemon(self.settings) as daemon:
            with self.cluster(Mode.PD, daemon.address, f"{self.revision}-pd") as cluster:
                self.run(Name.PD, cluster)
                _forget(daemon, cluster)
            with ExitStack() as engines:
                self._run_on(daemon, engines)

    def _run_on(self, daemon: PrivateDaemon | RunningDaemon, engines: ExitStack) -> None:
        first = engines.enter_context(self.cluster(Mode.PD_CACHE, daemon.address))
        self.run(Name.COLD, first)
        self.run(Name.DRAM, first)
        second = engines.enter_context(self.cluster(Mode.PD_CACHE, daemon.address))
        self.run(Name.SHARED, second)
        for engine in (first, second):
            engine.kill_workers()
        with self.cluster(Mode.PD_CACHE, daemon.address) as third:
            self.run(Name.ENGINE_KILLED, third)
            if Name.DAEMON_KILLED in self.settings.names:
                daemon.kill()
                daemon.start()
                if not third.wait_for_store(RECONNECT_SECONDS_MAX):
                    raise DeadlineExceededError(
                        f"the engine did not find the daemon within {RECONNECT_SECONDS_MAX:g} s"
                    )
                self.run(Name.DAEMON_KILLED, third)
            _forget(daemon, third)
            if isinstance(daemon, PrivateDaemon):
                self._run_from_ssd(daemon, third)

    def _run_from_ssd(self, daemon: PrivateDaemon, engine: Cluster) -> None:
        assert engine.store is not None
        if not engine.store.flush(FLUSH_SECONDS_MAX):
            raise DeadlineExceededError(
                f"ssd: the blocks were not written within {FLUSH_SECONDS_MAX:g} s"
            )
        daemon.stop()
        daemon.start()
        with self.cluster(Mode.PD_CACHE, daemon.address) as fresh:
            self.run(Name.SSD, fresh)


def _forget(daemon: PrivateDaemon | RunningDaemon, cluster: Cluster) -> None:
    """Leave nothing of the cluster in a daemon that goes on after us."""
    if isinstance(daemon, RunningDaemon) and cluster.store is not None:
        cluster.store.clear()


@contextmanager
def _daemon(settings: DemoSettings) -> Iterator[PrivateDaemon | RunningDaemon]:
    if settings.connect:
        yield RunningDaemon(settings.connect)
        return
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-demo-", dir=settings.ssd) as ssd,
        tempfile.TemporaryDirectory(prefix="kvstore-demo-") as directory,
    ):
        daemon = PrivateDaemon(Path(directory), cpu=settings.cpu, ssd=ssd)
        with daemon:
            daemon.start()
            yield daemon


def run_demo(
    settings: DemoSettings, on_progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[DemoRun]:
    """All runs, in order. `on_progress(run, done, total)` is called as requests finish.

    Raises:
        KVStoreError: workers or daemon could not be started. Single requests that fail do not
            raise.
    """
    directory = settings.model.directory
    tokenizer = tokenizers.load(Path(directory) if directory is not None else None)
    sessions = make_sessions(
        tokenizer, settings.num_requests, settings.max_new_tokens, settings.document_tokens
    )
    demo = _Demo(settings, sessions, on_progress)
    demo.run_all()
    return demo.runs

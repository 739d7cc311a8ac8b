"""An engine goes on while its daemon is away, and finds its cache again when it is back.

A reference worker on a real daemon that is stopped (SIGSTOP) or killed (SIGKILL) between requests.
The oracle is a worker without a store: tokens must be the same at every point. That the daemon was
away is seen in what the worker computed itself, that it is back in its hits.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import kvstore  # noqa: E402
from kvstore.bench.serving import PrivateDaemon  # noqa: E402
from kvstore_adapters.reference import checkpoint  # noqa: E402
from kvstore_adapters.reference.scheduler import Request, WorkerSettings  # noqa: E402
from kvstore_adapters.reference.store_transfer import StoreTransfer, namespace_of  # noqa: E402
from kvstore_adapters.reference.worker import ReferenceWorker  # noqa: E402

CAPACITY = WorkerSettings(page_tokens=16, num_pages=64, batch_tokens_max=96)
NEW_TOKENS = 4
PROMPTS = [tuple((key + 7 * i * i + i) % 251 for i in range(200)) for key in range(2)]
TIMEOUT_SECONDS = 0.5
WAIT_SECONDS_MAX = 60.0  # a bound for what must come


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> checkpoint.Checkpoint:
    return checkpoint.make_random(size="nano", seed=3)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[PrivateDaemon]:
    with PrivateDaemon(tmp_path, cpu="8MiB") as running:
        running.start()
        yield running


class Engine:
    def __init__(self, model: checkpoint.Checkpoint, store: kvstore.Store, layerwise: bool) -> None:
        self.transfer = StoreTransfer(store, layerwise=layerwise)
        self.worker = ReferenceWorker(model, CAPACITY, self.transfer)
        self.count = 0

    def generate(self) -> tuple[list[list[int]], int]:
        """The tokens of every prompt, and how many of their blocks came from the store."""
        before = self.transfer.counters.hit_cpu_blocks
        tokens = []
        for prompt in PROMPTS:
            self.count += 1
            self.worker.add_request(Request(str(self.count), prompt, NEW_TOKENS))
            tokens.append(run(self.worker))
        assert self.worker.pages_free == CAPACITY.num_pages
        return tokens, self.transfer.counters.hit_cpu_blocks - before

    def wait_for_store(self) -> None:
        give_up = time.monotonic() + WAIT_SECONDS_MAX
        while not self.transfer.reaches_store():
            assert time.monotonic() < give_up, "the engine did not find the daemon again"


def run(worker: ReferenceWorker) -> list[int]:
    tokens: list[int] = []
    while worker.has_work:
        tokens += [output.token_id for output in worker.step()]
    return tokens


def expected(model: checkpoint.Checkpoint) -> list[list[int]]:
    worker = ReferenceWorker(model, CAPACITY)
    tokens = []
    for index, prompt in enumerate(PROMPTS):
        worker.add_request(Request(str(index), prompt, NEW_TOKENS))
        tokens.append(run(worker))
    return tokens


def is_stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(") ")[2][0] == "T" for task in tasks)


def stop(daemon: PrivateDaemon) -> Callable[[], object]:
    os.kill(daemon.pid, signal.SIGSTOP)
    give_up = time.monotonic() + WAIT_SECONDS_MAX
    while not is_stopped(daemon.pid):  # its threads stop one after the other
        assert time.monotonic() < give_up
    return lambda: os.kill(daemon.pid, signal.SIGCONT)


def kill(daemon: PrivateDaemon) -> Callable[[], object]:
    daemon.kill()
    return daemon.start


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("take_away", [stop, kill])
def test_an_engine_goes_on_without_its_daemon_and_hits_again_when_it_is_back(
    model: checkpoint.Checkpoint,
    daemon: PrivateDaemon,
    take_away: Callable[[PrivateDaemon], Callable[[], object]],
    layerwise: bool,
) -> None:
    tokens = expected(model)
    namespace = namespace_of(model, CAPACITY.page_tokens)
    with kvstore.connect(daemon.address, namespace, timeout=TIMEOUT_SECONDS) as store:
        engine = Engine(model, store, layerwise)
        assert engine.generate() == (tokens, 0)
        warm, hits = engine.generate()
        assert warm == tokens
        assert hits == len(PROMPTS) * (len(PROMPTS[0]) // CAPACITY.page_tokens)
        bring_back = take_away(daemon)
        try:
            assert engine.generate() == (tokens, 0)
            assert engine.generate() == (tokens, 0)
        finally:
            bring_back()
        engine.wait_for_store()
        assert engine.generate() == (tokens, hits)
        engine.transfer.close()

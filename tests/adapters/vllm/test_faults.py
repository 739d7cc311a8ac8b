"""A daemon that is killed or stopped under a serving vLLM, or was never there: no request fails,
and the tokens are those of an engine without kvstore.

The engine is one for all tests, started with no daemon. Each test runs a daemon at the same
address, and harms it while requests are in flight: at once after they were sent, or when the engine
has begun to talk to it about them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adapters.vllm import support
from tests.adapters.vllm.conftest import Reference
from tests.adapters.vllm.support import EngineProcess, tokens_of
from tests.daemon.daemon_support import Daemon, running

pytestmark = support.pytestmark

DECODED = 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d")


@pytest.fixture(scope="module")
def engine(model: Path, home: Path) -> Iterator[EngineProcess]:
    config = support.transfer_config(f"unix:{home}/s")
    with EngineProcess(model, home / "engine", config) as engine:
        yield engine


@pytest.fixture
def filled(engine: EngineProcess, home: Path) -> Iterator[Daemon]:
    """A daemon that the engine has found, and in which the prompts of these tests are."""
    with running(home, *support.DAEMON) as daemon:
        fill(engine, daemon)
        yield daemon


def fill(engine: EngineProcess, daemon: Daemon) -> None:
    """The engine tries again in the background, so the first prompts may still miss the daemon."""

    def is_filled() -> bool:
        engine.reset()
        engine.one_by_one(PROMPTS, 1)
        return support.stored_blocks(daemon.address) >= support.full_blocks(PROMPTS)

    support.wait_until(is_filled)
    engine.reset()


PROMPTS = support.prompts(4)


def at_once(daemon: Daemon, asked: int) -> None:
    """Harm it while the engine still takes the requests in."""


def when_it_is_asked(daemon: Daemon, asked: int) -> None:
    """Harm it when the engine has begun to look up or to load."""
    support.wait_until(lambda: requests_of_engine(daemon) > asked)


def requests_of_engine(daemon: Daemon) -> int:
    return support.daemon_metric(daemon.address, "queried_blocks_total")


MOMENTS = pytest.mark.parametrize("moment", [at_once, when_it_is_asked])


def check_answers(engine: EngineProcess, reference: Reference) -> None:
    found = engine.finish()
    assert tokens_of(found) == reference(PROMPTS, DECODED)
    assert {completion.finish_reason for completion in found} == {"length"}


def test_a_daemon_that_is_not_there_is_done_without_and_used_once_it_is(
    engine: EngineProcess, home: Path, reference: Reference
) -> None:
    engine.begin(PROMPTS, DECODED)
    check_answers(engine, reference)
    with running(home, *support.DAEMON) as daemon:
        fill(engine, daemon)
        check_hits(engine, reference)


def check_hits(engine: EngineProcess, reference: Reference) -> None:
    """Prompts come from the daemon, once the scheduler's connection has found it too: that is not
    the one by which blocks are saved."""
    hits = engine.external_hits()

    def has_hit() -> bool:
        engine.reset()
        engine.begin(PROMPTS, DECODED)
        check_answers(engine, reference)
        return engine.external_hits() > hits

    support.wait_until(has_hit)


@MOMENTS
def test_kill(
    moment: Callable[[Daemon, int], None],
    filled: Daemon,
    engine: EngineProcess,
    reference: Reference,
    home: Path,
) -> None:
    asked = requests_of_engine(filled)
    engine.begin(PROMPTS, DECODED)
    moment(filled, asked)
    filled.kill()
    check_answers(engine, reference)
    engine.reset()
    engine.begin(PROMPTS, DECODED)
    check_answers(engine, reference)
    with running(home, *support.DAEMON) as another:
        fill(engine, another)
        check_hits(engine, reference)


@MOMENTS
def test_stop_and_continue(
    moment: Callable[[Daemon, int], None],
    filled: Daemon,
    engine: EngineProcess,
    reference: Reference,
) -> None:
    asked = requests_of_engine(filled)
    engine.begin(PROMPTS, DECODED)
    moment(filled, asked)
    filled.process.send_signal(signal.SIGSTOP)
    try:
        check_answers(engine, reference)
        engine.reset()
        engine.begin(PROMPTS, DECODED)
        check_answers(engine, reference)
    finally:
        filled.process.send_signal(signal.SIGCONT)
    fill(engine, filled)
    check_hits(engine, reference)


def test_nothing_of_this_was_an_exception_in_the_engine(engine: EngineProcess) -> None:
    assert "Traceback" not in engine.printed()

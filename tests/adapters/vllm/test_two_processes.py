"""A daemon and vLLM engines in processes of their own, one after the other: what one has computed
the next one loads, unless it is another model or another layout of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.vllm import support
from tests.adapters.vllm.conftest import Reference
from tests.adapters.vllm.support import BLOCK_TOKENS, EngineProcess, tokens_of
from tests.daemon.daemon_support import Daemon, running

pytestmark = support.pytestmark


def run(
    model: Path, daemon: Daemon, log: Path, prompts: list[list[int]], **arguments: Any
) -> tuple[list[tuple[int, ...]], int]:
    """Tokens and external hits of an engine that lives for these prompts."""
    config = support.transfer_config(daemon.address, arguments.pop("role", "kv_both"))
    with EngineProcess(model, log, config, **arguments) as engine:
        found = tokens_of(engine.one_by_one(prompts))
        return found, engine.external_hits()


PROMPTS = support.prompts()


@pytest.fixture(scope="module")
def filled(
    model: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    """A daemon that has what an engine computed which is gone."""
    home = tmp_path_factory.mktemp("d")
    with running(home, *support.DAEMON) as daemon:
        assert run(model, daemon, home / "first", PROMPTS) == (reference(PROMPTS), 0)
        support.wait_stored(daemon.address, support.full_blocks(PROMPTS))
        yield daemon


def test_a_second_process_loads_what_the_first_computed(
    model: Path, filled: Daemon, reference: Reference, tmp_path: Path
) -> None:
    """The second one is started as vLLM starts itself: engine core and worker as processes too."""
    tokens, hits = run(model, filled, tmp_path / "second", PROMPTS, in_process=False)
    assert (tokens, hits) == (reference(PROMPTS), support.full_blocks(PROMPTS) * BLOCK_TOKENS)


@pytest.mark.slow
def test_a_producer_only_saves_and_a_consumer_only_loads(
    model: Path, daemon: Daemon, reference: Reference, tmp_path: Path
) -> None:
    prompts = support.prompts(seed=1)
    assert run(model, daemon, tmp_path / "a", prompts, role="kv_consumer")[1] == 0
    assert support.stored_blocks(daemon.address) == 0
    for log in ("b", "c"):  # the second producer finds what the first one saved, and computes it
        tokens, hits = run(model, daemon, tmp_path / log, prompts, role="kv_producer")
        assert (tokens, hits) == (reference(prompts), 0)
    support.wait_stored(daemon.address, support.full_blocks(prompts))
    tokens, hits = run(model, daemon, tmp_path / "d", prompts, role="kv_consumer")
    assert tokens == reference(prompts)
    assert hits > 0


@pytest.mark.parametrize(
    "other",
    ["weights", pytest.param("dtype", marks=pytest.mark.slow), "block_size"],
)
def test_another_model_or_layout_is_a_miss(
    other: str, model: Path, filled: Daemon, reference: Reference, tmp_path: Path
) -> None:
    choices: dict[str, dict[str, Any]] = {
        "weights": {"model": support.write_model(tmp_path / "other", seed=1)},
        "dtype": {"dtype": "bfloat16"},
        "block_size": {"block_size": 2 * BLOCK_TOKENS},
    }
    arguments = choices[other]
    # A block's size changes no number, so those tokens are known.
    numerics = {name: arguments[name] for name in ("model", "dtype") if name in arguments}
    wanted = reference(PROMPTS, **numerics)
    log = tmp_path / "second"
    tokens, hits = run(arguments.pop("model", model), filled, log, PROMPTS, **arguments)
    assert (tokens, hits) == (wanted, 0)
    warnings = [line for line in log.read_text().splitlines() if "kvstore" in line.lower()]
    assert sum("WARNING" in line or "ERROR" in line for line in warnings) <= 1, warnings

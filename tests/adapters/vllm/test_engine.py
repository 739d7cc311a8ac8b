"""One real vLLM engine with KVStoreConnector, and a daemon: the prompt's KV comes back out of
kvstore and the tokens stay the same.

vLLM's own prefix cache is reset between filling and using, so what is not computed came through the
connector. That equal tokens mean something is shown by the control: with zeros in the place of the
stored KV they differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.vllm import support
from tests.adapters.vllm.conftest import Reference
from tests.adapters.vllm.support import BLOCK_TOKENS, EngineProcess, tokens_of
from tests.daemon.daemon_support import Daemon, running

pytestmark = support.pytestmark


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("d"), *support.DAEMON) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def engine(
    model: Path, served: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """Tests share it; each has prompts of its own."""
    log = tmp_path_factory.mktemp("engine") / "log"
    with EngineProcess(model, log, support.transfer_config(served.address)) as engine:
        yield engine


def fill(engine: EngineProcess, daemon: Daemon, prompts: list[list[int]]) -> None:
    before = support.stored_blocks(daemon.address)
    engine.one_by_one(prompts)
    support.wait_stored(daemon.address, before + support.full_blocks(prompts))
    engine.reset()


def test_after_a_reset_the_prompt_comes_from_kvstore_and_tokens_are_the_same(
    engine: EngineProcess, served: Daemon, reference: Reference
) -> None:
    prompts = support.prompts(seed=1)
    fill(engine, served, prompts)
    hits = engine.external_hits()
    again = engine.one_by_one(prompts)
    assert tokens_of(again) == reference(prompts)
    # All but the rest that fills no block; later prompts share what came for the first.
    assert [found.num_cached for found in again] == [
        len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS for prompt in prompts
    ]
    assert engine.external_hits() - hits == support.full_blocks(prompts) * BLOCK_TOKENS


def test_a_batch_of_requests_that_share_a_prefix(
    engine: EngineProcess, served: Daemon, reference: Reference
) -> None:
    prompts = support.prompts(6, seed=2)
    fill(engine, served, prompts)
    hits = engine.external_hits()
    assert tokens_of(engine.generate(prompts)) == reference(prompts)
    assert engine.external_hits() - hits >= support.full_blocks(prompts) * BLOCK_TOKENS


def test_zeros_in_place_of_the_stored_kv_change_the_tokens(
    engine: EngineProcess, served: Daemon, reference: Reference
) -> None:
    """The control. The daemon trusts its memory here (verify="boundary"), so it hands them out."""
    (prompt,) = support.prompts(1, seed=3)
    fill(engine, served, [prompt])
    (namespace,) = engine.namespaces()
    assert support.zero_blocks(served.address, namespace, prompt) == len(prompt) // BLOCK_TOKENS
    hits = engine.external_hits()
    assert tokens_of(engine.one_by_one([prompt])) != reference([prompt])
    assert engine.external_hits() > hits


def test_another_cache_salt_gets_no_hits(
    engine: EngineProcess, served: Daemon, reference: Reference
) -> None:
    prompts = support.prompts(1, seed=4)
    fill(engine, served, prompts)
    hits = engine.external_hits()
    assert tokens_of(engine.generate(prompts, salt="another tenant")) == reference(prompts)
    assert engine.external_hits() == hits
    engine.reset()
    assert tokens_of(engine.generate(prompts, salt="another tenant")) == reference(prompts)
    assert engine.external_hits() > hits


def test_a_prompt_of_whole_blocks_only(
    engine: EngineProcess, served: Daemon, reference: Reference
) -> None:
    """Nothing is left to compute but the last token, which vLLM wants for its logits."""
    prompts = [support.prompts(1, seed=5)[0][: 10 * BLOCK_TOKENS]]
    fill(engine, served, prompts)
    hits = engine.external_hits()
    assert tokens_of(engine.generate(prompts)) == reference(prompts)
    assert engine.external_hits() > hits


def test_hits_are_told_by_where_they_came_from(engine: EngineProcess, served: Daemon) -> None:
    prompts = support.prompts(1, seed=6)
    fill(engine, served, prompts)
    engine.generate(prompts)
    assert engine.counter("prompt_tokens_cached_by_source:host") > 0


def test_nothing_was_logged_as_an_error(engine: EngineProcess) -> None:
    assert "Traceback" not in engine.printed()
    assert " ERROR " not in engine.printed()

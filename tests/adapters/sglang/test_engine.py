"""The real SGLang engine on a CPU with each of our adapters: what it generates from stored KV is
what it generates from its own.

The model is random, in fp32, and sensitive to its context: the oracle is a decoder of our own that
shares no code with SGLang, and a control run with the stored KV zeroed must generate other tokens.
Two processes share a daemon, which is killed and stopped while they serve.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from kvstore.admin import Admin
from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.reference import checkpoint
from tests.adapters.sglang.cpu.engine_driver import (
    PAGE_TOKENS,
    Answer,
    EngineProcess,
    control_file,
    reference_tokens,
    running,
)

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
]

WAIT_S = 60.0  # a bound for what must come
NUM_TOKENS = 8


def prompt(seed: int, num_tokens: int = 200) -> list[int]:
    return [(i * 7 + i * i * 3 + seed * (i + 31)) % 250 for i in range(num_tokens)]


def whole_pages(tokens: list[int]) -> int:
    """Tokens that a cache can serve: whole pages, and not the last token."""
    return (len(tokens) - 1) // PAGE_TOKENS * PAGE_TOKENS


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {WAIT_S} s: {what}"
        time.sleep(0.02)


def linker(daemon: PrivateDaemon) -> dict[str, Any]:
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "KVStoreLinker",
            "linker_module_path": "kvstore_adapters.sglang.linker",
            "linker_extra_config": {"address": daemon.address, "timeout": 0.3},
        },
    }


def hicache(daemon: PrivateDaemon) -> dict[str, Any]:
    extra = {
        "backend_name": "kvstore",
        "module_path": "kvstore_adapters.sglang.hicache",
        "class_name": "KVStoreHiCache",
        "interface_v1": 1,
        "prefetch_threshold": PAGE_TOKENS,
        "address": daemon.address,
        "timeout": 0.3,
    }
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2.0,
        "hicache_io_backend": "kernel",
        "hicache_mem_layout": "page_first",
        "hicache_write_policy": "write_through",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": json.dumps(extra),
    }


ADAPTERS = {"linker": linker, "hicache": hicache}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    return checkpoint.make_random(tmp_path_factory.mktemp("model"), "tiny", seed=3)


class Served:
    """A daemon, a model, and how engines of one adapter are started."""

    def __init__(
        self,
        directory: Path,
        daemon: PrivateDaemon,
        model: checkpoint.Checkpoint,
        arguments: dict[str, Any],
    ) -> None:
        self.directory = directory
        self.daemon = daemon
        self.model = model
        self.arguments = {"model_path": str(model.directory), **arguments}

    def num_blocks(self) -> int:
        with Admin(self.daemon.address) as admin:
            return int(admin.status()["tiers"][0]["blocks"])

    def is_by_us(self, answer: Answer) -> bool:
        """Whether SGLang names our storage as the source. A linker it does not name: what the
        device does not have can then only come from the linker, SGLang has no host cache."""
        if "enable_hierarchical_cache" not in self.arguments:
            return bool(answer.details["host"] == answer.num_external)
        found = (answer.details["storage"], answer.details["storage_backend"])
        return found == (answer.num_external, "KVStoreHiCache")

    def expected(self, tokens: list[int]) -> list[int]:
        return reference_tokens(self.model, tokens, NUM_TOKENS)

    def generate_until_external(self, engine: EngineProcess, tokens: list[int]) -> None:
        """Tokens are right each time, and one day the prompt comes from the store."""

        def is_external() -> bool:
            wait_until(engine.flush, "the engine is idle")
            answer = engine.generate(tokens)
            assert answer.tokens == self.expected(tokens)
            is_whole = answer.num_external == whole_pages(tokens)
            assert not is_whole or self.is_by_us(answer)
            return is_whole

        wait_until(is_external, "the prompt comes from the store")


@pytest.fixture(scope="module", params=ADAPTERS)
def served(request: pytest.FixtureRequest, model: checkpoint.Checkpoint) -> Iterator[Served]:
    # pytest's own directories have names too long for a socket.
    with (
        tempfile.TemporaryDirectory(prefix="kv-sgl-") as path,
        PrivateDaemon(Path(path), cpu="64MiB", hold_seconds="0") as daemon,
    ):
        daemon.start()
        yield Served(Path(path), daemon, model, ADAPTERS[request.param](daemon))


def test_stored_kv_gives_the_same_tokens_in_this_engine_and_the_next(served: Served) -> None:
    tokens = prompt(1)
    with running(served.directory, **served.arguments) as engine:
        cold = engine.generate(tokens)
        assert cold.tokens == served.expected(tokens)
        assert cold.cached == 0
        warm = engine.generate(tokens)
        assert warm.tokens == cold.tokens
        assert (warm.cached, warm.num_external) == (whole_pages(tokens), 0)
        wait_until(lambda: served.num_blocks() >= len(tokens) // PAGE_TOKENS, "pages are stored")

        served.generate_until_external(engine, tokens)

        control_file(served.directory).touch()
        wait_until(engine.flush, "the engine is idle")
        zeroed = engine.generate(tokens)
        control_file(served.directory).unlink()
        assert zeroed.num_external == whole_pages(tokens)
        assert served.is_by_us(zeroed)
        assert zeroed.tokens != cold.tokens
        served.generate_until_external(engine, tokens)

    with running(served.directory, **served.arguments) as second:
        first = second.generate(tokens)
        assert first.tokens == cold.tokens
        assert first.num_external == whole_pages(tokens)
        assert served.is_by_us(first)
        longer = tokens + prompt(2, 100)
        continued = second.generate(longer)
        assert continued.tokens == served.expected(longer)

    with running(served.directory, **served.arguments, dtype="bfloat16") as other:
        assert other.generate(tokens).cached == 0


def test_requests_do_not_fail_while_the_daemon_stops_dies_and_returns(served: Served) -> None:
    prompts = [prompt(10 + i, 150 + 16 * i) for i in range(6)]
    expected = [served.expected(tokens) for tokens in prompts]
    with running(served.directory, **served.arguments) as engine:

        def all_are_right(meanwhile: Callable[[], None] | None = None) -> None:
            wait_until(engine.flush, "the engine is idle")
            answers = engine.generate_all(prompts, meanwhile=meanwhile)
            assert [answer.tokens for answer in answers] == expected
            assert all(answer.finish and answer.finish["type"] == "length" for answer in answers)

        all_are_right()
        served.generate_until_external(engine, prompts[0])
        os.kill(served.daemon.pid, signal.SIGSTOP)
        try:
            all_are_right()
        finally:
            os.kill(served.daemon.pid, signal.SIGCONT)
        all_are_right(lambda: os.kill(served.daemon.pid, signal.SIGSTOP))
        os.kill(served.daemon.pid, signal.SIGCONT)
        served.generate_until_external(engine, prompts[0])
        all_are_right(served.daemon.kill)
        all_are_right()
        served.daemon.start()
        served.generate_until_external(engine, prompts[0])

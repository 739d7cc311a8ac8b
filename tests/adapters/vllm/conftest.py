"""One model for all tests, and what it says without kvstore."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.vllm import support
from tests.daemon.daemon_support import Daemon, running

Reference = Callable[..., list[tuple[int, ...]]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """`reference(prompts, max_tokens, **arguments)`: tokens of an engine that knows no kvstore,
    prompt by prompt, with nothing cached.
    """
    known: dict[str, list[tuple[int, ...]]] = {}
    logs = tmp_path_factory.mktemp("reference")

    def tokens(
        prompts: Sequence[Sequence[int]], max_tokens: int = 16, **arguments: Any
    ) -> list[tuple[int, ...]]:
        arguments.setdefault("model", model)
        key = json.dumps([prompts, max_tokens, arguments], default=str)
        if key not in known:
            options = {"enable_prefix_caching": False, **arguments}
            with support.EngineProcess(log=logs / f"{len(known)}", **options) as engine:
                found = engine.one_by_one(prompts, max_tokens)
            known[key] = support.tokens_of(found)
        return known[key]

    return tokens


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(tmp_path, *support.DAEMON) as found:
        yield found

"""vLLM's own OffloadingConnector with KVStoreTier below it, end to end in real engines.

The oracle is an engine without a connector. A second process starts with an empty pool: what it
does not compute came from the daemon.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.vllm import models, support
from tests.adapters.vllm.conftest import Reference
from tests.adapters.vllm.support import BLOCK_TOKENS, EngineProcess, tokens_of
from tests.daemon.daemon_support import Daemon

pytestmark = [*support.pytestmark, pytest.mark.slow]

POOL_BYTES = 16 << 20


def offloading(address: str, **settings: Any) -> dict[str, Any]:
    """vLLM's kv_transfer_config for its OffloadingConnector over our tier."""
    tier = {"type": "KVStoreTier", "module_path": "kvstore_adapters.vllm.tier", "address": address}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "tests.adapters.vllm.cpu_offload",
            "cpu_bytes_to_use": POOL_BYTES,
            "secondary_tiers": [{**tier, **settings}],
        },
    }


def run(
    model: Path, address: str, log: Path, prompts: list[list[int]], **arguments: Any
) -> tuple[list[tuple[int, ...]], int]:
    with EngineProcess(model, log, offloading(address), **arguments) as engine:
        found = tokens_of(engine.one_by_one(prompts))
        return found, engine.external_hits()


def test_a_second_process_loads_what_the_first_one_stored(
    model: Path, daemon: Daemon, reference: Reference, tmp_path: Path
) -> None:
    prompts = support.prompts()
    tokens, hits = run(model, daemon.address, tmp_path / "first", prompts)
    assert (tokens, hits) == (reference(prompts), 0)
    support.wait_stored(daemon.address, support.full_blocks(prompts))
    tokens, hits = run(model, daemon.address, tmp_path / "second", prompts)
    assert (tokens, hits) == (reference(prompts), support.full_blocks(prompts) * BLOCK_TOKENS)


def test_a_model_with_sliding_windows_is_shared_too(
    daemon: Daemon, reference: Reference, tmp_path: Path
) -> None:
    model = models.write_sliding_window(tmp_path / "model")
    prompts = support.prompts()
    wanted = reference(prompts, model=model)
    tokens, _ = run(model, daemon.address, tmp_path / "first", prompts)
    assert tokens == wanted
    support.wait_stored(daemon.address, support.full_blocks(prompts))
    tokens, hits = run(model, daemon.address, tmp_path / "second", prompts)
    assert tokens == wanted
    assert hits >= support.SHARED_TOKENS


@pytest.mark.parametrize("change", [{"load_format": "dummy"}, {"dtype": "bfloat16"}])
def test_another_model_at_the_same_path_is_a_miss(
    model: Path, daemon: Daemon, tmp_path: Path, change: dict[str, Any]
) -> None:
    """vLLM does not tell a tier how weights are loaded: it has to find out."""
    prompts = support.prompts(1)
    run(model, daemon.address, tmp_path / "first", prompts)
    support.wait_stored(daemon.address, support.full_blocks(prompts))
    assert run(model, daemon.address, tmp_path / "second", prompts, **change)[1] == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_engine_serves_on_without_the_daemon(
    model: Path, daemon: Daemon, reference: Reference, tmp_path: Path, how: signal.Signals
) -> None:
    prompts = support.prompts()
    config = offloading(daemon.address, timeout=0.5, load_deadline=1.0)
    with EngineProcess(model, tmp_path / "engine", config) as engine:
        assert tokens_of(engine.one_by_one(prompts[:1])) == reference(prompts)[:1]
        os.kill(daemon.pid, how)
        try:
            assert tokens_of(engine.one_by_one(prompts)) == reference(prompts)
        finally:
            if how == signal.SIGSTOP:
                os.kill(daemon.pid, signal.SIGCONT)

"""vLLM's own MooncakeStoreConnector in a real engine, on kvstore: nothing of vLLM is changed.

`mooncake.store` is found by PYTHONPATH, as a user would have it. The oracle is an engine without a
connector; a second process that computes less than it has to can only have loaded the rest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvstore_adapters.mooncake import shim
from tests.adapters.vllm import support
from tests.adapters.vllm.conftest import Reference
from tests.adapters.vllm.support import BLOCK_TOKENS, EngineProcess, tokens_of
from tests.daemon.daemon_support import Daemon

pytestmark = [*support.pytestmark, pytest.mark.slow]

CONNECTOR = {"kv_connector": "MooncakeStoreConnector", "kv_role": "kv_both"}


def environment(directory: Path, address: str) -> dict[str, str]:
    settings: dict[str, Any] = {
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": address,
        "protocol": "tcp",
        "global_segment_size": "16MB",
        "local_buffer_size": "16MB",
    }
    modules = [shim.PATH, str(support.ROOT), str(support.ROOT / "adapters")]
    path = directory / "mooncake.json"
    path.write_text(json.dumps(settings))
    return {
        "MOONCAKE_CONFIG_PATH": str(path),
        "PYTHONPATH": os.pathsep.join(modules),
        "VLLM_RPC_BASE_PATH": str(directory),
    }


def test_a_second_process_loads_what_the_first_one_stored(
    model: Path, daemon: Daemon, reference: Reference, tmp_path: Path
) -> None:
    prompts = support.prompts()
    settings = environment(tmp_path, daemon.address)
    hits = []
    for name in ("first", "second"):
        with EngineProcess(model, tmp_path / name, CONNECTOR, environment=settings) as engine:
            assert tokens_of(engine.one_by_one(prompts)) == reference(prompts)
            hits.append(engine.external_hits())
        # Each block is a value and its entry.
        support.wait_stored(daemon.address, 2 * support.full_blocks(prompts))
    assert hits == [0, support.full_blocks(prompts) * BLOCK_TOKENS]


def test_the_engine_serves_on_without_the_daemon(
    model: Path, daemon: Daemon, reference: Reference, tmp_path: Path
) -> None:
    prompts = support.prompts()
    settings = environment(tmp_path, daemon.address)
    with EngineProcess(model, tmp_path / "engine", CONNECTOR, environment=settings) as engine:
        assert tokens_of(engine.one_by_one(prompts[:1])) == reference(prompts)[:1]
        daemon.kill()
        assert tokens_of(engine.one_by_one(prompts)) == reference(prompts)

"""vLLM's modes that change what a connector sees, each with a real engine: tokens equal those of an
engine without kvstore, and prompt tokens came from kvstore.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.adapters.vllm import models, support
from tests.adapters.vllm.conftest import Reference
from tests.adapters.vllm.support import BLOCK_TOKENS, EngineProcess, tokens_of
from tests.daemon.daemon_support import Daemon, running

pytestmark = support.pytestmark
slow = pytest.mark.slow


def mode(name: str, *marks: Any, connector: dict[str, Any] | None = None, **arguments: Any) -> Any:
    return pytest.param(connector or {}, arguments, marks=marks, id=name)


@pytest.mark.parametrize(
    ("connector", "arguments"),
    [
        mode("synchronous loads", connector={"load": "sync", "save_decode": True}),
        mode("chunked prefill", max_num_batched_tokens=128),
        mode("without vLLM's prefix cache", slow, enable_prefix_caching=False),
        mode("hashes over CBOR", slow, prefix_caching_hash_algo="sha256_cbor"),
        mode("bfloat16", slow, dtype="bfloat16"),
        mode("larger blocks", slow, block_size=4 * BLOCK_TOKENS),
        mode("two tensor-parallel ranks", slow, tensor_parallel_size=2),
        mode("compiled", slow, enforce_eager=False),
    ],
)
def test_mode(
    connector: dict[str, Any],
    arguments: dict[str, Any],
    model: Path,
    daemon: Daemon,
    reference: Reference,
    tmp_path: Path,
) -> None:
    prompts = support.prompts()
    num_blocks = support.full_blocks(prompts, arguments.get("block_size", BLOCK_TOKENS))
    num_ranks = arguments.get("tensor_parallel_size", 1)
    config = support.transfer_config(daemon.address, **connector)
    with EngineProcess(model, tmp_path / "log", config, **arguments) as engine:
        first = tokens_of(engine.one_by_one(prompts))
        support.wait_stored(daemon.address, num_blocks * num_ranks)
        engine.reset()
        hits = engine.external_hits()
        again = tokens_of(engine.one_by_one(prompts))
        together = tokens_of(engine.generate(prompts))
        assert engine.external_hits() > hits
    numerics = {name: arguments[name] for name in ("dtype",) if name in arguments}
    assert first == again == together == reference(prompts, **numerics)


def test_a_preempted_request_gets_its_decoded_tokens_back_too(
    model: Path, daemon: Daemon, reference: Reference, tmp_path: Path
) -> None:
    prompts = support.prompts(3)
    decoded = 200
    # Room for the shared prefix and the rest of two requests, not of three, at 128 KiB a block.
    num_blocks = (support.SHARED_TOKENS + 2 * 350) // BLOCK_TOKENS
    sizes: dict[str, Any] = {"kv_cache_memory_bytes": num_blocks << 17, "max_model_len": 640}
    config = support.transfer_config(daemon.address, save_decode=True)
    with EngineProcess(model, tmp_path / "log", config, **sizes) as engine:
        found = tokens_of(engine.generate(prompts, decoded))
        assert engine.counter("num_preemptions") > 0
        assert engine.external_hits() > 0
    assert found == reference(prompts, decoded)


def test_a_damaged_block_is_not_used_and_the_rest_is_computed(
    model: Path, reference: Reference, tmp_path: Path
) -> None:
    prompts = support.prompts(1)
    first_damaged = 5
    with running(tmp_path, *support.DAEMON, "--verify", "always") as daemon:
        config = support.transfer_config(daemon.address)
        with EngineProcess(model, tmp_path / "engine", config) as engine:
            engine.generate(prompts)
            support.wait_stored(daemon.address, support.full_blocks(prompts))
            engine.reset()
            (namespace,) = engine.namespaces()
            support.zero_blocks(daemon.address, namespace, prompts[0], first_damaged)
            (found,) = engine.generate(prompts)
            assert [found.tokens] == reference(prompts)
            assert found.finish_reason == "length"
            # It was saved again, and is sound now.
            support.wait_stored(daemon.address, support.full_blocks(prompts))
            engine.reset()
            (found,) = engine.generate(prompts)
            assert [found.tokens] == reference(prompts)
            assert found.num_cached == len(prompts[0]) // BLOCK_TOKENS * BLOCK_TOKENS


def test_sliding_windows_and_full_attention_in_one_model(
    daemon: Daemon, reference: Reference, tmp_path: Path
) -> None:
    model = models.write_sliding_window(tmp_path / "model")
    prompts = support.prompts()
    options: dict[str, Any] = {"block_size": 64}
    config = support.transfer_config(daemon.address)
    with EngineProcess(model, tmp_path / "log", config, **options) as engine:
        first = tokens_of(engine.one_by_one(prompts))
        support.wait_stored(daemon.address, support.full_blocks(prompts, 64))
        engine.reset()
        again = tokens_of(engine.one_by_one(prompts))
        assert engine.external_hits() > 0
    assert first == again == reference(prompts, model=model, **options)


@slow
def test_beside_another_connector(
    model: Path, daemon: Daemon, reference: Reference, tmp_path: Path
) -> None:
    prompts = support.prompts()
    ours = support.transfer_config(daemon.address)
    other = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "other")},
    }
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [ours, other]},
    }
    with EngineProcess(model, tmp_path / "log", both) as engine:
        first = tokens_of(engine.one_by_one(prompts))
        support.wait_stored(daemon.address, support.full_blocks(prompts))
        engine.reset()
        again = tokens_of(engine.one_by_one(prompts))
        assert engine.external_hits() > 0
    assert first == again == reference(prompts)

"""A namespace stands for all that makes a block's bytes what they are, beside its tokens.

vLLM's own configurations, one field changed at a time: every one that matters makes another
namespace, and none differs between processes. And the groups: which layers can be kept at all.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what vLLM imports
    pytest.importorskip("vllm.v1.worker.utils")

import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)

from kvstore import BlockSpec, ConfigError, Namespace
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.settings import AdapterSettings
from kvstore_adapters.vllm import namespaces
from kvstore_adapters.vllm.namespaces import (
    ShardNames,
    groups_of,
    is_writer,
    layers_of,
    namespaces_of,
    namespaces_told,
    own_rank,
)
from tests.adapters.vllm import configs
from tests.adapters.vllm.configs import cache_config, full, vllm_config, window

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SETTINGS = AdapterSettings(address="unix:/nowhere/s")
PAGE_BYTES = 32 * 2 * 2 * 64 * 4  # tokens, K and V, heads, dimensions, bytes


@pytest.fixture(scope="module")
def made(model: Path) -> Any:
    return vllm_config(model)


@pytest.fixture(autouse=True)
def _no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


def names(config: Any, caches: Any = None, settings: AdapterSettings = SETTINGS) -> Any:
    return namespaces_of(config, cache_config(config) if caches is None else caches, settings)


def with_path(config: Any, path: str, value: Any) -> Any:
    """A copy of a configuration in which "a.b.c" is `value`; the original stays as it was."""
    name, _, rest = path.partition(".")
    changed = copy.copy(config)
    if rest:
        value = with_path(getattr(config, name), rest, value)
    object.__setattr__(changed, name, value)
    return changed


CHANGES = [
    ("model_config.dtype", torch.bfloat16),
    ("model_config.quantization", "fp8"),
    ("model_config.hf_overrides", {"rope_theta": 1e6}),
    ("model_config.hf_config_path", "elsewhere"),
    ("model_config.model_impl", "transformers"),
    ("cache_config.cache_dtype", "fp8_e5m2"),
    ("cache_config.prefix_caching_hash_algo", "sha256_cbor"),
    ("load_config.load_format", "dummy"),
    ("parallel_config.tensor_parallel_size", 2),
    ("parallel_config.pipeline_parallel_size", 2),
]


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=[path for path, _ in CHANGES])
def test_another_value_is_another_namespace(made: Any, path: str, value: Any) -> None:
    caches = cache_config(made)
    before = names(made, caches)[0, 0]
    after = names(with_path(made, path, value), caches)[0, 0]
    assert before.digest != after.digest


CACHE_CHANGES: list[tuple[str, Callable[[Any], Any]]] = [
    ("block size", lambda c: cache_config(c, [dataclasses.replace(full(), block_size=64)])),
    ("layers", lambda c: cache_config(c, layers=2)),
    ("heads", lambda c: cache_config(c, [full(heads=1)])),
    ("kind", lambda c: cache_config(c, [window()])),
    ("window in a full group", lambda c: cache_config(c, [full(sliding_window=64)])),
    ("hash unit", lambda c: _with(cache_config(c), hash_block_size=16)),
    ("layout", lambda c: _with(cache_config(c), kv_cache_layout="BLHNC")),
    ("number of groups", lambda c: cache_config(c, [full(), window()])),
]


def _with(caches: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        setattr(caches, name, value)
    return caches


@pytest.mark.parametrize(
    "change", [change for _, change in CACHE_CHANGES], ids=[name for name, _ in CACHE_CHANGES]
)
def test_another_cache_is_another_namespace(made: Any, change: Callable[[Any], Any]) -> None:
    assert names(made)[0, 0].digest != names(made, change(made))[0, 0].digest


def test_windows_of_other_sizes_are_other_namespaces(made: Any) -> None:
    found = {
        names(made, cache_config(made, [full(), window(size)]))[0, 1].digest for size in (64, 128)
    }
    assert len(found) == 2


def test_ranks_and_groups_have_namespaces_of_their_own(made: Any) -> None:
    config = with_path(made, "parallel_config.tensor_parallel_size", 2)
    config = with_path(config, "parallel_config.pipeline_parallel_size", 2)
    found = names(config, cache_config(config, [full(), window()]))
    assert found.keys() == {(rank, group) for rank in range(4) for group in range(2)}
    assert len({name.digest for name in found.values()}) == 8
    assert (found[3, 0].tp_rank, found[3, 0].pp_rank) == (1, 1)


def test_another_seed_of_hashes_is_another_namespace(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [names(made)[0, 0].digest]
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(names(made)[0, 0].digest)
    assert len(set(found)) == 3


def test_another_attention_backend_is_another_namespace(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(made)[0, 0]
    assert "CPU_ATTN" in before.layout
    monkeypatch.setattr(namespaces, "_backends", lambda *_: ["FLASHINFER"])
    assert names(made)[0, 0].digest != before.digest


def test_the_seed_of_dummy_weights_counts_and_else_does_not(made: Any) -> None:
    seeded = with_path(made, "model_config.seed", 5)
    assert names(made)[0, 0] == names(seeded)[0, 0]
    dummy = with_path(made, "load_config.load_format", "dummy")
    assert names(dummy)[0, 0] != names(with_path(dummy, "model_config.seed", 5))[0, 0]


@pytest.mark.parametrize(
    ("of_model", "counts"),
    [
        ({}, False),
        ({"rope_parameters": {"rope_type": "longrope"}}, True),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, True),
        ({"model_type": "llama4_text"}, True),
    ],
)
def test_the_longest_context_counts_where_kv_depends_on_it(
    made: Any, of_model: dict[str, Any], counts: bool
) -> None:
    text = copy.copy(made.model_config.hf_text_config)
    for name, value in of_model.items():
        setattr(text, name, value)
    config = with_path(made, "model_config.hf_text_config", text)
    caches = cache_config(made)
    longer = with_path(config, "model_config.max_model_len", 2048)
    assert (names(config, caches)[0, 0] != names(longer, caches)[0, 0]) == counts


def test_other_layers_of_the_same_sizes_are_another_namespace(made: Any) -> None:
    # As where pipeline stages are cut elsewhere.
    caches = cache_config(made)
    group = caches.kv_cache_groups[0]
    other = {name: f"{name}0" for name in group.layer_names}
    before = names(made, caches)[0, 0]
    group.layer_names[:] = other.values()
    for tensor in caches.kv_cache_tensors:
        tensor.layers = [other[name] for name in tensor.layers]
    after = names(made, caches)[0, 0]
    assert before.spec == after.spec
    assert before.digest != after.digest


def test_the_draft_model_counts(made: Any, model: Path) -> None:
    class Draft:
        method = "eagle3"
        draft_model_config = with_path(made, "model_config.model", str(model)).model_config

    drafted = with_path(made, "speculative_config", Draft())
    assert names(made)[0, 0] != names(drafted)[0, 0]
    assert "eagle3" in names(drafted)[0, 0].revision


def test_the_model_is_its_weights_wherever_they_lie(made: Any, model: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "copy")
    moved = with_path(made, "model_config.model", str(copied))
    assert names(made) == names(moved)
    weights = next(copied.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert names(made)[0, 0] != names(moved)[0, 0]


def test_who_names_the_model_answers_for_it(made: Any, model: Path, tmp_path: Path) -> None:
    settings = AdapterSettings(address="unix:/nowhere/s", model="ours-v2")
    found = names(made, settings=settings)[0, 0]
    assert found.model == "ours-v2"
    elsewhere = with_path(made, "model_config.model", str(tmp_path))  # no weights here
    assert names(elsewhere, settings=settings)[0, 0] == found


def test_a_namespace_can_be_read_by_people(made: Any) -> None:
    found = names(made)[0, 0]
    assert found.model == "LlamaForCausalLM"
    assert found.spec == BlockSpec.of_bytes(3 * PAGE_BYTES)
    assert found.hash_algorithm == "vllm_sha256"
    for part in ("vllm LBHNC", "CPU_ATTN", "group 0 of 1", "float32", "kv auto", "num_kv_heads=2"):
        assert part in found.layout


def test_other_processes_have_the_same_namespaces(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from tests.adapters.vllm.configs import cache_config, full, vllm_config, window\n"
        "from kvstore_adapters.settings import AdapterSettings\n"
        "from kvstore_adapters.vllm.namespaces import namespaces_of\n"
        "config = vllm_config(Path(sys.argv[1]))\n"
        "caches = cache_config(config, [full(), window()])\n"
        "made = namespaces_of(config, caches, AdapterSettings(address='unix:/other/s'))\n"
        "print('found', json.dumps([name.describe() for name in made.values()]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(model)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        check=True,
        timeout=110,
    )
    line = next(part for part in done.stdout.decode().splitlines() if part.startswith("found "))
    there = [Namespace.from_description(part) for part in json.loads(line.removeprefix("found "))]
    config = vllm_config(model)
    here = names(config, cache_config(config, [full(), window()]))
    assert there == list(here.values())


# --- what workers tell


def test_what_workers_tell_arrives_as_it_was(made: Any) -> None:
    config = with_path(made, "parallel_config.tensor_parallel_size", 2)
    found = names(config, cache_config(config, [full(), window()]))
    content = {
        (0, rank): pickle.loads(pickle.dumps(ShardNames.of(found, rank)))  # noqa: S301
        for rank in range(2)
    }
    assert namespaces_told(content) == found
    assert namespaces_told({(0, 0): object()}) == {}


def test_a_workers_rank_is_its_place_in_the_model(made: Any) -> None:
    config = with_path(made, "parallel_config.tensor_parallel_size", 2)
    for rank, place in ((0, 0), (1, 1), (3, 1)):  # of a second data-parallel engine
        assert own_rank(with_path(config, "parallel_config.rank", rank)) == place


def test_of_ranks_with_the_same_kv_one_writes(made: Any) -> None:
    config = with_path(made, "parallel_config.tensor_parallel_size", 4)
    caches = _with(cache_config(config, [latent()]), kv_tp_replicas=4)
    found = names(config, caches)
    assert len(set(found.values())) == 1
    assert (found[3, 0].tp_rank, found[3, 0].tp_size) == (0, 1)
    assert [is_writer(caches, config, rank) for rank in range(4)] == [True, False, False, False]
    caches.kv_tp_replicas = 2
    assert [name.tp_rank for name in names(config, caches).values()] == [0, 0, 1, 1]


# --- groups


def latent() -> Any:
    return MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)


def test_groups_are_taken_from_the_specs(made: Any) -> None:
    chunked = ChunkedLocalAttentionSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32, attention_chunk_size=256
    )
    caches = cache_config(made, [full(), window(128), chunked])
    assert groups_of(caches) == (
        Group(0, 32, "full"),
        Group(1, 32, "window", 128),
        Group(2, 32, "window", 256),
    )
    assert groups_of(cache_config(made, [latent()])) == (Group(0, 32, "full"),)
    retained = window(128, extra_retained_tokens=3)
    assert groups_of(cache_config(made, [retained])) == (Group(0, 32, "window", 131),)


def test_layers_of_several_sizes_in_one_group_are_added_up(made: Any) -> None:
    specs = {f"group0.layer{i}": full(heads=i + 1) for i in range(3)}
    uniform = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=specs)
    config = with_path(made, "cache_config.kv_cache_layout", "BLHNC")
    caches = cache_config(config, [uniform])
    assert groups_of(caches) == (Group(0, 32, "full"),)
    assert names(config, caches)[0, 0].spec.block_bytes == (1 + 2 + 3) * PAGE_BYTES // 2


def test_layers_that_share_the_kv_of_others_are_left_out(made: Any) -> None:
    caches = cache_config(made)
    caches.kv_cache_groups[0].layer_names.append("shares.another")
    assert list(layers_of(caches, 0)) == [f"group0.layer{i}" for i in range(3)]
    assert names(made, caches) == names(made)


def test_what_cannot_be_kept_is_refused_by_name(made: Any) -> None:
    mamba = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
    caches = cache_config(made)
    caches.kv_cache_groups[0].kv_cache_spec = mamba
    with pytest.raises(ConfigError, match=r"group 0.*mamba"):
        groups_of(caches)
    for path, value, said in (
        ("parallel_config.decode_context_parallel_size", 2, "decode_context_parallel_size"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill_context_parallel_size"),
        ("cache_config.prefix_caching_hash_algo", "xxhash", "xxhash.*sha256"),
        ("cache_config.calculate_kv_scales", True, "calculate_kv_scales"),
    ):
        with pytest.raises(ConfigError, match=said):
            names(with_path(made, path, value), cache_config(made))


def test_the_configurations_here_are_the_sizes_that_tests_count_with(made: Any) -> None:
    assert full().page_size_bytes == PAGE_BYTES
    assert cache_config(made).num_blocks == configs.NUM_BLOCKS

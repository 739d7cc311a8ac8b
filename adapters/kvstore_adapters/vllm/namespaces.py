"""From vLLM's configuration to what names a block's bytes: groups, and a Namespace each rank and
group.

vLLM's block hashes cover tokens, LoRA, images and salts, and nothing of the model or of how its KV
lies in memory: all that is here. `kvstore inspect` shows the texts, so they are made to be read.

Some of it only a worker knows for certain: which attention backend was chosen, what the layers of
its pipeline stage are. So workers tell the scheduler their namespaces (`ShardNames`), and what the
scheduler works out for itself serves until then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.v1.kv_cache_interface import KVCacheSpecKind, get_kv_cache_spec_kind

from kvstore import BlockSpec, ConfigError, Namespace
from kvstore_adapters.identity import model_identity
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.settings import AdapterSettings

Key = tuple[int, int]  # rank, group

_HASHES = {"sha256": "vllm_sha256", "sha256_cbor": "vllm_sha256_cbor"}

# Of a layer's spec: what changes neither its bytes nor what they mean.
_SPEC_SILENT = frozenset(
    ("block_stride_alignment", "is_index_group_leader", "kv_cache_specs", "max_tp_shards")
)


@dataclass
class ShardNames(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler: its shards, as (rank, group, description)."""

    shards: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)

    @classmethod
    def of(cls, namespaces: Mapping[Key, Namespace], rank: int) -> ShardNames:
        own = {group: name for (r, group), name in namespaces.items() if r == rank}
        return cls([(rank, group, name.describe()) for group, name in own.items()])


def namespaces_told(content: Mapping[tuple[int, int], object]) -> dict[Key, Namespace]:
    """Return what all workers told; `content` as vLLM hands it to the scheduler side."""
    return {
        (rank, group_id): Namespace.from_description(description)
        for names in content.values()
        if isinstance(names, ShardNames)
        for rank, group_id, description in names.shards
    }


def own_rank(vllm_config: Any) -> int:
    """Return a worker's place among the ranks of `namespaces_of`."""
    parallel = vllm_config.parallel_config
    size = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
    return int(parallel.rank) % size


def is_writer(kv_cache_config: Any, vllm_config: Any, rank: int) -> bool:
    """Whether a rank saves its blocks: not where another rank holds the same ones."""
    tp_rank = rank % int(vllm_config.parallel_config.tensor_parallel_size)
    return tp_rank % int(kv_cache_config.kv_tp_replicas) == 0


def groups_of(kv_cache_config: Any) -> tuple[Group, ...]:
    """Return the groups whose blocks are kept.

    Raises:
        ConfigError: the model has layers whose state cannot be found by a prefix's hashes.
    """
    if getattr(kv_cache_config, "hisparse_host_num_blocks", None) is not None:
        raise ConfigError("hisparse: its host pool numbers blocks of its own; not supported")
    kept = set(kv_cache_config.prefix_cacheable_group_ids)
    groups = []
    for group_id in kv_cache_config.transfer_group_ids:
        spec = kv_cache_config.kv_cache_groups[group_id].kv_cache_spec
        kind = get_kv_cache_spec_kind(spec)
        window = _window_of(kind, _first_spec(spec))
        if window is None or group_id not in kept:
            raise ConfigError(
                f"kv cache group {group_id}: layers of the kind {kind.value} cannot be kept; full, "
                "latent (MLA), sliding-window and chunked local attention can"
            )
        groups.append(Group(group_id, int(spec.block_size), "window" if window else "full", window))
    if not groups:
        raise ConfigError("kv cache groups: the model has none that can be kept")
    return tuple(groups)


def _window_of(kind: KVCacheSpecKind, spec: Any) -> int | None:
    """Return the tokens of a group's window, 0 for full attention, None for what is neither."""
    if kind in (KVCacheSpecKind.FULL_ATTENTION, KVCacheSpecKind.MLA_ATTENTION):
        return None if hasattr(spec, "rswa_window") else 0
    if kind in (KVCacheSpecKind.SLIDING_WINDOW, KVCacheSpecKind.SLIDING_WINDOW_MLA):
        return int(spec.sliding_window) + int(getattr(spec, "extra_retained_tokens", 0))
    if kind is KVCacheSpecKind.CHUNKED_LOCAL_ATTENTION:
        return int(spec.attention_chunk_size)  # more than needed, but for the last token of a chunk
    return None


def _first_spec(spec: Any) -> Any:
    """A group of layers of one kind and several sizes has a spec for each layer."""
    return next(iter(getattr(spec, "kv_cache_specs", {"": spec}).values()))


def layers_of(kv_cache_config: Any, group_id: int) -> dict[str, Any]:
    """Return the specs of the layers that have memory of their own in a group, by name, in order.

    Layers that share another's KV are left out: its bytes are theirs.
    """
    group = kv_cache_config.kv_cache_groups[group_id]
    spec = group.kv_cache_spec
    single = getattr(spec, "kv_cache_specs", {})
    placed = {name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers}
    return {name: single.get(name, spec) for name in group.layer_names if name in placed}


def page_bytes(spec: Any) -> int:
    """Return the bytes of one layer of a block, without what pads it."""
    return int(getattr(spec, "unpadded_page_size_bytes", spec.page_size_bytes))


def namespaces_of(
    vllm_config: Any, kv_cache_config: Any, settings: AdapterSettings
) -> dict[Key, Namespace]:
    """Return the namespaces of all ranks' shards. Those of other pipeline stages than our own are
    guesses, see above.

    Raises:
        ConfigError: the model, or the way it runs, is not supported; the message says what.
    """
    _check(vllm_config)
    groups = groups_of(kv_cache_config)
    parallel = vllm_config.parallel_config
    replicas = int(kv_cache_config.kv_tp_replicas)
    tp_size = int(parallel.tensor_parallel_size)
    pp_size = int(parallel.pipeline_parallel_size)
    model, revision = model_of(vllm_config, settings)
    made = {}
    for group in groups:
        layers = layers_of(kv_cache_config, group.group_id)
        spec = BlockSpec.of_bytes(sum(page_bytes(layer) for layer in layers.values()))
        layout = _layout(vllm_config, kv_cache_config, group, layers)
        for rank in range(tp_size * pp_size):
            made[rank, group.group_id] = Namespace(
                model=model,
                spec=spec,
                revision=revision,
                layout=layout,
                # Ranks that hold the same KV have one shard.
                tp_rank=rank % tp_size // replicas,
                tp_size=tp_size // replicas,
                pp_rank=rank // tp_size,
                pp_size=pp_size,
                hash_algorithm=_HASHES[vllm_config.cache_config.prefix_caching_hash_algo],
            )
    return made


def _check(vllm_config: Any) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name}: {getattr(parallel, name)} is not supported, only 1")
    if cache.prefix_caching_hash_algo not in _HASHES:
        raise ConfigError(
            f"prefix_caching_hash_algo: {cache.prefix_caching_hash_algo!r} does not name blocks "
            f"for good; use one of {', '.join(_HASHES)}"
        )
    if getattr(cache, "calculate_kv_scales", False):
        raise ConfigError(
            "calculate_kv_scales: scales are other ones in every process, so blocks cannot be kept"
        )


def model_of(vllm_config: Any, settings: AdapterSettings) -> tuple[str, str]:
    """Return the model's name, and as its revision all that makes its KV other than the weights'
    alone."""
    model = vllm_config.model_config
    name, revision = settings.model, ""
    if not name:
        name, revision = model_identity(model.model_weights or model.model, model.revision)
    said = [revision] if revision else []
    if vllm_config.load_config.load_format == "dummy":
        said.append(f"dummy weights of seed {model.seed}")
    if model.quantization:
        said.append(f"quantization {model.quantization}")
    said += _changes(model)
    said += _lengths(model)
    draft = vllm_config.speculative_config
    if draft is not None:  # its layers keep their KV in the same blocks
        config = getattr(draft, "draft_model_config", None)
        where = model_identity(config.model, config.revision) if config is not None else ("", "")
        said.append(" ".join(filter(None, ("draft", str(draft.method), *where))))
    return name, ", ".join(said)


def _changes(model: Any) -> Sequence[str]:
    """What the user changed of a checkpoint's own configuration."""
    said = []
    for name in ("hf_config_path", "code_revision", "model_impl"):
        value = getattr(model, name, None)
        if value and value != "auto":
            said.append(f"{name} {value}")
    for name in ("hf_overrides", "quantization_config"):
        value = getattr(model, name, None)
        if value:
            said.append(f"{name} {_digest(value)}")
    return said


def _lengths(model: Any) -> Sequence[str]:
    """The longest context, where models compute other KV by it: LongRoPE takes its long factors for
    all positions once the engine allows long contexts, and Llama 4 tunes its attention so."""
    text = getattr(model, "hf_text_config", None)
    kind = str(getattr(text, "model_type", ""))
    rope = (getattr(text, "rope_parameters", None), getattr(text, "rope_scaling", None))
    said = []
    if kind.startswith("llama4") or any(name in str(rope) for name in ("longrope", "'su'")):
        said.append(f"max_model_len {model.max_model_len}")
    if kind.startswith("llama4"):
        chosen = (model.generation_config, model.override_generation_config)
        said.append(f"generation {_digest(chosen)}")
    return said


def _digest(value: object) -> str:
    """The same for equal values in every process."""
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    """Of objects without a JSON form: their fields, or else their text. With an address in it every
    process has a namespace of its own, which shares nothing, and is never wrong."""
    return getattr(value, "__dict__", None) or str(value)


def _layout(vllm_config: Any, kv_cache_config: Any, group: Group, layers: Mapping[str, Any]) -> str:
    """What the bytes of a block are."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import DEFAULT_NONE_HASH_SEED, resolve_none_hash_seed

    cache = vllm_config.cache_config
    said = [
        f"vllm {kv_cache_config.kv_cache_layout or 'default'}",
        "+".join(_backends(vllm_config, list(layers))),
        f"group {group.group_id} of {len(kv_cache_config.kv_cache_groups)}",
        f"{vllm_config.model_config.dtype}".removeprefix("torch."),
        f"kv {cache.cache_dtype}",
        f"hashes of {kv_cache_config.hash_block_size or group.block_tokens} tokens",
        # As many layers are as many bytes, whichever of a pipeline's they are.
        f"layers {_digest(list(layers))}",
    ]
    seed = resolve_none_hash_seed(get_hash_fn_by_name(cache.prefix_caching_hash_algo))
    if seed != DEFAULT_NONE_HASH_SEED:
        said.append(f"hash seed {_digest(seed)}")
    kinds = dict.fromkeys(_spec_text(spec) for spec in layers.values())
    return ", ".join([*said, *kinds])


def _backends(vllm_config: Any, layer_names: list[str]) -> list[str]:
    """Return the names of the attention backends of some layers: what lies in a page is theirs."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends

    try:
        backends = get_current_attn_backends(vllm_config, layer_names)
    except Exception:  # noqa: BLE001  where no layers are, as in the scheduler's process
        return ["unknown backend"]
    return sorted({str(backend.get_name()) for backend in backends})


def _spec_text(spec: Any) -> str:
    values = {declared.name: getattr(spec, declared.name, None) for declared in fields(spec)}
    said = [
        f"{name}={getattr(value, 'name', value)}"
        for name, value in values.items()
        if name not in _SPEC_SILENT and value not in (None, False)
    ]
    return f"{type(spec).__name__}({', '.join(said)})"

"""What SGLang's process says of itself: settings, model, and what happens on the way.

Everything that reads SGLang's own configuration is here.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvstore_adapters.identity import model_identity
from kvstore_adapters.settings import AdapterSettings
from kvstore_adapters.sglang.keys import Model

# SGLang's own keys in the extra config of a `dynamic` backend; it takes others out before we see
# them.
_SGLANG_KEYS = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "allocator",
        "file_storage_path",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
    }
)
_SAMPLES_MAX = 1024


def settings_of(extra_config: Mapping[str, Any]) -> AdapterSettings:
    """Our settings in SGLang's extra config.

    Raises:
        ConfigError: a key is neither ours nor SGLang's, or a value is wrong.
    """
    return AdapterSettings.of(
        {name: value for name, value in extra_config.items() if name not in _SGLANG_KEYS}
    )


def model_of(name: str | None, settings: AdapterSettings) -> Model:
    """What model this process serves, by SGLang's configuration in effect.

    `name` is what SGLang calls it towards storage: the name it is served by, which says nothing of
    its weights, and a suffix where its pages have a format of their own. Another name than that is
    taken as it is.

    Raises:
        ConfigError: the model's weights cannot be told from others; the setting `model` can do it.
    """
    from sglang.srt.runtime_context import get_lora, get_model, get_serving, get_spec

    try:
        model, serving, spec, lora = get_model(), get_serving(), get_spec(), get_lora()
    except ValueError:  # outside of an engine
        return Model(settings.model or name or "unnamed", "", "", "")
    label = (name or "").removeprefix(serving.served_model_name or model.model_path)
    identity, revision = settings.model, ""
    if not identity:
        identity, revision = model_identity(model.model_path, model.revision)
    ways = {"label": label, "weight_version": serving.weight_version}
    ways |= {field: getattr(model, field, None) for field in _WAYS_TO_COMPUTE}
    if str(model.load_format) not in _AS_THEY_LIE:
        ways["load_format"] = str(model.load_format)
    ways["lora_paths"] = _adapters(lora.lora_paths or ())
    described = ";".join(f"{field}={value}" for field, value in ways.items() if value)
    draft = spec.speculative_draft_model_path
    return Model(
        name=identity,
        revision=";".join(filter(None, (revision, described))),
        kv_dtype=str(model.kv_cache_dtype),
        draft="/".join(model_identity(draft, spec.speculative_draft_model_revision))
        if draft
        else "",
    )


# Of one checkpoint, these make other KV.
_WAYS_TO_COMPUTE = (
    "dtype",
    "quantization",
    "json_model_override_args",
    "quantization_param_path",
    "modelopt_quant",
    "rl_quant_profile",
    "custom_weight_loader",
)
# Ways to load that take weights as they are; others make them up ("dummy") or quantise them.
_AS_THEY_LIE = frozenset(
    {
        "auto",
        "pt",
        "safetensors",
        "instanttensor",
        "npcache",
        "sharded_state",
        "presharded",
        "mistral",
        "layered",
        "remote",
        "remote_instance",
        "rdma",
        "local_cached",
        "fastsafetensors",
        "runai_streamer",
        "ipc_cache",
    }
)


def _adapters(references: Iterable[Any]) -> str:
    """The content of the LoRA adapters that SGLang was started with: it names their pages by what
    the adapters are called and where they lie. Those that are loaded later have a name of their
    own each time.

    Raises:
        ConfigError: an adapter cannot be read.
    """
    digest = hashlib.sha256()
    references = sorted(references, key=lambda one: str(one.lora_name))
    for one in references:
        parts = [str(one.lora_name), *model_identity(str(one.lora_path))]
        with contextlib.suppress(OSError):  # of a hub
            parts.append((Path(one.lora_path) / "adapter_config.json").read_text())
        digest.update(repr(parts).encode())
    return digest.hexdigest()[:32] if references else ""


class TransferMetrics:
    """Samples for SGLang's storage metrics: pages and GB/s of each batch since the last take."""

    def __init__(self, is_enabled: bool) -> None:
        self._is_enabled = is_enabled
        self._loads: deque[tuple[int, float]] = deque(maxlen=_SAMPLES_MAX)
        self._puts: deque[tuple[int, float]] = deque(maxlen=_SAMPLES_MAX)

    def add_load(self, pages: int, num_bytes: int, seconds: float) -> None:
        self._add(self._loads, pages, num_bytes, seconds)

    def add_put(self, pages: int, num_bytes: int, seconds: float) -> None:
        self._add(self._puts, pages, num_bytes, seconds)

    def _add(
        self, samples: deque[tuple[int, float]], pages: int, num_bytes: int, seconds: float
    ) -> None:
        if self._is_enabled and pages:
            samples.append((pages, num_bytes / 1e9 / max(seconds, 1e-9)))

    def take(self) -> Any:
        """The samples as SGLang's StorageMetrics; None when it does not collect them."""
        if not self._is_enabled:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        loads, puts = _drain(self._loads), _drain(self._puts)
        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in loads],
            backup_pgs=[pages for pages, _ in puts],
            prefetch_bandwidth=[rate for _, rate in loads],
            backup_bandwidth=[rate for _, rate in puts],
        )


def _drain(samples: deque[tuple[int, float]]) -> list[tuple[int, float]]:
    taken = []
    while samples:  # others may append meanwhile; nobody else takes
        taken.append(samples.popleft())
    return taken

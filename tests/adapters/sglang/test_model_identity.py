"""What SGLang computes KV from, other than tokens, tells namespaces apart: also adapters that are
called the same and lie in the same place.

SGLang's configuration is made up; what is read of it is checked with real engines elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt import runtime_context

from kvstore_adapters.settings import AdapterSettings
from kvstore_adapters.sglang.runtime import model_of

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """SGLang's configuration in effect, to be changed."""
    bags: dict[str, Any] = {
        "model": SimpleNamespace(
            model_path="org/name",
            revision=None,
            kv_cache_dtype="auto",
            dtype="bfloat16",
            load_format="auto",
        ),
        "serving": SimpleNamespace(served_model_name="org/name", weight_version="default"),
        "spec": SimpleNamespace(
            speculative_draft_model_path=None, speculative_draft_model_revision=None
        ),
        "lora": SimpleNamespace(lora_paths=[]),
    }
    for name, bag in bags.items():
        monkeypatch.setattr(runtime_context, f"get_{name}", lambda bag=bag: bag)
    return bags


def revision() -> str:
    return model_of("org/name", AdapterSettings.of({"model": "m"})).revision


def test_ways_to_load_count_where_they_change_weights(config: dict[str, Any]) -> None:
    plain = revision()
    config["model"].load_format = "safetensors"
    assert revision() == plain
    seen = {plain}
    for field, value in (
        ("load_format", "dummy"),
        ("load_format", "bitsandbytes"),
        ("modelopt_quant", "fp8"),
        ("quantization", "fp8"),
        ("json_model_override_args", '{"rope_theta": 1}'),
    ):
        config["model"].load_format = "auto"
        setattr(config["model"], field, value)
        seen.add(revision())
        setattr(config["model"], field, None)
    assert len(seen) == 6


def test_adapters_count_by_their_content(config: dict[str, Any], tmp_path: Path) -> None:
    weights, settings = tmp_path / "adapter_model.bin", tmp_path / "adapter_config.json"
    weights.write_bytes(b"one")
    settings.write_text('{"lora_alpha": 16}')
    plain = revision()
    config["lora"].lora_paths = [SimpleNamespace(lora_name="a", lora_path=str(tmp_path))]
    first = revision()
    weights.write_bytes(b"two")
    second = revision()
    settings.write_text('{"lora_alpha": 32}')
    assert len({plain, first, second, revision()}) == 4

"""Hugging Face checkpoint directories of Llama, Qwen2 and Qwen3, and random ones of a named size.

Whatever this decoder would compute wrongly (an unknown rope type, a sliding window, quantised
weights, a tensor it has no place for) is refused by name: a reference that is quietly wrong is
worse than none.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from kvstore import ConfigError, IncompatibleError

from . import safetensors

FAMILIES = ("llama", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COUNT_MAX = (
    1 << 24
)  # no dimension of a real model is larger; keeps a foreign config from allocating

# hidden, intermediate, layers, heads, kv heads; head_dim is 64. About 0.15 (for tests of other
# things than numbers), 3, 23 and 100 million parameters.
SIZES = {
    "nano": (64, 160, 2, 2, 1),
    "tiny": (256, 704, 4, 4, 2),
    "small": (512, 1408, 8, 8, 2),
    "medium": (768, 2048, 16, 12, 4),
}
BYTE_VOCABULARY = 258  # 256 bytes, then beginning and end of text (tokenizer.py)


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's stretch of the long wavelengths (arXiv 2407.21783, section 3.4.1, and the released
    config.json).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class ModelConfig:
    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions_max: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    dtype: torch.dtype
    end_token_ids: frozenset[int]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model, by its Hugging Face name without the leading `model.`."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (query, self.hidden),
            "self_attn.k_proj.weight": (key, self.hidden),
            "self_attn.v_proj.weight": (key, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, query),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }
        if self.qkv_bias:
            layer |= {"self_attn.q_proj.bias": (query,)}
            layer |= {"self_attn.k_proj.bias": (key,), "self_attn.v_proj.bias": (key,)}
        if self.output_bias:
            layer |= {"self_attn.o_proj.bias": (self.hidden,)}
        if self.qk_norm:
            layer |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, self.hidden)}
        for index in range(self.layers):
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes["norm.weight"] = (self.hidden,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden)
        return shapes


@dataclass(frozen=True)
class Checkpoint:
    config: ModelConfig
    weights: dict[str, torch.Tensor]
    directory: Path | None = None

    def on(self, device: str) -> Checkpoint:
        """The same with its weights on a device of torch's."""
        if device == "cpu":
            return self
        weights = {name: tensor.to(device) for name, tensor in self.weights.items()}
        return Checkpoint(self.config, weights, self.directory)

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every weight: names the model where nothing else does.
        Reads them all.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for name in sorted(self.weights):
            digest.update(name.encode() + b"\0")
            digest.update(safetensors.bytes_of(self.weights[name]))
        return digest.hexdigest()


def load(directory: str | Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """Read a checkpoint directory, in `dtype` or else in the dtype that its config names."""
    directory = Path(directory)
    config = parse_config(_read_json(directory / "config.json"), dtype)
    tensors: dict[str, torch.Tensor] = {}
    for file in _shards(directory):
        for name, tensor in safetensors.read(file).items():
            tensors[name.removeprefix("model.")] = tensor.to(config.dtype)
    return Checkpoint(config, _checked(directory, config, tensors), directory)


def make_random(
    directory: str | Path | None = None,
    size: str = "tiny",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """A seeded random Llama over bytes, kept in memory, and written as a real checkpoint where
    `directory` is given.

    The weights are far larger than a training run would start with: with the usual small ones
    attention hardly moves the output, and a cache that returns wrong KV would go unnoticed.
    """
    if size not in SIZES:
        raise ConfigError(f"size: {size!r} is not one of {', '.join(SIZES)}")
    raw = _random_config(size, dtype)
    config = parse_config(raw, dtype)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=dtype)
        else:
            gain = 1.0 if name == "embed_tokens.weight" else 2.4 / math.sqrt(shape[1])
            weights[name] = (torch.randn(shape, generator=generator) * gain).to(dtype)
    if directory is None:
        return Checkpoint(config, weights)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    prefixed = {n if n == "lm_head.weight" else f"model.{n}": t for n, t in weights.items()}
    safetensors.write(directory / "model.safetensors", prefixed)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return Checkpoint(config, weights, directory)


def parse_config(raw: dict[str, Any], dtype: torch.dtype | None = None) -> ModelConfig:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise IncompatibleError(f"model_type: {family!r} is not one of {', '.join(FAMILIES)}")
    _refuse_unsupported(raw)
    hidden, heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters: {rope!r} is not an object")
    bias = bool(raw.get("attention_bias", False)) and family != "qwen2"
    ends = raw.get("eos_token_id")
    config = ModelConfig(
        family=family,
        vocab_size=_count(raw, "vocab_size"),
        hidden=hidden,
        intermediate=_count(raw, "intermediate_size"),
        layers=_count(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=_count(raw, "num_key_value_heads", heads),
        head_dim=_count(raw, "head_dim", hidden // heads),
        positions_max=_count(raw, "max_position_embeddings", 2048),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=_number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        qk_norm=family == "qwen3",
        dtype=dtype or _dtype(raw),
        end_token_ids=frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends]),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ConfigError(
            "num_attention_heads must be a multiple of num_key_value_heads, head_dim even"
        )
    return config


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise IncompatibleError(f"hidden_act: {raw['hidden_act']!r} is not supported, only 'silu'")
    for name in ("quantization_config", "use_sliding_window", "mlp_bias"):
        if raw.get(name):
            raise IncompatibleError(f"{name}: not supported")
    for kind in raw.get("layer_types") or ():
        if kind != "full_attention":
            raise IncompatibleError(f"layer_types: {kind!r} is not supported")


def _rope_scaling(rope: dict[str, Any]) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise IncompatibleError("partial_rotary_factor: not supported")
    if kind == "default":
        return None
    if kind != "llama3":
        raise IncompatibleError(f"rope_type: {kind!r} is not supported, only default and llama3")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if not low < high:
        raise ConfigError("low_freq_factor: must be below high_freq_factor")
    original = _count(rope, "original_max_position_embeddings")
    return Llama3Rope(_number(rope, "factor"), low, high, original)


def _dtype(raw: dict[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise IncompatibleError(f"dtype: {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _count(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= COUNT_MAX:
        raise ConfigError(f"{name}: {value!r} is not a count from 1 to {COUNT_MAX}")
    return value


def _number(raw: dict[str, Any], name: str, default: float | None = None) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name}: {value!r} is not a positive number")
    return float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"not a checkpoint directory: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IncompatibleError(f"{path}: not JSON") from error
    if not isinstance(value, dict):
        raise IncompatibleError(f"{path}: not a JSON object")
    return value


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise IncompatibleError(f"{index}: no weight_map of file names")
    for name in names.values():
        if Path(name).name != name:
            raise IncompatibleError(f"{index}: {name!r} is not a file name")
    return [directory / name for name in sorted(set(names.values()))]


def _checked(
    directory: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    def refuse(why: str) -> NoReturn:
        raise IncompatibleError(f"{directory}: the weights do not fit config.json: {why}")

    shapes = config.tensor_shapes()
    if config.tied_embeddings:
        tensors.pop("lm_head.weight", None)  # some writers store the tied copy as well
    for name, shape in shapes.items():
        if name not in tensors:
            refuse(f"no tensor {name!r}")
        if tuple(tensors[name].shape) != shape:
            refuse(f"{name!r} is {tuple(tensors[name].shape)}, not {shape}")
    for name in tensors.keys() - shapes.keys():
        if not name.endswith("rotary_emb.inv_freq"):  # derived, stored by old versions
            refuse(f"no place for tensor {name!r}")
    return {name: tensors[name] for name in shapes}


def _random_config(size: str, dtype: torch.dtype) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": BYTE_VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }

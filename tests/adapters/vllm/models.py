"""Random models that only vLLM's tests need, as Hugging Face checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from kvstore_adapters.reference import safetensors, tokenizer

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 4, 4, 2, 64
WINDOW = 128


def write_sliding_window(directory: Path) -> Path:
    """A Gemma 3 of 3 million parameters in which every second layer sees the last 128 tokens only:
    two groups of KV caches.
    """
    directory.mkdir(parents=True)
    safetensors.write(directory / "model.safetensors", _weights(torch.Generator().manual_seed(0)))
    tokenizer.write(directory)
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 258,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in (("sliding_attention", 1e4), ("full_attention", 1e6))
        },
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.BEGIN_ID,
        "eos_token_id": tokenizer.END_ID,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    norms = {
        f"{where}_layernorm": HIDDEN
        for where in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    } | {"self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
    # Gemma multiplies by 1 + weight. Its embeddings are scaled up by sqrt(hidden) as they are read.
    weights = {
        "model.embed_tokens.weight": torch.randn(258, HIDDEN, generator=generator)
        / math.sqrt(HIDDEN),
        "model.norm.weight": torch.zeros(HIDDEN),
    }
    for layer in range(LAYERS):
        for name, (rows, columns) in shapes.items():
            gain = 2.4 / math.sqrt(columns)
            drawn = torch.randn(rows, columns, generator=generator) * gain
            weights[f"model.layers.{layer}.{name}.weight"] = drawn
        for name, size in norms.items():
            # What layers add must outweigh the embedding, which would else name itself as the
            # next token whatever came before: it is the output's matrix too.
            weight = torch.full((size,), 15.0 if name.startswith("post") else 0.0)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    return weights

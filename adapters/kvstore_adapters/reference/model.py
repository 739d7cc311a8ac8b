"""The decoder of the Llama family (RMSNorm, RoPE, grouped-query attention, SwiGLU) over paged KV.

The KV pool is `[pages, layers, 2, page_tokens, kv_heads, head_dim]`: one page is one canonical
kvstore block.

Same bits in every mode. A token's KV and logits must not depend on how its prompt was cut into
chunks, which other sequences ran beside it, or whether its prefix was computed here, loaded, or
generated one token at a time: only then does a cache hit give the very tokens of a cold run. Matrix
libraries choose kernels by shape, and their last bits differ (on an AVX-512 machine fp32 rows
differ between fewer than four rows and more; attention differs with the number of queries and of
keys). So every kernel that sums is called with one shape only:
  * linear layers run on ROW_TILE rows at a time, the last tile padded;
  * attention runs on QUERY_TILE queries whose positions start at a multiple of QUERY_TILE, over
    keys from 0 to the end of that tile rounded up to KEY_TILE, masked beyond each query: shapes
    depend on the position alone.
Against one large product this costs about 1.7x in prefill, and one decoding sequence pays for 16
rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from .checkpoint import Checkpoint, ModelConfig

Bytes = npt.NDArray[np.uint8]

ROW_TILE = 16
QUERY_TILE = 8
KEY_TILE = 64


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence: its tokens at positions start, start + 1, ...

    REQUIRES: the KV of all positions before `start` is in `pages`, which have room for the chunk as
    well.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class Model:
    """Weights and a KV pool. Not thread-safe, but others may read a layer after `on_layer`."""

    def __init__(self, checkpoint: Checkpoint, pool: Tensor) -> None:
        self.config = checkpoint.config
        self.pool = pool
        self._weights = checkpoint.weights
        positions = min(self.config.positions_max, pool.shape[0] * pool.shape[3])
        angles = torch.outer(torch.arange(positions).float(), _inverse_frequencies(self.config))
        self._cos = angles.cos().to(pool).unsqueeze(1)
        self._sin = angles.sin().to(pool).unsqueeze(1)

    def forward(
        self,
        batch: Sequence[Chunk],
        on_layer: Callable[[int], None] | None = None,
        before_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Run the chunks, put their KV in the pool, and return their last tokens' float32 logits.

        The logits are `[len(batch), vocab]`.

        `on_layer(layer)` is called as soon as that layer's KV of the whole batch is in the pool;
        `before_layer(layer)` before that layer of the pool is read, so the KV of earlier positions
        may come as late as that. What it raises ends the forward, whose chunks may be run again.
        """
        with torch.inference_mode():
            return self._forward(
                batch, on_layer or (lambda layer: None), before_layer or (lambda layer: None)
            )

    def _forward(
        self,
        batch: Sequence[Chunk],
        on_layer: Callable[[int], None],
        before_layer: Callable[[int], None],
    ) -> Tensor:
        config, device = self.config, self.pool.device
        ids = [token for chunk in batch for token in chunk.token_ids]
        positions = torch.tensor([p for chunk in batch for p in range(chunk.start, chunk.end)])
        tables = [torch.tensor(chunk.pages, device=device) for chunk in batch]
        pages = torch.tensor(
            [c.pages[p // self._page_tokens] for c in batch for p in range(c.start, c.end)],
            device=device,
        )
        slots = (positions % self._page_tokens).to(device)
        rows, padding = len(ids), -len(ids) % ROW_TILE
        cos, sin = (
            functional.pad(t[positions.to(device)], (0, 0, 0, 0, 0, padding))
            for t in (self._cos, self._sin)
        )
        x = self._weights["embed_tokens.weight"][torch.tensor(ids + [0] * padding, device=device)]
        for layer in range(config.layers):
            h = self._norm(x, layer, "input_layernorm")
            query = self._heads(h, layer, "q")
            key = self._heads(h, layer, "k")
            value = self._heads(h, layer, "v")
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            self.pool[pages, layer, 0, slots] = key[:rows]
            self.pool[pages, layer, 1, slots] = value[:rows]
            on_layer(layer)
            before_layer(layer)
            attended = self._attend(batch, tables, layer, query)
            x = x + self._linear(attended, layer, "self_attn.o_proj")
            h = self._norm(x, layer, "post_attention_layernorm")
            gated = functional.silu(self._linear(h, layer, "mlp.gate_proj"))
            x = x + self._linear(
                gated * self._linear(h, layer, "mlp.up_proj"), layer, "mlp.down_proj"
            )
        return self._logits(x, batch)

    @property
    def _page_tokens(self) -> int:
        return self.pool.shape[3]

    def _logits(self, x: Tensor, batch: Sequence[Chunk]) -> Tensor:
        ends = torch.tensor([len(chunk.token_ids) for chunk in batch]).cumsum(0) - 1
        last = functional.pad(x[ends.to(x.device)], (0, 0, 0, -len(batch) % ROW_TILE))
        last = _rms_norm(last, self._weights["norm.weight"], self.config.norm_eps)
        head = "embed_tokens.weight" if self.config.tied_embeddings else "lm_head.weight"
        return _tiled_linear(last, self._weights[head], None)[: len(batch)].float()

    def _norm(self, x: Tensor, layer: int, name: str) -> Tensor:
        return _rms_norm(x, self._weights[f"layers.{layer}.{name}.weight"], self.config.norm_eps)

    def _linear(self, x: Tensor, layer: int, name: str) -> Tensor:
        prefix = f"layers.{layer}.{name}"
        return _tiled_linear(
            x, self._weights[f"{prefix}.weight"], self._weights.get(f"{prefix}.bias")
        )

    def _heads(self, h: Tensor, layer: int, name: str) -> Tensor:
        flat = self._linear(h, layer, f"self_attn.{name}_proj")
        split = flat.view(len(flat), -1, self.config.head_dim)
        if self.config.qk_norm and name != "v":
            return self._norm(split, layer, f"self_attn.{name}_norm")
        return split

    def _attend(
        self, batch: Sequence[Chunk], tables: Sequence[Tensor], layer: int, query: Tensor
    ) -> Tensor:
        out = torch.zeros_like(query)
        row = 0
        for chunk, table in zip(batch, tables, strict=True):
            rows = slice(row, row + len(chunk.token_ids))
            out[rows] = self._attend_one(chunk, table, layer, query[rows])
            row = rows.stop
        return out.flatten(1)

    def _attend_one(self, chunk: Chunk, table: Tensor, layer: int, query: Tensor) -> Tensor:
        first = chunk.start - chunk.start % QUERY_TILE
        last = _round_up(chunk.end, QUERY_TILE)
        keys, values = (
            self._gather(table, layer, part, chunk.end, _round_up(last, KEY_TILE))
            for part in (0, 1)
        )
        aligned = query.new_zeros(last - first, *query.shape[1:])
        aligned[chunk.start - first : chunk.end - first] = query
        out = torch.empty_like(aligned)
        for begin in range(first, last, QUERY_TILE):
            tile = slice(begin - first, begin - first + QUERY_TILE)
            length = _round_up(begin + QUERY_TILE, KEY_TILE)
            at = torch.arange(begin, begin + QUERY_TILE, device=query.device)
            mask = torch.arange(length, device=query.device) <= at.unsqueeze(1)
            out[tile] = functional.scaled_dot_product_attention(
                aligned[tile].transpose(0, 1).unsqueeze(0),
                keys[:length].transpose(0, 1).unsqueeze(0),
                values[:length].transpose(0, 1).unsqueeze(0),
                attn_mask=mask,
                enable_gqa=True,
            )[0].transpose(0, 1)
        return out[chunk.start - first : chunk.end - first]

    def _gather(self, table: Tensor, layer: int, part: int, tokens: int, length: int) -> Tensor:
        """Keys (part 0) or values (1) of the first `tokens` positions, then zeros to `length`."""
        used = table[: -(-tokens // self._page_tokens)]
        room = max(length, len(used) * self._page_tokens)
        out = self.pool.new_empty(room, *self.pool.shape[4:])
        paged = out[: len(used) * self._page_tokens].view(len(used), *self.pool.shape[3:])
        torch.index_select(self.pool[:, layer, part], 0, used, out=paged)
        out[tokens:] = 0  # masked, but a stale infinity would still poison the sum
        return out


def new_bytes(count: int) -> Bytes:
    return np.zeros(count, np.uint8)


def new_pool(
    config: ModelConfig,
    num_pages: int,
    page_tokens: int,
    allocate: Callable[[int], Bytes] = new_bytes,
    device: str = "cpu",
) -> Tensor:
    """A pool of zeros; on the CPU in memory that `allocate` gives: so many bytes, all zero."""
    shape = (num_pages, config.layers, 2, page_tokens, config.kv_heads, config.head_dim)
    if device != "cpu":
        return torch.zeros(shape, dtype=config.dtype, device=device)
    memory = allocate(math.prod(shape) * config.dtype.itemsize)
    return torch.from_numpy(memory).view(config.dtype).view(shape)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tiles = torch.split(x, ROW_TILE)
    return torch.cat([functional.linear(rows, weight, bias) for rows in tiles])


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) in the halves form that Hugging Face checkpoints use."""
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def _inverse_frequencies(config: ModelConfig) -> Tensor:
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    # Short wavelengths stay, long ones are stretched by `factor`, those between are blended.
    wavelengths = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((scaling.original_positions / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return blend * plain + (1 - blend) * plain / scaling.factor

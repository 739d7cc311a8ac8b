"""Engines' layouts of paged KV as numpy arrays, each with a canonical view to compare with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockSpec
from kvstore.layout import VLLM_LAYOUTS, BlockBuffers, PagedBuffers

Array = npt.NDArray[Any]
UINTS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
DTYPES = {1: "uint8", 2: "float16", 4: "float32"}

# A layout: makes the tensors, and gives a canonical view [block, layer, part, token, head, dim] of
# the same memory, which is the model to compare with.
Made = tuple[BlockBuffers, Array, list[Array]]
Layout = Callable[[BlockSpec, int, Callable[..., Array]], Made]


def layers_of(
    order: str, make: Callable[[list[Array], BlockSpec], BlockBuffers], parts: str = "P"
) -> Layout:
    """One tensor a layer with dimensions in `order`, of B, P, T, H, D."""

    def build(spec: BlockSpec, blocks: int, new: Callable[..., Array]) -> Made:
        sizes = axis_sizes(spec, blocks)
        tensors = [new(*(sizes[axis] for axis in order)) for _ in range(spec.num_layers)]
        missing = [axis for axis in "BPTHD" if axis not in order]
        views = [t.reshape(*t.shape, *(1 for _ in missing)) for t in tensors]
        full = order + "".join(missing)
        stacked = [v.transpose([full.index(axis) for axis in "BPTHD"]) for v in views]
        return make(tensors, spec), StackedView(stacked), tensors  # type: ignore[return-value]

    return build


def pool_of(order: str, make: Callable[[Array, BlockSpec], BlockBuffers]) -> Layout:
    """One tensor with dimensions in `order`; S stands for block and token, 1 for size one."""

    def build(spec: BlockSpec, blocks: int, new: Callable[..., Array]) -> Made:
        sizes = axis_sizes(spec, blocks)
        pool = new(*(sizes[axis] for axis in order))
        full = order.replace("S", "BT").replace("1", "")
        view = pool.reshape([sizes[axis] for axis in full])
        for axis in "BLPTHD":
            if axis not in full:
                view, full = view[..., None], full + axis
        model = view.transpose([full.index(axis) for axis in "BLPTHD"])
        return make(pool, spec), model, [pool]

    return build


def axis_sizes(spec: BlockSpec, blocks: int) -> dict[str, int]:
    return {
        "B": blocks,
        "L": spec.num_layers,
        "P": spec.num_parts,
        "T": spec.block_tokens,
        "H": spec.num_kv_heads,
        "D": spec.head_dim,
        "S": blocks * spec.block_tokens,
        "1": 1,
    }


class StackedView:
    """Per-layer arrays [B, P, T, H, D] read and written as [B, L, P, T, H, D]."""

    def __init__(self, layers: list[Array]) -> None:
        self.layers = layers

    def __getitem__(self, block: int) -> Array:
        return np.stack([layer[block] for layer in self.layers])

    def __setitem__(self, block: int, value: Array) -> None:
        for layer, part in zip(self.layers, value, strict=True):
            layer[block] = part


def sglang_pools(spec: BlockSpec, blocks: int, new: Callable[..., Array]) -> Made:
    shape = (blocks * spec.block_tokens, spec.num_kv_heads, spec.head_dim)
    keys = [new(*shape) for _ in range(spec.num_layers)]
    values = [new(*shape) for _ in range(spec.num_layers)]
    paged = (blocks, spec.block_tokens, *shape[1:])

    class KeyValueView(StackedView):
        def __getitem__(self, block: int) -> Array:
            return np.stack(
                [
                    np.stack([k.reshape(paged)[block], v.reshape(paged)[block]])
                    for k, v in zip(keys, values, strict=True)
                ]
            )

        def __setitem__(self, block: int, value: Array) -> None:
            for layer in range(len(keys)):
                keys[layer].reshape(paged)[block] = value[layer, 0]
                values[layer].reshape(paged)[block] = value[layer, 1]

    buffers = PagedBuffers.sglang_pools(keys, values, spec)
    return buffers, KeyValueView([]), [*keys, *values]  # type: ignore[return-value]


def vllm_views(name: str) -> Layout:
    """One allocation in the order of `name`, one view [B, H, N, C] a layer."""

    def build(spec: BlockSpec, blocks: int, new: Callable[..., Array]) -> Made:
        sizes = axis_sizes(spec, blocks) | {
            "N": spec.block_tokens,
            "C": spec.num_parts * spec.head_dim,
        }
        memory = new(*(sizes[axis] for axis in name))
        view = memory.transpose([name.index(axis) for axis in "LBHNC"])
        buffers = PagedBuffers.vllm_views(list(view), spec, name)
        split = memory.reshape(*memory.shape[:-1], spec.num_parts, spec.head_dim)
        axes = name.replace("C", "PD")
        return buffers, split.transpose([axes.index(axis) for axis in "BLPNHD"]), [memory]

    return build


LAYOUTS: dict[str, Layout] = {
    "reference": pool_of("BLPTHD", PagedBuffers.reference),
    "vllm_nhd": layers_of("PBTHD", PagedBuffers.vllm_nhd),
    "vllm_hnd": layers_of("PBHTD", PagedBuffers.vllm_hnd),
    "vllm_blocks_first": layers_of("BPTHD", PagedBuffers.vllm_blocks_first),
    "vllm_blocks_first_hnd": layers_of("BPHTD", PagedBuffers.vllm_blocks_first_hnd),
    "sglang_pools": sglang_pools,
    "sglang_layer_first": pool_of("PLSHD", PagedBuffers.sglang_layer_first),
    "sglang_page_first": pool_of("PSLHD", PagedBuffers.sglang_page_first),
    "sglang_page_first_direct": pool_of("PBLTHD", PagedBuffers.sglang_page_first_direct),
    "sglang_page_head": pool_of("PBHTLD", PagedBuffers.sglang_page_head),
    **{f"vllm_views_{name}": vllm_views(name) for name in VLLM_LAYOUTS},
}
LATENT_LAYOUTS: dict[str, Layout] = {
    "vllm_mla": layers_of("BTD", PagedBuffers.vllm_mla),
    "sglang_mla": pool_of("LS1D", PagedBuffers.sglang_mla),
    "sglang_mla_page_first": pool_of("SL1D", PagedBuffers.sglang_mla_page_first),
}

SHAPES = [(2, 2, 4, 4), (1, 1, 1, 1), (3, 1, 5, 3), (2, 3, 64, 16), (4, 2, 7, 5), (2, 4, 32, 8)]


def spec_of(shape: tuple[int, int, int, int], itemsize: int, kind: str) -> BlockSpec:
    layers, heads, dim, tokens = shape
    heads = 1 if kind == "latent" else heads
    return BlockSpec(layers, heads, dim, tokens, DTYPES[itemsize], kind)


CASES = [(n, "kv", layout) for n, layout in LAYOUTS.items()] + [
    (n, "latent", layout) for n, layout in LATENT_LAYOUTS.items()
]

"""Where SGLang's host pools keep their pages, as blocks of kvstore.

A host pool is one or more tensors that hold pages of `page_tokens` slots. `pages_of` describes
them once, when the pool is registered; from then on a page is a number, and the store copies it
straight between the pool and its own memory. From the most to the least that we know of a pool:

- *canonical*: an MHA or MLA pool whose axes are known in each of SGLang's layouts. Its pages become
  canonical blocks, the same whatever the layout, so engines of different layouts share them.
- *pieces*: the bytes of a page lie at fixed distances from those of the page before. A block is the
  concatenation of its pieces, under a layout name of its own.
- *flat*: a page is only reached through SGLang's own copy of it (`get_data_page`): one copy more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import kvstore
from kvstore import AxisTensor, BlockBuffers, BlockSpec, ContiguousBlocks, PagedBuffers

CANONICAL_LAYOUT = "canonical-1"

# The dimensions of `kv_buffer` in each layout. A page of `get_data_page` has the same without the
# block, and with the page's tokens in place of all slots.
_MHA_AXES = {
    "layer_first": ("part", "layer", "slot", "head", "dim"),
    "page_first": ("part", "slot", "layer", "head", "dim"),
    "page_first_direct": ("part", "block", "layer", "token", "head", "dim"),
    "page_head": ("part", "block", "head", "token", "layer", "dim"),
    "page_unified": ("block", "one", "layer", "part", "token", "head", "dim"),
}
_MLA_AXES = {
    "layer_first": ("layer", "slot", "one", "dim"),
    "page_first": ("slot", "layer", "one", "dim"),
    "page_first_direct": ("block", "layer", "token", "one", "dim"),
    "page_unified": ("block", "layer", "token", "dim"),
}
# How pools say that they have no such page in their layout.
_UNSUPPORTED = (NotImplementedError, ValueError, TypeError, AttributeError)
_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "uint8",
}


@dataclass(frozen=True)
class Pages:
    """The pages of one host pool, or of one group of its heads.

    `buffers` is None where pages are only reached as flat copies; `axes` are those of a flat page
    of a canonical pool, and empty where a flat page is opaque bytes.
    """

    pool: Any
    page_tokens: int
    spec: BlockSpec
    layout: str
    buffers: BlockBuffers | None
    axes: tuple[str, ...] = ()
    first_head: int = 0
    is_split: bool = False

    @property
    def is_canonical(self) -> bool:
        return bool(self.axes)

    def numbers(self, host_indices: torch.Tensor, count: int) -> torch.Tensor:
        """The numbers of the pages that `host_indices` names slot by slot.

        Raises:
            ValueError: they are not the slots of `count` pages.
        """
        if host_indices.numel() != count * self.page_tokens:
            raise ValueError(
                f"{host_indices.numel()} host indices for {count} pages of {self.page_tokens} slots"
            )
        return host_indices.reshape(count, self.page_tokens)[:, 0] // self.page_tokens

    def stack(self, num_pages: int) -> torch.Tensor:
        """Room for flat pages, one in each row, for `flat_buffers`."""
        row: Any = self.pool.get_dummy_flat_data_page()
        return torch.empty((num_pages, row.numel()), dtype=row.dtype)

    def flat_buffers(self, stack: torch.Tensor) -> BlockBuffers:
        """Flat pages as blocks: of this heads' group, if the pool is split."""
        if not self.axes:
            return ContiguousBlocks(stack.view(torch.uint8), self.layout)
        sizes = _sizes(self.spec) | {"head": self.pool_heads}
        shaped = _plain(stack).view(len(stack), *(sizes[axis] for axis in self.axes))
        head = 1 + self.axes.index("head") if "head" in self.axes else 0
        if head:
            shaped = shaped.narrow(head, self.first_head, self.spec.num_kv_heads)
        return PagedBuffers.strided(
            [AxisTensor(shaped, ("block", *self.axes), name="pages")], self.spec
        )

    @property
    def pool_heads(self) -> int:
        return int(getattr(self.pool, "head_num", 1))


class _Piece:
    """Equal pieces of memory at equal distances, for whoever asks by `__array_interface__`."""

    def __init__(self, owner: object, address: int, count: int, stride: int, size: int) -> None:
        self._owner = owner  # the memory lives as long as the pool
        self.__array_interface__ = {
            "shape": (count, size),
            "strides": (stride, 1),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def pages_of(pool: Any, num_splits: int = 1, *, only_flat: bool = False) -> list[Pages]:
    """Describe a host pool, once for each of `num_splits` equal groups of its heads.

    Only canonical pools with heads are split; others have one element whatever `num_splits`.

    Args:
        pool: SGLang's host pool.
        num_splits: how many groups.
        only_flat: the caller will pass flat pages, so pieces are of no use.

    Raises:
        ConfigError: the pool's pages cannot be stored, or its heads cannot be split in so many
            groups.
    """
    name = type(pool).__name__
    if getattr(pool, "shared_allocation_domain", None) is not None:
        raise kvstore.ConfigError(f"{name}: its pages move, so they cannot be stored from outside")
    if getattr(pool, "shard_size", 1) > 1:
        raise kvstore.ConfigError(f"{name}: KV sharded by pages is not supported")
    axes = _known_axes(pool)
    if "head" in axes:
        return [_canonical(pool, axes, num_splits, split) for split in range(num_splits)]
    if axes:
        return [_canonical(pool, axes, 1, 0)]
    for pieces in () if only_flat else (_meta_pieces, _view_pieces):
        found = _affine(pool, pieces)
        if found is not None:
            return [_of_pieces(pool, found)]
    return [_flat(pool)]


def is_logical(pool: Any) -> bool:
    """Whether the pool only hands out slots, and others hold what belongs to them."""
    return bool(pool.size_per_token == 0)


def is_sharded(pool: Any) -> bool:
    """Whether ranks of tensor parallelism hold different parts of a page, in a model too whose
    main pool is the same on every rank."""
    from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    return isinstance(pool, (MHATokenToKVPoolHost, MambaPoolHost))


def _known_axes(pool: Any) -> tuple[str, ...]:
    """The axes of `kv_buffer` where it holds all of a page and its inside is what we know."""
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    # Subclasses hold other things (asymmetric heads, scales), so the type itself counts.
    table = {MHATokenToKVPoolHost: _MHA_AXES, MLATokenToKVPoolHost: _MLA_AXES}.get(type(pool))
    axes = (table or {}).get(pool.layout, ())
    buffer = getattr(pool, "kv_buffer", None)
    if not axes or buffer is None or buffer.ndim != len(axes):
        return ()
    if table is _MHA_AXES and not _is_native(pool):
        return ()
    if "one" in axes and buffer.shape[axes.index("one")] != 1:
        return ()  # page_unified with several groups of heads
    return axes if _plain(buffer).dtype in _DTYPES else ()


def _is_native(pool: Any) -> bool:
    """Whether the device keeps rows `[head, dim]`: host pages repeat the device's inside."""
    layouts = {info.buffers.layout.value for info in getattr(pool, "_buffer_infos", ())}
    return layouts <= {"nhd", "paged_nhd"} and pool.head_dim == pool.v_head_dim


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A type of one byte that kvstore cannot name goes as bytes; the layout tells them apart."""
    if tensor.dtype not in _DTYPES and tensor.dtype.itemsize == 1:
        return tensor.view(torch.uint8)
    return tensor


def _canonical(pool: Any, axes: tuple[str, ...], num_splits: int, split: int) -> Pages:
    buffer = _plain(pool.kv_buffer)
    is_kv = "part" in axes
    heads = int(pool.head_num) if is_kv else 1
    if heads % num_splits:
        raise kvstore.ConfigError(
            f"tp_lcm_size: the {heads} heads of a rank cannot be split in {num_splits} groups"
        )
    spec = BlockSpec(
        num_layers=int(pool.layer_num),
        num_kv_heads=heads // num_splits,
        head_dim=int(pool.head_dim if is_kv else pool.kv_cache_dim),
        block_tokens=int(pool.page_size),
        dtype=_DTYPES[buffer.dtype],
        kind="kv" if is_kv else "latent",
    )
    first = split * spec.num_kv_heads
    if num_splits > 1:
        buffer = buffer.narrow(axes.index("head"), first, spec.num_kv_heads)
    layout = CANONICAL_LAYOUT
    if pool.dtype not in _DTYPES:
        layout += f";dtype={pool.dtype}"
    flat = tuple("token" if axis == "slot" else axis for axis in axes if axis != "block")
    buffers = PagedBuffers.strided([AxisTensor(buffer, axes, name="kv_buffer")], spec)
    is_split = num_splits > 1
    return Pages(pool, spec.block_tokens, spec, layout, buffers, flat, first, is_split)


def _sizes(spec: BlockSpec) -> dict[str, int]:
    return {
        "part": spec.num_parts,
        "layer": spec.num_layers,
        "token": spec.block_tokens,
        "dim": spec.head_dim,
        "one": 1,
    }


# --- pages as pieces of memory

_Pieces = tuple[tuple[int, ...], tuple[int, ...]]  # addresses and sizes, of one page


def _meta_pieces(pool: Any, page: int) -> _Pieces | None:
    """What the pool itself tells backends without copies."""
    tokens = int(pool.page_size)
    try:
        found = pool.get_page_buffer_meta(torch.arange(page * tokens, (page + 1) * tokens))
    except _UNSUPPORTED:
        return None
    if not found or not found[0] or any(isinstance(part, Sequence) for part in found[0]):
        return None
    return tuple(map(int, found[0])), tuple(map(int, found[1]))


def _view_pieces(pool: Any, page: int) -> _Pieces | None:
    """The pieces of a page that the pool hands out as a view of its memory."""
    try:
        view = pool.get_data_page(page * int(pool.page_size), flat=False)
    except _UNSUPPORTED:
        return None
    size = view.element_size()
    starts = [0]
    dense = view.ndim
    run = size
    while dense and (view.shape[dense - 1] == 1 or view.stride(dense - 1) * size == run):
        dense -= 1
        run *= view.shape[dense]
    for axis in range(dense):
        step = view.stride(axis) * size
        starts = [start + i * step for start in starts for i in range(view.shape[axis])]
    return tuple(view.data_ptr() + start for start in starts), (run,) * len(starts)


def _affine(pool: Any, pieces: Callable[[Any, int], _Pieces | None]) -> list[_Piece] | None:
    """A page's pieces, if those of page i lie i times a constant after those of page 0."""
    count = int(pool.size) // int(pool.page_size) if getattr(pool, "size", 0) else 0
    if count < 2:
        return None
    probes = {page: pieces(pool, page) for page in (0, 1, count // 2, count - 1)}
    first, second = probes[0], probes[1]
    if first is None or second is None or len(first[0]) != len(second[0]):
        return None
    strides = [b - a for a, b in zip(first[0], second[0], strict=True)]
    for page, found in probes.items():
        expected = tuple(a + page * s for a, s in zip(first[0], strides, strict=True))
        if found is None or found[0] != expected or found[1] != first[1]:
            return None
    if any(stride < size for stride, size in zip(strides, first[1], strict=True)):
        return None
    rows = zip(*first, strides, strict=True)
    return [_Piece(pool, address, count, stride, size) for address, size, stride in rows]


def _private_layout(pool: Any, how: str) -> str:
    """A name that is the same only for pools whose pages mean the same, byte by byte."""
    types = sorted(f"{name}={kind}" for name, kind in vars(pool).items() if name.endswith("dtype"))
    parts = [
        f"sglang-{type(pool).__name__}-{pool.layout}-{how}",
        *types,
        f"tokens={pool.page_size}",
    ]
    return ";".join(parts)


def _of_pieces(pool: Any, pieces: list[_Piece]) -> Pages:
    layout = _private_layout(pool, "pieces")
    buffers = PagedBuffers.opaque(pieces, layout)
    spec = BlockSpec.of_bytes(buffers.block_bytes)
    return Pages(pool, int(pool.page_size), spec, layout, buffers)


def _flat(pool: Any) -> Pages:
    try:
        page = pool.get_dummy_flat_data_page()
    except _UNSUPPORTED as error:
        raise kvstore.ConfigError(
            f"{type(pool).__name__}: has no pages to store in layout {pool.layout}: {error}"
        ) from error
    spec = BlockSpec.of_bytes(math.prod(page.shape) * page.element_size())
    return Pages(pool, int(pool.page_size), spec, _private_layout(pool, "flat"), None)

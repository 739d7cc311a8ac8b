"""How engines lay out paged KV, and the copy plan from there to canonical blocks.

A canonical block is `[layer][k|v][token][kv_head][head_dim]` without gaps. An engine's tensors are
described once, as named axes over strided memory; everything else follows from the strides:
neighbouring axes that are contiguous on both sides merge into the largest pieces, and what remains
becomes the runs of one native CopyPlan (csrc/copy/plan.h) that serves every put and load.

Axis names: `block`, `layer`, `part` (0 is K, 1 is V), `token`, `head`, `dim`, and three that stand
for others: `slot` (block and token: `block_tokens` consecutive slots are a block), `kv` (part and
dim: K then V in one row) and `one` (a dimension of size 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.buffers import HostBuffer, as_block_ids
from kvstore.errors import ConfigError

CANONICAL = "canonical"

# Axes of a canonical block, innermost first.
_PAYLOAD_AXES = ("dim", "head", "token", "part", "layer")

# vLLM's names for the order of (L)ayers, (B)locks, (H)eads, toke(N)s and (C)ontents in memory;
# every layer is a view [B, H, N, C] whatever the name.
VLLM_LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


@dataclass(frozen=True)
class AxisTensor:
    """One tensor of an engine: what each of its dimensions is, and which layer and part it holds
    where no dimension says so."""

    buffer: object
    axes: tuple[str, ...]
    layer: int | None = None
    part: int | None = None
    name: str = "tensor"


@dataclass(frozen=True)
class _Axis:
    size: int
    stride: int  # bytes


class BlockBuffers:
    """Memory of an engine seen as numbered blocks: the source of a put, the target of a load.

    Holds references to the memory, so its addresses stay valid as long as it lives. Immutable.
    """

    def __init__(
        self, plan: _native.CopyPlan, layout: str, keepalive: object, layers: int = 1
    ) -> None:
        self.plan = plan
        self.layout = layout  # goes into the Namespace: blocks of one layout are interchangeable
        self.num_layers = layers
        self._keepalive = keepalive

    @property
    def num_blocks(self) -> int:
        return self.plan.num_blocks

    @property
    def block_bytes(self) -> int:
        return self.plan.block_bytes

    @property
    def writable(self) -> bool:
        """False when a tensor is read-only, so that blocks can be put from it but not loaded."""
        return self.plan.writable

    def layer_range(self, first: int, count: int = 1) -> tuple[int, int]:
        """The payload bytes [begin, end) of layers [first, first + count) of any block."""
        if first < 0 or count < 0 or first + count > self.num_layers:
            raise ConfigError(
                f"layers {first} to {first + count} are outside of [0, {self.num_layers})"
            )
        layer_bytes = self.block_bytes // self.num_layers
        return first * layer_bytes, (first + count) * layer_bytes

    def validate_ids(self, block_ids: object) -> npt.NDArray[np.int64]:
        """Return `block_ids` as the native code takes them.

        Raises IndexError naming the first id that is out of range; TypeError for other than
        integers; ValueError for other than one dimension.
        """
        ids = as_block_ids(block_ids)
        bad = np.flatnonzero((ids < 0) | (ids >= self.num_blocks))
        if bad.size:
            raise IndexError(
                f"block id {ids[bad[0]]} is out of range: the buffers have {self.num_blocks} blocks"
            )
        return ids

    def require_block_bytes(self, block_bytes: int) -> None:
        """Raises ConfigError when a block has another size here than in the store's namespace."""
        if self.block_bytes != block_bytes:
            raise ConfigError(
                f"buffers: blocks of {self.block_bytes} bytes, the namespace's have {block_bytes}"
            )

    def require_writable(self) -> None:
        """Raises ConfigError when blocks cannot be loaded into these buffers."""
        if not self.writable:
            raise ConfigError("buffers: read-only memory cannot be a destination")


class ContiguousBlocks(BlockBuffers):
    """The simplest buffers: an array `[n, ...]` whose row i is block i, dense within a row."""

    def __init__(self, array: object, layout: str = CANONICAL) -> None:
        buffer = HostBuffer.of(array, "array")
        if buffer.ndim < 1 or buffer.size_bytes == 0:
            raise ConfigError(f"array: needs at least one block and one byte, has {buffer.shape}")
        if not buffer.is_contiguous(1):
            raise ConfigError("array: the bytes of a row are not contiguous")
        block_bytes = buffer.size_bytes // buffer.shape[0]
        rows = [_whole_piece(buffer, 0, block_bytes)]
        plan = _make_plan(rows, block_bytes, buffer.shape[0], not buffer.readonly)
        super().__init__(plan, layout, buffer)


class PagedBuffers(BlockBuffers):
    """An engine's paged KV tensors. One classmethod a layout; `strided` takes any other."""

    @classmethod
    def strided(cls, tensors: Sequence[AxisTensor], spec: BlockSpec) -> PagedBuffers:
        """Any layout in which every element's address is affine in its axes.

        Raises ConfigError, naming tensor and axis, for what does not match `spec`.
        """
        if not tensors:
            raise ConfigError("tensors: at least one is needed")
        buffers = [HostBuffer.of(tensor.buffer, tensor.name) for tensor in tensors]
        blocks: int | None = None
        rows: list[npt.NDArray[np.int64]] = []
        for tensor, buffer in zip(tensors, buffers, strict=True):
            _check_dtype(tensor.name, buffer, spec)
            axes = _resolve_axes(tensor, buffer, spec)
            _check_no_overlap(tensor.name, axes, buffer.itemsize)
            size = axes["block"].size
            if blocks not in (None, size):
                raise ConfigError(f"{tensor.name}: block axis has {size} blocks, expected {blocks}")
            blocks = size
            rows.append(_runs_of(buffer, axes, _payload_offset(tensor, spec), spec))
        plan = _make_plan(
            rows, spec.block_bytes, blocks or 0, not any(buffer.readonly for buffer in buffers)
        )
        return cls(plan, CANONICAL, buffers, spec.num_layers)

    @classmethod
    def reference(cls, pool: object, spec: BlockSpec) -> PagedBuffers:
        """One tensor `[num_blocks, layers, parts, tokens, heads, dim]`: canonical blocks."""
        axes = ("block", "layer", "part", "token", "head", "dim")
        return cls.strided([AxisTensor(pool, axes, name="pool")], spec)

    @classmethod
    def vllm_nhd(cls, layers: Sequence[object], spec: BlockSpec) -> PagedBuffers:
        """A tensor `[2, num_blocks, tokens, heads, dim]` for each layer (flash-attn)."""
        return cls._per_layer(layers, ("part", "block", "token", "head", "dim"), spec)

    @classmethod
    def vllm_hnd(cls, layers: Sequence[object], spec: BlockSpec) -> PagedBuffers:
        """A tensor `[2, num_blocks, heads, tokens, dim]` for each layer."""
        return cls._per_layer(layers, ("part", "block", "head", "token", "dim"), spec)

    @classmethod
    def vllm_blocks_first(cls, layers: Sequence[object], spec: BlockSpec) -> PagedBuffers:
        """A tensor `[num_blocks, 2, tokens, heads, dim]` for each layer (FlashInfer NHD)."""
        return cls._per_layer(layers, ("block", "part", "token", "head", "dim"), spec)

    @classmethod
    def vllm_blocks_first_hnd(cls, layers: Sequence[object], spec: BlockSpec) -> PagedBuffers:
        """A tensor `[num_blocks, 2, heads, tokens, dim]` for each layer (FlashInfer HND)."""
        return cls._per_layer(layers, ("block", "part", "head", "token", "dim"), spec)

    @classmethod
    def vllm_views(
        cls, layers: Sequence[object], spec: BlockSpec, layout: str | None = None
    ) -> PagedBuffers:
        """vLLM's registered views `[B, H, N, C]`, one a layer, C = K and V together.

        The strides say how the memory is ordered; `layout`, one of VLLM_LAYOUTS, is what vLLM
        claims it is, and is checked against them. Only for backends that keep `[K | V]` rows:
        vLLM's CPU backend does not, see `opaque`.
        """
        buffers = cls._named_layers(layers, spec)
        if layout is not None:
            _check_vllm_layout(layout, buffers)
        return cls._per_layer(buffers, ("block", "head", "token", "kv"), spec)

    @classmethod
    def vllm_mla(cls, layers: Sequence[object], spec: BlockSpec) -> PagedBuffers:
        """A tensor `[num_blocks, tokens, latent_dim]` for each layer."""
        return cls._per_layer(layers, ("block", "token", "dim"), spec)

    @classmethod
    def sglang_pools(
        cls, keys: Sequence[object], values: Sequence[object], spec: BlockSpec
    ) -> PagedBuffers:
        """Device pools: K and V tensors `[slots, heads, dim]` for each layer."""
        cls._check_layers("keys", keys, spec)
        cls._check_layers("values", values, spec)
        axes = ("slot", "head", "dim")
        return cls.strided(
            [
                AxisTensor(tensor, axes, layer, part, f"{name}[{layer}]")
                for part, (name, pool) in enumerate((("keys", keys), ("values", values)))
                for layer, tensor in enumerate(pool)
            ],
            spec,
        )

    @classmethod
    def sglang_layer_first(cls, pool: object, spec: BlockSpec) -> PagedBuffers:
        """Host pool `(2, layers, slots, heads, dim)`."""
        axes = ("part", "layer", "slot", "head", "dim")
        return cls.strided([AxisTensor(pool, axes, name="pool")], spec)

    @classmethod
    def sglang_page_first(cls, pool: object, spec: BlockSpec) -> PagedBuffers:
        """Host pool `(2, slots, layers, heads, dim)`."""
        axes = ("part", "slot", "layer", "head", "dim")
        return cls.strided([AxisTensor(pool, axes, name="pool")], spec)

    @classmethod
    def sglang_page_first_direct(cls, pool: object, spec: BlockSpec) -> PagedBuffers:
        """Host pool `(2, pages, layers, page_size, heads, dim)`."""
        axes = ("part", "block", "layer", "token", "head", "dim")
        return cls.strided([AxisTensor(pool, axes, name="pool")], spec)

    @classmethod
    def sglang_page_head(cls, pool: object, spec: BlockSpec) -> PagedBuffers:
        """Host pool `(2, pages, heads, page_size, layers, dim)`."""
        axes = ("part", "block", "head", "token", "layer", "dim")
        return cls.strided([AxisTensor(pool, axes, name="pool")], spec)

    @classmethod
    def sglang_mla(cls, pool: object, spec: BlockSpec) -> PagedBuffers:
        """Host pool `(layers, slots, 1, latent_dim)`, layer first."""
        axes = ("layer", "slot", "one", "dim")
        return cls.strided([AxisTensor(pool, axes, name="pool")], spec)

    @classmethod
    def sglang_mla_page_first(cls, pool: object, spec: BlockSpec) -> PagedBuffers:
        """Host pool `(slots, layers, 1, latent_dim)`, page first."""
        axes = ("slot", "layer", "one", "dim")
        return cls.strided([AxisTensor(pool, axes, name="pool")], spec)

    @classmethod
    def opaque(cls, tensors: Sequence[object], layout: str) -> PagedBuffers:
        """Tensors whose dimension 0 is the block and whose interiors are private to the engine: a
        block is the concatenation of each tensor's bytes of that block, under the layout name that
        the caller gives."""
        if not layout or layout == CANONICAL:
            raise ConfigError(f"layout: {layout!r} cannot name a private layout")
        if not tensors:
            raise ConfigError("tensors: at least one is needed")
        rows: list[npt.NDArray[np.int64]] = []
        buffers: list[HostBuffer] = []
        offset = 0
        for index, tensor in enumerate(tensors):
            name = f"tensors[{index}]"
            buffer = HostBuffer.of(tensor, name)
            if buffer.ndim < 1 or buffer.size_bytes == 0:
                raise ConfigError(f"{name}: holds no blocks, its shape is {buffer.shape}")
            if buffers and buffer.shape[0] != buffers[0].shape[0]:
                raise ConfigError(
                    f"{name}: block axis has {buffer.shape[0]} blocks,"
                    f" expected {buffers[0].shape[0]}"
                )
            page_bytes = buffer.size_bytes // buffer.shape[0]
            _check_dense_page(name, buffer)
            rows.append(_whole_piece(buffer, offset, page_bytes))
            buffers.append(buffer)
            offset += page_bytes
        writable = not any(buffer.readonly for buffer in buffers)
        plan = _make_plan(rows, offset, buffers[0].shape[0], writable)
        return cls(plan, layout, buffers)

    @classmethod
    def _per_layer(
        cls, layers: Sequence[object], axes: tuple[str, ...], spec: BlockSpec
    ) -> PagedBuffers:
        cls._check_layers("layers", layers, spec)
        return cls.strided(
            [AxisTensor(t, axes, layer, name=f"layers[{layer}]") for layer, t in enumerate(layers)],
            spec,
        )

    @classmethod
    def _named_layers(cls, layers: Sequence[object], spec: BlockSpec) -> list[HostBuffer]:
        cls._check_layers("layers", layers, spec)
        return [HostBuffer.of(tensor, f"layers[{i}]") for i, tensor in enumerate(layers)]

    @staticmethod
    def _check_layers(name: str, layers: Sequence[object], spec: BlockSpec) -> None:
        if len(layers) != spec.num_layers:
            raise ConfigError(
                f"{name}: layer axis has {len(layers)} layers, expected {spec.num_layers}"
            )


def _payload_axes(spec: BlockSpec) -> dict[str, _Axis]:
    """Sizes and byte strides within a canonical block, innermost axis first."""
    sizes = {
        "dim": spec.head_dim,
        "head": spec.num_kv_heads,
        "token": spec.block_tokens,
        "part": spec.num_parts,
        "layer": spec.num_layers,
    }
    axes: dict[str, _Axis] = {}
    stride = spec.dtype_bytes
    for name in _PAYLOAD_AXES:
        axes[name] = _Axis(sizes[name], stride)
        stride *= sizes[name]
    return axes


def _check_dtype(name: str, buffer: HostBuffer, spec: BlockSpec) -> None:
    if buffer.itemsize != spec.dtype_bytes:
        raise ConfigError(
            f"{name}: elements have {buffer.itemsize} bytes ({buffer.dtype}),"
            f" expected {spec.dtype_bytes} ({spec.dtype})"
        )
    # Integers of the same size are how engines view types that a library cannot name.
    if buffer.dtype != spec.dtype and not buffer.dtype.startswith(("int", "uint", "void")):
        raise ConfigError(f"{name}: dtype is {buffer.dtype}, expected {spec.dtype}")


def _split_axis(
    tensor: AxisTensor, axis: str, size: int, stride: int, spec: BlockSpec
) -> dict[str, _Axis]:
    """The payload axes that one dimension of a tensor stands for."""
    if axis == "slot":
        if size % spec.block_tokens:
            raise ConfigError(
                f"{tensor.name}: slot axis has {size} slots,"
                f" expected a multiple of {spec.block_tokens} tokens"
            )
        return {
            "block": _Axis(size // spec.block_tokens, stride * spec.block_tokens),
            "token": _Axis(spec.block_tokens, stride),
        }
    if axis == "kv":
        expected = spec.num_parts * spec.head_dim
        if size != expected:
            raise ConfigError(f"{tensor.name}: kv axis has size {size}, expected {expected}")
        return {
            "part": _Axis(spec.num_parts, stride * spec.head_dim),
            "dim": _Axis(spec.head_dim, stride),
        }
    if axis == "one":
        if size != 1:
            raise ConfigError(f"{tensor.name}: an axis has size {size}, expected 1")
        return {}
    return {axis: _Axis(size, stride)}


def _resolve_axes(tensor: AxisTensor, buffer: HostBuffer, spec: BlockSpec) -> dict[str, _Axis]:
    """The block axis and every payload axis of a tensor, checked against `spec`."""
    if buffer.ndim != len(tensor.axes):
        raise ConfigError(
            f"{tensor.name}: has {buffer.ndim} dimensions {buffer.shape},"
            f" expected {len(tensor.axes)} ({', '.join(tensor.axes)})"
        )
    axes: dict[str, _Axis] = {}
    for axis, size, stride in zip(tensor.axes, buffer.shape, buffer.strides, strict=True):
        for name, part in _split_axis(tensor, axis, size, stride, spec).items():
            if name in axes or name not in ("block", *_PAYLOAD_AXES):
                raise ConfigError(f"{tensor.name}: axis {name!r} is unknown or given twice")
            axes[name] = part
    if "block" not in axes or axes["block"].size < 1:
        raise ConfigError(f"{tensor.name}: block axis is missing or empty")
    return _complete_axes(tensor, axes, spec)


def _complete_axes(tensor: AxisTensor, axes: dict[str, _Axis], spec: BlockSpec) -> dict[str, _Axis]:
    """Checks sizes and adds the payload axes that the tensor has no dimension for."""
    fixed = {"layer": tensor.layer, "part": tensor.part}
    for name, payload in _payload_axes(spec).items():
        if name not in axes:
            if fixed.get(name) is None and payload.size != 1:
                raise ConfigError(f"{tensor.name}: has no {name} axis, expected {payload.size}")
            axes[name] = _Axis(1, 0)
        elif fixed.get(name) is not None:
            raise ConfigError(f"{tensor.name}: axis {name!r} is unknown or given twice")
        elif axes[name].size != payload.size:
            raise ConfigError(
                f"{tensor.name}: {name} axis has size {axes[name].size}, expected {payload.size}"
            )
    return axes


def _payload_offset(tensor: AxisTensor, spec: BlockSpec) -> int:
    """Where the part of a block that this tensor holds starts in the payload."""
    payload = _payload_axes(spec)
    offset = 0
    for name, index in (("layer", tensor.layer), ("part", tensor.part)):
        if index is None:
            continue
        if not 0 <= index < payload[name].size:
            raise ConfigError(
                f"{tensor.name}: {name} {index} is outside of [0, {payload[name].size})"
            )
        offset += index * payload[name].stride
    return offset


def _check_no_overlap(name: str, axes: Mapping[str, _Axis], itemsize: int) -> None:
    """Two elements of one tensor never share a byte: expanded tensors cannot be loaded into."""
    span = itemsize
    for axis, part in sorted(axes.items(), key=lambda item: abs(item[1].stride)):
        if part.size == 1:
            continue
        if abs(part.stride) < span:
            raise ConfigError(
                f"{name}: {axis} axis has a stride of {part.stride} bytes,"
                f" expected at least {span}: its elements overlap"
            )
        span += abs(part.stride) * (part.size - 1)


def _runs_of(
    buffer: HostBuffer, axes: Mapping[str, _Axis], offset: int, spec: BlockSpec
) -> npt.NDArray[np.int64]:
    """Rows for CopyPlan: the largest pieces, repeated along one axis, once per rest of the axes."""
    payload = _payload_axes(spec)
    # (size, engine stride, payload stride), innermost first, without axes of size 1.
    loops = [
        (axes[name].size, axes[name].stride, payload[name].stride)
        for name in _PAYLOAD_AXES
        if axes[name].size > 1
    ]
    piece = buffer.itemsize
    while loops and loops[0][1] == piece and loops[0][2] == piece:
        piece *= loops.pop(0)[0]
    merged: list[tuple[int, int, int]] = []
    for size, engine, block in loops:
        if merged:
            inner, inner_engine, inner_block = merged[-1]
            if engine == inner * inner_engine and block == inner * inner_block:
                merged[-1] = (inner * size, inner_engine, inner_block)
                continue
        merged.append((size, engine, block))
    count, engine_stride, piece_stride = merged.pop(0) if merged else (1, piece, piece)
    bases = np.array([buffer.address], dtype=np.int64)
    offsets = np.array([offset], dtype=np.int64)
    for size, engine, block in merged:
        steps = np.arange(size, dtype=np.int64)[:, None]
        bases = (steps * engine + bases).ravel()
        offsets = (steps * block + offsets).ravel()
    rows = np.empty((len(bases), 7), dtype=np.int64)
    rows[:, 0] = bases
    rows[:, 3] = offsets
    rows[:, [1, 2, 4, 5, 6]] = (axes["block"].stride, engine_stride, piece_stride, count, piece)
    return rows


def _whole_piece(buffer: HostBuffer, offset: int, page_bytes: int) -> npt.NDArray[np.int64]:
    """The row of a tensor whose blocks are one piece each; one block has no stride to trust."""
    stride = buffer.strides[0] if buffer.shape[0] > 1 else page_bytes
    row = (buffer.address, stride, page_bytes, offset, page_bytes, 1, page_bytes)
    return np.array([row], dtype=np.int64)


def _check_dense_page(name: str, buffer: HostBuffer) -> None:
    """A block's bytes have no gaps, in whatever order the dimensions lie."""
    dense = buffer.itemsize
    inner = zip(buffer.strides[1:], buffer.shape[1:], strict=True)
    for stride, size in sorted(part for part in inner if part[1] > 1):
        if stride != dense:
            raise ConfigError(
                f"{name}: the bytes of a block are not contiguous: an axis of size {size} has a"
                f" stride of {stride} bytes, expected {dense}"
            )
        dense *= size


def _check_vllm_layout(layout: str, views: Sequence[HostBuffer]) -> None:
    if layout not in VLLM_LAYOUTS:
        raise ConfigError(f"layout: {layout!r} is not one of {', '.join(VLLM_LAYOUTS)}")
    first = views[0]
    if first.ndim != len(layout) - 1:
        return  # reported with the expected axes by strided()
    sizes = dict(zip("BHNC", first.shape, strict=True)) | {"L": len(views)}
    strides = dict(zip("BHNC", first.strides, strict=True))
    strides["L"] = views[1].address - first.address if len(views) > 1 else 0
    order = [axis for axis in layout if sizes[axis] > 1]
    # Layers may be allocations of their own, in any order, where they are outermost anyway.
    if order[:1] == ["L"]:
        order = order[1:]
    for outer, inner in pairwise(order):
        if strides[outer] < strides[inner]:
            raise ConfigError(
                f"layout: {layout} needs axis {outer} outside of {inner}, but their strides are"
                f" {strides[outer]} and {strides[inner]} bytes"
            )


def _make_plan(
    rows: Sequence[npt.NDArray[np.int64]], block_bytes: int, num_blocks: int, writable: bool
) -> _native.CopyPlan:
    runs = np.ascontiguousarray(np.concatenate(rows))
    try:
        return _native.CopyPlan(runs, block_bytes, num_blocks, writable=writable)
    except ValueError as error:
        raise ConfigError(f"tensors: no copy plan: {error}") from error

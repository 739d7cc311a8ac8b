"""One of SGLang's device pools as blocks of kvstore: put pages, and load them layer by layer.

A block is the concatenation of a page's pieces: for each layer, for each tensor of that layer (K
then V, or the latent), the rows of the page. For plain MHA and MLA pools that is the canonical
block of kvstore, so an engine with HiCache and one with a linker share it.

Pools in host memory are copied straight. Those on a device go through a staging area in pinned host
memory, a chunk of pages at a time: gathered or scattered by torch, copied by the store. The tests
run that path with a pool in host memory; on a GPU it has not been run.

Thread safety: one thread may put while another loads; each has a staging area of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore import (
    AxisTensor,
    BlockBuffers,
    BlockHashes,
    BlockSpec,
    ContiguousBlocks,
    KVStoreError,
    Lease,
    PagedBuffers,
    Store,
    TransferResult,
)
from kvstore_adapters.sglang.keys import block_hashes
from kvstore_adapters.sglang.pins import PinnedPages

_LAYOUT = "sglang-device-pieces"
_STAGING_BYTES = 32 << 20  # in each direction: enough pages that a copy's start costs little

PageIds = npt.NDArray[np.int64]


class LoadError(KVStoreError):
    """What was pinned could not be copied: its lease ended, or a block was damaged."""


@dataclass(frozen=True)
class Pieces:
    """The tensors of a pool as rows of bytes, `[row, row_bytes]`, by layer of the forward pass."""

    layers: dict[int, list[torch.Tensor]]
    rows_per_page: int

    @classmethod
    def of(cls, entry: Any) -> Pieces:
        """Those of one of SGLang's `DevicePoolEntry`."""
        layers: dict[int, list[torch.Tensor]] = {}
        for layer in sorted(entry.layer_mapping):
            mapped = entry.layer_mapping[layer]
            chosen = [mapped] if isinstance(mapped, int) else list(mapped)
            layers[layer] = [_as_rows(part[i]) for part in entry.components for i in chosen]
        first = entry.components[0][0]
        piece_bytes = entry.buffer_meta[0][0][2]
        return cls(layers, piece_bytes * len(first) // first.nbytes)

    @property
    def all(self) -> list[torch.Tensor]:
        return [piece for pieces in self.layers.values() for piece in pieces]

    @cached_property
    def num_pages(self) -> int:
        return min(map(len, self.all)) // self.rows_per_page

    @cached_property
    def page_bytes(self) -> int:
        return sum(piece.shape[1] for piece in self.all) * self.rows_per_page

    @cached_property
    def are_even(self) -> bool:
        """Whether all layers have the same one or two pieces of one size. Layers of other pools
        are not found in a block by number, so such blocks are loaded whole."""
        counts = {len(pieces) for pieces in self.layers.values()}
        return len(counts) == 1 and max(counts) <= 2 and len({p.shape[1] for p in self.all}) == 1

    @cached_property
    def spec(self) -> BlockSpec:
        """A page as bytes."""
        if not self.are_even:
            return BlockSpec.of_bytes(self.page_bytes)
        parts = len(next(iter(self.layers.values())))
        width = self.all[0].shape[1]
        kind = "kv" if parts == 2 else "latent"
        return BlockSpec(len(self.layers), 1, width, self.rows_per_page, "uint8", kind)

    def rows(self, ids: PageIds) -> torch.Tensor:
        """The rows of pages."""
        first = torch.from_numpy(ids) * self.rows_per_page
        return (first[:, None] + torch.arange(self.rows_per_page)).flatten()


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(len(tensor), -1).view(torch.uint8)


class DevicePages:
    """A device pool and the store of its pages."""

    def __init__(self, entry: Any, store: Store, *, is_staged: bool | None = None) -> None:
        """`is_staged`: default, only where the store cannot reach the pool's memory."""
        self.entry = entry
        self.store = store
        self.pieces = Pieces.of(entry)
        self._order = {layer: order for order, layer in enumerate(self.pieces.layers)}
        is_on_host = self.pieces.all[0].device.type == "cpu"
        self._putting: _Staging | None = None
        self._loading: _Staging | None = None
        if is_staged or (is_staged is None and not is_on_host):
            self._putting, self._loading = _Staging(self.pieces), _Staging(self.pieces)
        else:
            self._buffers = _buffers_over(self.pieces)

    def hashes(self, keys: Sequence[str]) -> BlockHashes:
        return block_hashes(keys)

    def page_ids(self, slots: torch.Tensor) -> PageIds:
        """The pages that `slots` fill.

        Raises:
            ValueError: they do not fill whole pages of the pool, each in order.
        """
        rows = np.asarray(self.entry.prepare_locations(slots), np.int64)
        return rows // self.pieces.rows_per_page

    def put(self, keys: Sequence[str], ids: PageIds) -> bool:
        """Store pages; return whether all of them are in the store now."""
        hashes = self.hashes(keys)
        if self._putting is None:
            return _is_complete(self.store.put(hashes, self._buffers, ids).wait())
        is_complete = True
        for begin, part in self._putting.chunks(ids):
            self._putting.gather(part)
            buffers, own = self._putting.buffers, np.arange(len(part))
            done = self.store.put(hashes[begin : begin + len(part)], buffers, own)
            is_complete &= _is_complete(done.wait())
        return is_complete

    def load_layer(self, layer: int, pinned: PinnedPages, ids: PageIds) -> None:
        """Copy a layer of the leading pinned pages to pages `ids`; it is there on return.

        Raises:
            LoadError: not all of it came.
        """
        order = self._order.get(layer)
        if order is None or not (self.pieces.are_even or order == 0):
            return  # an uneven page is loaded whole with its first layer
        if pinned.num_pages < len(ids):
            raise LoadError(f"{pinned.num_pages} of {len(ids)} pages are pinned")
        for lease, part in pinned.parts(ids):
            if self._loading is None:
                _load(lease, self._buffers, part, 0, self._layers(order))
                continue
            for begin, chunk in self._loading.chunks(part):
                own = np.arange(len(chunk))
                _load(lease, self._loading.buffers, own, begin, self._layers(order))
                self._loading.scatter(chunk, layer if self.pieces.are_even else None)

    def _layers(self, order: int) -> tuple[int, int] | None:
        return (order, order + 1) if self.pieces.are_even else None


def _is_complete(result: TransferResult) -> bool:
    """A block that another writer has in hand counts: it is stored without us."""
    return not (result.num_no_space or result.num_orphan or result.num_unavailable)


def _load(
    lease: Lease, buffers: BlockBuffers, ids: PageIds, first: int, layers: tuple[int, int] | None
) -> None:
    num_loaded = lease.load(buffers, ids, first=first, layers=layers)
    if num_loaded < len(ids):
        raise LoadError(f"{num_loaded} of {len(ids)} pinned pages could be read")


def _buffers_over(pieces: Pieces) -> BlockBuffers:
    """A pool in host memory, where it lies."""
    if pieces.are_even:
        return PagedBuffers.strided(
            [
                AxisTensor(_whole_pages(piece, pieces), ("slot", "dim"), order, part)
                for order, layer in enumerate(pieces.layers.values())
                for part, piece in enumerate(layer)
            ],
            pieces.spec,
        )
    shape = (pieces.num_pages, pieces.rows_per_page)
    return PagedBuffers.opaque(
        [_whole_pages(piece, pieces).view(*shape, -1) for piece in pieces.all], _LAYOUT
    )


def _whole_pages(piece: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    return piece[: pieces.num_pages * pieces.rows_per_page]


class _Staging:
    """Host memory between a pool on a device and the store: blocks, one in each row.

    What is under way on the device is finished before a row is read or filled again. A stream of
    our own keeps the copies out of the way of the forward pass.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._device = pieces.all[0].device
        self._is_host = self._device.type == "cpu"
        num_pages = max(1, min(_STAGING_BYTES // pieces.page_bytes, pieces.num_pages))
        self._rows = torch.empty(
            (num_pages, pieces.page_bytes), dtype=torch.uint8, pin_memory=not self._is_host
        )
        self._stream = None if self._is_host else torch.Stream(self._device)
        self.buffers: BlockBuffers = ContiguousBlocks(self._rows)
        if pieces.are_even:
            spec = pieces.spec
            shape = (spec.num_layers, spec.num_parts, spec.block_tokens, spec.head_dim)
            axes = ("block", "layer", "part", "token", "dim")
            shaped = self._rows.view(num_pages, *shape)
            self.buffers = PagedBuffers.strided([AxisTensor(shaped, axes)], spec)

    def chunks(self, ids: PageIds) -> Iterator[tuple[int, PageIds]]:
        size = len(self._rows)
        for begin in range(0, len(ids), size):
            yield begin, ids[begin : begin + size]

    def gather(self, ids: PageIds) -> None:
        """Fill the first rows with pages of the device."""
        rows = self._pieces.rows(ids).to(self._device)
        with self._on_stream():
            for piece, column in self._columns(len(ids)):
                column.copy_(piece[rows].view(len(ids), -1), non_blocking=True)
        self._finish()

    def scatter(self, ids: PageIds, layer: int | None) -> None:
        """Copy the first rows to pages of the device: one layer, or all with None."""
        rows = self._pieces.rows(ids).to(self._device)
        chosen = None if layer is None else {id(p) for p in self._pieces.layers[layer]}
        with self._on_stream():
            for piece, column in self._columns(len(ids)):
                if chosen is None or id(piece) in chosen:
                    there = column.to(self._device, non_blocking=True)
                    piece.index_copy_(0, rows, there.reshape(len(rows), -1))
        self._finish()

    def _columns(self, num_pages: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each piece of the pool, and where it lies in the rows."""
        begin = 0
        for piece in self._pieces.all:
            end = begin + piece.shape[1] * self._pieces.rows_per_page
            yield piece, self._rows[:num_pages, begin:end]
            begin = end

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._stream

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

"""From the tensors that vLLM registers to whole blocks as bytes.

What lies inside a page is the attention backend's own affair, so blocks move as bytes. A block of a
group is one piece of memory for each of its layers, or several where heads lie apart; pieces that
are neighbours become one: in a block-outermost layout the whole block is.

Blocks in host memory are copied by the store itself. Those on a device are staged: gathered on a
stream of ours into device memory, copied into pinned host memory, and put from there; a load goes
the same way back. One batch of STAGING_BYTES for loads and one for saves are all that this takes of
either memory, so loads that run at a time take turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.v1.kv_cache_interface import group_kernel_blocks

from kvstore import BlockHashes, ConfigError, ContiguousBlocks, PagedBuffers, Store, TransferResult
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.pages import BlockIds, HostPages, Pages

from .namespaces import layers_of

STAGING_BYTES = 64 << 20

_LAYOUT = "vllm"  # which one is said by the namespace


def pages_of(
    kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any, groups: Sequence[Group]
) -> dict[int, Pages]:
    """Return the pages of each group.

    Raises:
        ConfigError: a layer's tensor is missing, does not hold whole blocks, or is on a device that
            we cannot copy from.
    """
    num_blocks = int(kv_cache_config.num_blocks)
    views = {}
    for group in groups:
        names = layers_of(kv_cache_config, group.group_id)
        views[group.group_id] = block_views(
            [_tensor(kv_caches, name) for name in names], num_blocks
        )
    device = next(iter(views.values()))[0].device
    if device.type == "cpu":
        return {
            group_id: HostPages(PagedBuffers.opaque(pieces, _LAYOUT))
            for group_id, pieces in views.items()
        }
    if device.type != "cuda":
        raise ConfigError(f"kv cache: is on {device}, only host memory and CUDA are supported")
    return dict(staged_pages(views))


def staged_pages(
    views: Mapping[int, Sequence[torch.Tensor]], staging_bytes: int = STAGING_BYTES
) -> dict[int, StagedPages]:
    """Return the pages of groups, whose `block_views` are given, with one stage each way."""
    size = max(staging_bytes, *(sum(v.shape[1] for v in pieces) for pieces in views.values()))
    device = next(iter(views.values()))[0].device
    save, load = _Stage(device, size), _Stage(device, size)
    return {group_id: StagedPages(pieces, save, load) for group_id, pieces in views.items()}


def recorder(kv_caches: Mapping[str, torch.Tensor]) -> Callable[[], Callable[[], None]] | None:
    """Return what marks a device's work so far, for `WorkerSide`; None where memory is the CPU's,
    whose work is done when a step's calls are."""
    if all(not tensor.is_cuda for tensor in kv_caches.values()):
        return None

    def record() -> Callable[[], None]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        synchronize: Callable[[], None] = event.synchronize
        return synchronize

    return record


def block_views(tensors: Sequence[torch.Tensor], num_blocks: int) -> list[torch.Tensor]:
    """Return a block's pieces, each as a view (num_blocks, bytes) of the engine's memory.

    The order is the layers' own, which does not depend on where memory happens to lie; only where
    all pieces together are one without gaps does their order in memory count, and the layout
    stands for it.

    Raises:
        ConfigError: a tensor's first dimension is not made of blocks.
    """
    pieces: list[tuple[torch.Tensor, int, int, int]] = []  # memory, offset, bytes, block stride
    for tensor in tensors:
        if tensor.shape[0] % num_blocks:
            raise ConfigError(
                f"kv cache: {tensor.shape[0]} kernel blocks are not a multiple of {num_blocks}"
            )
        pieces += _pieces(group_kernel_blocks(tensor, num_blocks))
    if not pieces:
        raise ConfigError("kv cache: a group has no layers")
    in_memory = _merged(sorted(pieces, key=lambda piece: piece[1]))
    merged = in_memory if len(in_memory) == 1 else _merged(pieces)
    return [
        torch.empty(0, dtype=torch.uint8, device=memory.device).set_(
            memory.untyped_storage(), offset, (num_blocks, size), (stride, 1)
        )
        for memory, offset, size, stride in merged
    ]


def _tensor(kv_caches: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in kv_caches:
        raise ConfigError(f"kv cache: layer {name} was not registered")
    return kv_caches[name]


def _pieces(tensor: torch.Tensor) -> list[tuple[torch.Tensor, int, int, int]]:
    """The dense pieces of a block in one layer's tensor: in one, or apart by some dimension."""
    item = tensor.element_size()
    inner = sorted(
        (stride * item, size)
        for stride, size in zip(tensor.stride()[1:], map(int, tensor.shape[1:]), strict=True)
        if size > 1
    )
    size = item
    while inner and inner[0][0] == size:
        size *= inner.pop(0)[1]
    offsets = [tensor.storage_offset() * item]
    for stride, count in inner:  # the innermost first, so that pieces lie in order of address
        offsets = [begin + i * stride for i in range(count) for begin in offsets]
    stride = int(tensor.stride(0)) * item
    return [(tensor, int(offset), size, stride) for offset in offsets]


def _merged(
    pieces: Sequence[tuple[torch.Tensor, int, int, int]],
) -> list[tuple[torch.Tensor, int, int, int]]:
    """Make one of each two pieces that follow on one another, in every block alike."""
    merged: list[tuple[torch.Tensor, int, int, int]] = []
    for memory, offset, size, stride in pieces:
        if merged:
            before, begin, length, step = merged[-1]
            is_same = before.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
            if is_same and step == stride and begin + length == offset and length + size <= stride:
                merged[-1] = (before, begin, length + size, step)
                continue
        merged.append((memory, offset, size, stride))
    return merged


class _Stage:
    """Memory for one batch: where pieces are gathered, and its twin that the store reads."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        is_cuda = device.type == "cuda"
        self.device = device
        self.gathered = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._stream: Any = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self.lock = threading.Lock()  # one batch at a time

    def rows(self, memory: torch.Tensor, row_bytes: int) -> torch.Tensor:
        """Return either memory as rows."""
        count = len(memory) // row_bytes
        return memory[: count * row_bytes].view(count, row_bytes)

    def on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class _Batch:
    """A stage as a group's blocks."""

    def __init__(self, stage: _Stage, block_bytes: int) -> None:
        self.stage = stage
        self.gathered = stage.rows(stage.gathered, block_bytes)
        self.host = stage.rows(stage.host, block_bytes)
        self.buffers = ContiguousBlocks(self.host.numpy(), _LAYOUT)


class StagedPages:
    """Blocks on a device. See the top."""

    def __init__(self, views: Sequence[torch.Tensor], save: _Stage, load: _Stage) -> None:
        """`views`: a block's pieces, from `block_views`. `save`, `load`: hold at least a block."""
        self._views = tuple(views)
        self._block_bytes = sum(int(view.shape[1]) for view in views)
        self._save, self._load = _Batch(save, self._block_bytes), _Batch(load, self._block_bytes)
        self._batch = len(self._save.host)

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    def put(self, store: Store, chain: BlockHashes, block_ids: BlockIds) -> TransferResult:
        total = TransferResult(0)
        is_leading = True
        for begin in range(0, len(chain), self._batch):
            part = chain[begin : begin + self._batch]
            with self._save.stage.lock:
                self._gather(self._save, block_ids[begin : begin + self._batch])
                result = store.put(part, self._save.buffers).wait()
            if is_leading:
                total.num_blocks += result.num_blocks
            is_leading = is_leading and result.num_blocks == len(part)
            for name in ("stored", "present", "pending", "no_space", "orphan", "unavailable"):
                count = getattr(total, f"num_{name}") + getattr(result, f"num_{name}")
                setattr(total, f"num_{name}", count)
        return total

    def load(
        self,
        store: Store,
        chain: BlockHashes,
        block_ids: BlockIds,
        deadline: float,
        holders: Sequence[str] = (),
    ) -> int:
        loaded = 0
        while loaded < len(chain):
            end = loaded + self._batch
            part = chain[loaded:end]
            with self._load.stage.lock:
                left = deadline - time.monotonic()  # another load may have had its turn first
                if left <= 0:
                    break
                done = store.load(part, self._load.buffers, timeout=left, holders=holders).wait()
                came = done.num_blocks
                self._scatter(self._load, block_ids[loaded : loaded + came])
            loaded += came
            if came < len(part):
                break
        return loaded

    def _gather(self, batch: _Batch, block_ids: BlockIds) -> None:
        count = len(block_ids)
        with batch.stage.on_stream():
            ids = torch.from_numpy(block_ids).to(batch.stage.device)
            for view, columns in self._columns(batch, count):
                columns.copy_(view.index_select(0, ids))
            batch.host[:count].copy_(batch.gathered[:count], non_blocking=True)
        batch.stage.wait()

    def _scatter(self, batch: _Batch, block_ids: BlockIds) -> None:
        count = len(block_ids)
        if count == 0:
            return
        with batch.stage.on_stream():
            ids = torch.from_numpy(block_ids).to(batch.stage.device)
            batch.gathered[:count].copy_(batch.host[:count], non_blocking=True)
            for view, columns in self._columns(batch, count):
                view.index_copy_(0, ids, columns)
        batch.stage.wait()

    def _columns(self, batch: _Batch, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each piece's memory in the engine and its part of the rows of a batch."""
        begin = 0
        for view in self._views:
            end = begin + int(view.shape[1])
            yield view, batch.gathered[:count, begin:end]
            begin = end

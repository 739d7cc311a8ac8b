"""What vLLM's OffloadingConnector lacks to run on a CPU: a worker that copies by itself.

vLLM's own spec refuses hosts without a GPU, as its worker copies by CUDA. This one copies between
vLLM's blocks and its pinned pool in `submit_*`; everything else is vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyingWorker(OffloadingWorker):
    """Copies at once, on the caller's thread."""

    def __init__(
        self, caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        self._caches = caches
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._pools = [
            region.create_next_worker_view(tensor.page_size_bytes * blocks_per_chunk)
            for tensor in caches.tensors
        ]
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec
    ) -> bool:
        for page, chunk_page in self._pairs(src_spec, dst_spec):
            chunk_page.copy_(page)
        return self._finish(job_id)

    def submit_load(
        self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec
    ) -> bool:
        for page, chunk_page in self._pairs(dst_spec, src_spec):
            page.copy_(chunk_page)
        return self._finish(job_id)

    def _pairs(
        self, blocks: GPULoadStoreSpec, chunks: CPULoadStoreSpec
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each page of vLLM's blocks with its place in the pool."""
        block_ids, chunk_ids = iter(blocks.block_ids.tolist()), iter(chunks.chunk_ids.tolist())
        for group, (count, first) in enumerate(
            zip(blocks.group_sizes, blocks.block_indices, strict=True)
        ):
            chunk = -1
            for index in range(first, first + count):
                if index == first or index % self._blocks_per_chunk == 0:
                    chunk = next(chunk_ids)
                place = index % self._blocks_per_chunk
                block = next(block_ids)
                for ref in self._caches.group_data_refs[group]:
                    tensor = self._caches.tensors[ref.tensor_idx]
                    begin = place * tensor.page_size_bytes
                    row = self._pools[ref.tensor_idx][chunk]
                    yield (
                        tensor.tensor[block, : ref.page_size_bytes],
                        row[begin : begin + ref.page_size_bytes],
                    )

    def _finish(self, job_id: int) -> bool:
        self._finished.append(TransferResult(job_id, True, 0, 0.0))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: Any) -> None:
        """They are done."""

    def shutdown(self) -> None:
        self._pools.clear()
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """TieringOffloadingSpec with a CopyingWorker."""

    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyingWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker

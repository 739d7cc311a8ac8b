"""vLLM's tiered offloading on a machine without a GPU, to compare and to test with.

vLLM's own worker copies between a GPU and the pool of its OffloadingConnector, and refuses to start
elsewhere. This spec puts a worker in its place that copies within host memory; manager, pool and
secondary tiers are vLLM's. A chunk is one block. In `kv_connector_extra_config`: `spec_name` is
HostOffloadingSpec, `spec_module_path` this module.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostCopies(OffloadingWorker):
    """Copies when it is asked; so each job is finished when it is submitted."""

    def __init__(self, caches: Any, region: Any) -> None:
        self._groups = caches.group_data_refs
        self._blocks = [kept.tensor for kept in caches.tensors]
        self._chunks = [region.create_next_worker_view(k.page_size_bytes) for k in caches.tensors]
        self._region = region
        self._finished: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for blocks, block_ids, chunks, chunk_ids in self._pieces(src_spec, dst_spec):
            chunks[chunk_ids] = blocks[block_ids]
        return self._finish(job_id)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for blocks, block_ids, chunks, chunk_ids in self._pieces(dst_spec, src_spec):
            blocks[block_ids] = chunks[chunk_ids]
        return self._finish(job_id)

    def _pieces(self, engine: Any, host: Any) -> Any:
        """Views and row numbers on both sides, a piece for each group and tensor."""
        begin = 0
        block_ids, chunk_ids = torch.as_tensor(engine.block_ids), torch.as_tensor(host.block_ids)
        for refs, size in zip(self._groups, engine.group_sizes, strict=True):
            rows = slice(begin, begin + size)
            begin += size
            for ref in refs:
                used = slice(ref.page_size_bytes)
                blocks, chunks = self._blocks[ref.tensor_idx], self._chunks[ref.tensor_idx]
                yield blocks[:, used], block_ids[rows], chunks[:, used], chunk_ids[rows]

    def _finish(self, job_id: int) -> bool:
        self._finished.append(TransferResult(job_id, True))
        return True

    def get_finished(self) -> list[Any]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def shutdown(self) -> None:
        self._chunks.clear()
        self._region.cleanup()


class HostOffloadingSpec(TieringOffloadingSpec):
    _worker: Any

    def get_worker(self, kv_caches: Any) -> Any:
        if not self._worker:
            if self.blocks_per_chunk != 1:
                raise ValueError(f"block_size: a chunk of {self.blocks_per_chunk} blocks, not 1")
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = HostCopies(kv_caches, region)
        return self._worker

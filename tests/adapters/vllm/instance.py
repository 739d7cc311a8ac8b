"""A vLLM instance without a model: the real scheduler, block pool, request and hash classes, and
our connector in both roles, made by vLLM's own factory; steps run in the order of vLLM's runner.

The forward pass writes into each block what the tokens up to its end are, and first compares all
that the request counts as computed: a block that was loaded wrong, not at all, or saved before it
was computed is seen by the next step that rests on it.
"""

from __future__ import annotations

import copy
import hashlib
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvstore import Store
from tests.adapters.vllm import configs

BLOCK = configs.BLOCK_TOKENS
WAIT_S = 60.0
END_OF_PROMPT = 7  # the token that the model always says

KV_CONNECTOR = {
    "kv_connector": "KVStoreConnector",
    "kv_connector_module_path": "kvstore_adapters.vllm.connector",
}


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(i * 37 + seed * 11 + 3) % 251 for i in range(num_tokens)]


class Instance:
    """See above. `alter` may change the configuration before anything is made of it."""

    def __init__(
        self,
        model: Path,
        address: str,
        *,
        name: str = "",
        role: str = "kv_both",
        specs: Sequence[Any] = (),
        num_blocks: int = configs.NUM_BLOCKS,
        num_ranks: int = 1,
        policy: str = "recompute",
        connector: dict[str, Any] | None = None,
        alter: Callable[[Any], None] = lambda config: None,
        **settings: Any,
    ) -> None:
        config = configs.vllm_config(model)
        config.cache_config.num_gpu_blocks_override = num_blocks
        chosen = connector or {
            **KV_CONNECTOR,
            # Requests end after two steps here: what finds no room at once would not be saved.
            "kv_connector_extra_config": {
                "address": address,
                "model": name,
                "max_pinned_fraction": 1.0,
                **settings,
            },
        }
        config.kv_transfer_config = KVTransferConfig(
            kv_role=role, kv_load_failure_policy=policy, **chosen
        )
        config.parallel_config.tensor_parallel_size = num_ranks
        config.parallel_config.world_size = num_ranks
        alter(config)
        self.caches = configs.cache_config(config, specs)
        config.cache_config.num_gpu_blocks = self.caches.num_blocks
        block_tokens, hash_tokens = resolve_kv_cache_block_sizes(self.caches, config)
        self.caches.hash_block_size = hash_tokens
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(hash_tokens, hash_function)
        # In vLLM's order: first the workers, then the scheduler, then the handshake.
        self.workers: list[Any] = []
        self.tensors: list[dict[str, torch.Tensor]] = []
        for rank in range(num_ranks):
            own = copy.copy(config)
            own.parallel_config = copy.copy(config.parallel_config)
            own.parallel_config.rank = rank
            worker = KVConnectorFactory.create_connector(own, KVConnectorRole.WORKER, self.caches)
            tensors = configs.allocated(config, self.caches)
            for tensor in tensors.values():
                tensor.fill_(-1.0)
            worker.register_kv_caches(tensors)
            self.workers.append(worker)
            self.tensors.append(tensors)
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=self.caches,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_tokens,
            hash_block_size=hash_tokens,
            log_stats=True,
        )
        self.connector = self.scheduler.connector
        told = {(0, r): w.get_handshake_metadata() for r, w in enumerate(self.workers)}
        if any(told.values()):
            self.connector.set_xfer_handshake_metadata_pp_aware(told)
        self.aggregator = KVOutputAggregator.from_connector(self.connector, num_ranks)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.on_scheduled: Callable[[Any], None] = lambda output: None  # before workers see it
        self.computed: dict[str, int] = {}  # tokens that each request had the model compute
        self.published: list[Any] = []
        self.scheduler.kv_event_publisher = types.SimpleNamespace(
            publish=lambda batch: self.published.extend(batch.events), shutdown=lambda: None
        )

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()

    def stores(self, rank: int = 0) -> dict[int, Store]:
        """The stores of one rank by group, as its worker has them."""
        shards = self.workers[rank]._worker._shards
        return {group: shards.store(rank, group) for _, group in shards._namespaces}

    def hold_loads(self, rank: int = 0) -> Callable[[], None]:
        """Keep loads from beginning; what is returned lets them go."""
        transfers = self.workers[rank]._worker._transfers
        held: list[Any] = []
        begin, transfers.load = transfers.load, lambda *load: held.append(load)

        def release() -> None:
            transfers.load = begin
            for load in held:
                begin(*load)

        return release

    # --- requests

    def add(
        self,
        name: str,
        tokens: Sequence[int],
        *,
        max_tokens: int = 2,
        salt: str | None = None,
        lora: str | None = None,
        params: dict[str, Any] | None = None,
    ) -> Request:
        sampling = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args={"kv_transfer_params": params} if params is not None else None,
        )
        sampling.update_from_generation_config({}, 2)
        request = Request(
            request_id=name,
            prompt_token_ids=list(tokens),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self.hasher,
            cache_salt=salt,
            lora_request=LoRARequest(lora, 1, f"/{lora}") if lora else None,
        )
        self.computed[name] = 0
        self.scheduler.add_request(request)
        return request

    def run(self, name: str, tokens: Sequence[int], **options: Any) -> int:
        """Serve one request; return how many tokens were computed for it."""
        self.add(name, tokens, **options)
        self.until(lambda: name not in self.scheduler.requests)
        return self.computed[name]

    def until(self, condition: Callable[[], bool]) -> None:
        """Step until it is so."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "did not happen in time"
            self.step()

    def settle(self) -> None:
        """Step until nothing is under way."""
        self.until(lambda: not self.scheduler.has_requests())

    def status(self, name: str) -> RequestStatus:
        return self.scheduler.requests[name].status

    # --- steps

    def step(self) -> Any:
        """One step; returns the scheduler's output."""
        output = self.scheduler.schedule()
        self.on_scheduled(output)
        results = [self._on_rank(rank, output) for rank in range(len(self.workers))]
        result = self.aggregator.aggregate(results)
        self.scheduler.update_from_output(output, result)
        return output

    def _on_rank(self, rank: int, output: Any) -> ModelRunnerOutput:
        worker, metadata = self.workers[rank], output.kv_connector_metadata
        context = types.SimpleNamespace(attn_metadata=None)
        worker.handle_preemptions(metadata)
        worker.bind_connector_metadata(metadata)
        if output.has_sync_kv_loads:
            worker.start_load_kv(context)
        before = {
            name: self.scheduler.requests[name].num_computed_tokens - count
            for name, count in output.num_scheduled_tokens.items()
        }
        failed_now = output.has_sync_kv_loads and self._peek_failed(worker)
        for name, count in output.num_scheduled_tokens.items():
            self._forward(rank, name, before[name], count, is_checked=not failed_now)
        if not output.has_sync_kv_loads:
            worker.start_load_kv(context)
        worker.wait_for_save()
        told = worker.get_transfer_results(output.finished_req_ids)
        connector_output = KVConnectorOutput(
            finished_sending=told.finished_sending,
            finished_recving=told.finished_recving,
            failed_recving=told.failed_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_stats=worker.get_kv_connector_stats(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[self._sampled(name) for name in names],
            kv_connector_output=connector_output,
        )

    def _peek_failed(self, worker: Any) -> bool:
        """Whether a load that this step waited for failed: what is computed then is garbage."""
        side = worker._worker
        with side._transfers._lock:
            return any(not outcome.is_complete for _, outcome in side._transfers._outcomes)

    def _sampled(self, name: str) -> list[int]:
        request = self.scheduler.requests[name]
        return [END_OF_PROMPT] if request.num_computed_tokens >= request.num_tokens else []

    def _forward(self, rank: int, name: str, before: int, count: int, is_checked: bool) -> None:
        request = self.scheduler.requests[name]
        self.computed[name] += count if rank == 0 else 0
        tables = self.scheduler.kv_cache_manager.get_block_ids(name)
        for group_id, table in enumerate(tables):
            spec = self.caches.kv_cache_groups[group_id].kv_cache_spec
            size = spec.block_size
            if is_checked:
                visible = getattr(spec, "sliding_window", None)
                first = max(0, before - visible + 1) // size if visible else 0
                for index in range(first, before // size):
                    assert self.holds(rank, group_id, table[index], request, index), (
                        f"{name}: block {index} of group {group_id} is not what it should be"
                    )
            for index in range(before // size, -(-(before + count) // size)):
                if table[index]:
                    end = min((index + 1) * size, before + count)
                    value = -2.0 if not is_checked else self.value(rank, group_id, request, end)
                    self._write(rank, group_id, table[index], value)

    def value(self, rank: int, group_id: int, request: Request, end: int) -> float:
        """What a block says whose last token is number `end - 1`."""
        said = (rank, group_id, list(request.all_token_ids[:end]), request.cache_salt)
        lora = request.lora_request.lora_name if request.lora_request else None
        return float(int(hashlib.sha256(repr((said, lora)).encode()).hexdigest()[:5], 16))

    def _write(self, rank: int, group_id: int, block: int, value: float) -> None:
        for layer, name in enumerate(self.caches.kv_cache_groups[group_id].layer_names):
            self.tensors[rank][name][block] = value + layer

    def holds(self, rank: int, group_id: int, block: int, request: Request, index: int) -> bool:
        size = self.caches.kv_cache_groups[group_id].kv_cache_spec.block_size
        value = self.value(rank, group_id, request, (index + 1) * size)
        return block != 0 and all(
            bool((self.tensors[rank][name][block] == value + layer).all())
            for layer, name in enumerate(self.caches.kv_cache_groups[group_id].layer_names)
        )

    @property
    def free_blocks(self) -> int:
        return int(self.pool.get_num_free_blocks())

    @property
    def all_blocks(self) -> int:
        return int(self.caches.num_blocks) - 1  # one is the null block


@contextmanager
def instances() -> Iterator[Callable[..., Instance]]:
    """Make instances that are closed at the end."""
    made: list[Instance] = []

    def make(*arguments: Any, **options: Any) -> Instance:
        made.append(Instance(*arguments, **options))
        return made[-1]

    try:
        yield make
    finally:
        for instance in made:
            instance.close()

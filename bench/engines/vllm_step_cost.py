"""What does the connector add to a step of vLLM's scheduler, and to a request's way into it?

    .venv-vllm/bin/python bench/engines/vllm_step_cost.py [--json | --markdown] [--quick]

vLLM's own scheduler decodes REQUESTS requests at once, with the connector made by its own factory;
each step is timed twice, what the scheduler calls of the connector and all that it does besides. A
worker that moves nothing reports every save in the next step. Lookups ask a real daemon that holds
all blocks of a prompt of 8,192 hashes. Times are medians of single calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import kvstore
from kvstore.bench.report import Figure, Report
from kvstore.bench.serving import PrivateDaemon

REQUESTS = 64
BLOCK_TOKENS = 16
LONG_HASHES = 8192
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 1 << 18,
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class Timed:
    """A method of the connector that notes how long each call took."""

    def __init__(self, connector: Any, name: str) -> None:
        self.seconds = 0.0  # since it was last set to 0
        self._call = getattr(connector, name)
        setattr(connector, name, self)

    def __call__(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._call(*arguments)
        finally:
            self.seconds += time.perf_counter() - began


class Instance:
    """A scheduler with its connector, and what stands for the workers."""

    def __init__(self, directory: Path, address: str, num_blocks: int) -> None:
        import torch
        from vllm.config import (
            CacheConfig,
            DeviceConfig,
            KVTransferConfig,
            ModelConfig,
            SchedulerConfig,
            VllmConfig,
        )
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            KVCacheTensor,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        (directory / "config.json").write_text(json.dumps(MODEL))
        longest = LONG_HASHES * BLOCK_TOKENS + 64
        config = VllmConfig(
            model_config=ModelConfig(
                model=str(directory),
                dtype="float32",
                max_model_len=longest,
                skip_tokenizer_init=True,
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=REQUESTS,
                max_num_batched_tokens=1 << 17,
                max_model_len=longest,
                is_encoder_decoder=False,
                async_scheduling=False,
            ),
            cache_config=CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=KVTransferConfig(
                kv_connector="KVStoreConnector",
                kv_connector_module_path="kvstore_adapters.vllm.connector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"address": address, "model": "step-cost"},
            ),
        )
        config.cache_config.num_gpu_blocks = num_blocks
        config.cache_config.kv_cache_layout = "LBHNC"
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=32, dtype=torch.float32
        )
        page = spec.page_size_bytes
        tensor = KVCacheTensor(
            size=page * num_blocks, layers=["l"], layer_stride=0, block_stride=page
        )
        caches = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[tensor],
            kv_cache_groups=[KVCacheGroupSpec(["l"], spec)],
            kv_cache_layout="LBHNC",
            hash_block_size=BLOCK_TOKENS,
        )
        function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(function)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, function)
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=caches,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        self.connector: Any = self.scheduler.connector
        self._jobs: dict[int, int] = {}

    def request(self, name: str, num_tokens: int, max_tokens: int = 1) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        sampling.update_from_generation_config({}, 2)
        seed = int(name)
        return Request(
            request_id=name,
            prompt_token_ids=[(i * 7 + seed) % 251 for i in range(num_tokens)],
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self._hasher,
        )

    def step(self) -> None:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        from kvstore_adapters.planning.plan import StepReport
        from kvstore_adapters.vllm.metadata import ReportMetadata

        output: Any = self.scheduler.schedule()
        report = ReportMetadata(StepReport(dict.fromkeys(self._jobs, 1), self._jobs))
        self._jobs = {job.job_id: job.num_blocks for job in output.kv_connector_metadata.plan.saves}
        names = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        done = {n for n in names if requests[n].num_computed_tokens >= requests[n].num_tokens}
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[7] if name in done else [] for name in names],
            kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=report),
        )
        self.scheduler.update_from_output(output, result)

    def close(self) -> None:
        self.scheduler.shutdown()


def microseconds(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e6


def steps(instance: Instance, count: int) -> list[Figure]:
    """REQUESTS requests decode, their prompts' lengths spread over a block."""
    for i in range(REQUESTS):
        instance.scheduler.add_request(
            instance.request(str(i), 1000 + i, max_tokens=count + REQUESTS)
        )
    while len(instance.scheduler.running) < REQUESTS:
        instance.step()
    parts = [
        Timed(instance.connector, name)
        for name in ("build_connector_meta", "update_connector_output")
    ]
    ours, theirs = [], []
    for _ in range(count):
        for part in parts:
            part.seconds = 0.0
        began = time.perf_counter()
        instance.step()
        took = time.perf_counter() - began
        ours.append(sum(part.seconds for part in parts))
        theirs.append(took - ours[-1])
    assert len(instance.scheduler.running) == REQUESTS
    share = statistics.median(theirs) / statistics.median(ours)
    against = "the rest of vLLM's step"
    return [
        Figure("step_64_p50_us", microseconds(ours), "us", share, against),
        Figure("step_64_p99_us", float(np.quantile(ours, 0.99)) * 1e6, "us"),
    ]


def matches(instance: Instance, address: str, count: int) -> Iterator[Figure]:
    """A prompt whose blocks are all in the daemon comes in, again and again."""
    long = instance.request("1000", LONG_HASHES * BLOCK_TOKENS)
    connector, hashes = instance.connector, long.block_hashes
    assert len(hashes) == LONG_HASHES
    namespace = connector._scheduler._shards.namespace(0, 0)
    size = namespace.spec.block_bytes
    with kvstore.connect(address, namespace) as store:
        names = kvstore.BlockHashes.chain(hashes)
        blocks = kvstore.ContiguousBlocks(np.zeros((LONG_HASHES, size), np.uint8))
        assert store.put(names, blocks).wait().num_blocks == LONG_HASHES
        bare = timed(lambda: store.lookup(names), count)
    arrivals, answers, memos = [], [], []
    for _ in range(count):
        instance.step()  # each gives lookups some time to be waited for
        began = time.perf_counter()
        connector.on_new_request(long)
        arrived = time.perf_counter()
        while (found := connector.get_num_new_matched_tokens(long, 0)[0]) is None:
            pass
        known = time.perf_counter()
        connector.get_num_new_matched_tokens(long, 0)
        memos.append(time.perf_counter() - known)
        assert found == LONG_HASHES * BLOCK_TOKENS
        arrivals.append(arrived - began)
        answers.append(known - arrived)
        connector.request_finished(long, [])
    limit = microseconds(bare)
    against = "Store.lookup of the same hashes"
    match, arrival = microseconds(answers), microseconds(arrivals)
    yield Figure("match_memo_p50_us", microseconds(memos), "us")
    yield Figure("match_8192_p50_us", match, "us", limit / match, against)
    yield Figure("arrive_8192_p50_us", arrival, "us", limit / arrival, against)


def timed(call: Callable[[], object], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


@contextmanager
def served() -> Iterator[tuple[Path, str]]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with PrivateDaemon(path, cpu="256MiB") as daemon:
            daemon.start()
            yield path, daemon.address


def measure(quick: bool) -> list[Figure]:
    count = 200 if quick else 2000
    with served() as (path, address):
        instance = Instance(path, address, num_blocks=1 << 15)
        try:
            return [*matches(instance, address, count // 10), *steps(instance, count)]
        finally:
            instance.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    Report(measure(arguments.quick), arguments.quick).show(
        as_json=arguments.json, as_markdown=arguments.markdown
    )


if __name__ == "__main__":
    main()

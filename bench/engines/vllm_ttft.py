"""How much sooner is vLLM's first token there when the prompt's KV comes from kvstore?

    .venv-vllm/bin/python bench/engines/vllm_ttft.py [--json | --markdown] [--quick] [--only NAME]

Prompts of 3,000 tokens, a Llama of 100 million random weights, one request at a time. For each
subject one engine computes the prompts and ends, and a second one, in a process of its own, gets
them through its connector. What computing costs is asked of an engine without connector, which also
gets them from vLLM's own prefix cache: the limit. Figures are medians, and tokens are compared.

`fs_tier` is vLLM's own file tier on tmpfs and `kvstore_tier` ours in its place, both below vLLM's
OffloadingConnector with a worker that needs no GPU (tests/adapters/vllm/cpu_offload.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.admin import Admin
from kvstore.bench.report import Figure, Report
from kvstore.bench.serving import PrivateDaemon

SUBJECTS = ("kvstore_async", "kvstore_sync", "kvstore_tier", "fs_tier")
POOL_BYTES = 1 << 30  # of vLLM's OffloadingConnector
QUIET_SECONDS = 2.0
TMPFS = "/dev/shm"
ROOT = Path(__file__).resolve().parents[2]
# LMCache 0.5.6 says "No supported cpu connector found" in vLLM's worker, and computes everything.
LMCACHE = "its connector for vLLM has no support for CPUs"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # more threads than idle cores make every figure noise
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Times:
    """Milliseconds to the first token, one a prompt, and these tokens."""

    first: list[float]
    again: list[float]  # from vLLM's own prefix cache
    external_tokens: int  # prompt tokens that came through the connector, in all
    tokens: list[int]


@dataclass(frozen=True)
class Subject:
    name: str
    transfer: Mapping[str, Any]
    stored: Callable[[], int]  # grows while saves go on


def run_engine(
    model: str, prompts: Sequence[Sequence[int]], transfer: Mapping[str, Any] | None
) -> Iterator[Times]:
    """Yield the times, and then step until it is closed, as some saves need."""
    from vllm import LLM

    llm: Any = LLM(
        model=model,
        dtype="float32",
        max_model_len=4096,
        kv_cache_memory_bytes=1 << 30,
        max_num_seqs=4,
        enforce_eager=True,
        disable_log_stats=False,
        **({"kv_transfer_config": dict(transfer)} if transfer else {}),
    )
    first_token(llm, prompts[0][5:300])
    found = Times([], [], 0, [])
    for prompt in prompts:
        token, milliseconds = first_token(llm, prompt)
        found.tokens.append(token)
        found.first.append(milliseconds)
    hits = external_hits(llm)
    found.again.extend(first_token(llm, prompt)[1] for prompt in prompts)
    yield Times(found.first, found.again, hits, found.tokens)
    while True:
        llm.llm_engine.step()
        yield found


def engine_process(model: str, prompts: Sequence[Sequence[int]], subject: Subject | None) -> Times:
    """What a process of its own does. It ends when what it stores has stopped to grow."""
    os.environ.update(ENVIRONMENT)
    running = run_engine(model, prompts, subject.transfer if subject else None)
    found = next(running)
    if subject is not None:
        stored, since = -1, time.monotonic()
        while time.monotonic() - since < QUIET_SECONDS:
            next(running)
            if subject.stored() != stored:
                stored, since = subject.stored(), time.monotonic()
    return found


def first_token(llm: Any, prompt: Sequence[int]) -> tuple[int, float]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    (answer,) = llm.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)
    return answer.outputs[0].token_ids[0], 1000 * answer.metrics.first_token_latency


def external_hits(llm: Any) -> int:
    wanted = "vllm:external_prefix_cache_hits"
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == wanted)


def in_process(model: str, prompts: list[list[int]], subject: Subject | None = None) -> Times:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(engine_process, model, prompts, subject).result()


def stored_in_daemon(address: str) -> int:
    with Admin(address) as admin:
        return int(admin.status()["metrics"]["kvstore_stored_bytes_total"])


def stored_in_files(directory: Path) -> int:
    return sum(1 for path in directory.rglob("*.bin"))


def connector(address: str, load: str) -> dict[str, Any]:
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore_adapters.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": address, "load": load},
    }


def offloading(tier: dict[str, Any]) -> dict[str, Any]:
    """vLLM's OffloadingConnector with one secondary tier."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "tests.adapters.vllm.cpu_offload",
            "cpu_bytes_to_use": POOL_BYTES,
            "secondary_tiers": [tier],
        },
    }


def subject(name: str, directory: Path, until_end: contextlib.ExitStack) -> Subject:
    directory.mkdir()
    if name == "fs_tier":
        tier = {"type": "fs", "root_dir": str(directory)}
        return Subject(name, offloading(tier), partial(stored_in_files, directory))
    daemon = until_end.enter_context(PrivateDaemon(directory, cpu="2GiB"))
    daemon.start()
    stored = partial(stored_in_daemon, daemon.address)
    if name == "kvstore_tier":
        tier = {
            "type": "KVStoreTier",
            "module_path": "kvstore_adapters.vllm.tier",
            "address": daemon.address,
        }
        return Subject(name, offloading(tier), stored)
    return Subject(name, connector(daemon.address, name.removeprefix("kvstore_")), stored)


def figures_of(name: str, filling: Times, found: Times, computed: float) -> list[Figure]:
    return [
        Figure(
            f"ttft_{name}_hit_ms",
            statistics.median(found.first),
            "ms",
            computed / statistics.median(found.first),
            f"an engine without connector that computes it: {computed:.0f} ms",
        ),
        Figure(
            f"ttft_{name}_miss_ms",
            statistics.median(filling.first),
            "ms",
            computed / statistics.median(filling.first),
            "the same; this one saves what it computes",
        ),
    ]


def measure(
    model: str, prompts: list[list[int]], names: Sequence[str], directory: Path
) -> list[Figure]:
    plain = in_process(model, prompts)
    computed, local = statistics.median(plain.first), statistics.median(plain.again)
    figures = [
        Figure("ttft_computed_ms", computed, "ms"),
        Figure("ttft_local_hit_ms", local, "ms", computed / local, "computing it"),
    ]
    for name in names:
        with contextlib.ExitStack() as until_end:
            measured = subject(name, directory / name, until_end)
            filling = in_process(model, prompts, measured)
            found = in_process(model, prompts, measured)
        for times in (filling, found):
            if times.tokens != plain.tokens:
                raise SystemExit(f"{name}: other tokens than those of an engine without connector")
        if found.external_tokens < 0.9 * sum(map(len, prompts)):
            raise SystemExit(f"{name}: only {found.external_tokens} tokens came from outside")
        figures += figures_of(name, filling, found, computed)
    figures.append(Figure.absent("ttft_lmcache_hit_ms", LMCACHE))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--quick", action="store_true", help="a smaller model, shorter prompts")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--only", action="append", choices=SUBJECTS)
    options = parser.parse_args()
    from kvstore_adapters.reference import checkpoint, tokenizer

    sys.path.append(str(ROOT))  # for what our tests have; engines get it too
    size, length = ("tiny", 1000) if options.quick else ("medium", 3000)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 256, length).tolist() for _ in range(options.prompts)]
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=TMPFS) as directory:
        model = Path(directory) / "model"
        checkpoint.make_random(model, size)
        tokenizer.write(model)
        figures = measure(str(model), prompts, options.only or SUBJECTS, Path(directory))
    Report(figures, options.quick).show(as_json=options.json, as_markdown=options.markdown)


if __name__ == "__main__":
    main()

"""How much sooner is vLLM's first token there when the prompt's KV comes from kvstore?

    .venv-vllm/bin/python bench/engines/vllm_ttft.py [--json | --markdown] [--quick] [--prompts N]

Prompts of 3,000 tokens, a Llama of 100 million random weights, one request at a time. Each subject
is an engine in a process of its own. It computes a prompt, forgets vLLM's own prefix cache, and
then gets it again: through its connector, and from vLLM's own cache, which is the limit. What
computing costs is asked of an engine without connector. Figures are medians, and tokens are
compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.bench.report import Figure, Report
from kvstore.bench.serving import PrivateDaemon

IDLE_STEPS_MAX = 1_000_000
SAVE_SECONDS_MAX = 120.0
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
    """Milliseconds to the first token, one a prompt, and the token."""

    computed: list[float]
    external: list[float]
    local: list[float]
    external_tokens: int  # prompt tokens that came through the connector, in all
    first_tokens: list[int]


def run_engine(
    model: str, prompts: Sequence[Sequence[int]], transfer: Mapping[str, Any] | None
) -> Times:
    """In a process of its own. Without `transfer` there are no external times."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    llm: Any = LLM(
        model=model,
        dtype="float32",
        max_model_len=4096,
        kv_cache_memory_bytes=512 << 20,
        max_num_seqs=4,
        enforce_eager=True,
        disable_log_stats=False,
        **({"kv_transfer_config": dict(transfer)} if transfer else {}),
    )
    first_token(llm, prompts[0][5:300])
    times = Times([], [], [], 0, [])
    hits = 0
    for prompt in prompts:
        token, computed = first_token(llm, prompt)
        times.first_tokens.append(token)
        times.computed.append(computed)
        if transfer is not None:
            finish_saves(llm)
            before = external_hits(llm)
            times.external.append(timed(llm, prompt, token))
            hits += external_hits(llm) - before
        times.local.append(timed(llm, prompt, token))
    return Times(times.computed, times.external, times.local, hits, times.first_tokens)


def first_token(llm: Any, prompt: Sequence[int]) -> tuple[int, float]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    (answer,) = llm.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)
    return answer.outputs[0].token_ids[0], 1000 * answer.metrics.first_token_latency


def timed(llm: Any, prompt: Sequence[int], token: int) -> float:
    again, milliseconds = first_token(llm, prompt)
    if again != token:
        raise SystemExit(f"another token came out of cached KV: {again} instead of {token}")
    return milliseconds


def finish_saves(llm: Any) -> None:
    """Wait until nothing refers to the engine's blocks; vLLM's own prefix cache is empty then."""
    give_up = time.monotonic() + SAVE_SECONDS_MAX
    while not llm.reset_prefix_cache():
        if time.monotonic() > give_up:
            raise SystemExit(f"saves did not end within {SAVE_SECONDS_MAX:g} s")
        llm.llm_engine.step()


def external_hits(llm: Any) -> int:
    wanted = "vllm:external_prefix_cache_hits"
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == wanted)


def in_process(model: str, prompts: list[list[int]], transfer: Mapping[str, Any] | None) -> Times:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(run_engine, model, prompts, transfer).result()


def ours(address: str, load: str) -> dict[str, Any]:
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore_adapters.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": address, "load": load},
    }


def figures_of(name: str, found: Times, computed: float) -> list[Figure]:
    external = statistics.median(found.external)
    return [
        Figure(
            f"ttft_{name}_hit_ms",
            external,
            "ms",
            computed / external,
            f"computing it in an engine without connector: {computed:.0f} ms",
        ),
        Figure(
            f"ttft_{name}_miss_ms",
            statistics.median(found.computed),
            "ms",
            computed / statistics.median(found.computed),
            "the same: what the connector adds where nothing is stored yet",
        ),
    ]


def measure(model: str, prompts: list[list[int]], directory: Path) -> list[Figure]:
    plain = in_process(model, prompts, None)
    computed = statistics.median(plain.computed)
    local = statistics.median(plain.local)
    figures = [
        Figure("ttft_computed_ms", computed, "ms"),
        Figure("ttft_local_hit_ms", local, "ms", computed / local, "computing it"),
    ]
    for load in ("async", "sync"):
        place = directory / load
        place.mkdir()
        with PrivateDaemon(place, cpu="1GiB") as daemon:
            daemon.start()
            found = in_process(model, prompts, ours(daemon.address, load))
        if found.first_tokens != plain.first_tokens:
            raise SystemExit(f"{load}: tokens differ from those of an engine without connector")
        if found.external_tokens < 0.9 * sum(map(len, prompts)):
            raise SystemExit(f"{load}: only {found.external_tokens} tokens came from kvstore")
        figures += figures_of(f"kvstore_{load}", found, computed)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--quick", action="store_true", help="a smaller model, shorter prompts")
    parser.add_argument("--prompts", type=int, default=5)
    options = parser.parse_args()
    from kvstore_adapters.reference import checkpoint, tokenizer

    size, length = ("tiny", 1000) if options.quick else ("medium", 3000)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 256, length).tolist() for _ in range(options.prompts)]
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as directory:
        model = Path(directory) / "model"
        checkpoint.make_random(model, size)
        tokenizer.write(model)
        figures = measure(str(model), prompts, Path(directory))
    Report(figures, options.quick).show(as_json=options.json, as_markdown=options.markdown)


if __name__ == "__main__":
    main()

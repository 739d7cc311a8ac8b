"""Two vLLM engines, one after the other, share one KV cache: the second computes no prompt twice.

    pip install kvstore-llm vllm
    python examples/vllm_shared_cache.py [--model DIR] [--connect unix:/path.sock]

Without --model a small model with random weights is made. Without --connect the daemon is used that
`kvstore serve` runs, or else one is started for as long as this runs. Prints the time to the first
token (TTFT) in both engines, how many prompt tokens came from kvstore, and whether both generated
the same tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kvstore
from kvstore.bench.serving import PrivateDaemon, accepts

PROMPT_TOKENS = 1500
NEW_TOKENS = 16


def run_engine(model: str, address: str) -> dict[str, Any]:
    """What one engine generates, in a process of its own."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import torch
    from vllm import LLM, SamplingParams

    # What a GPU has is divided by vLLM itself; on a CPU it asks to be told.
    on_cpu = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 256 << 20}
    llm = LLM(
        model=model,
        max_model_len=2048,
        max_num_seqs=8,
        enforce_eager=True,
        disable_log_stats=False,
        # All that kvstore needs:
        kv_transfer_config={
            "kv_connector": "KVStoreConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"address": address},
        },
        **on_cpu,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    text = "A cache may lose data; it never returns wrong data. " * PROMPT_TOKENS
    prompt = llm.get_tokenizer().encode(text)[:PROMPT_TOKENS]
    # The first request of an engine is slow for reasons of its own: send another one ahead.
    llm.generate({"prompt_token_ids": prompt[7:300]}, sampling, use_tqdm=False)
    hits = external_hits(llm)
    (answer,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    found = {
        "tokens": list(answer.outputs[0].token_ids),
        "ttft_ms": 1000 * answer.metrics.first_token_latency,
        "external_hits": external_hits(llm) - hits,
    }
    llm.llm_engine.engine_core.shutdown()  # else this process waits for the engine's for ever
    return found


def external_hits(llm: Any) -> int:
    """Prompt tokens that vLLM got through its connector so far."""
    wanted = "vllm:external_prefix_cache_hits"
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == wanted)


@contextlib.contextmanager
def daemon(address: str) -> Iterator[str]:
    """The address of a daemon: the one given, the user's own, or one that we start."""
    own = kvstore.default_address()
    if address:
        yield address
    elif accepts(Path(own.removeprefix("unix:"))):
        yield own
    else:
        with (
            tempfile.TemporaryDirectory(prefix="kvstore-") as directory,
            PrivateDaemon(Path(directory), cpu="1GiB") as started,
        ):
            started.start()
            yield started.address


@contextlib.contextmanager
def model_directory(given: str) -> Iterator[str]:
    """The model given, or one of 23 million random weights."""
    if given:
        yield given
        return
    from kvstore_adapters.reference import checkpoint, tokenizer

    with tempfile.TemporaryDirectory(prefix="kvstore-model-") as directory:
        checkpoint.make_random(directory, "small")
        tokenizer.write(Path(directory))
        yield directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="directory or name of a model; default: random")
    parser.add_argument("--connect", default="", help="address of a daemon that runs")
    arguments = parser.parse_args()

    with daemon(arguments.connect) as address, model_directory(arguments.model) as model:
        print(f"daemon: {address}", flush=True)
        found = []
        for which in ("first", "second"):
            # A new process each, so that nothing but kvstore is common to them.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found.append(process.submit(run_engine, model, address).result())
            print(
                f"{which} engine: TTFT {found[-1]['ttft_ms']:.1f} ms,"
                f" {found[-1]['external_hits']} of {PROMPT_TOKENS} prompt tokens from kvstore",
                flush=True,
            )
    same = found[0]["tokens"] == found[1]["tokens"]
    print(f"TTFT ratio: {found[0]['ttft_ms'] / found[1]['ttft_ms']:.1f}x")
    print(f"tokens identical: {'yes' if same else 'NO'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""One SGLang engine whose hierarchical cache is stored in kvstore: a prompt that SGLang itself has
forgotten is not computed again.

    pip install kvstore-llm sglang
    python examples/sglang_hicache.py [--model DIR] [--connect unix:/path.sock] [--linker]

Without --model a small model with random weights is made. Without --connect the daemon is used that
`kvstore serve` runs, or else one is started for as long as this runs. With --linker SGLang's device
pages go straight to kvstore, without a host cache of its own. Prints where the prompt's tokens came
from and how long the answer took: cold, from SGLang's own cache, and after `flush_cache`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvstore
from kvstore.bench.serving import PrivateDaemon, accepts

PROMPT_TOKENS = 1500
NEW_TOKENS = 8
PAGE_TOKENS = 16
STORED_SECONDS_MAX = 60.0  # SGLang writes to its storage in the background


def hicache(address: str) -> dict[str, Any]:
    """All that kvstore needs as HiCache's storage."""
    extra = {
        "backend_name": "kvstore",
        "module_path": "kvstore_adapters.sglang.hicache",
        "class_name": "KVStoreHiCache",
        "interface_v1": 1,
        "address": address,
    }
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2.0,
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps(extra),
        "hicache_storage_prefetch_policy": "wait_complete",
    }


def linker(address: str) -> dict[str, Any]:
    """All that kvstore needs without HiCache."""
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "KVStoreLinker",
            "linker_module_path": "kvstore_adapters.sglang.linker",
            "linker_extra_config": {"address": address},
        },
    }


def start_engine(model: str, arguments: dict[str, Any]) -> Any:
    import sglang
    import torch

    # What a GPU does by default, a CPU has to be asked for.
    on_cpu: dict[str, Any] = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "max_total_tokens": 4096,
        "mem_fraction_static": 0.1,
    }
    return sglang.Engine(
        model_path=model,
        page_size=PAGE_TOKENS,
        context_length=2048,
        max_running_requests=4,
        enable_cache_report=True,
        skip_tokenizer_init=True,
        log_level="error",
        **({} if torch.cuda.is_available() else on_cpu),
        **arguments,
    )


def generate(engine: Any, prompt: list[int]) -> dict[str, Any]:
    began = time.perf_counter()
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    (answer,) = engine.generate(input_ids=[prompt], sampling_params=sampling)
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return {
        "tokens": answer["output_ids"],
        "details": details,
        # SGLang counts what a linker loads as `host`.
        "from_kvstore": details.get("storage", 0) or details.get("host", 0),
        "ms": 1000 * (time.perf_counter() - began),
    }


def generate_flushed(engine: Any, prompt: list[int]) -> dict[str, Any]:
    """The answer of an engine that has forgotten all, once the prompt is stored."""
    deadline = time.monotonic() + STORED_SECONDS_MAX
    while True:
        engine.flush_cache()
        answer = generate(engine, prompt)
        if answer["from_kvstore"] or time.monotonic() > deadline:
            return answer
        time.sleep(0.2)


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
    from kvstore_adapters.reference import checkpoint

    with tempfile.TemporaryDirectory(prefix="kvstore-model-") as directory:
        checkpoint.make_random(directory, "small")
        yield directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="directory or name of a model; default: random")
    parser.add_argument("--connect", default="", help="address of a daemon that runs")
    parser.add_argument("--linker", action="store_true", help="without SGLang's own host cache")
    arguments = parser.parse_args()

    prompt = [(i * 7 + i * i * 3) % 250 for i in range(PROMPT_TOKENS)]
    with daemon(arguments.connect) as address, model_directory(arguments.model) as model:
        print(f"daemon: {address}", flush=True)
        engine = start_engine(model, (linker if arguments.linker else hicache)(address))
        try:
            # The first request of an engine is slow for reasons of its own: send one ahead.
            generate(engine, prompt[7:300])
            answers = {"cold": generate(engine, prompt), "warm": generate(engine, prompt)}
            answers["flushed"] = generate_flushed(engine, prompt)
        finally:
            engine.shutdown()
    for name, answer in answers.items():
        print(
            f"{name}: {answer['ms']:.1f} ms, {answer['from_kvstore']} of {PROMPT_TOKENS} prompt"
            f" tokens from kvstore, cached_tokens_details {answer['details']}"
        )
    same = len({tuple(answer["tokens"]) for answer in answers.values()}) == 1
    print(f"tokens identical: {'yes' if same else 'NO'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""A vLLM engine as a process that takes one JSON command a line and answers each with one line.

`python engine_process.py '{"model": ..., ...}'` (the arguments of vllm.LLM). Commands: `generate`
(prompts of token ids), `reset` (forget vLLM's own prefix cache), `counters`, `namespaces` (of
kvstore that this process has connected to). It ends with its standard input. All that vLLM prints
goes to standard error; answers alone go to standard output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any

import kvstore

# Steps without a request that let a connector finish its saves before vLLM's cache can be reset.
IDLE_STEPS_MAX = 200_000


def generate(llm: Any, command: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    extra = {"kv_transfer_params": command["params"]} if command.get("params") else None
    sampling = SamplingParams(
        temperature=0, max_tokens=command["max_tokens"], ignore_eos=True, extra_args=extra
    )
    salt = {"cache_salt": command["salt"]} if command.get("salt") else {}
    prompts = [{"prompt_token_ids": tokens, **salt} for tokens in command["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "num_cached": output.num_cached_tokens or 0,
            "finish_reason": output.outputs[0].finish_reason,
            "params": output.kv_transfer_params,
            "ttft_ms": _ttft_ms(output),
        }
        for output in outputs
    ]


def _ttft_ms(output: Any) -> float:
    metrics = output.metrics
    return 1000 * metrics.first_token_latency if metrics is not None else 0.0


def reset(llm: Any) -> bool:
    """Forget vLLM's own prefix cache. It refuses while blocks are referred to, as by saves."""
    for _ in range(IDLE_STEPS_MAX):
        if llm.reset_prefix_cache():
            return True
        llm.llm_engine.step()
    return False


def counters(llm: Any) -> dict[str, float]:
    """Each summed over its labels, and again for each value of a label as `name:value`."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            names = [metric.name, *(f"{metric.name}:{v}" for v in metric.labels.values())]
            for name in names:
                found[name] = found.get(name, 0) + metric.value
    return found


def record_namespaces() -> list[dict[str, Any]]:
    """Descriptions of the namespaces that will be connected to, as they come."""
    found: list[dict[str, Any]] = []
    connect = kvstore.connect

    def recorded(address: Any, namespace: Any = None, *rest: Any, **options: Any) -> kvstore.Store:
        if isinstance(namespace, kvstore.Namespace):
            found.append(namespace.describe())
        return connect(address, namespace, *rest, **options)

    vars(kvstore)["connect"] = recorded
    return found


def main() -> None:
    answers: IO[str] = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    namespaces = record_namespaces()
    from vllm import LLM

    llm: Any = LLM(**json.loads(sys.argv[1]))
    actions: dict[str, Callable[[dict[str, Any]], Any]] = {
        "generate": lambda command: generate(llm, command),
        "reset": lambda _: reset(llm),
        "counters": lambda _: counters(llm),
        "namespaces": lambda _: namespaces,
    }
    print("ready", file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(actions[command["do"]](command)), file=answers)


if __name__ == "__main__":
    main()

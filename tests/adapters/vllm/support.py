"""What the vLLM tests share: tiny models whose tokens depend on all of their context, prompts, and
real vLLM engines and OpenAI servers as processes that a test can wait for, kill and read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore.admin import Admin
from kvstore.bench.helpers import free_port
from tests.daemon.daemon_support import RawClient

ROOT = Path(__file__).resolve().parents[3]
BLOCK_TOKENS = 32  # the smallest that vLLM's CPU attention takes
SHARED_TOKENS = 8 * BLOCK_TOKENS  # that all prompts of a set begin with
START_SECONDS = 300.0  # an engine starts in 20 s on an idle machine
ANSWER_SECONDS = 180.0
CONNECTOR = "kvstore_adapters.vllm.connector"

# The tests themselves import no vLLM: each engine is a process.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(900),
]
DAEMON = ("--cpu", "64MiB", "--chunk", "1MiB")

_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # spinning threads of several engines starve each other
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}


def write_model(directory: Path, seed: int = 0) -> Path:
    """A random Llama of 3 million parameters over bytes, with its tokenizer."""
    from kvstore_adapters.reference import checkpoint, tokenizer

    checkpoint.make_random(directory, "tiny", seed)
    tokenizer.write(directory)
    return directory


def prompts(count: int = 3, num_tokens: int = 400, seed: int = 0) -> list[list[int]]:
    """Prompts of bytes with `SHARED_TOKENS` in common. No length is a multiple of a block's."""
    shared = [(i * 37 + seed * 11) % 251 for i in range(SHARED_TOKENS)]
    return [
        shared
        + [(i * (41 + 2 * k) + k + seed) % 251 for i in range(num_tokens - SHARED_TOKENS + k)]
        for k in range(count)
    ]


def full_blocks(sets: Sequence[Sequence[int]], block_tokens: int = BLOCK_TOKENS) -> int:
    """Different full blocks of some prompts."""
    return len(
        {
            tuple(tokens[:end])
            for tokens in sets
            for end in range(block_tokens, len(tokens) + 1, block_tokens)
        }
    )


def transfer_config(address: str, role: str = "kv_both", **extra: Any) -> dict[str, Any]:
    """vLLM's kv_transfer_config for our connector, `extra` being its own settings.

    Only prompts are saved, so that a test can count what there must be.
    """
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": CONNECTOR,
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": address, "save_decode": False, **extra},
    }


@dataclass(frozen=True)
class Completion:
    tokens: tuple[int, ...]
    num_cached: int  # prompt tokens that were not computed
    finish_reason: str
    params: dict[str, Any] | None
    ttft_ms: float


def tokens_of(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


def environment_of_engines(more: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    return {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, **more}


class Child:
    """A process group of ours with its output in a file."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment_of_engines(environment),
                start_new_session=True,
                text=True,
            )

    def close(self) -> None:
        """End it, and whatever it started."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EngineProcess(Child):
    """vllm.LLM in a process of its own; `in_process=False` lets it start its usual workers too."""

    def __init__(
        self,
        model: Path,
        log: Path,
        connector: dict[str, Any] | None = None,
        *,
        in_process: bool = True,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        settings = {
            "model": str(model),
            "dtype": "float32",
            "max_model_len": 1024,
            "block_size": BLOCK_TOKENS,
            "kv_cache_memory_bytes": 32 << 20,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "disable_log_stats": False,
            **({"kv_transfer_config": connector} if connector else {}),
            **arguments,
        }
        script = Path(__file__).with_name("engine_process.py")
        super().__init__(
            [sys.executable, str(script), json.dumps(settings)],
            log,
            {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
                **(environment or {}),
            },
        )
        self.wait_ready()

    def wait_ready(self) -> None:
        assert self._answer(START_SECONDS) == "ready", self.printed()[-4000:]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 16, **options: Any
    ) -> list[Completion]:
        """All prompts as one batch. Options: `salt`, `params` (kv_transfer_params)."""
        self.begin(prompts, max_tokens, **options)
        return self.finish()

    def one_by_one(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 16
    ) -> list[Completion]:
        return [self.generate([prompt], max_tokens)[0] for prompt in prompts]

    def begin(self, prompts: Sequence[Sequence[int]], max_tokens: int = 16, **options: Any) -> None:
        """Send what `finish` answers, and do not wait."""
        self._send(do="generate", prompts=prompts, max_tokens=max_tokens, **options)

    def finish(self) -> list[Completion]:
        return [
            Completion(**{**found, "tokens": tuple(found["tokens"])})
            for found in json.loads(self._answer(ANSWER_SECONDS))
        ]

    def reset(self) -> None:
        """Forget vLLM's own prefix cache; what is in kvstore stays."""
        self._send(do="reset")
        assert json.loads(self._answer(ANSWER_SECONDS)), "vLLM's prefix cache cannot be reset"

    def counter(self, name: str) -> int:
        """A vLLM counter, summed over its labels."""
        self._send(do="counters")
        found = json.loads(self._answer(ANSWER_SECONDS))
        return int(found.get(f"vllm:{name}", 0))

    def external_hits(self) -> int:
        """Prompt tokens that came through the connector, so far."""
        return self.counter("external_prefix_cache_hits")

    def namespaces(self) -> list[kvstore.Namespace]:
        """What it has connected to in kvstore, without repetition."""
        self._send(do="namespaces")
        described = json.loads(self._answer(ANSWER_SECONDS))
        found = map(kvstore.Namespace.from_description, described)
        return list(dict.fromkeys(found))

    def _send(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def _answer(self, seconds: float) -> str:
        assert self.process.stdout is not None
        with _killed_after(self.process, seconds):
            line = self.process.stdout.readline()
        assert line, f"the engine ended or hung: {self.printed()[-6000:]}"
        return line.strip()


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Ends a process that does not answer, so that a reader of its pipe comes back."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class ServerProcess(Child):
    """vLLM's OpenAI server on a free port of this host."""

    def __init__(
        self, model: Path, log: Path, connector: dict[str, Any] | None = None, *flags: str
    ) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        arguments = [
            *("--model", str(model), "--served-model-name", "tiny", "--dtype", "float32"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "1024"),
            *("--block-size", str(BLOCK_TOKENS), "--kv-cache-memory-bytes", str(32 << 20)),
            *("--max-num-seqs", "8", "--enforce-eager"),
            *(("--kv-transfer-config", json.dumps(connector)) if connector else ()),
        ]
        server = "vllm.entrypoints.openai.api_server"
        super().__init__([sys.executable, "-m", server, *arguments, *flags], log, {})

    def ready(self) -> ServerProcess:
        wait_until(lambda: is_healthy(self.address) or self._ended(), START_SECONDS)
        assert not self._ended(), self.printed()[-6000:]
        return self

    def complete(
        self, prompt: Sequence[int], max_tokens: int = 16, **options: Any
    ) -> dict[str, Any]:
        return complete(self.address, prompt, max_tokens, **options)

    def external_hits(self) -> int:
        return self.counter("external_prefix_cache_hits_total")

    def counter(self, name: str) -> int:
        lines = _get(f"{self.address}/metrics").decode().splitlines()
        values = [line.split()[-1] for line in lines if line.startswith(f"vllm:{name}{{")]
        return int(sum(float(value) for value in values))

    def close(self) -> None:
        # The API server ends its engine processes itself when it is asked politely.
        self.process.terminate()
        super().close()

    def _ended(self) -> bool:
        return self.process.poll() is not None


def is_healthy(address: str) -> bool:
    try:
        _get(f"{address}/health")
    except OSError:
        return False
    return True


def complete(
    address: str, prompt: Sequence[int], max_tokens: int = 16, **options: Any
) -> dict[str, Any]:
    """Ask an OpenAI server or a proxy for a greedy completion of token ids."""
    request = completion_request(address, prompt, max_tokens, **options)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        found: dict[str, Any] = json.load(response)
    return found


def completion_request(
    address: str, prompt: Sequence[int], max_tokens: int, **options: Any
) -> urllib.request.Request:
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **options,
    }
    return urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )


def completed_tokens(answer: dict[str, Any]) -> tuple[int, ...]:
    return tuple(answer["choices"][0]["token_ids"])


def _get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as response:
        content: bytes = response.read()
    return content


def wait_until(condition: Callable[[], bool], seconds: float = ANSWER_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def stored_blocks(address: str) -> int:
    """Blocks of all namespaces in a daemon's memory."""
    with Admin(address) as admin:
        return sum(tier["blocks"] for tier in admin.status()["tiers"] if tier["tier"] == "cpu")


def daemon_metric(address: str, name: str) -> int:
    with Admin(address) as admin:
        return int(admin.status()["metrics"][f"kvstore_{name}"])


def wait_stored(address: str, num_blocks: int) -> None:
    """Saves go on after a request's answer: wait until that many blocks are in the daemon."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: stored_blocks(address) >= num_blocks, 30)
    assert stored_blocks(address) >= num_blocks


def zero_blocks(
    address: str, namespace: kvstore.Namespace, prompt: Sequence[int], first: int = 0
) -> int:
    """Overwrite a prompt's blocks in the daemon's memory behind its back, from `first` on.

    Returns how many.
    """
    hashes = kvstore.hash_blocks(list(prompt), BLOCK_TOKENS, algorithm="vllm_sha256")
    size = namespace.spec.block_bytes
    with RawClient(address, namespace) as client:
        lease, offsets, *_ = client.connection.acquire(
            60.0, 0.0, 0, hashes.array, hashes.start, hashes.parent, 10.0
        )
        for offset in offsets[first:].tolist():
            client.memory[offset : offset + size] = 0
        client.connection.release(np.array([lease], np.uint64), 10.0)
    return len(offsets) - first

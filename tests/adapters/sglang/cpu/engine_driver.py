"""Start real SGLang engines on this CPU from a test, and say what they should generate."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore_adapters.reference.checkpoint import Checkpoint
from tests.adapters.sglang.cpu import plugin

ROOT = Path(__file__).parents[4]
STUBS = Path(__file__).parents[1] / "stubs"
START_S = 240.0  # bounds for what must come, not durations
ANSWER_S = 120.0
PAGE_TOKENS = 16

_ENGINE: dict[str, Any] = {
    "device": "cpu",
    "skip_tokenizer_init": True,
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "dtype": "float32",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 4096,
    "max_running_requests": 4,
    "context_length": 2048,
    "page_size": PAGE_TOKENS,
    "disable_cuda_graph": True,
    "enable_cache_report": True,
    "random_seed": 1,
    "log_level": "info",
}


@dataclass
class Answer:
    tokens: list[int]
    cached: int
    details: dict[str, Any]
    finish: dict[str, Any] | None

    @property
    def num_external(self) -> int:
        """Prompt tokens from beyond the device. SGLang books what a linker loads under `host`, what
        HiCache's storage loads under `storage`."""
        details = self.details or {}
        return int(details.get("storage", 0)) + int(details.get("host", 0))


class EngineError(Exception):
    """The engine answered a request with an error, or not at all."""


@dataclass
class EngineProcess:
    """An engine in a process; use `running`."""

    process: subprocess.Popen[str]
    log: Path

    def generate(self, prompt: list[int], num_tokens: int = 8) -> Answer:
        (answer,) = self.generate_all([prompt], num_tokens)
        return answer

    def generate_all(
        self,
        prompts: list[list[int]],
        num_tokens: int = 8,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Answer]:
        """Generate for prompts that arrive together; `meanwhile` is called once they are on their
        way."""
        self._tell({"do": "generate", "prompts": prompts, "num_tokens": num_tokens})
        if meanwhile is not None:
            meanwhile()
        return [Answer(**told) for told in self._read(ANSWER_S)["answers"]]

    def flush(self) -> bool:
        """Empty SGLang's own caches; False when it was not idle."""
        self._tell({"do": "flush"})
        return bool(self._read(ANSWER_S)["flushed"])

    def _tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(seconds) else ""
        if not line:
            raise EngineError(f"no answer; its log ends with\n{self.log.read_text()[-6000:]}")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise EngineError(told["error"])
        return told


def control_file(directory: Path) -> Path:
    return directory / "control-run"


def environment(directory: Path) -> dict[str, str]:
    """What the stubs, the plugin and a small machine need."""
    paths = [STUBS, plugin.install(directory / "plugin"), ROOT, ROOT / "adapters"]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        plugin.CONTROL_VARIABLE: str(control_file(directory)),
    }


def reference_tokens(model: Checkpoint, prompt: list[int], num_tokens: int) -> list[int]:
    """What a decoder that shares no code with SGLang generates, greedily and without any cache."""
    from kvstore_adapters.reference.model import Chunk, Model, new_pool

    num_pages = (len(prompt) + num_tokens) // PAGE_TOKENS + 1
    decoder = Model(model, new_pool(model.config, num_pages, PAGE_TOKENS))
    tokens = list(prompt)
    for begin in [0, *range(len(prompt), len(prompt) + num_tokens - 1)]:
        chunk = Chunk(tokens[begin:], begin, range(num_pages))
        tokens.append(int(decoder.forward([chunk])[0].argmax()))
    return tokens[len(prompt) :]


@contextmanager
def running(directory: Path, **arguments: Any) -> Iterator[EngineProcess]:
    """An engine with `arguments` over the defaults. While `control_file(directory)` exists, KV that
    comes from the store is zeroed on its way to the model."""
    log = directory / f"engine-{time.monotonic_ns()}.log"
    chosen = environment(directory)
    all_arguments = {**_ENGINE, **arguments}
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.engine_process", json.dumps(all_arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            cwd=ROOT,
            env=chosen,
            start_new_session=True,
        )
    engine = EngineProcess(process, log)
    try:
        engine._read(START_S)
        yield engine
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
        assert process.stdout is not None
        process.stdout.close()

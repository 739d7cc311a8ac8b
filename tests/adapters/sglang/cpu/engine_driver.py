"""Start real SGLang engines on this CPU, and daemons for them, from a test."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    seconds: float

    @property
    def num_from_storage(self) -> int:
        return int((self.details or {}).get("storage", 0))


class EngineError(Exception):
    """The engine answered a request with an error, or not at all."""


@dataclass
class EngineProcess:
    """An engine in a process; use `running`."""

    process: subprocess.Popen[str]
    log: Path

    def generate(self, prompt: list[int], num_tokens: int = 8) -> Answer:
        told = self._ask({"do": "generate", "prompt": prompt, "num_tokens": num_tokens})
        return Answer(**told)

    def flush(self) -> bool:
        """Empty SGLang's own caches; False when it was not idle."""
        return bool(self._ask({"do": "flush"})["flushed"])

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._read(ANSWER_S)

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


def environment(directory: Path, **more: str) -> dict[str, str]:
    """What the stubs, the plugin and a small machine need."""
    paths = [STUBS, plugin.install(directory / "plugin"), ROOT, ROOT / "adapters"]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


@contextmanager
def running(
    directory: Path, arguments: dict[str, Any], control_run: bool = False
) -> Iterator[EngineProcess]:
    """An engine with `arguments` over the defaults; with `control_run`, KV of the store is zeroed
    on its way to the model."""
    log = directory / f"engine-{time.monotonic_ns()}.log"
    chosen = environment(directory, **({"KVSTORE_TEST_ZERO_KV": "1"} if control_run else {}))
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


@dataclass
class Daemon:
    """`kvstore serve` on a socket in `directory`."""

    directory: Path
    process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"unix:{self.directory}/kvstore.sock"

    def start(self) -> None:
        command = [sys.executable, "-m", "kvstore", "serve", "--listen", self.address]
        command += ["--http", "", "--cpu", "64MiB", "--scrub", "0", "--hold-seconds", "0"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}"},
        )
        assert self.process.stdout is not None
        assert "serves" in self.process.stdout.readline()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
        shutil.rmtree(self.directory, ignore_errors=True)

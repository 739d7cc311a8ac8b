"""Start real SGLang prefill and decode servers on this CPU from a test, and ask them for tokens."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.bench.helpers import free_port
from kvstore_adapters.reference.checkpoint import Checkpoint
from tests.adapters.sglang.cpu import plugin
from tests.adapters.sglang.cpu.engine_driver import (
    ANSWER_S,
    PAGE_TOKENS,
    ROOT,
    START_S,
    control_file,
    environment,
)

_FLAGS = [
    "--device=cpu",
    "--skip-tokenizer-init",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--dtype=float32",
    "--mem-fraction-static=0.1",
    "--max-total-tokens=4096",
    "--max-running-requests=4",
    "--context-length=2048",
    f"--page-size={PAGE_TOKENS}",
    "--disable-cuda-graph",
    "--enable-cache-report",
    "--random-seed=1",
    "--skip-server-warmup",
    "--host=127.0.0.1",
]
_OF_ROLE = {"prefill": [], "decode": ["--disaggregation-decode-retraction-backup=cpu_tensor"]}
ON_HOST = [  # instead, for a decode server that receives into SGLang's host pool
    "--disaggregation-decode-retraction-backup=host_pool",
    "--disaggregation-decode-host-receive-threshold=0",
    "--hicache-mem-layout=layer_first",
]
# A server gives up what waits for a peer that is gone after these many seconds; SGLang's own
# defaults are minutes.
GIVE_UP_S = 20
_GIVE_UP = {
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(GIVE_UP_S),
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(GIVE_UP_S),
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
}


@dataclass
class Said:
    """What one server answered: tokens, or why not."""

    status: int
    tokens: list[int]
    cached: int
    error: str


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    bootstrap_port: int
    log: Path

    def ready(self) -> Server:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                url = f"http://127.0.0.1:{self.port}/model_info"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    if answer.status == 200:
                        return self
            ended = self.process.poll()
            assert ended is None, f"it ended with {ended}:\n{self.log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"not ready:\n{self.log.read_text()[-6000:]}"
            time.sleep(0.1)

    def ask(self, body: dict[str, Any]) -> Said:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                told = json.load(answer)
        except urllib.error.HTTPError as error:
            return Said(error.code, [], 0, error.read().decode(errors="replace"))
        except OSError as error:
            return Said(0, [], 0, str(error))
        about = told["meta_info"]
        finish = about.get("finish_reason") or {}
        is_abort = finish.get("type") == "abort"
        return Said(
            int(finish.get("status_code") or 500) if is_abort else 200,
            told["output_ids"],
            about.get("cached_tokens") or 0,
            str(finish.get("message", "")) if is_abort else "",
        )

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


@contextlib.contextmanager
def serving(
    directory: Path,
    model: Checkpoint,
    role: str,
    *,
    flags: Sequence[str] | None = None,
    **variables: str,
) -> Iterator[Server]:
    """A server of `role` that hands over KV by kvstore; not ready yet. `flags`: in the place of the
    role's own. With `variables` in its environment. `control_file(directory)` does what
    cpu/plugin.py says."""
    port, bootstrap_port = free_port(), free_port()
    log = directory / f"{role}-{time.monotonic_ns()}.log"
    arguments = [
        *_FLAGS,
        *(_OF_ROLE[role] if flags is None else flags),
        f"--model-path={model.directory}",
        f"--port={port}",
        f"--disaggregation-mode={role}",
        f"--disaggregation-bootstrap-port={bootstrap_port}",
        "--disaggregation-transfer-backend=kvstore",
    ]
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={
                **environment(directory),
                **_GIVE_UP,
                "SGLANG_HOST_IP": "127.0.0.1",
                "XDG_RUNTIME_DIR": str(directory),
                **variables,
            },
            start_new_session=True,
        )
    server = Server(process, port, bootstrap_port, log)
    try:
        yield server
    finally:
        server.kill()


def generate(
    prefill: Server, decode: Server, prompt: list[int], num_tokens: int = 8
) -> tuple[Said, Said]:
    """What both answer to a request sent to both, as SGLang's router does."""
    return Request(prefill, decode, prompt, num_tokens).wait()


class Request:
    """One that is under way."""

    def __init__(
        self, prefill: Server, decode: Server, prompt: list[int], num_tokens: int = 8
    ) -> None:
        self._said: dict[int, Said] = {}
        body = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": num_tokens,
                "ignore_eos": True,
            },
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": prefill.bootstrap_port,
            "bootstrap_room": random.randrange(1, 1 << 31),
        }
        self._threads = [
            threading.Thread(target=self._ask, args=(place, server, body), daemon=True)
            for place, server in enumerate((prefill, decode))
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, place: int, server: Server, body: dict[str, Any]) -> None:
        self._said[place] = server.ask(body)

    def wait(self) -> tuple[Said, Said]:
        for thread in self._threads:
            thread.join(ANSWER_S + 10)
        return self._said[0], self._said[1]


@contextlib.contextmanager
def held(directory: Path) -> Iterator[Callable[[], bool]]:
    """What prefill servers send waits meanwhile; the value tells whether one does."""
    control = str(control_file(directory))
    hold, is_held = Path(control + plugin.HOLD), Path(control + plugin.HELD)
    is_held.unlink(missing_ok=True)
    hold.touch()
    try:
        yield is_held.exists
    finally:
        hold.unlink()

"""Prefill and decode on two SGLang servers: kvstore hands the prompt's KV from one to the other.

    pip install kvstore-llm sglang
    python examples/sglang_pd.py [--model DIR]

Without --model a small model with random weights is made. Starts a prefill and a decode server on
this host, sends a prompt to both as SGLang's router does, and the same prompt to a server that
does both by itself; prints how long each took and whether the answers are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

PROMPT_TOKENS = 1500
NEW_TOKENS = 8
PAGE_TOKENS = 16
START_SECONDS = 600.0
ROLES = {
    "prefill": ["--disaggregation-mode=prefill", "--disaggregation-transfer-backend=kvstore"],
    "decode": ["--disaggregation-mode=decode", "--disaggregation-transfer-backend=kvstore"],
    "both": [],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flags_of_this_machine() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return []
    # What a GPU does by default, a CPU has to be asked for.
    return [
        "--device=cpu",
        "--attention-backend=torch_native",
        "--sampling-backend=pytorch",
        "--grammar-backend=none",
        "--disable-cuda-graph",
        "--max-total-tokens=4096",
        "--mem-fraction-static=0.1",
    ]


def receiving() -> list[str]:
    """How a decode server takes KV: on a GPU by SGLang's host pool."""
    import torch

    if torch.cuda.is_available():
        return [
            "--disaggregation-decode-host-receive-threshold=0",
            "--hicache-mem-layout=layer_first",
        ]
    return ["--disaggregation-decode-retraction-backup=cpu_tensor"]


class Server:
    """An SGLang server of one role; it ends with the `with` block."""

    def __init__(self, model: str, role: str, bootstrap_port: int) -> None:
        self.port = free_port()
        command = [
            *(sys.executable, "-m", "sglang.launch_server"),
            *ROLES[role],
            *flags_of_this_machine(),
            f"--model-path={model}",
            "--host=127.0.0.1",
            f"--port={self.port}",
            f"--page-size={PAGE_TOKENS}",
            f"--disaggregation-bootstrap-port={bootstrap_port}",
            "--context-length=2048",
            "--max-running-requests=4",
            "--skip-tokenizer-init",
            "--skip-server-warmup",
            "--enable-cache-report",
        ]
        if role == "decode":
            command += receiving()
        self.process = subprocess.Popen(
            command,
            stdout=sys.stderr,
            env={**os.environ, "SGLANG_HOST_IP": "127.0.0.1"},
            start_new_session=True,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                address = f"http://127.0.0.1:{self.port}/model_info"
                with urllib.request.urlopen(address, timeout=5):
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("a server did not start")
            time.sleep(0.2)

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def request_of(prompt: list[int]) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling}


def generate_by_both(
    prefill: Server, decode: Server, bootstrap_port: int, prompt: list[int]
) -> dict[str, Any]:
    """What SGLang's router does: the same request to both, with where and as what they meet."""
    meeting = {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": bootstrap_port,
        "bootstrap_room": random.randrange(1, 1 << 31),
    }
    body = {**request_of(prompt), **meeting}
    other = threading.Thread(target=prefill.generate, args=(body,))
    other.start()
    answer = decode.generate(body)
    other.join()
    return answer


def timed(what: str, generate: Any, *arguments: Any) -> list[int]:
    began = time.perf_counter()
    answer = generate(*arguments)
    took = 1000 * (time.perf_counter() - began)
    print(f"{what}: {took:.1f} ms, tokens {answer['output_ids']}", flush=True)
    return list(answer["output_ids"])


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
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end with us

    prompt = [(i * 7 + i * i * 3) % 250 for i in range(PROMPT_TOKENS)]
    ahead = prompt[7:300]  # the first request of a server is slow for reasons of its own
    meet = free_port()
    with model_directory(arguments.model) as model:
        with Server(model, "prefill", meet) as prefill, Server(model, "decode", meet) as decode:
            prefill.wait_until_ready()
            decode.wait_until_ready()
            generate_by_both(prefill, decode, meet, ahead)
            both = (generate_by_both, prefill, decode, meet, prompt)
            handed_over = timed("prefill computes, decode generates", *both)
            again = timed("prefill knows the prompt, decode generates", *both)
        with Server(model, "both", meet) as single:
            single.wait_until_ready()
            single.generate(request_of(ahead))
            alone = timed("one server does both", single.generate, request_of(prompt))
    same = handed_over == again == alone
    print(f"tokens identical: {'yes' if same else 'NO'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""Prefill and decode on two vLLM servers: the prompt's KV goes from one to the other by kvstore.

    pip install kvstore-llm vllm
    python examples/vllm_pd.py [--model DIR] [--push]

Starts a daemon, a prefill server (kv_producer), a decode server (kv_consumer) and the proxy of
vllm_pd_proxy.py, all on this host; sends a prompt through the proxy, and the same one to the
prefill server alone; prints how many prompt tokens the decode server did not compute, and whether
both answers are the same. With --push the decode server has a daemon of its own, into which the
prefill server puts the KV, as when they are on two hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstore.bench.serving import PrivateDaemon

START_SECONDS = 600.0
NEW_TOKENS = 16
MODEL_NAME = "example"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with this block; what it prints goes to our standard error."""
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, *command], stdout=sys.stderr, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def server_command(model: str, port: int, role: str, connector: dict[str, Any]) -> list[str]:
    transfer = {
        "kv_connector": "KVStoreConnector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": connector,
    }
    return [
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", MODEL_NAME, "--max-model-len", "2048"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager"),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]


def wait_healthy(address: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        if process.poll() is not None or time.monotonic() > give_up:
            raise SystemExit(f"{address} did not start; see above")
        time.sleep(0.2)


def ask(address: str, prompt: str) -> str:
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({**body, "ignore_eos": True, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return str(json.load(response)["choices"][0]["token_ids"])


def external_hits(address: str) -> int:
    wanted = "vllm:external_prefix_cache_hits_total{"
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(wanted))


def run(model: str, directory: Path, push: bool) -> int:
    daemons = [directory / name for name in ("prefill", "decode")[: 2 if push else 1]]
    with contextlib.ExitStack() as running_until_end:
        addresses = []
        for place in daemons:
            place.mkdir()
            started = running_until_end.enter_context(PrivateDaemon(place, cpu="256MiB"))
            started.start()
            addresses.append(started.address)
        ports = [free_port() for _ in range(3)]
        prefill, decode, proxy = (f"http://127.0.0.1:{port}" for port in ports)
        targets = {"push_targets": {"decode": addresses[-1]}} if push else {}
        commands = [
            server_command(model, ports[0], "kv_producer", {"address": addresses[0], **targets}),
            server_command(model, ports[1], "kv_consumer", {"address": addresses[-1]}),
            [
                str(Path(__file__).with_name("vllm_pd_proxy.py")),
                *("--prefill", prefill, "--decode", decode, "--port", str(ports[2])),
                *(("--push", "decode") if push else ()),
            ],
        ]
        processes = [running_until_end.enter_context(running(*command)) for command in commands]
        for address, process in zip((prefill, decode, proxy), processes, strict=True):
            wait_healthy(address, process)
        prompt = "A cache may lose data; it never returns wrong data. " * 12
        through_proxy, alone = ask(proxy, prompt), ask(prefill, prompt)
        print(f"tokens by prefill and decode: {through_proxy}")
        print(f"prompt tokens that the decode server got from kvstore: {external_hits(decode)}")
        print(f"tokens identical to one server's: {'yes' if through_proxy == alone else 'NO'}")
        return 0 if through_proxy == alone else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="directory or name of a model; default: random")
    parser.add_argument("--push", action="store_true", help="a daemon for each server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvstore-") as directory:
        model = arguments.model or str(Path(directory) / "model")
        if not arguments.model:
            from kvstore_adapters.reference import checkpoint, tokenizer

            checkpoint.make_random(model, "small")
            tokenizer.write(Path(model))
        return run(model, Path(directory), arguments.push)


if __name__ == "__main__":
    sys.exit(main())

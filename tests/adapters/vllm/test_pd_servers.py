"""Prefill and decode on two real OpenAI servers, the example's proxy before them, and daemons:
what comes through the proxy equals what one engine generates, and the decode server loaded the
prompt's KV in place of computing it. Pull: both servers use one daemon, or the decode server's
daemon fetches from the prefill server's. Push: the decode server's daemon is another one, into
which the prefill server puts the KV as well.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.admin import Admin
from kvstore.bench.helpers import free_port
from tests.adapters.vllm import support
from tests.adapters.vllm.conftest import Reference
from tests.adapters.vllm.support import BLOCK_TOKENS, Child, ServerProcess
from tests.daemon.daemon_support import Daemon, running

pytestmark = [*support.pytestmark, pytest.mark.slow]

PROMPTS = support.prompts()
PORT = free_port()
HOLDER = f"tcp:127.0.0.1:{PORT}"  # where the decode server's daemon finds the prefill server's


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Daemon]]:
    """The prefill server's and another."""
    secret = tmp_path_factory.mktemp("secret") / "peers"
    secret.touch(0o600)
    secret.write_text("peers-" + "x" * 32)
    peers = ("--peer-token", str(secret))
    with (
        running(
            tmp_path_factory.mktemp("p"), *support.DAEMON, *peers, "--tcp", f"127.0.0.1:{PORT}"
        ) as first,
        running(tmp_path_factory.mktemp("d"), *support.DAEMON, *peers) as second,
    ):
        yield first, second


@pytest.fixture(scope="module")
def prefill(
    model: Path, daemons: tuple[Daemon, Daemon], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    ours, other = daemons
    config = support.transfer_config(
        ours.address, "kv_producer", push_targets={"decode": other.address}, holder=HOLDER
    )
    log = tmp_path_factory.mktemp("prefill") / "log"
    with ServerProcess(model, log, config) as server:
        yield server.ready()


@contextlib.contextmanager
def decoding(
    model: Path, daemon: Daemon, prefill: str, log: Path, *flags: str
) -> Iterator[tuple[str, ServerProcess]]:
    """A decode server on that daemon, and the address of a proxy in front of both."""
    config = support.transfer_config(daemon.address, "kv_consumer", holders=[HOLDER])
    port = free_port()
    script = str(support.ROOT / "examples" / "vllm_pd_proxy.py")
    with ServerProcess(model, log, config) as decode:
        arguments = ["--prefill", prefill, "--decode", decode.address, "--port", str(port), *flags]
        decode.ready()
        with Child([sys.executable, script, *arguments], log.with_suffix(".proxy"), {}):
            address = f"http://127.0.0.1:{port}"
            support.wait_until(lambda: support.is_healthy(address))
            yield address, decode


def test_pull(
    model: Path,
    daemons: tuple[Daemon, Daemon],
    prefill: ServerProcess,
    reference: Reference,
    tmp_path: Path,
) -> None:
    with decoding(model, daemons[0], prefill.address, tmp_path / "log") as (proxy, decode):
        found = [support.completed_tokens(support.complete(proxy, prompt)) for prompt in PROMPTS]
        assert found == reference(PROMPTS)
        # All of the three prompts' blocks; nothing else could have brought them.
        assert decode.external_hits() == support.full_blocks(PROMPTS) * BLOCK_TOKENS
        streamed = "".join(stream(proxy, PROMPTS[0]))
        assert streamed == support.complete(proxy, PROMPTS[0])["choices"][0]["text"]
        assert chat(proxy) == chat(prefill.address)


def test_pull_from_the_daemon_of_the_prefill_server(
    model: Path,
    daemons: tuple[Daemon, Daemon],
    prefill: ServerProcess,
    reference: Reference,
    tmp_path: Path,
) -> None:
    prompts = support.prompts(seed=3)
    with decoding(model, daemons[1], prefill.address, tmp_path / "log") as (proxy, decode):
        found = [support.completed_tokens(support.complete(proxy, prompt)) for prompt in prompts]
        assert found == reference(prompts)
        blocks = support.full_blocks(prompts)
        assert decode.external_hits() == blocks * BLOCK_TOKENS
        with Admin(daemons[1].address) as admin:
            values = admin.status()["metrics"]
        assert values["kvstore_peer_fetched_shm_blocks_total"] == blocks


def test_push(
    model: Path,
    daemons: tuple[Daemon, Daemon],
    prefill: ServerProcess,
    reference: Reference,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    prompts = support.prompts(seed=1)
    flags = ("--push", "decode")
    with decoding(model, daemons[1], prefill.address, log, *flags) as (proxy, decode):
        found = [support.completed_tokens(support.complete(proxy, prompt)) for prompt in prompts]
        assert found == reference(prompts)
        assert decode.external_hits() == support.full_blocks(prompts) * BLOCK_TOKENS


def test_without_a_prefill_server_the_decode_server_computes(
    model: Path, daemons: tuple[Daemon, Daemon], reference: Reference, tmp_path: Path
) -> None:
    """And goes on to when the daemon is killed, and hangs, with requests in flight."""
    prompts = support.prompts(seed=2)
    nobody = f"http://127.0.0.1:{free_port()}"
    with (
        running(tmp_path, *support.DAEMON) as daemon,
        decoding(model, daemon, nobody, tmp_path / "log") as (proxy, _),
    ):
        assert complete_all(proxy, prompts) == reference(prompts)
        daemon.process.send_signal(signal.SIGSTOP)
        assert complete_all(proxy, prompts) == reference(prompts)
        daemon.process.send_signal(signal.SIGCONT)
        daemon.kill()
        assert complete_all(proxy, prompts) == reference(prompts)


def complete_all(address: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    return [support.completed_tokens(support.complete(address, prompt)) for prompt in prompts]


def stream(address: str, prompt: list[int]) -> Iterator[str]:
    request = support.completion_request(address, prompt, 16, stream=True)
    with urllib.request.urlopen(request, timeout=support.ANSWER_SECONDS) as response:
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["choices"][0]["text"]


def chat(address: str) -> str:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Where is my prefix? " * 10}],
        "max_completion_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=support.ANSWER_SECONDS) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])

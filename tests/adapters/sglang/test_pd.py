"""Prefill and decode on two real SGLang servers on a CPU, KV handed over by kvstore.

The decode server computes no prompt, so what it generates it generates from KV that it got. The
oracle is a decoder of our own without any cache; a control run with the KV zeroed in flight must
give other tokens. Servers are killed in the middle of a hand-off: the other answers with an error
in bounded time, and serves on with a new one.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from kvstore_adapters.reference import checkpoint
from tests.adapters.sglang.cpu import plugin
from tests.adapters.sglang.cpu.engine_driver import PAGE_TOKENS, control_file, reference_tokens
from tests.adapters.sglang.cpu.servers import (
    GIVE_UP_S,
    ON_HOST,
    Request,
    Server,
    generate,
    held,
    serving,
)

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
]

NUM_TOKENS = 8
BOUND_S = GIVE_UP_S + 40.0  # SGLang looks once in a while


def prompt(seed: int, num_tokens: int = 200) -> list[int]:
    return [(i * 7 + i * i * 3 + seed * (i + 31)) % 250 for i in range(num_tokens)]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {BOUND_S} s: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pd")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    return checkpoint.make_random(tmp_path_factory.mktemp("model"), "tiny", seed=3)


@pytest.fixture(scope="module")
def servers(directory: Path, model: checkpoint.Checkpoint) -> Iterator[tuple[Server, Server]]:
    with (
        serving(directory, model, "prefill") as prefill,
        serving(directory, model, "decode") as decode,
    ):
        yield prefill.ready(), decode.ready()


def test_the_decode_server_generates_from_what_the_prefill_server_computed(
    servers: tuple[Server, Server], directory: Path, model: checkpoint.Checkpoint
) -> None:
    prefill, decode = servers
    first = prompt(1)
    expected = reference_tokens(model, first, NUM_TOKENS)
    by_prefill, by_decode = generate(prefill, decode, first)
    assert (by_prefill.status, by_decode.status) == (200, 200), (by_prefill, by_decode)
    assert by_prefill.tokens == expected[:1]
    assert by_decode.tokens == expected

    # A prompt that begins as one that the prefill server knows: only its end is computed, all of
    # it handed over.
    longer = first + prompt(2, 60)
    by_prefill, by_decode = generate(prefill, decode, longer)
    assert by_prefill.cached == len(first) // PAGE_TOKENS * PAGE_TOKENS
    assert by_decode.tokens == reference_tokens(model, longer, NUM_TOKENS)

    control_file(directory).touch()
    try:
        _, zeroed = generate(prefill, decode, first)
    finally:
        control_file(directory).unlink()
    assert zeroed.status == 200
    assert zeroed.tokens != expected
    assert generate(prefill, decode, first)[1].tokens == expected

    assert "hand-off to 127.0.0.1:" in prefill.log.read_text()


def test_requests_together(servers: tuple[Server, Server], model: checkpoint.Checkpoint) -> None:
    prefill, decode = servers
    prompts = [prompt(20 + i, 100 + 37 * i) for i in range(6)]
    requests = [Request(prefill, decode, tokens, NUM_TOKENS) for tokens in prompts]
    found = [request.wait()[1].tokens for request in requests]
    assert found == [reference_tokens(model, tokens, NUM_TOKENS) for tokens in prompts]


@pytest.mark.skipif("KVSTORE_TEST_LONG" not in os.environ, reason="minutes: KVSTORE_TEST_LONG=1")
def test_kv_of_gpus_goes_by_the_host(
    servers: tuple[Server, Server], directory: Path, model: checkpoint.Checkpoint
) -> None:
    """The prefill server's KV is memory of a device, here one that only pretends; the decode server
    receives into SGLang's host pool, and SGLang loads it. Both get on with servers that do not."""
    prefill, decode = servers
    with (
        serving(directory, model, "prefill", **{plugin.GPU_VARIABLE: "1"}) as of_device,
        serving(directory, model, "decode", flags=ON_HOST) as on_host,
    ):
        of_device.ready()
        on_host.ready()
        first = prompt(30)
        expected = reference_tokens(model, first, NUM_TOKENS)
        for one, other in ((of_device, on_host), (prefill, on_host), (of_device, decode)):
            by_prefill, by_decode = generate(one, other, first)
            assert by_prefill.status == 200, by_prefill
            assert by_decode.tokens == expected, by_decode
        control_file(directory).touch()
        try:
            assert generate(of_device, on_host, first)[1].tokens != expected
        finally:
            control_file(directory).unlink()
        # Several at once, and a prefill server that dies in the middle of one: its pages are used
        # again for others, when nothing can come any more.
        prompts = [prompt(40 + i, 100 + 37 * i) for i in range(4)]
        requests = [Request(of_device, on_host, tokens, NUM_TOKENS) for tokens in prompts]
        found = [request.wait()[1].tokens for request in requests]
        assert found == [reference_tokens(model, tokens, NUM_TOKENS) for tokens in prompts]
        with held(directory) as is_held:
            request = Request(of_device, on_host, first)
            wait_until(is_held, "the prefill server sends")
            of_device.kill()
        assert request.wait()[1].status >= 500
        wait_until(lambda: "no word of a prefill" in on_host.log.read_text(), "pages are freed")
        assert generate(prefill, on_host, first)[1].tokens == expected


def test_a_decode_server_with_another_secret_is_refused_by_name(
    servers: tuple[Server, Server], directory: Path, model: checkpoint.Checkpoint
) -> None:
    prefill, decode = servers
    token = directory / "other-token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with serving(directory, model, "decode", KVSTORE_TRANSFER_TOKEN_FILE=str(token)) as stranger:
        said = generate(prefill, stranger.ready(), prompt(3))
    assert all(one.status >= 500 for one in said), said
    assert not said[1].tokens
    complaint = next(
        line for line in prefill.log.read_text().splitlines() if "failed after" in line
    )
    assert "secret" in complaint
    # The stranger took nobody else along.
    answer = generate(prefill, decode, prompt(4))[1]
    assert answer.tokens == reference_tokens(model, prompt(4), NUM_TOKENS)


@pytest.mark.skipif("KVSTORE_TEST_LONG" not in os.environ, reason="minutes: KVSTORE_TEST_LONG=1")
def test_servers_that_are_killed_in_a_hand_off_take_one_request_along(
    servers: tuple[Server, Server], directory: Path, model: checkpoint.Checkpoint
) -> None:
    prefill, decode = servers

    def expect_right(prefill: Server, decode: Server, seed: int) -> None:
        by_prefill, by_decode = generate(prefill, decode, prompt(seed))
        assert by_prefill.status == 200, by_prefill
        assert by_decode.tokens == reference_tokens(model, prompt(seed), NUM_TOKENS), by_decode

    expect_right(prefill, decode, 10)
    with held(directory) as is_held:
        request = Request(prefill, decode, prompt(11))
        wait_until(is_held, "the prefill server sends")
        decode.kill()
    began = time.monotonic()
    by_prefill, _ = request.wait()
    assert time.monotonic() - began < BOUND_S
    assert by_prefill.status >= 500, by_prefill

    with (
        serving(directory, model, "decode") as second,
        serving(directory, model, "prefill") as another,
    ):
        expect_right(prefill, second.ready(), 12)
        with held(directory) as is_held:
            request = Request(prefill, second, prompt(13))
            wait_until(is_held, "the prefill server sends")
            prefill.kill()
        began = time.monotonic()
        _, by_decode = request.wait()
        assert time.monotonic() - began < BOUND_S
        assert by_decode.status >= 500, by_decode
        expect_right(another.ready(), second, 14)

"""A request that is prefilled by one worker and decoded by another, with its KV handed off, has the
tokens that it has when one worker runs it alone: whatever the direction, the chunks, preemptions,
failures in between.

Two `ReferenceWorker`s with their pools and exchanges in this process; the test is the router. That
the KV is used at all is shown by zeroing it: after the checksum, tokens change; before, the
hand-off is refused and the prompt computed again.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvstore import _native  # noqa: E402
from kvstore.transport.handoff import Direction, HandoffMessage, Ready  # noqa: E402
from kvstore_adapters.reference import checkpoint, handoff_transfer  # noqa: E402
from kvstore_adapters.reference.handoff_transfer import HandoffTransfer  # noqa: E402
from kvstore_adapters.reference.messages import HandoffSetup  # noqa: E402
from kvstore_adapters.reference.scheduler import Request, WorkerSettings  # noqa: E402
from kvstore_adapters.reference.store_transfer import namespace_of  # noqa: E402
from kvstore_adapters.reference.transfer import KVTransfer, NoTransfer  # noqa: E402
from kvstore_adapters.reference.worker import Output, ReferenceWorker  # noqa: E402

PAGE_TOKENS = 16
LENGTHS = [15, 16, 40, 64, 100, 130]
REQUESTS = [
    Request(str(n), tuple((n * 7 + i * i) % 250 for i in range(n)), max_new_tokens=10)
    for n in LENGTHS
]
WITH_BLOCKS = [request for request in REQUESTS if len(request.prompt_token_ids) >= PAGE_TOKENS]
WAIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> checkpoint.Checkpoint:
    return checkpoint.make_random(size="nano", seed=1)


@pytest.fixture(scope="module")
def expected(model: checkpoint.Checkpoint) -> dict[str, list[int]]:
    alone = ReferenceWorker(model, WorkerSettings(PAGE_TOKENS, 32))
    tokens: dict[str, list[int]] = {}
    for request in REQUESTS:
        alone.add_request(request)
        while alone.has_work:
            for output in alone.step():
                tokens.setdefault(output.request_id, []).append(output.token_id)
    return tokens


class Side:
    """A worker. `mangle` sees each message that it sends, and may keep it (None)."""

    def __init__(
        self,
        model: checkpoint.Checkpoint,
        settings: WorkerSettings,
        setup: HandoffSetup,
        inner: KVTransfer | None = None,
    ) -> None:
        spec = namespace_of(model, PAGE_TOKENS).spec
        self.other: Side
        self.mangle: Callable[[HandoffMessage], HandoffMessage | None] = lambda message: message
        self.handoff = HandoffTransfer(setup, spec, inner or NoTransfer(), self.send, lambda: None)
        self.worker = ReferenceWorker(model, settings, self.handoff, allocate=self.handoff.allocate)
        self.outputs: list[Output] = []

    def send(self, handoff_id: str, message: HandoffMessage) -> None:
        mangled = self.mangle(message)
        if mangled is not None:
            self.other.handoff.deliver(handoff_id, mangled)

    def step(self) -> list[Output]:
        outputs = self.worker.step() if self.worker.has_work else []
        self.outputs += outputs
        return outputs


class Router:
    """The prefill side, the decode side, and requests on their way from one to the other."""

    def __init__(self, prefill: Side, decode: Side) -> None:
        self.prefill, self.decode = prefill, decode
        prefill.other, decode.other = decode, prefill
        self.pages_free = [side.worker.pages_free for side in (prefill, decode)]

    def run(self, requests: list[Request]) -> dict[str, list[int]]:
        for request in requests:
            name = f"handoff of {request.request_id}"
            length = len(request.prompt_token_ids)
            if length >= PAGE_TOKENS:
                for side in (self.prefill, self.decode):
                    side.handoff.expect(name)
                self.decode.handoff.receive_request(request.request_id, name)
                self.decode.worker.add_request(request, awaits_token=True)
                self.prefill.handoff.send_request(request.request_id, name, length)
            self.prefill.worker.add_request(replace(request, max_new_tokens=1))
        by_id = {request.request_id: request for request in requests}
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        give_up = time.monotonic() + WAIT_S
        while any(len(tokens[name]) < 10 for name in tokens) and time.monotonic() < give_up:
            for output in self.prefill.step():
                tokens[output.request_id].append(output.token_id)
                self.go_on(replace(by_id[output.request_id], output_token_ids=(output.token_id,)))
            for output in self.decode.step():
                tokens[output.request_id].append(output.token_id)
        self.wait_until_pages_are_free()
        return tokens

    def go_on(self, request: Request) -> None:
        if self.decode.worker.continue_request(request):
            self.decode.handoff.token_came(request.request_id)
        else:
            self.decode.worker.add_request(request)

    def wait_until_pages_are_free(self) -> None:
        give_up = time.monotonic() + WAIT_S
        while time.monotonic() < give_up:
            for side in (self.prefill, self.decode):
                side.handoff.poll()
            if [side.worker.pages_free for side in (self.prefill, self.decode)] == self.pages_free:
                return
            time.sleep(0.01)
        raise AssertionError("pages were not given back")

    def cached(self) -> dict[str, int]:
        """Tokens that came by hand-off, by request."""
        return {
            output.request_id: output.metrics.cached_tokens
            for output in self.decode.outputs
            if output.metrics is not None
        }


WHOLE = {str(n): n // PAGE_TOKENS * PAGE_TOKENS for n in LENGTHS}


@pytest.fixture
def make_router(model: checkpoint.Checkpoint) -> Iterator[Callable[..., Router]]:
    made: list[Side] = []

    def make(
        direction: Direction,
        *,
        prefill: WorkerSettings | None = None,
        decode: WorkerSettings | None = None,
        inner: KVTransfer | None = None,
        **changes: Any,
    ) -> Router:
        setup = HandoffSetup(direction=direction.value, transport="shm", **changes)
        usual = WorkerSettings(PAGE_TOKENS, 64)
        made.append(Side(model, prefill or usual, setup, inner))
        made.append(Side(model, decode or usual, setup))
        return Router(*made[-2:])

    yield make
    for side in made:
        side.handoff.close()


Make = Callable[..., Router]
Expected = dict[str, list[int]]


@pytest.mark.parametrize("direction", Direction)
def test_tokens_are_the_same_handed_off(
    make_router: Make, expected: Expected, direction: Direction
) -> None:
    router = make_router(direction)
    assert router.run(REQUESTS) == expected
    assert router.cached() == WHOLE
    assert router.decode.handoff.counters().received == len(WITH_BLOCKS)


@pytest.mark.parametrize("direction", Direction)
def test_tokens_are_the_same_with_chunks_and_preemptions_on_both_sides(
    make_router: Make, expected: Expected, direction: Direction
) -> None:
    chunked = WorkerSettings(PAGE_TOKENS, 14, batch_tokens_max=24, sequences_max=4)
    router = make_router(direction, prefill=chunked, decode=chunked)
    assert router.run(REQUESTS) == expected
    assert any(router.cached().values())


@pytest.mark.parametrize("direction", Direction)
def test_a_step_begins_behind_layers_that_are_still_to_come(
    make_router: Make,
    expected: Expected,
    direction: Direction,
) -> None:
    """The last layer is kept back until the decode worker waits for it."""
    router = make_router(direction)
    request = REQUESTS[-1]
    kept: list[HandoffMessage] = []
    last = router.prefill.handoff._spec.num_layers - 1

    def keep(message: HandoffMessage) -> HandoffMessage | None:
        if isinstance(message, Ready) and message.layer == last:
            kept.append(message)
            return None
        return message

    waits: list[int] = []
    real = handoff_transfer._Incoming.wait_layer

    def wait_layer(self: Any, layer: int) -> bool:
        waits.append(layer)
        if layer == last:
            for message in kept:
                router.decode.handoff.deliver(f"handoff of {request.request_id}", message)
        return real(self, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handoff_transfer._Incoming, "wait_layer", wait_layer)
        # Sent late, Ended comes before the layer does: the sender's last word is kept as well.
        router.prefill.mangle = lambda message: None if ended(message) else keep(message)
        assert router.run([request]) == {request.request_id: expected[request.request_id]}
    assert sorted(set(waits)) == list(range(last + 1))
    assert router.cached() == {request.request_id: WHOLE[request.request_id]}


def ended(message: HandoffMessage) -> bool:
    return type(message).__name__ == "Ended"


@pytest.mark.parametrize("direction", Direction)
def test_a_layer_that_never_comes_costs_time_only(
    make_router: Make, expected: Expected, direction: Direction
) -> None:
    router = make_router(direction, wait_s=0.3)
    last = router.prefill.handoff._spec.num_layers - 1
    router.prefill.mangle = lambda message: (
        None if isinstance(message, Ready) and message.layer == last else message
    )
    assert router.run(REQUESTS) == expected
    assert set(router.cached().values()) == {0}
    assert router.decode.handoff.counters().receive_failures == len(WITH_BLOCKS)


@pytest.mark.parametrize("direction", Direction)
def test_kv_zeroed_after_the_check_changes_tokens(
    make_router: Make,
    expected: Expected,
    direction: Direction,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = make_router(direction)
    pool = router.decode.worker._model.pool
    real, hold = handoff_transfer._Incoming.wait, router.decode.handoff._hold
    received: list[int] = []

    def remember(handoff_id: str, pages: Any) -> None:
        received.extend(pages)
        hold(handoff_id, pages)

    def wait(self: Any) -> int:
        loaded = real(self)
        pool[received] = 0
        return loaded

    monkeypatch.setattr(router.decode.handoff, "_hold", remember)
    monkeypatch.setattr(handoff_transfer._Incoming, "wait", wait)
    monkeypatch.setattr(handoff_transfer._Incoming, "layers_ready", lambda self: 0)
    request = REQUESTS[-1]
    tokens = router.run([request])[request.request_id]
    assert tokens[0] == expected[request.request_id][0], "the prefill worker's own"
    assert tokens != expected[request.request_id]


@pytest.mark.parametrize("direction", Direction)
def test_kv_zeroed_on_the_way_is_refused_and_computed_again(
    make_router: Make,
    expected: Expected,
    direction: Direction,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = _native.move_pieces

    def move(to: Any, source: Any, lengths: Any, checksums: Any, *rest: Any) -> Any:
        statuses = real(to, source, lengths, None, *rest)
        for address, size in zip(to.tolist(), lengths.tolist(), strict=True):
            ctypes.memset(address, 0, size)
        return statuses

    monkeypatch.setattr(_native, "move_pieces", move)
    router = make_router(direction)
    assert router.run(REQUESTS) == expected
    assert set(router.cached().values()) == {0}


@pytest.mark.parametrize("direction", Direction)
def test_requests_cancelled_in_between_give_their_pages_back(
    make_router: Make, expected: Expected, direction: Direction
) -> None:
    router = make_router(direction)
    for side in (router.prefill, router.decode):
        for request in WITH_BLOCKS:
            side.handoff.expect(f"cancelled {request.request_id}")
    for request in WITH_BLOCKS:
        name = f"cancelled {request.request_id}"
        router.decode.handoff.receive_request(request.request_id, name)
        router.decode.worker.add_request(request, awaits_token=True)
        router.prefill.handoff.send_request(request.request_id, name, len(request.prompt_token_ids))
        router.prefill.worker.add_request(replace(request, max_new_tokens=1))
    router.decode.step()
    for request in WITH_BLOCKS:
        for side in (router.decode, router.prefill):
            side.worker.cancel(request.request_id)
            side.handoff.cancel(request.request_id)
    router.wait_until_pages_are_free()
    assert router.run(REQUESTS) == expected


def test_what_the_prefill_worker_found_in_a_store_is_handed_on(
    make_router: Make, expected: Expected, model: checkpoint.Checkpoint
) -> None:
    import kvstore
    from kvstore_adapters.reference.store_transfer import StoreTransfer

    for direction in Direction:
        with kvstore.open(namespace_of(model, PAGE_TOKENS), cpu="16MiB") as store:
            inner = StoreTransfer(store)
            router = make_router(direction, inner=inner)
            assert router.run(REQUESTS) == expected
            cold = inner.counters.hit_cpu_blocks
            again = [replace(request, request_id=request.request_id) for request in REQUESTS]
            assert router.run(again) == expected
            assert inner.counters.hit_cpu_blocks > cold
            assert router.cached() == WHOLE

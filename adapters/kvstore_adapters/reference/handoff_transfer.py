"""KVTransfer by hand-off: pool to pool, from the worker that prefills to the one that decodes.

It stands before another transfer, of a store or of nothing, which has all requests that are not
handed off, and what a prefill worker finds in the store is handed on as if it were computed.

Threads: as `transfer.KVTransfer`, the worker's own; an `Exchange` moves the bytes on another one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvstore import BlockSpec, ConfigError
from kvstore.codec import ALIGNMENT_BYTES
from kvstore.transport import Endpoint, SharedMemory, TransportSettings
from kvstore.transport.handoff import (
    Direction,
    Exchange,
    HandoffCounters,
    HandoffMessage,
    Incoming,
    Layout,
    Links,
    Party,
    Wire,
)

from .messages import HandoffSetup
from .pages import PagePool
from .transfer import BlockSave, KVTransfer, PendingLoad

STAGING_SHARE = 4  # encoded layers may take a quarter of the pool's bytes


class HandoffTransfer:
    """See `transfer.KVTransfer`. Owns its endpoint and its pool's memory, not `inner`.

    Args:
        spec: of a page.
        send: see `Exchange`.
        notify: see `Exchange`.

    Raises:
        KVStoreError: a mover that was asked for cannot work here.
    """

    def __init__(
        self,
        setup: HandoffSetup,
        spec: BlockSpec,
        inner: KVTransfer,
        send: Callable[[str, HandoffMessage], None],
        notify: Callable[[], None],
    ) -> None:
        self._setup = setup
        self._spec = spec
        self._inner = inner
        self._send = send
        self._notify = notify
        self._direction = Direction(setup.direction)
        movers = (setup.transport,) if setup.transport != "auto" else None
        self._endpoint = Endpoint(
            TransportSettings(listen=setup.listen, movers=movers, timeout=setup.timeout_s),
            secret=secrets.token_bytes(32),
        )
        self._links = Links(self._endpoint, movers, setup.timeout_s)
        self._exchange: Exchange
        self._pages: PagePool
        self._memory: SharedMemory
        self._sending: dict[str, str] = {}  # request -> hand-off
        self._expected: dict[str, str] = {}
        self._coming: dict[str, Incoming] = {}  # by request
        self._has_token: set[str] = set()  # of those that are expected
        self._held: dict[str, list[int]] = {}  # by hand-off
        self._saves: list[tuple[str, int, list[int]]] = []

    # --- memory

    def allocate(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The pool's memory, for the worker: peers on this host can map it."""
        self._memory = SharedMemory(num_bytes, "kvstore-pool")
        return self._memory.array

    def attach(self, pool: Tensor, pages: PagePool) -> None:
        self._inner.attach(pool, pages)
        self._pages = pages
        assert pool.data_ptr() == self._memory.address, "the pool is not in our memory"
        spec, num_pages = self._spec, pool.shape[0]
        region = self._endpoint.register(self._memory, writable=True)
        offsets = [[layer * spec.layer_bytes] for layer in range(spec.num_layers)]
        layout = Layout(region.region_id, spec.block_bytes, [spec.layer_bytes], offsets)
        wire = self._make_wire(num_pages * spec.block_bytes // STAGING_SHARE)
        # All regions are registered by now, so peers learn of all.
        party = Party(
            layout,
            self._memory.address,
            self._endpoint.info().encode(),
            self._links.connect,
            wire,
            move_timeout_s=self._setup.timeout_s,
            death_grace_s=2 * self._setup.timeout_s,
        )
        self._exchange = Exchange(party, self._send, self._notify)

    def _make_wire(self, num_bytes: int) -> Wire | None:
        if self._setup.codec == "none":
            return None
        size = max(num_bytes, self._spec.block_bytes) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        staging = SharedMemory(max(size, ALIGNMENT_BYTES), "kvstore-staging")
        region = self._endpoint.register(staging, writable=True)
        return Wire(self._setup.codec, self._spec, staging.array, region.region_id)

    # --- what the router says

    def expect(self, handoff_id: str) -> None:
        """Messages of it may come before the request does. From any thread."""
        self._exchange.expect(handoff_id)

    def deliver(self, handoff_id: str, message: HandoffMessage) -> None:
        """From any thread."""
        self._exchange.deliver(handoff_id, message)

    def peer_lost(self, handoff_id: str) -> None:
        """The process at the other end is dead. From any thread."""
        self._exchange.peer_lost(handoff_id)

    def send_request(self, request_id: str, handoff_id: str, num_tokens: int) -> None:
        """The blocks of a prompt of so many tokens are to be handed off."""
        blocks = num_tokens // self._spec.block_tokens
        if not blocks:
            raise ConfigError(f"send_as: {num_tokens} tokens have no full block")
        self._sending[request_id] = handoff_id
        lease = self._setup.lease_s
        self._exchange.open_sender(handoff_id, self._direction, blocks, lease)

    def receive_request(self, request_id: str, handoff_id: str) -> None:
        """The blocks of a request that is added come by hand-off."""
        self._expected[request_id] = handoff_id

    def token_came(self, request_id: str) -> None:
        """Its prefill is done, so what is missing has to come soon now."""
        incoming = self._coming.get(request_id)
        if incoming is not None:
            incoming.expire_at(time.monotonic() + self._setup.wait_s)
        elif request_id in self._expected:
            self._has_token.add(request_id)

    def cancel(self, request_id: str) -> None:
        """The request is dropped, or refused."""
        handoff_id = self._sending.pop(request_id, None)
        if handoff_id is not None:
            self._exchange.close_sender(handoff_id, "the request was cancelled")
        expected = self._expected.pop(request_id, None)
        if expected is not None:
            self._exchange.forget(expected)
        self._has_token.discard(request_id)

    def counters(self) -> HandoffCounters:
        return self._exchange.counters()

    # --- KVTransfer

    def poll(self) -> None:
        self._inner.poll()
        for handoff_id in self._exchange.take_settled():
            self._pages.drop(self._held.pop(handoff_id, ()))
            for request_id, name in list(self._sending.items()):
                if name == handoff_id:
                    del self._sending[request_id]

    def match(self, request_id: str, token_ids: Sequence[int], blocks_max: int) -> int:
        if request_id in self._expected:
            return blocks_max
        return self._inner.match(request_id, token_ids, blocks_max)

    def load(self, request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> PendingLoad:
        handoff_id = self._expected.pop(request_id, None)
        if handoff_id is None:
            load = self._inner.load(request_id, token_ids, pages)
            if request_id not in self._sending:
                return load
            return _HandedOn(self, request_id, list(pages), load)
        self._hold(handoff_id, pages)
        incoming = self._exchange.open_receiver(handoff_id, self._direction, pages)
        self._coming[request_id] = incoming
        if request_id in self._has_token:
            self._has_token.remove(request_id)
            self.token_came(request_id)
        return _Incoming(self, request_id, incoming, self._setup.wait_s)

    def begin_save(self, saves: Sequence[BlockSave]) -> None:
        self._inner.begin_save(saves)
        for save in saves:
            handoff_id = self._sending.get(save.request_id)
            if handoff_id is not None:
                self._hold(handoff_id, save.pages)
                self._saves.append((handoff_id, save.first_block, list(save.pages)))

    def save_layer(self, layer: int) -> None:
        self._inner.save_layer(layer)
        for handoff_id, first_block, pages in self._saves:
            self._exchange.add(handoff_id, layer, first_block, pages)

    def end_save(self) -> None:
        self._saves.clear()
        self._inner.end_save()

    def abort_save(self) -> None:
        # The layers that were handed on are right: only a later one is missing.
        self._saves.clear()
        self._inner.abort_save()

    def _hold(self, handoff_id: str, pages: Sequence[int]) -> None:
        self._pages.hold(pages)
        self._held.setdefault(handoff_id, []).extend(pages)

    def hand_on(self, request_id: str, pages: list[int]) -> None:
        """These first blocks came from elsewhere. For `_HandedOn`."""
        handoff_id = self._sending.get(request_id)
        if handoff_id is not None and pages:
            self._hold(handoff_id, pages)
            for layer in range(self._spec.num_layers):
                self._exchange.add(handoff_id, layer, 0, pages)

    def end_load(self, request_id: str) -> None:
        self._coming.pop(request_id, None)

    def close(self) -> None:
        self._exchange.close()
        self._links.close()
        self._endpoint.close()


class _HandedOn:
    """A load of what is to be sent on."""

    def __init__(
        self, owner: HandoffTransfer, request_id: str, pages: list[int], load: PendingLoad
    ) -> None:
        self._owner, self._request_id, self._pages, self._load = owner, request_id, pages, load
        self._is_handed_on = False

    def done(self) -> bool:
        return self._load.done()

    def wait(self) -> int:
        loaded = self._load.wait()
        if not self._is_handed_on:
            self._is_handed_on = True
            self._owner.hand_on(self._request_id, self._pages[:loaded])
        return loaded

    def abandon(self) -> None:
        self._load.abandon()

    def layers_ready(self) -> int:
        return 0

    def wait_layer(self, layer: int) -> bool:
        return self._load.wait_layer(layer)


class _Incoming:
    """A hand-off that is waited for."""

    def __init__(
        self, owner: HandoffTransfer, request_id: str, incoming: Incoming, wait_s: float
    ) -> None:
        self._owner, self._request_id = owner, request_id
        self._incoming, self._wait_s = incoming, wait_s

    def done(self) -> bool:
        return self._incoming.is_over

    def wait(self) -> int:
        if not self._incoming.wait(self._wait_s):
            self.abandon()
        self._owner.end_load(self._request_id)
        return self._incoming.blocks_ready

    def abandon(self) -> None:
        self._incoming.abandon("it is not waited for any more")
        self._owner.end_load(self._request_id)

    def layers_ready(self) -> int:
        return self._incoming.layers_ready

    def wait_layer(self, layer: int) -> bool:
        return self._incoming.wait_layer(layer, self._wait_s)

"""A worker of its own process; `main` is what that process runs.

Started by `pd.Cluster`, which holds the other end of the socket FD. The process ends when that end
is closed, however the router died. One thread computes; a lost store is a slower worker, not a dead
one. Another reads the socket, so that what hand-offs say is heard while a step is computed.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from contextlib import suppress

import torch

import kvstore
from kvstore import ConfigError, IncompatibleError, KVStoreError, Namespace
from kvstore.transport.handoff import HandoffCounters, HandoffMessage

from . import checkpoint
from .counters import TransferCounters
from .handoff_transfer import HandoffTransfer
from .messages import (
    Attach,
    Attached,
    Cancel,
    Counters,
    Failed,
    Frames,
    FromWorker,
    ModelSource,
    NewToken,
    PeerLost,
    Prepare,
    Ready,
    Refused,
    Relay,
    Report,
    Setup,
    Submit,
    Tokens,
    ToWorker,
    frame,
)
from .scheduler import Request
from .store_transfer import StoreTransfer, namespace_of
from .transfer import NoTransfer
from .worker import Output, ReferenceWorker

STALL_SECONDS = 0.5  # after which a worker that waits for news looks again


class RouterGoneError(Exception):
    """The router closed its end."""


class Link:
    """The socket to the router. `send` and `wake` may be called from any thread; the rest is of
    one."""

    def __init__(self, connection: socket.socket) -> None:
        self.handoff: HandoffTransfer | None = None  # hears its messages from the reading thread
        self._connection = connection
        self._send_lock = threading.Lock()
        # None: a wake-up; an exception: there will be no more.
        self._messages: queue.SimpleQueue[ToWorker | RouterGoneError | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="router", daemon=True).start()

    def send(self, message: FromWorker) -> None:
        try:
            with self._send_lock:
                self._connection.sendall(frame(message))
        except OSError as error:
            raise RouterGoneError from error

    def relay(self, handoff_id: str, message: HandoffMessage) -> None:
        """To the other end of a hand-off. That the router is gone, the computing thread learns."""
        with suppress(RouterGoneError):
            self.send(Relay(handoff_id, message))

    def wake(self) -> None:
        """Let `poll` return."""
        self._messages.put(None)

    def receive(self) -> ToWorker:
        """The next message, waiting for it."""
        while (message := self.poll(None)) is None:
            pass
        return message

    def poll(self, timeout: float | None = 0.0) -> ToWorker | None:
        """The next message if there is one within `timeout` seconds (None: wait); None also when
        woken."""
        try:
            message = self._messages.get(timeout is None or timeout > 0, timeout or None)
        except queue.Empty:
            return None
        if isinstance(message, RouterGoneError):
            self._messages.put(message)
            raise message
        return message

    def _read(self) -> None:
        frames: Frames[ToWorker] = Frames(ToWorker)
        try:
            while (messages := frames.receive(self._connection)) is not None:
                for message in messages:
                    self._sort(message)
        except (OSError, IncompatibleError):
            pass
        self._messages.put(RouterGoneError())

    def _sort(self, message: ToWorker) -> None:
        handoff = self.handoff
        if isinstance(message, Relay):
            if handoff is not None:
                handoff.deliver(message.handoff_id, message.message)
        elif isinstance(message, PeerLost):
            if handoff is not None:
                handoff.peer_lost(message.handoff_id)
        else:
            if handoff is not None and isinstance(message, Prepare):
                handoff.expect(message.receive_as)
            if handoff is not None and isinstance(message, Submit) and message.send_as:
                handoff.expect(message.send_as)
            self._messages.put(message)


class Worker:
    """What this process has made of its settings."""

    def __init__(
        self,
        worker: ReferenceWorker,
        store: StoreTransfer | None,
        handoff: HandoffTransfer | None,
    ) -> None:
        self.worker = worker
        self.store = store
        self.handoff = handoff


def load_model(source: ModelSource) -> checkpoint.Checkpoint:
    if source.directory is not None:
        return checkpoint.load(source.directory)
    return checkpoint.make_random(size=source.size, seed=source.seed)


def describe(model: checkpoint.Checkpoint, namespace: Namespace) -> Ready:
    spec = namespace.spec
    return Ready(
        model=namespace.model,
        revision=namespace.revision,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_tokens=spec.block_tokens,
        dtype=spec.dtype,
        vocab_size=model.config.vocab_size,
        end_token_ids=sorted(model.config.end_token_ids),
    )


def start(link: Link) -> Worker:
    """Load the model and connect to the store, as the router says."""
    setup = link.receive()
    assert isinstance(setup, Setup)
    model = load_model(setup.model)
    namespace = namespace_of(model, setup.settings.page_tokens, setup.revision)
    link.send(describe(model, namespace))
    attach = link.receive()
    assert isinstance(attach, Attach)
    store = None
    if attach.address is not None:
        store = StoreTransfer(
            kvstore.connect(attach.address, namespace),
            read=attach.read,
            write=attach.write,
            layerwise=attach.layerwise,
        )
    if attach.handoff is None:
        worker = ReferenceWorker(model, setup.settings, store)
        link.send(Attached())
        return Worker(worker, store, None)
    inner = store or NoTransfer()
    handoff = HandoffTransfer(attach.handoff, namespace.spec, inner, link.relay, link.wake)
    worker = ReferenceWorker(model, setup.settings, handoff, allocate=handoff.allocate)
    link.handoff = handoff
    link.send(Attached())
    return Worker(worker, store, handoff)


def serve(link: Link, own: Worker) -> None:
    """Compute until the router is gone."""
    worker, is_idle = own.worker, True
    while True:
        wait = STALL_SECONDS if worker.has_work else None
        message = link.poll(wait if is_idle else 0.0)
        while message is not None:
            answer(link, own, message)
            message = link.poll()
        is_idle = True
        if worker.has_work:
            outputs = worker.step()
            is_idle = worker.is_stalled
            if outputs:
                link.send(Tokens(time.monotonic(), [new_token(output) for output in outputs]))


def answer(link: Link, own: Worker, message: ToWorker) -> None:
    if isinstance(message, Submit | Prepare):
        try:
            take_request(own, message)
        except ConfigError as error:
            if own.handoff is not None:
                own.handoff.cancel(message.request_id)
            link.send(Refused(message.request_id, str(error)))
    elif isinstance(message, Cancel):
        own.worker.cancel(message.request_id)
        if own.handoff is not None:
            own.handoff.cancel(message.request_id)
    elif isinstance(message, Report):
        link.send(counters_of(own))
    else:
        raise AssertionError(f"{type(message).__name__} after the start")


def take_request(own: Worker, message: Submit | Prepare) -> None:
    request = Request(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        max_new_tokens=message.max_new_tokens,
        output_token_ids=tuple(message.output_token_ids) if isinstance(message, Submit) else (),
        stop_token_ids=frozenset(message.stop_token_ids if isinstance(message, Submit) else ()),
    )
    if isinstance(message, Prepare):
        assert own.handoff is not None
        own.handoff.receive_request(message.request_id, message.receive_as)
        own.worker.add_request(request, awaits_token=True)
    elif own.worker.continue_request(request):
        assert own.handoff is not None
        own.handoff.token_came(message.request_id)
    else:
        if message.send_as and own.handoff is not None:
            own.handoff.send_request(
                message.request_id, message.send_as, len(message.prompt_token_ids)
            )
        own.worker.add_request(request)


def counters_of(own: Worker) -> Counters:
    handoffs = own.handoff.counters() if own.handoff is not None else HandoffCounters()
    if own.store is None:
        return Counters(TransferCounters(), True, handoffs)
    return Counters(own.store.counters, own.store.reaches_store(), handoffs)


def new_token(output: Output) -> NewToken:
    return NewToken(
        output.request_id,
        output.token_id,
        output.finish_reason.value if output.finish_reason is not None else None,
        output.metrics.cached_tokens if output.metrics is not None else 0,
    )


def main() -> None:
    torch.set_num_threads(1)  # workers share the cores among themselves
    connection = socket.socket(fileno=int(sys.argv[1]))
    link = Link(connection)
    try:
        try:
            own = start(link)
        except KVStoreError as error:
            link.send(Failed(str(error), isinstance(error, ConfigError)))
            return
        serve(link, own)
    except RouterGoneError:
        pass
    finally:
        connection.close()

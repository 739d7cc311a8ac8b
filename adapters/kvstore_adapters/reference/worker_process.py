"""A worker of its own process; `main` is what that process runs.

Started by `pd.Cluster`, which holds the other end of the socket FD. The process ends when that end
is closed, however the router died. One thread computes; a lost store is a slower worker, not a dead
one.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections import deque

import torch

import kvstore
from kvstore import ConfigError, KVStoreError, Namespace

from . import checkpoint
from .counters import TransferCounters
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
    Ready,
    Refused,
    Report,
    Setup,
    Submit,
    Tokens,
    ToWorker,
    frame,
)
from .scheduler import Request
from .store_transfer import StoreTransfer, namespace_of
from .worker import Output, ReferenceWorker


class RouterGoneError(Exception):
    """The router closed its end."""


class Link:
    """The socket to the router. Not thread-safe."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames: Frames[ToWorker] = Frames(ToWorker)
        self._messages: deque[ToWorker] = deque()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)

    def send(self, message: FromWorker) -> None:
        try:
            self._connection.sendall(frame(message))
        except OSError as error:
            raise RouterGoneError from error

    def receive(self) -> ToWorker:
        """The next message, waiting for it."""
        while (message := self.poll(None)) is None:
            pass
        return message

    def poll(self, timeout: float | None = 0.0) -> ToWorker | None:
        """The next message if there is one within `timeout` seconds (None: wait)."""
        if not self._messages and self._selector.select(timeout):
            try:
                messages = self._frames.receive(self._connection)
            except OSError as error:
                raise RouterGoneError from error
            if messages is None:
                raise RouterGoneError
            self._messages.extend(messages)
        return self._messages.popleft() if self._messages else None


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


def start(link: Link) -> tuple[ReferenceWorker, StoreTransfer | None]:
    """Load the model and connect to the store, as the router says."""
    setup = link.receive()
    assert isinstance(setup, Setup)
    model = load_model(setup.model)
    namespace = namespace_of(model, setup.settings.page_tokens, setup.revision)
    link.send(describe(model, namespace))
    attach = link.receive()
    assert isinstance(attach, Attach)
    transfer = None
    if attach.address is not None:
        transfer = StoreTransfer(
            kvstore.connect(attach.address, namespace),
            read=attach.read,
            write=attach.write,
            layerwise=attach.layerwise,
        )
    worker = ReferenceWorker(model, setup.settings, transfer)
    link.send(Attached())
    return worker, transfer


def serve(link: Link, worker: ReferenceWorker, transfer: StoreTransfer | None) -> None:
    """Compute until the router is gone."""
    while True:
        message = link.poll() if worker.has_work else link.receive()
        while message is not None:
            answer(link, worker, transfer, message)
            message = link.poll()
        if worker.has_work and (outputs := worker.step()):
            link.send(Tokens(time.monotonic(), [new_token(output) for output in outputs]))


def answer(
    link: Link, worker: ReferenceWorker, transfer: StoreTransfer | None, message: ToWorker
) -> None:
    if isinstance(message, Submit):
        try:
            worker.add_request(
                Request(
                    request_id=message.request_id,
                    prompt_token_ids=tuple(message.prompt_token_ids),
                    max_new_tokens=message.max_new_tokens,
                    output_token_ids=tuple(message.output_token_ids),
                    stop_token_ids=frozenset(message.stop_token_ids),
                )
            )
        except ConfigError as error:
            link.send(Refused(message.request_id, str(error)))
    elif isinstance(message, Cancel):
        worker.cancel(message.request_id)
    elif isinstance(message, Report):
        link.send(counters_of(transfer))
    else:
        raise AssertionError(f"{type(message).__name__} after the start")


def counters_of(transfer: StoreTransfer | None) -> Counters:
    if transfer is None:
        return Counters(TransferCounters(), True)
    return Counters(transfer.counters, transfer.reaches_store())


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
            worker, transfer = start(link)
        except KVStoreError as error:
            link.send(Failed(str(error), isinstance(error, ConfigError)))
            return
        serve(link, worker, transfer)
    except RouterGoneError:
        pass
    finally:
        connection.close()

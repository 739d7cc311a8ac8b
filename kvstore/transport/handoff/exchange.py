"""The hand-offs of one process, driven by a thread: what an engine uses.

The engine's thread says what is computed and asks what has arrived; nothing of that waits. Messages
of the control channel come in by `deliver` and go out by `send`, each with its hand-off's name.

A hand-off's pages are its own, whatever the request does, until `take_settled` names it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from kvstore.transport.handoff.messages import Failed, Grant, HandoffMessage, Stop
from kvstore.transport.handoff.party import Direction, Party
from kvstore.transport.handoff.receiver import Receiver
from kvstore.transport.handoff.sender import Sender

log = logging.getLogger(__name__)

TICK_SECONDS = 0.05  # how late a deadline may be noticed


@dataclass
class HandoffCounters:
    """Of one process. Seconds and "early" are the receivers': what they waited for after the
    sender had computed everything, and the bytes that had come by then."""

    sent: int = 0  # ended by the receiver having everything
    send_failures: int = 0
    received: int = 0
    receive_failures: int = 0
    received_bytes: int = 0
    early_bytes: int = 0
    tail_seconds: float = 0.0
    moved_bytes: dict[str, int] = field(default_factory=dict)  # by mover, where the move was begun

    def __add__(self, other: HandoffCounters) -> HandoffCounters:
        return self._with(other, 1)

    def __sub__(self, other: HandoffCounters) -> HandoffCounters:
        return self._with(other, -1)

    def _with(self, other: HandoffCounters, sign: int) -> HandoffCounters:
        numbers = {
            each.name: getattr(self, each.name) + sign * getattr(other, each.name)
            for each in fields(self)
            if each.name != "moved_bytes"
        }
        movers = {**self.moved_bytes, **other.moved_bytes}
        moved = {
            mover: self.moved_bytes.get(mover, 0) + sign * other.moved_bytes.get(mover, 0)
            for mover in movers
        }
        return HandoffCounters(**numbers, moved_bytes=moved)


class Incoming:
    """What the engine sees of one hand-off to it. Thread-safe."""

    def __init__(self, exchange: Exchange, handoff_id: str, num_layers: int) -> None:
        self._exchange = exchange
        self._handoff_id = handoff_id
        self._changed = threading.Condition()
        self._num_layers = num_layers
        self.layers_ready = 0
        self.blocks_ready = 0
        self.failure = ""

    @property
    def is_over(self) -> bool:
        """Nothing more comes: it is complete or has failed."""
        return bool(self.failure) or self.layers_ready == self._num_layers

    def wait_layer(self, layer: int, timeout: float) -> bool:
        """Wait until that layer of all blocks is there; False: it is not, and `failure` or the
        timeout says why."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over or self.layers_ready > layer, timeout)
            return self.layers_ready > layer

    def wait(self, timeout: float) -> bool:
        """Wait until it is over; False: it is not yet."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_over, timeout)

    def expire_at(self, deadline: float) -> None:
        """Abandon it then, on the party's clock."""
        self._exchange._expire(self._handoff_id, deadline)

    def abandon(self, reason: str) -> None:
        """Nothing of it is wanted any more."""
        with self._changed:
            if not self.is_over:
                self.failure = reason
                self._changed.notify_all()
        self._exchange._abandon(self._handoff_id, reason)

    def _fail(self, reason: str) -> None:
        with self._changed:
            if not self.is_over:
                self.failure = reason
            self._changed.notify_all()

    def _publish(self, receiver: Receiver) -> bool:
        """Whether anything is new. From the driving thread."""
        with self._changed:
            if self.is_over:
                return False
            failure = "" if receiver.is_complete else receiver.failure
            new = (receiver.layers_ready, receiver.blocks_ready, failure)
            if new == (self.layers_ready, self.blocks_ready, self.failure):
                return False
            self.layers_ready, self.blocks_ready, self.failure = new
            self._changed.notify_all()
            return True


class Exchange:
    """Thread-safe.

    Args:
        party: its `on_progress` is replaced.
        send: puts a message on the control channel of a hand-off; called from the driving thread,
            must not raise or block for long.
        notify: called from the driving thread when something changed that the engine may act on.
    """

    def __init__(
        self,
        party: Party,
        send: Callable[[str, HandoffMessage], None],
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self._party = replace(party, on_progress=lambda: self._call(lambda: None))
        self._send = send
        self._notify = notify
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Of the driving thread alone, from here ...
        self._senders: dict[str, Sender] = {}
        self._receivers: dict[str, tuple[Receiver, Incoming]] = {}
        self._counted: set[str] = set()
        self._mail: dict[str, list[HandoffMessage | None]] = {}
        # ... to here. Under the lock:
        self._lock = threading.Lock()
        self._settled: list[str] = []
        self._counters = HandoffCounters()
        self._thread = threading.Thread(target=self._drive, name="handoff", daemon=True)
        self._thread.start()

    # --- what the engine says

    def expect(self, handoff_id: str) -> None:
        """Keep messages of this one: it is opened soon, or forgotten."""

        def expect() -> None:
            self._mail.setdefault(handoff_id, [])

        self._call(expect)

    def forget(self, handoff_id: str) -> None:
        """It will not be opened to receive: the sender is told."""

        def forget() -> None:
            if self._mail.pop(handoff_id, None) is not None:
                self._send(handoff_id, Stop("it is not wanted any more"))

        self._call(forget)

    def open_sender(
        self, handoff_id: str, direction: Direction, num_blocks: int, lease_s: float
    ) -> None:
        """Send that many blocks. `lease_s`: for so long, at most, their pages are kept."""

        def start() -> None:
            sender = Sender(direction, self._party, num_blocks, lease_s=lease_s)
            self._senders[handoff_id] = sender
            self._send_all(handoff_id, sender.start())
            self._read_mail(handoff_id)

        self._call(start)

    def add(self, handoff_id: str, layer: int, first_block: int, pages: Sequence[int]) -> None:
        """A layer of these blocks is computed. Their pages are the hand-off's until it is settled.
        Does nothing for one that is over."""
        copied = list(pages)

        def add() -> None:
            sender = self._senders.get(handoff_id)
            if sender is not None:
                self._send_all(handoff_id, sender.add(layer, first_block, copied))

        self._call(add)

    def close_sender(self, handoff_id: str, reason: str) -> None:
        def close() -> None:
            sender = self._senders.get(handoff_id)
            if sender is not None:
                self._send_all(handoff_id, sender.stop(reason))

        self._call(close)

    def open_receiver(
        self, handoff_id: str, direction: Direction, pages: Sequence[int]
    ) -> Incoming:
        """Receive as many blocks as there are pages, which are the hand-off's until it is settled.
        It has no deadline before `Incoming.expire_at`."""
        incoming = Incoming(self, handoff_id, self._party.layout.num_layers)
        copied = list(pages)

        def start() -> None:
            receiver = Receiver(direction, self._party, copied)
            self._receivers[handoff_id] = (receiver, incoming)
            self._send_all(handoff_id, receiver.start())
            self._read_mail(handoff_id)

        self._call(start)
        return incoming

    # --- what the control channel says

    def deliver(self, handoff_id: str, message: HandoffMessage) -> None:
        self._call(lambda: self._deliver(handoff_id, message))

    def peer_lost(self, handoff_id: str) -> None:
        """The other side's process is dead: only when that is certain."""
        self._call(lambda: self._deliver(handoff_id, None))

    # --- what there is to know

    def take_settled(self) -> list[str]:
        """Hand-offs whose pages are free again since the last call."""
        with self._lock:
            settled, self._settled = self._settled, []
        return settled

    def counters(self) -> HandoffCounters:
        with self._lock:
            return replace(self._counters, moved_bytes=dict(self._counters.moved_bytes))

    def close(self) -> None:
        """End the thread. Moves that are under way end with their links."""
        self._calls.put(None)
        self._thread.join(5.0)

    # --- the driving thread

    def _call(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def _drive(self) -> None:
        while True:
            is_active = bool(self._senders or self._receivers)
            try:
                call = self._calls.get(timeout=TICK_SECONDS if is_active else None)
            except queue.Empty:
                pass
            else:
                if call is None:
                    return
                try:
                    call()
                except Exception:
                    log.exception("hand-off: a step failed")
            self._poll()

    def _poll(self) -> None:
        is_new = False
        for handoff_id in [*self._senders, *self._receivers]:
            try:
                if handoff_id in self._senders:
                    is_new |= self._poll_sender(handoff_id, self._senders[handoff_id])
                if handoff_id in self._receivers:
                    is_new |= self._poll_receiver(handoff_id, *self._receivers[handoff_id])
            except Exception:
                log.exception("hand-off %s: a step failed", handoff_id)
                self._drop(handoff_id)
                is_new = True
        if is_new:
            self._notify()

    def _poll_sender(self, handoff_id: str, sender: Sender) -> bool:
        self._send_all(handoff_id, sender.poll())
        if not sender.is_over:
            return False
        del self._senders[handoff_id]
        self._count_sent(sender)
        self._settle(handoff_id)
        return True

    def _poll_receiver(self, handoff_id: str, receiver: Receiver, incoming: Incoming) -> bool:
        self._send_all(handoff_id, receiver.poll())
        is_new = incoming._publish(receiver)
        if handoff_id not in self._counted and (receiver.is_complete or receiver.failure):
            self._counted.add(handoff_id)
            self._count_received(receiver)
        if not receiver.is_settled:
            return is_new
        del self._receivers[handoff_id]
        self._counted.discard(handoff_id)
        self._settle(handoff_id)
        return True

    def _drop(self, handoff_id: str) -> None:
        """What it does is not known any more, so its pages are never settled; others go on."""
        if self._senders.pop(handoff_id, None) is not None:
            self._send(handoff_id, Failed("an error in the sender"))
        found = self._receivers.pop(handoff_id, None)
        self._counted.discard(handoff_id)
        if found is not None:
            found[1]._fail("an error in the receiver")
            self._send(handoff_id, Stop("an error in the receiver"))

    def _deliver(self, handoff_id: str, message: HandoffMessage | None) -> None:
        sender = self._senders.get(handoff_id)
        receiver = self._receivers.get(handoff_id)
        if sender is None and receiver is None:
            if handoff_id in self._mail:
                self._mail[handoff_id].append(message)
        elif sender is not None:
            if message is None:
                self._send_all(handoff_id, sender.receiver_lost())
            elif isinstance(message, Grant | Stop):
                self._send_all(handoff_id, sender.take(message))
        elif receiver is not None:
            if message is None:
                receiver[0].sender_lost()
            elif not isinstance(message, Grant | Stop):
                self._send_all(handoff_id, receiver[0].take(message))

    def _read_mail(self, handoff_id: str) -> None:
        for message in self._mail.pop(handoff_id, ()):
            self._deliver(handoff_id, message)

    def _send_all(self, handoff_id: str, messages: Sequence[HandoffMessage]) -> None:
        for message in messages:
            self._send(handoff_id, message)

    def _expire(self, handoff_id: str, deadline: float) -> None:
        def expire() -> None:
            found = self._receivers.get(handoff_id)
            if found is not None:
                found[0].deadline = deadline

        self._call(expire)

    def _abandon(self, handoff_id: str, reason: str) -> None:
        def abandon() -> None:
            found = self._receivers.get(handoff_id)
            if found is not None:
                self._send_all(handoff_id, found[0].abandon(reason))

        self._call(abandon)

    def _settle(self, handoff_id: str) -> None:
        with self._lock:
            self._settled.append(handoff_id)

    def _count_sent(self, sender: Sender) -> None:
        with self._lock:
            counters = self._counters
            if sender.failure:
                counters.send_failures += 1
            else:
                counters.sent += 1
            self._count_moved(sender.mover, sender.wire_bytes)

    def _count_received(self, receiver: Receiver) -> None:
        with self._lock:
            counters = self._counters
            if not receiver.is_complete:
                counters.receive_failures += 1
            else:
                counters.received += 1
                if receiver.computed_at is not None and receiver.completed_at is not None:
                    counters.tail_seconds += receiver.completed_at - receiver.computed_at
            counters.received_bytes += receiver.bytes_arrived
            counters.early_bytes += receiver.bytes_before_computed
            self._count_moved(receiver.mover, receiver.bytes_arrived)

    def _count_moved(self, mover: str, num_bytes: int) -> None:
        if mover:
            moved = self._counters.moved_bytes
            moved[mover] = moved.get(mover, 0) + num_bytes

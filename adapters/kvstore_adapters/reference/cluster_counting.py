"""What a cluster's workers have counted."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Sequence

from kvstore.transport.handoff import HandoffCounters

from .counters import TransferCounters
from .messages import Counters, Relay, Report
from .worker_handle import SEND_SECONDS_MAX, Role, WorkerProcess


def ask(
    workers: Sequence[WorkerProcess],
    selector: selectors.BaseSelector,
    pass_on: Callable[[WorkerProcess, Relay], None],
    lose: Callable[[WorkerProcess], None],
) -> dict[WorkerProcess, Counters]:
    """What each worker that answers says of itself. Hand-offs may still be ending meanwhile."""
    reports: dict[WorkerProcess, Counters] = {}
    asked = {worker for worker in workers if worker.alive and worker.send(Report())}
    deadline = time.monotonic() + SEND_SECONDS_MAX
    while asked and (ready := selector.select(max(0.0, deadline - time.monotonic()))):
        for key, _ in ready:
            worker: WorkerProcess = key.data
            messages = worker.receive()
            if messages is None:
                lose(worker)
                asked.discard(worker)
            for message in messages or ():
                if isinstance(message, Relay):
                    pass_on(worker, message)
                elif isinstance(message, Counters) and worker in asked:
                    asked.remove(worker)
                    reports[worker] = message
    return reports


def what_moved(
    before: dict[WorkerProcess, Counters], after: dict[WorkerProcess, Counters]
) -> tuple[TransferCounters, TransferCounters, HandoffCounters]:
    """Through the prefill (or both-role) workers' stores, the decode workers', and by hand-off.
    What a worker that died had counted is not known."""
    prefill, decode, handoff = TransferCounters(), TransferCounters(), HandoffCounters()
    for worker, counted in after.items():
        since = before.get(worker, Counters(TransferCounters(), True, HandoffCounters()))
        if worker.role is Role.DECODE:
            decode += counted.counters - since.counters
        else:
            prefill += counted.counters - since.counters
        handoff += counted.handoff - since.handoff
    return prefill, decode, handoff

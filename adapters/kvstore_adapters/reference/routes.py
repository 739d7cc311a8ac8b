"""Jobs, and between which workers their hand-offs are: the router passes on what those say."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from kvstore.transport.handoff import Ended

from .messages import Relay
from .results import Prompt, RequestResult
from .worker_handle import Role, WorkerProcess


@dataclass(eq=False)
class Job:
    prompt: Prompt
    result: RequestResult
    role: Role
    session: list[Prompt]  # what comes after it
    submitted_s: float
    deadline_s: float
    attempts: int = 0
    worker: WorkerProcess | None = None
    dispatched_s: float = 0.0
    receiver: WorkerProcess | None = None  # has been told to prepare for it


class Routes:
    """Hand-offs under way. Not thread-safe."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._ends: dict[str, tuple[WorkerProcess, WorkerProcess]] = {}

    def open(self, request_id: str, sender: WorkerProcess, receiver: WorkerProcess) -> str:
        """Return its name, which no other one has had."""
        handoff_id = f"{request_id}#{next(self._numbers)}"
        self._ends[handoff_id] = (sender, receiver)
        return handoff_id

    def target(self, source: WorkerProcess, relay: Relay) -> WorkerProcess | None:
        """Whom a message is for; None: nobody any more. The sender's Ended is the last."""
        ends = self._ends.get(relay.handoff_id)
        if ends is None or source not in ends:
            return None
        if isinstance(relay.message, Ended):
            del self._ends[relay.handoff_id]
        sender, receiver = ends
        return receiver if source is sender else sender

    def lose(self, worker: WorkerProcess) -> list[tuple[str, WorkerProcess]]:
        """Forget what the worker takes part in; return what each other one has to be told of."""
        lost = []
        for handoff_id, ends in list(self._ends.items()):
            if worker in ends:
                del self._ends[handoff_id]
                lost.append((handoff_id, ends[ends[0] is worker]))
        return lost

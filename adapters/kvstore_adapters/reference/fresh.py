"""Run a cluster in a new process; `main` is what that process runs.

The process opens the store itself, so nothing of an earlier one's memory is left: what it serves
warm comes from the ssd directory.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvstore import KVStoreError

from .messages import Frames, frame
from .pd import (
    Cluster,
    ClusterSettings,
    Prompt,
    RequestResult,
    RunResult,
    WorkerError,
    child_command,
)


@dataclass(frozen=True)
class Plan:
    settings: ClusterSettings
    sessions: list[list[Prompt]]


@dataclass(frozen=True)
class Event:
    """One of the three: a request has finished, all have, or it cannot be done."""

    finished: RequestResult | None = None
    run: RunResult | None = None
    error: str | None = None


def run_in_fresh_process(
    settings: ClusterSettings,
    sessions: Sequence[Sequence[Prompt]],
    on_finish: Callable[[RequestResult], None] | None = None,
) -> RunResult:
    """As `Cluster.run`, with router, store and workers in new processes.

    Raises:
        WorkerError: it failed, died or hung.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                child_command("fresh", theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt ends us, and the closed socket ends it
            )
        # Between two events no more can happen than a start and one request's deadline.
        ours.settimeout(settings.start_timeout_s + settings.request_timeout_s + 30.0)
        try:
            ours.sendall(frame(Plan(settings, [list(session) for session in sessions])))
            return _follow(ours, on_finish or (lambda result: None))
        except OSError as error:
            raise WorkerError(f"the new process died or hung: {error}") from error
        finally:
            ours.close()
            try:
                process.wait(30.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _follow(connection: socket.socket, on_finish: Callable[[RequestResult], None]) -> RunResult:
    frames: Frames[Event] = Frames(Event)
    while True:
        events = frames.receive(connection)
        if events is None:
            raise WorkerError("the new process ended without a result")
        for event in events:
            if event.finished is not None:
                on_finish(event.finished)
            if event.error is not None:
                raise WorkerError(f"in the new process: {event.error}")
            if event.run is not None:
                return event.run


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as connection, suppress(ConnectionError):
        frames: Frames[Plan] = Frames(Plan)
        while (plans := frames.receive(connection)) is not None:
            for plan in plans:
                connection.sendall(frame(_carry_out(plan, connection)))


def _carry_out(plan: Plan, connection: socket.socket) -> Event:
    """Run the plan; sends each request's result, returns the last event.

    Raises:
        ConnectionError: nobody wants the results any more.
    """

    def send(result: RequestResult) -> None:
        connection.sendall(frame(Event(finished=result)))

    try:
        with Cluster(plan.settings) as cluster:
            return Event(run=cluster.run(plan.sessions, send))
    except KVStoreError as error:
        return Event(error=str(error))

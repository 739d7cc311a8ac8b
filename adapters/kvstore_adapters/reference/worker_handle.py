"""A worker process as the router sees it: how it is started, spoken to and ended."""

from __future__ import annotations

import enum
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from kvstore import IncompatibleError

from .messages import Frames, FromWorker, ToWorker, frame

if TYPE_CHECKING:
    from .routes import Job

SEND_SECONDS_MAX = 10.0  # a worker that does not read for so long is hung
KILL_SECONDS_MAX = 5.0


class Role(enum.Enum):
    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


def child_command(module: str, fd: int) -> list[str]:
    """What runs `main` of a module beside this one in a new process, with `fd` as its argument.

    It looks for modules where this process does, so both run the same code however this one found
    it.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.{module} import main; main()"
    )
    return [sys.executable, "-c", code, str(fd)]


class WorkerProcess:
    """One worker as the router sees it.

    `prepared` are the jobs whose KV it receives, and which come to it when they are prefilled.
    `command` makes a command line run on the worker's host.
    """

    def __init__(
        self,
        role: Role,
        index: int,
        command: Callable[..., list[str]] = lambda *arguments: [*arguments],
    ) -> None:
        self.role = role
        self.index = index
        self.name = f"worker {index}" if role is Role.BOTH else f"{role.value} worker {index}"
        self.jobs: dict[str, Job] = {}
        self.prepared: dict[str, Job] = {}
        self.alive = True
        self.heard_s = time.monotonic()
        self._frames: Frames[FromWorker] = Frames(FromWorker)
        # A file and not a pipe: nobody has to read it for the worker to go on.
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command(*child_command("worker_process", theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                start_new_session=True,  # an interrupt is for the router, which ends the workers
            )
        self.connection.settimeout(SEND_SECONDS_MAX)

    def send(self, message: ToWorker) -> bool:
        """False when the worker is gone or hung."""
        try:
            self.connection.sendall(frame(message))
        except OSError:
            return False
        return True

    def receive(self) -> list[FromWorker] | None:
        """What has arrived; None when the worker is gone or talks nonsense."""
        self.heard_s = time.monotonic()
        try:
            return self._frames.receive(self.connection)
        except (OSError, IncompatibleError):
            return None

    def give_up(self) -> bool:
        """Kill it; True when it is certainly dead."""
        self.alive = False
        self.process.kill()
        try:
            self.process.wait(KILL_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_words(self) -> str:
        """The last line that it wrote, for error messages."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it wrote no message"

    def close(self) -> None:
        """The end of the socket tells the worker to stop; one that does not is killed."""
        self.connection.close()
        try:
            self.process.wait(KILL_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stderr.close()

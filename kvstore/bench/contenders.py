"""Contender: the two processes of one way to move bytes, started, asked in turns, and stopped.

Between its turns it stands still (SIGSTOP), so that what polls takes no time from the others. It
dies with the thread that started it.

Where processes share few cores, chance decides whether both ends of a stream get one core or two,
which is a factor of two to three. Two hosts have cores of their own, so there are two kinds of
turns: as the scheduler likes, and each end on its own half of the cores; the better one counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from kvstore.bench import ends
from kvstore.bench.two_hosts import Host

_START_SECONDS = 60.0
_TURN_SECONDS = 60.0
_ROOT = Path(ends.__file__).resolve().parents[2]
# Before it becomes the process: to be killed when we die (prctl PR_SET_PDEATHSIG), also stopped.
_BIND_TO_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
)


class ContenderError(Exception):
    """It cannot be run here, or failed; says why."""


@dataclass(frozen=True)
class End:
    """A process: its command, on which host, and its options, which go as a line on its stdin.
    "{hello}" in a command, and `hello` in options, are what the served end said."""

    command: Sequence[str]
    host: Host | None
    options: Mapping[str, Any] | None = None

    @staticmethod
    def python(
        peer: str,
        role: str,
        options: Mapping[str, Any],
        host: Host | None = None,
        python: Path | None = None,
    ) -> End:
        """`peer`: a module of kvstore, or a file for `kvstore.bench.ends`, which `python` runs that
        need not have kvstore."""
        if peer.endswith(".py"):
            return End([str(python or sys.executable), ends.__file__, peer, role], host, options)
        return End([sys.executable, "-m", peer, role], host, options)


class Contender:
    """`serve`: None for one that needs no other process; `is_parted`: it has turns of both kinds.

    Thread safety: none.
    """

    def __init__(self, serve: End | None, read: End, *, is_parted: bool = False) -> None:
        self.version = ""
        self.absent = ""
        self._serve = serve
        self._read = read
        self._is_parted = is_parted and len(_cores()) > 1
        self._medians: dict[tuple[str, bool], list[float]] = {}  # True: on halves of the cores
        self._processes: list[_Process] = []

    def start(self) -> None:
        """Start both; what hinders it is `absent`."""
        try:
            hello = "" if self._serve is None else self._start(self._serve, "", "hello")
            self.version = self._start(self._read, hello, "version")
            self._signal(signal.SIGSTOP)
        except (ContenderError, OSError) as error:
            self._fail(str(error))

    def _start(self, end: End, hello: str, key: str) -> str:
        process = _Process([word.replace("{hello}", hello) for word in end.command], end.host)
        self._processes.append(process)
        if end.options is not None:
            process.ask(json.dumps({**end.options, "hello": hello}) + "\n")
        answer = process.answer(_START_SECONDS)
        if key not in answer:
            raise ContenderError(str(answer.get("absent") or answer))
        return str(answer[key])

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.signal(number)

    def turn(self, label: str, size: int, batch: int, calls: int, number: int) -> None:
        """One untimed call, then `calls`; their median is this round's."""
        for apart in (False, True) if self._is_parted else (False,):
            if self.absent:
                return
            try:
                seconds = self._ask(apart, size, batch, calls + 1, number * (calls + 1))
            except (ContenderError, OSError) as error:
                self._fail(f"{label}: {error}")
                return
            self._medians.setdefault((label, apart), []).append(float(np.median(seconds[1:])))

    def _ask(self, apart: bool, *numbers: int) -> Sequence[float]:
        if self._is_parted:
            for process, cores in zip(self._processes, _halves(apart), strict=True):
                process.use(cores)
        self._signal(signal.SIGCONT)
        reader = self._processes[-1]
        reader.ask(" ".join(map(str, numbers)) + "\n")
        answer = reader.answer(_TURN_SECONDS)
        self._signal(signal.SIGSTOP)
        if "seconds" not in answer:
            raise ContenderError(str(answer.get("error") or answer))
        seconds: list[float] = answer["seconds"]
        return seconds

    def _fail(self, why: str) -> None:
        said = [text for process in self._processes if (text := process.last_words())]
        self.absent = "; ".join([why, *said])
        self.stop()

    def _best(self, label: str) -> list[float]:
        """A median a round, of the better kind of turns."""
        kinds = [rounds for (name, _), rounds in self._medians.items() if name == label]
        return min(kinds, key=lambda rounds: float(np.median(rounds)))

    def median(self, label: str) -> float:
        return float(np.median(self._best(label)))

    def speedup(self, theirs: Contender, label: str) -> float:
        """How many times as fast as `theirs`: the median over rounds of their time / ours."""
        ours, others = self._best(label), theirs._best(label)
        rounds = min(len(ours), len(others))
        return float(np.median(np.array(others[:rounds]) / np.array(ours[:rounds])))

    def stop(self) -> None:
        for process in self._processes:
            process.kill()


class _Process:
    """Answers in lines of JSON. Its stderr is kept for when it fails."""

    def __init__(self, command: Sequence[str], host: Host | None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        line = host.command(*command) if host else list(command)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BIND_TO_PARENT, *line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            cwd=_ROOT,
        )
        self._buffer = b""

    def ask(self, line: str) -> None:
        cast(BinaryIO, self._process.stdin).write(line.encode())

    def answer(self, seconds: float) -> dict[str, Any]:
        out = cast(BinaryIO, self._process.stdout)
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([out], [], [], seconds)
            if not ready:
                raise ContenderError(f"no answer within {seconds:g} s")
            chunk = os.read(out.fileno(), 1 << 16)
            if not chunk:
                raise ContenderError(f"ended with status {self._process.wait()}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise ContenderError(line.decode(errors="replace")[:200]) from error
        return answer

    def use(self, cores: Sequence[int]) -> None:
        """All threads that it has by now, and those that they start."""
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def last_words(self) -> str:
        """The last line on stderr of one that has ended."""
        if self._log.closed or self._process.poll() in (None, 0):
            return ""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    def kill(self) -> None:
        """Also one that stands still."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _halves(apart: bool) -> tuple[list[int], list[int]]:
    cores = _cores()
    half = len(cores) // 2
    return (cores[:half], cores[half:]) if apart else (cores, cores)


def compiled(source: Path, directory: Path, libraries: Sequence[str] = ()) -> Path:
    """Build a C program.

    Raises:
        ContenderError: no compiler, or no header or library that it needs.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ContenderError("no C compiler (Debian: apt-get install gcc)")
    program = directory / source.stem
    done = subprocess.run(
        [compiler, "-O3", "-pthread", str(source), "-o", str(program), *libraries],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["?"]
        raise ContenderError(f"{source.name} does not compile: {errors[0]}")
    return program

"""How fast is our store beside memcpy, Redis, LMDB, Mooncake Store and LMCache, in one run?

    python bench/peers/compare.py [--daemon] [--json | --markdown] [--rounds N]
        [--peers NAME,...] [--venv-mooncake DIR] [--venv-lmcache DIR] [--install DIR]

With --daemon each store's blocks live in a server process and this measures what a client process
gets of them; without it, stores are in the process that uses them where they can be.

Each store runs in a process of its own (see runner.py) and they take turns, a round each, so that a
machine whose speed drifts treats all alike. Same sizes, same bytes, compared after every round. A
figure `peer.operation` has the peer's value; its ratio says how many times as fast ours is. What is
not installed is listed as absent. Redis needs `redis-server` and the `bench` extra; the two that
bring much of their own live in their own environments, which --install makes below DIR (LMCache
takes 2 GB).

Every peer gets a network of its own that has only loopback, where the kernel allows it. At the end
nothing that was started is left: this process adopts what its runners leave behind, and ends it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.bench.report import Figure, Report

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "mooncake": ["numpy", "mooncake-transfer-engine-non-cuda"],
    "lmcache": ["numpy", "torch==2.13.0", "lmcache"],
}
KIB, MIB = 1 << 10, 1 << 20
ANSWER_SECONDS = 120.0
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Comparison:
    """Who is compared, and in what. The first of `peers` that is ours is the one ratios are of."""

    ours: str
    peers: tuple[str, ...]
    # (size, blocks a call) -> operation of the runner -> name of the figure
    workloads: Mapping[tuple[int, int], Mapping[str, str]]
    # Peers that are compared with another way of ours: what goes through TCP, with TCP.
    against: Mapping[str, str] = field(default_factory=dict)


_PUT_AND_GET = {
    (64 * KIB, 1): {"put": "put_64KiB", "get": "get_64KiB"},
    (MIB, 1): {"put": "put_1MiB", "get": "get_1MiB"},
    (MIB, 16): {"put": "batch_put_16x1MiB", "get": "batch_get_16x1MiB"},
}
EMBEDDED = Comparison(
    "kvstore", ("memcpy", "kvstore", "redis", "lmdb", "mooncake", "lmcache"), _PUT_AND_GET
)
DAEMONS = Comparison(
    "kvstore_unix",
    (
        *("memcpy", "kvstore_unix", "kvstore_tcp", "redis"),
        *("mooncake_shm", "mooncake_tcp", "lmcache_mp", "lmcache_tcp"),
    ),
    _PUT_AND_GET
    | {
        (64 * KIB, 16): {
            "put": "batch_put_16x64KiB",
            "get": "batch_get_16x64KiB",
            "lookup": "lookup_16",
        }
    },
    {"mooncake_tcp": "kvstore_tcp", "lmcache_tcp": "kvstore_tcp"},
)


class PeerError(Exception):
    """The peer failed, or gave wrong bytes, or did not answer in time."""


@dataclass
class Runner:
    """A peer's process. `medians[operation]` has the median seconds of a call for each round."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    version: str = ""
    absent: str = ""
    medians: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, python: Path, work: Path) -> Runner:
        work.mkdir()
        log = work / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [
                    *(str(python), str(Path(__file__).with_name("private_network.py"))),
                    *(str(python), "-m", "bench.peers.runner", name, str(work)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": _python_path()},
            )
        runner = cls(name, process, log)
        try:
            hello = runner._read()
        except PeerError as error:
            runner.stop()
            runner.absent = str(error)
            return runner
        runner.version, runner.absent = hello.get("version", ""), hello.get("absent", "")
        return runner

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        alarm = threading.Timer(ANSWER_SECONDS, self.process.kill)
        alarm.start()
        try:
            line = self.process.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise PeerError(f"{self.name} ended: {' '.join(last) or 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def round(self, size: int, batch: int, operations: Mapping[str, str]) -> None:
        assert self.process.stdin is not None
        request = {"size": size, "batch": batch, "operations": list(operations)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        for operation, figure in operations.items():
            self.medians.setdefault(figure, []).append(float(np.median(answer[operation])))

    def stop(self) -> None:
        """End the process; its servers end with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # LMCache's client leaves the tensors that it shared behind.
        for shared in Path("/dev/shm").glob(f"lmcache_kv_{self.process.pid}_*"):
            shared.unlink()


def _python_path() -> str:
    """Our checkout first: also peers' runners are started with it, but import only their own."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))


def install(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        target = directory / name
        venv.create(target, with_pip=True)
        command = [str(target / "bin" / "python"), "-m", "pip", "install", "-q", *PACKAGES[name]]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
            print(f"compare: could not install {name}", file=sys.stderr)


def environment_of(name: str) -> str | None:
    """The key in PACKAGES of a peer that lives in an environment of its own."""
    return next((package for package in PACKAGES if name.startswith(package)), None)


def compare(
    kind: Comparison, names: Sequence[str], pythons: dict[str, Path], rounds: int
) -> list[Figure]:
    """Run all; the figures of a peer that fails say so, and the others go on.

    Raises:
        PeerError: ours failed.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="kvstore-peers-", dir=memory if memory.is_dir() else None
    ) as work:
        runners: list[Runner] = []
        try:
            for name in names:
                if name in pythons:
                    runners.append(Runner.start(name, pythons[name], Path(work) / name))
            for runner in runners:
                if runner.name == kind.ours and runner.absent:
                    raise PeerError(f"{runner.name}: {runner.absent}")
            for number in range(rounds):
                for size, batch in kind.workloads:
                    _one_turn(kind, runners[:: 1 if number % 2 == 0 else -1], size, batch)
        finally:
            for runner in runners:
                runner.stop()
            end_descendants()
    by_name = {runner.name: runner for runner in runners}
    figures = []
    for runner in runners:
        mine = by_name.get(kind.against.get(runner.name, kind.ours))
        if mine is None or mine.absent:
            mine = by_name[kind.ours]
        figures += _figures(kind, runner, mine)
    missing = [name for name in names if name not in pythons]
    return figures + [Figure.absent(name, "no environment given") for name in missing]


def adopt_descendants() -> None:
    """What outlives its parent below us becomes our child, so that we can end it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kill and reap all children, and theirs as they become ours."""
    give_up = time.monotonic() + 10.0
    while time.monotonic() < give_up:
        tasks = Path("/proc/self/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
        if not children:
            return
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    raise PeerError("processes of peers are left")


def _one_turn(kind: Comparison, runners: Sequence[Runner], size: int, batch: int) -> None:
    for runner in runners:
        if runner.absent:
            continue
        try:
            runner.round(size, batch, _operations(kind, runner, size, batch))
        except (PeerError, OSError) as error:
            if runner.name == kind.ours:
                raise
            runner.absent = str(error)


def _operations(kind: Comparison, runner: Runner, size: int, batch: int) -> dict[str, str]:
    names = kind.workloads[size, batch]
    return {
        operation: figure
        for operation, figure in names.items()
        if (operation, runner.name) != ("lookup", "memcpy")
    }


def _figures(kind: Comparison, runner: Runner, mine: Runner) -> list[Figure]:
    if runner.absent:
        return [Figure.absent(runner.name, runner.absent)]
    figures = []
    for size, batch in kind.workloads:
        for operation, figure in _operations(kind, runner, size, batch).items():
            theirs, ours = np.array(runner.medians[figure]), np.array(mine.medians[figure])
            seconds = float(np.median(theirs))
            in_time = operation == "lookup" or size * batch < MIB
            value, unit = (
                (seconds * 1e6, "us") if in_time else (size * batch / seconds / 1e9, "GB/s")
            )
            name = f"{runner.name}.{figure}"
            if runner is mine:
                figures.append(Figure(name, value, unit))
            else:
                ratio = float(np.median(theirs / ours))
                figures.append(Figure(name, value, unit, ratio, f"{mine.name}; {runner.version}"))
    return figures


def _pythons(names: Sequence[str], options: argparse.Namespace) -> dict[str, Path]:
    """The interpreter of each peer that has one; installs environments when told to.

    Raises:
        FileNotFoundError: a directory that was given is no virtual environment.
    """
    wanted = {environment_of(name) for name in names}
    if options.install is not None:
        install(options.install, [name for name in PACKAGES if name in wanted])
    pythons = {name: Path(sys.executable) for name in names if environment_of(name) is None}
    for package in PACKAGES:
        directory = getattr(options, f"venv_{package}")
        if directory is None and options.install is not None:
            directory = options.install / package
        if directory is None:
            continue
        python = directory / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(f"--venv-{package}: {directory} is no virtual environment")
        pythons |= {name: python for name in names if environment_of(name) == package}
    return pythons


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--daemon", action="store_true", help="servers, each seen from a client")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", metavar="NAME,...", help="only these beside ours")
    for name in PACKAGES:
        parser.add_argument(
            f"--venv-{name}", type=Path, metavar="DIR", help="where it is installed"
        )
    parser.add_argument("--install", type=Path, metavar="DIR", help="make those environments here")
    options = parser.parse_args()
    kind = DAEMONS if options.daemon else EMBEDDED
    chosen = options.peers.split(",") if options.peers else kind.peers
    names = list(dict.fromkeys([kind.ours, *chosen]))
    unknown = sorted(set(names) - set(kind.peers))
    if unknown:
        parser.error(f"--peers: {unknown[0]} is not one of {', '.join(kind.peers)}")
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        pythons = _pythons(names, options)
    except FileNotFoundError as error:
        parser.error(str(error))
    adopt_descendants()
    try:
        figures = compare(kind, names, pythons, options.rounds)
    except PeerError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    Report(figures).show(as_json=options.json, as_markdown=options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())

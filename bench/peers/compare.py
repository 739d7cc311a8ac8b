"""How fast is our store beside memcpy, Redis, LMDB, Mooncake Store and LMCache, in one run?

    python bench/peers/compare.py [--json | --markdown] [--rounds N]
        [--peers NAME,...] [--venv-mooncake DIR] [--venv-lmcache DIR] [--install DIR]

Each store runs in a process of its own (see runner.py) and they take turns, a round each, so that a
machine whose speed drifts treats all alike. Same sizes, same bytes, compared after every round. A
figure `peer.operation` has the peer's value; its ratio says how many times as fast ours is. What is
not installed is listed as absent. Redis needs `redis-server` and the `bench` extra; the two that
bring much of their own live in their own environments, which --install makes below DIR (LMCache
takes 2 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.bench.report import Figure, Report

ROOT = Path(__file__).resolve().parents[2]
OURS = "kvstore"
IN_THIS_PYTHON = ("memcpy", OURS, "redis", "lmdb")
PACKAGES = {
    "mooncake": ["numpy", "mooncake-transfer-engine-non-cuda"],
    "lmcache": ["numpy", "torch==2.13.0", "lmcache"],
}
KIB, MIB = 1 << 10, 1 << 20
# (size, blocks a call) -> names of put and get
WORKLOADS = {
    (64 * KIB, 1): ("put_64KiB", "get_64KiB"),
    (MIB, 1): ("put_1MiB", "get_1MiB"),
    (MIB, 16): ("batch_put_16x1MiB", "batch_get_16x1MiB"),
}
ANSWER_SECONDS = 120.0


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
                [str(python), str(Path(__file__).with_name("runner.py")), name, str(work)],
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

    def round(self, size: int, batch: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"size": size, "batch": batch}) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        for operation, kind in zip(WORKLOADS[size, batch], ("put", "get"), strict=True):
            self.medians.setdefault(operation, []).append(float(np.median(answer[kind])))

    def stop(self) -> None:
        """End the process; its servers end with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


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


def compare(names: Sequence[str], pythons: dict[str, Path], rounds: int) -> list[Figure]:
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
            for number in range(rounds):
                for size, batch in WORKLOADS:
                    _one_turn(runners[:: 1 if number % 2 == 0 else -1], size, batch)
        finally:
            for runner in runners:
                runner.stop()
    ours = next(runner for runner in runners if runner.name == OURS)
    figures = [figure for runner in runners for figure in _figures(runner, ours)]
    missing = [name for name in names if name not in pythons]
    return figures + [Figure.absent(name, "no environment given") for name in missing]


def _one_turn(runners: Sequence[Runner], size: int, batch: int) -> None:
    for runner in runners:
        if runner.absent:
            continue
        try:
            runner.round(size, batch)
        except (PeerError, OSError) as error:
            if runner.name == OURS:
                raise
            runner.absent = str(error)


def _figures(runner: Runner, ours: Runner) -> list[Figure]:
    if runner.absent:
        return [Figure.absent(runner.name, runner.absent)]
    figures = []
    for (size, batch), operations in WORKLOADS.items():
        for operation in operations:
            theirs, mine = np.array(runner.medians[operation]), np.array(ours.medians[operation])
            seconds = float(np.median(theirs))
            per_call = size * batch
            value, unit = (
                (seconds * 1e6, "us") if size < MIB else (per_call / seconds / 1e9, "GB/s")
            )
            name = f"{runner.name}.{operation}"
            if runner is ours:
                figures.append(Figure(name, value, unit))
            else:
                ratio = float(np.median(theirs / mine))
                figures.append(Figure(name, value, unit, ratio, f"{OURS}; {runner.version}"))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default=",".join((*IN_THIS_PYTHON, *PACKAGES)))
    for name in PACKAGES:
        parser.add_argument(
            f"--venv-{name}", type=Path, metavar="DIR", help="where it is installed"
        )
    parser.add_argument("--install", type=Path, metavar="DIR", help="make those environments here")
    options = parser.parse_args()
    names = list(dict.fromkeys([OURS, *options.peers.split(",")]))
    unknown = set(names) - {*IN_THIS_PYTHON, *PACKAGES}
    if unknown or options.rounds < 1:
        parser.error(f"no such peer: {unknown.pop()}" if unknown else "--rounds: at least 1")
    if options.install is not None:
        install(options.install, [name for name in PACKAGES if name in names])
    pythons = {name: Path(sys.executable) for name in IN_THIS_PYTHON}
    for name in PACKAGES:
        directory = getattr(options, f"venv_{name}")
        if directory is None and options.install is not None:
            directory = options.install / name
        if directory is not None:
            if not (directory / "bin" / "python").exists():
                parser.error(f"--venv-{name}: {directory} is no virtual environment")
            pythons[name] = directory / "bin" / "python"
    figures = compare(names, pythons, options.rounds)
    Report(figures).show(as_json=options.json, as_markdown=options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The processes of a chaos run, and what may befall them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvstore
from tests.chaos.random_client import NAMESPACE
from tests.faults.faultfs import FaultyDisk, Rule

READY_S = 60.0
END_S = 90.0
NUM_CLIENTS = 6
_ARENA_LINK = "/memfd:kvstore-arena"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, seconds: float = END_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {seconds} s: {what}"
        time.sleep(0.05)


def processes_that_name(text: str) -> list[int]:
    """Return the processes, other than this one, whose command line has `text` in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def arenas_of(pid: int) -> set[int]:
    """Return the inodes of the arenas that a process has open or mapped."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(fd).startswith(_ARENA_LINK):
                    found.add(fd.stat().st_ino)
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if _ARENA_LINK in line:
                found.add(int(line.split()[4]))
    return found


class Daemon:
    """`kvstore serve`, killed and started again with the same settings."""

    def __init__(self, directory: Path, sockets: Path, ssd: Path) -> None:
        self.address = f"unix:{sockets}/s"
        self.tcp = f"tcp:127.0.0.1:{free_port()}"
        self.state = sockets
        self.token_file = directory / "token"
        self.token_file.touch(0o600)
        self.token_file.write_text(secrets.token_hex(32))
        self.log = directory / "daemon.log"
        self._command = [
            *(sys.executable, "-m", "kvstore", "serve", "--http", "", "--state", str(sockets)),
            *("--listen", self.address, "--tcp", self.tcp.removeprefix("tcp:")),
            *("--token-file", str(self.token_file), "--hold-seconds", "120"),
            *("--cpu", "4MiB", "--chunk", "1MiB", "--ssd", str(ssd), "--ssd-capacity", "48MiB"),
            *("--ssd-segment", "2MiB", "--log-level", "warning", "--scrub", "64MiB"),
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.arenas: set[int] = set()

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_ready(self) -> None:
        wait_until(self._answers, "the daemon serves", READY_S)
        assert self.process is not None
        self.arenas |= arenas_of(self.process.pid)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended: {self.log.read_text()[-3000:]}"
        with contextlib.suppress(kvstore.KVStoreError):
            kvstore.connect(self.address, NAMESPACE).close()
            return True
        return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        if self.process is not None:
            self.arenas |= arenas_of(self.process.pid)
            self.process.kill()
            self.process.wait()

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvstore", *command, "--connect", self.address],
            capture_output=True,
            text=True,
            timeout=READY_S,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        answer = self.ask("status", "--json")
        assert answer.returncode == 0, answer.stderr
        status: dict[str, Any] = json.loads(answer.stdout)
        return status

    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@dataclass
class Client:
    """One random_client process and what is known of its stops."""

    address: str
    seed: int
    token_file: Path
    log: Path
    stops: list[tuple[float, float]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    reader: threading.Thread | None = None

    def start(self, said: queue.Queue[tuple[Client, dict[str, Any]]]) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.chaos.random_client"),
                    *(self.address, str(self.seed), str(self.token_file)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.reader = threading.Thread(target=self._read, args=(said,), daemon=True)
        self.reader.start()

    def _read(self, said: queue.Queue[tuple[Client, dict[str, Any]]]) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
                    said.put((self, json.loads(line)))

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.reader is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.reader.join(END_S)

    def was_stopped_in(self, begin: float, end: float) -> bool:
        return any(a < end and b > begin for a, b in self.stops)


class Chaos:
    """Starts everything, lets random things happen, and gathers what clients say."""

    def __init__(self, seed: int, directory: Path, sockets: Path, disk: FaultyDisk) -> None:
        self.random = random.Random(seed)
        self._directory = directory
        self._disk = disk
        self.daemon = Daemon(directory, sockets, disk.path / "ssd")
        self._said: queue.Queue[tuple[Client, dict[str, Any]]] = queue.Queue()
        self.clients: list[Client] = []
        self.wrong: list[str] = []
        self.slow: list[str] = []
        self.done: dict[int, int] = {}  # seed -> calls
        self.num_calls = 0
        self.events: list[str] = []
        self._next_seed = seed * 1000

    def start(self) -> None:
        self.daemon.start()
        self.daemon.wait_ready()
        for _ in range(NUM_CLIENTS):
            self._start_client()

    def _start_client(self) -> None:
        self._next_seed += 1
        # One client in three copies through TCP, the others map the arena.
        address = self.daemon.tcp if self._next_seed % 3 == 0 else self.daemon.address
        log = self._directory / "clients.log"
        client = Client(address, self._next_seed, self.daemon.token_file, log)
        client.start(self._said)
        self.clients.append(client)

    def run(self, seconds: float) -> None:
        acts: list[tuple[Callable[[], None], int]] = [
            (self.kill_client, 6),
            (self.stop_client, 6),
            (self.kill_daemon, 4),
            (self.stop_daemon, 4),
            (self.restart_daemon, 2),
            (self.kill_holder, 1),
            (self.disk_full, 3),
            (self.disk_error, 3),
            (self.leave_alone, 6),
        ]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            act = self.random.choices([a for a, _ in acts], [w for _, w in acts])[0]
            self.events.append(f"{seconds - (deadline - time.monotonic()):.1f} s: {act.__name__}")
            act()
            self.listen()

    def _pause(self, longest: float) -> None:
        time.sleep(self.random.random() * longest)

    def leave_alone(self) -> None:
        self._pause(2.0)

    def kill_client(self) -> None:
        self.clients.pop(self.random.randrange(len(self.clients))).kill()
        self._start_client()
        self._pause(0.5)

    def stop_client(self) -> None:
        client = self.random.choice(self.clients)
        assert client.process is not None
        begin = time.monotonic()
        client.process.send_signal(signal.SIGSTOP)
        if self.random.random() < 0.4:
            self.kill_daemon()  # a writer that is stopped in the middle of a slot
        self._pause(3.0)
        client.process.send_signal(signal.SIGCONT)
        client.stops.append((begin, time.monotonic() + 0.5))

    def kill_daemon(self) -> None:
        self.daemon.kill()
        self._pause(1.5)
        self.daemon.start()
        self.daemon.wait_ready()

    def stop_daemon(self) -> None:
        os.kill(self.daemon.pid, signal.SIGSTOP)
        if self.random.random() < 0.3:
            self.kill_client()
        self._pause(4.0)
        os.kill(self.daemon.pid, signal.SIGCONT)

    def restart_daemon(self) -> None:
        answer = self.daemon.ask("restart")
        if answer.returncode:
            self.wrong.append(f"kvstore restart: {answer.stderr}")
        self.daemon.wait_ready()

    def kill_holder(self) -> None:
        for pid in processes_that_name(str(self.daemon.state)):
            if "holder" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        self._pause(1.0)

    def disk_full(self) -> None:
        self._disk.set(
            Rule("write", "*.seg*", value=errno.ENOSPC), Rule("fallocate", value=errno.ENOSPC)
        )
        self._pause(3.0)
        self._disk.heal()

    def disk_error(self) -> None:
        op = self.random.choice(["read", "write", "fsync"])
        do = self.random.choice(["errno", "flip"]) if op == "read" else "errno"
        self._disk.set(Rule(op, "*.seg*", do=do))
        self._pause(3.0)
        self._disk.heal()

    # --- what clients say

    def listen(self) -> None:
        while True:
            try:
                client, message = self._said.get_nowait()
            except queue.Empty:
                return
            if "wrong" in message:
                self.wrong.append(f"client {client.seed} at {client.address}: {message}")
            elif "slow" in message:
                if not client.was_stopped_in(message["begin"], message["end"]):
                    took = message["end"] - message["begin"]
                    self.slow.append(f"client {client.seed}: {message['slow']} took {took:.1f} s")
            elif "done" in message:
                self.done[client.seed] = message["done"]
                self.num_calls += message["done"]

    def end_clients(self) -> None:
        for client in self.clients:
            assert client.process is not None
            assert client.process.stdin is not None
            client.process.stdin.close()
        for client in self.clients:
            assert client.process is not None
            assert client.reader is not None
            assert client.process.wait(END_S) == 0, (self._directory / "clients.log").read_text()
            client.reader.join(END_S)
        self.listen()

    def kill_all(self) -> None:
        """Whatever happened, nothing of this run stays behind."""
        for client in self.clients:
            client.kill()
        self.daemon.kill()
        for pid in processes_that_name(str(self.daemon.state)):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

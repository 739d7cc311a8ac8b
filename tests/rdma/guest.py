"""A guest: qemu that emulates its processor, a kernel with soft-RoCE, and the host's files.

The host's root is the guest's, over 9p and read-only, beneath a tmpfs: the interpreter, the
environment and the checkout of whoever runs pytest are there under their own paths, and nothing
that the guest writes reaches the host. Needs neither root nor /dev/kvm. It is slow; what runs in it
is checked for what it does, never for how long.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.rdma.kernel import Kernel

ROOT = Path(__file__).parents[2]
BOOT_SECONDS = 600.0  # ten to twenty where nobody else uses the processors
_SLACK_SECONDS = 60.0  # over a command's own limit: a loaded host, a guest that swaps
_PORT = "kvstore.agent"


class GuestError(Exception):
    """The guest is gone or does not answer; the message has the end of its console."""


@dataclass(frozen=True)
class Finished:
    """A command that ran in the guest. `status` is 124 where its time was up."""

    status: int
    output: str
    seconds: float


class Guest:
    """One machine; one command at a time. `name` is also that of its files in `directory`."""

    def __init__(
        self,
        kernel: Kernel,
        directory: Path,
        name: str = "guest",
        *,
        number: int = 0,
        wire: Path | None = None,
        memory_mib: int = 2048,
    ) -> None:
        """Args:
        number: 0 listens for another guest at `wire`, 1 connects to it.
        """
        self.console = directory / f"{name}.console"
        # A socket's path is short, pytest's directories are not.
        self._sockets = Path(tempfile.mkdtemp(prefix="kvguest-"))
        agent = self._sockets / "agent"
        script = str(Path(__file__).with_name("agent.py"))
        words = [sys.executable, "-IS", script, _PORT]
        self._output = self.console.open("wb", buffering=0)
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
                *("-m", str(memory_mib), "-nographic", "-no-reboot", "-nodefaults"),
                *("-serial", "stdio", "-monitor", "none"),
                *("-kernel", str(kernel.image), "-initrd", str(kernel.initramfs)),
                *("-append", f"console=ttyS0 quiet panic=-1 {_PORT}={_hexadecimal(words)}"),
                *(
                    "-virtfs",
                    "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
                ),
                *("-device", "virtio-serial-pci"),
                *("-chardev", f"socket,id=agent,path={agent},server=on,wait=off"),
                *("-device", f"virtserialport,chardev=agent,name={_PORT}"),
                *_network(number, wire),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self._received = b""
        started = time.monotonic()
        try:
            self._socket = self._connect(agent, started + 30)
            self._receive(started + BOOT_SECONDS)
        except BaseException:
            self._process.kill()
            self.close()
            raise
        self.boot_seconds = time.monotonic() - started

    def run(
        self, *argv: str | Path, timeout: float = 60.0, env: Mapping[str, str] | None = None
    ) -> Finished:
        """Run a command from the root of the checkout; what it started is dead when it returns.

        Raises:
            GuestError: no answer.
        """
        request = {
            "argv": [str(word) for word in argv],
            "cwd": str(ROOT),
            "env": {"PYTHONPATH": f"{ROOT}:{ROOT}/adapters", **(env or {})},
            "timeout": timeout,
        }
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._lost(str(error)) from error
        return Finished(**json.loads(self._receive(time.monotonic() + timeout + _SLACK_SECONDS)))

    def python(
        self,
        module: str,
        *arguments: str,
        timeout: float = 120.0,
        env: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run a module by the interpreter that runs us."""
        return self.run(sys.executable, "-m", module, *arguments, timeout=timeout, env=env)

    def close(self) -> None:
        """Pull the plug. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._output.close()
        if hasattr(self, "_socket"):
            self._socket.close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _connect(self, path: Path, deadline: float) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
                return connection
            except OSError as error:
                connection.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise self._lost(str(error)) from error
                time.sleep(0.05)

    def _receive(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                some = self._socket.recv(1 << 16)
            except OSError as error:
                raise self._lost(str(error)) from error
            if not some:
                raise self._lost("it ended")
            self._received += some
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _lost(self, why: str) -> GuestError:
        said = self.console.read_bytes()[-4000:].decode(errors="replace")
        return GuestError(f"{why}; its console ends with\n{said}")


def _network(number: int, wire: Path | None) -> Sequence[str]:
    if wire is None:
        return ()
    role = f"addr.type=unix,addr.path={wire},server={'off' if number else 'on'}"
    return (
        *("-netdev", f"stream,id=wire,{role}"),
        *("-device", f"virtio-net-pci,netdev=wire,mac=52:54:00:00:00:{number + 1:02x},romfile="),
    )


def _hexadecimal(words: Sequence[str]) -> str:
    """A command line as one word without spaces or quotes, of letters that a kernel passes on."""
    return ",".join(word.encode().hex() for word in words)

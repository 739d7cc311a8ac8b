"""Runs in the guest: takes commands from a virtio port as lines of JSON, and answers each.

Standard library only, and started first, so that a guest is of use as soon as it has a root.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

OUTPUT_BYTES_MAX = 1 << 20


def open_port(name: str) -> IO[bytes]:
    for port in Path("/sys/class/virtio-ports").iterdir():
        if (port / "name").read_text().strip() == name:
            return open(Path("/dev") / port.name, "r+b", buffering=0)
    raise SystemExit(f"no virtio port {name}")


def run(request: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                request["argv"],
                cwd=request["cwd"],
                env={**os.environ, **request["env"]},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return {"status": 127, "output": str(error), "seconds": 0.0}
        try:
            status = process.wait(request["timeout"])
        except subprocess.TimeoutExpired:
            status = 124
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too
        process.wait()
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - OUTPUT_BYTES_MAX))
        said = output.read().decode(errors="replace")
    return {"status": status, "output": said, "seconds": time.monotonic() - started}


def main() -> None:
    # Memory that a device reads and writes is locked.
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    with open_port(sys.argv[1]) as port:
        port.write(b'{"ready": true}\n')
        waiting = b""
        while True:
            some = port.read(65536)
            if not some:
                time.sleep(0.1)  # the host is not there at present: a read does not wait then
                continue
            waiting += some
            *lines, waiting = waiting.split(b"\n")
            for line in lines:
                reply = json.dumps(run(json.loads(line))).encode() + b"\n"
                while reply:
                    reply = reply[port.write(reply) or 0 :]


if __name__ == "__main__":
    main()

"""Which processes live. A pid alone does not say: numbers are given again; with the time at which
the process started it does."""

from __future__ import annotations

from pathlib import Path

_START_FIELD = 22  # of /proc/PID/stat, see proc(5)
_STATE_FIELD = 3


def process_start(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 when there is no such process
    that we can see, or it has ended and only waits to be reaped."""
    if pid <= 0:
        return 0
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    # The second field is a name in brackets, which may hold anything.
    fields = stat.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return 0
    return int(fields[_START_FIELD - _STATE_FIELD])


def is_alive(pid: int, start: int) -> bool:
    """Whether the process of that number that started then still lives."""
    return start != 0 and process_start(pid) == start

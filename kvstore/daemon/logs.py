"""Logs of the daemon: structured lines on stderr, as text or JSON, and the last warnings kept for
`status`.

The library logs through the standard `logging` and sets nothing up; this module does, for a process
that is a daemon.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

KEPT = 50
HELD_MAX = 1000


class RecentErrors(logging.Handler):
    """The last warnings and errors. Thread-safe: a Handler has a lock, a deque is bounded."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                message += f": {record.exc_info[1]}"
        except (TypeError, ValueError):  # arguments that do not fit the text
            message = str(record.msg)
        self._kept.append(
            {"time": record.created, "level": record.levelname.lower(), "message": message[:500]}
        )

    def list(self) -> list[dict[str, Any]]:
        return list(self._kept)


class _Held(logging.Handler):
    """Keeps records, the oldest ones; thread-safe as a Handler is."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.kept) < HELD_MAX:
            self.kept.append(record)


@contextlib.contextmanager
def set_up_after(level: str, form: str) -> Iterator[None]:
    """Send log lines of this process to stderr from the end of the block on, and then those of the
    block too: what formats them takes longer to load than all else that a start needs. Used once,
    by the command."""
    root = logging.getLogger()
    held = _Held()
    root.handlers[:] = [held]
    root.setLevel(level.upper())
    try:
        yield
    finally:
        handler = _stderr(form)
        root.handlers[:] = [handler if each is held else each for each in root.handlers]
        for record in held.kept:
            handler.handle(record)


def _stderr(form: str) -> logging.Handler:
    import structlog

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any]
    if form == "json":
        last = [
            structlog.processors.dict_tracebacks,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ]
    else:
        last = [
            structlog.dev.ConsoleRenderer(
                colors=False, pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            )
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    return handler

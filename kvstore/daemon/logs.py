"""Logs of the daemon: structured lines on stderr, as text or JSON, and the last warnings kept for
`status`.

The library logs through the standard `logging` and sets nothing up; this module does, for a process
that is a daemon.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from typing import Any

KEPT = 50


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


def set_up(level: str, form: str) -> None:
    """Send log lines of this process to stderr. Called once, by the command."""
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
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())

"""`kvstore top`: a daemon's status, live. It goes on through a restart of the daemon."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from kvstore.admin import Admin
from kvstore.errors import ConfigError, KVStoreError
from kvstore.ops import views
from kvstore.ops.common import (
    PROBLEM,
    ConfigOption,
    ConnectOption,
    Target,
    TimeoutOption,
    TokenOption,
    console,
    error_json,
    failures,
    print_json,
    target,
)


class Watcher:
    """Asks again and again over one connection, made anew after a failure."""

    def __init__(self, where: Target) -> None:
        self._where = where
        self._admin: Admin | None = None

    def look(self) -> Mapping[str, Any]:
        """Raises KVStoreError: the daemon does not answer; the next look tries again."""
        try:
            if self._admin is None:
                self._admin = self._where.open()
            return self._admin.status()
        except KVStoreError:
            self.close()
            raise

    def close(self) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None


def top(
    connect: ConnectOption = None,
    config: ConfigOption = None,
    token_file: TokenOption = None,
    timeout: TimeoutOption = 2.0,
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", min=0.1, help="From one look to the next."),
    ] = 1.0,
    count: Annotated[
        int, typer.Option("--count", metavar="N", min=0, help="End after so many looks; 0: never.")
    ] = 0,
    once: Annotated[bool, typer.Option("--once", help="The same as --count 1.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Watch a daemon: rates, tiers, hit ratio, busiest clients, tenants, prefixes, errors.

    Ends with q or Ctrl-C. A daemon that goes away is waited for; exit status 1 when it did not
    answer at the last look.

    Example: kvstore top --json --count 10 --interval 2
    """
    count = 1 if once else count
    with failures(as_json):
        watcher = Watcher(target(connect, config, token_file, timeout))
        try:
            seen = (_print_lines if as_json or count == 1 else _live)(
                watcher, interval, count, as_json
            )
        finally:
            watcher.close()
    if not seen:
        raise typer.Exit(PROBLEM)


def _print_lines(watcher: Watcher, interval: float, count: int, as_json: bool) -> bool:
    """Without a live screen; whether the last look saw a daemon."""
    looks, seen = 0, True
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                found = watcher.look()
                seen = True
                _print_one(found, as_json)
            except ConfigError:
                raise
            except KVStoreError as error:
                if not as_json:
                    raise
                seen = False
                print_json(error_json(error), one_line=True)
            looks += 1
            if looks == count:
                break
            time.sleep(interval)
    return seen


def _print_one(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"time": time.time(), **found}, one_line=True)
    else:
        console().print(Group(*views.sections(found, short=True)))


def _live(watcher: Watcher, interval: float, count: int, _: bool) -> bool:
    looks, seen = 0, True
    out = console()
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as pressed_q,
        Live(console=out, screen=out.is_terminal, auto_refresh=False) as live,
    ):
        while True:
            try:
                screen = Group(*views.sections(watcher.look(), short=True), _HINT)
                seen = True
            except ConfigError:
                raise
            except KVStoreError as error:
                screen = Group(Text(str(error), style="red"), Text("trying again ..."), _HINT)
                seen = False
            live.update(screen, refresh=True)
            looks += 1
            if looks == count or pressed_q(interval):
                break
    return seen


_HINT = Text("q ends", style="dim")


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds and says whether q was pressed meanwhile."""

    def only_wait(seconds: float) -> bool:
        time.sleep(seconds)
        return False

    if not sys.stdin.isatty():
        yield only_wait
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed_q(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0]:
                key = os.read(fd, 1)
                if key in (b"q", b"Q", b""):
                    return True
        return False

    try:
        tty.setcbreak(fd)
        yield pressed_q
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)

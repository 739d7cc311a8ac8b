"""`kvstore doctor`: is this machine fit for a daemon with these settings?"""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kvstore.config import load_daemon_config
from kvstore.errors import ConfigError
from kvstore.ops.checks import CHECKS, Context, Verdict
from kvstore.ops.common import (
    PROBLEM,
    ConfigOption,
    ConnectOption,
    JsonOption,
    TimeoutOption,
    console,
    print_json,
)
from kvstore.ops.probes import Probes
from kvstore.ops.transport_checks import TRANSPORT_CHECKS
from kvstore.ops.views import plain

_STYLE = {"ok": "green", "warn": "yellow", "fail": "red"}


def examine(probes: Probes, context: Context) -> dict[str, Verdict]:
    """Return a verdict for every check, by name."""
    return {name: run(probes, context) for name, run in (*CHECKS, *TRANSPORT_CHECKS)}


def installed_version() -> str:
    """Of the installed package; empty for a source tree."""
    try:
        return metadata.version("kvstore-llm")
    except metadata.PackageNotFoundError:
        return ""


def doctor(
    config: ConfigOption = None,
    ssd: Annotated[
        Path | None,
        typer.Option("--ssd", metavar="DIR", help="Directory of the ssd tier; default: `ssd`."),
    ] = None,
    connect: ConnectOption = None,
    peer: Annotated[
        str,
        typer.Option(
            "--peer", metavar="ADDRESS", help="A daemon to be reached as a peer: tcp:HOST:PORT."
        ),
    ] = "",
    timeout: TimeoutOption = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: kernel, I/O, memory, limits, CPU, permissions, transports, settings.

    Each line says what was found and, where it could be better, what to do. Changes nothing. Exit
    status 1 when something would keep a daemon from working; warnings alone give 0.

    Example: kvstore doctor --config /etc/kvstore.toml
    """
    try:
        settings = load_daemon_config(config, ssd=str(ssd) if ssd else None)[0]
        address = connect or settings.listen
        context = Context(settings, "", installed_version(), address, timeout, peer)
    except ConfigError as error:
        context = Context(None, str(error), installed_version(), connect or "", timeout, peer)
    verdicts = examine(Probes(), context)
    worst = {verdict.level for verdict in verdicts.values()}
    if as_json:
        rows = [{"name": name, **dataclasses.asdict(v)} for name, v in verdicts.items()]
        print_json({"ok": "fail" not in worst, "checks": rows})
    else:
        console().print(_table(verdicts))
    if "fail" in worst:
        raise typer.Exit(PROBLEM)


def _table(verdicts: dict[str, Verdict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("", "check", "found"):
        table.add_column(column)
    for name, verdict in verdicts.items():
        found = plain(verdict.found)
        if verdict.advice:
            found = found + Text("\n-> ") + plain(verdict.advice)
        table.add_row(Text(verdict.level, style=_STYLE[verdict.level]), name, found)
    return table

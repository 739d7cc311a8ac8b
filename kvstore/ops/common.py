"""What the operator's commands share: options, how they reach a daemon, how they print and fail.

With `--json` a command prints one object and nothing else on stdout, an error too:
`{"error": {"kind": ..., "message": ...}}`. Exit status: 0 fine, 1 a problem was found or the daemon
is not there, 2 a wrong setting or usage.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.admin import Admin
from kvstore.auth import read_secret
from kvstore.config import DaemonConfig, load_daemon_config
from kvstore.errors import ConfigError, KVStoreError

if TYPE_CHECKING:
    from rich.console import Console

FINE, PROBLEM, WRONG = 0, 1, 2

ConnectOption = Annotated[
    str | None,
    typer.Option(
        "--connect",
        metavar="ADDRESS",
        help="unix:/path or tcp:host:port of the daemon; default: the setting `listen`.",
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with the settings.")
]
TokenOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="Secret for a daemon over TCP; default: the setting `token_file`.",
    ),
]
TimeoutOption = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", min=0.01, help="How long to wait for an answer."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class Target:
    """Which daemon is asked."""

    address: str
    token_file: str
    timeout: float

    def open(self) -> Admin:
        """Connect. Raises what Admin does."""
        wants_secret = self.address.startswith("tcp:") and self.token_file
        secret = read_secret(self.token_file) if wants_secret else None
        return Admin(self.address, self.timeout, secret)


def target(
    connect: str | None, config: Path | None, token_file: Path | None, timeout: float
) -> Target:
    """Raises ConfigError: the settings or the address are wrong."""
    settings: DaemonConfig = load_daemon_config(config)[0]
    address = connect or settings.listen
    if not address.startswith(("unix:", "tcp:")):
        raise ConfigError(f"connect: {address!r} is not unix:/path or tcp:host:port")
    return Target(address, str(token_file or settings.token_file), timeout)


def print_json(value: object, *, one_line: bool = False) -> None:
    """Whole and unwrapped, whatever the terminal's width."""
    text = json.dumps(value, indent=None if one_line else 2, default=str)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def console() -> Console:
    """For tables. Not wrapped at 80 columns where nobody looks on."""
    from rich.console import Console  # slow to load, and most commands print no table

    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=120)


@contextlib.contextmanager
def failures(as_json: bool) -> Iterator[None]:
    """Ends the command for an error of ours: told on stderr, with `as_json` on stdout as well."""
    try:
        yield
    except KVStoreError as error:
        if as_json:
            print_json(error_json(error))
        typer.echo(f"kvstore: {error}", err=True)
        raise typer.Exit(WRONG if isinstance(error, ConfigError) else PROBLEM) from None


def error_json(error: KVStoreError) -> dict[str, Any]:
    return {"error": {"kind": type(error).__name__, "message": str(error)}}


def number(value: Any) -> float:
    """A number of an answer, 0 for what is none: a daemon of another version may leave one out."""
    return float(value) if isinstance(value, int | float) else 0.0

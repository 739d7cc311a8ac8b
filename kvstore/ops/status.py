"""`kvstore status`: what a daemon is and does, once."""

from __future__ import annotations

from kvstore.ops import views
from kvstore.ops.common import (
    ConfigOption,
    ConnectOption,
    JsonOption,
    TimeoutOption,
    TokenOption,
    console,
    failures,
    print_json,
    target,
)


def status(
    connect: ConnectOption = None,
    config: ConfigOption = None,
    token_file: TokenOption = None,
    timeout: TimeoutOption = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Show a daemon's tiers, rates, clients, tenants and recent errors.

    Exit status 1 when no daemon answers.

    Example: kvstore status --connect unix:/run/kvstore/kvstore.sock --json
    """
    with failures(as_json):
        with target(connect, config, token_file, timeout).open() as admin:
            found = admin.status()
        if as_json:
            print_json(found)
            return
        out = console()
        for section in views.sections(found):
            out.print(section)
            out.print()

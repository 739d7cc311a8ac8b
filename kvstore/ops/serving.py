"""What `kvstore serve` does, without the library that parses command lines: to load that takes a
good part of the time in which a daemon is to serve again.

`plain_arguments` reads the usual command lines itself; all others, and whatever is wrong with one,
are left to `kvstore.ops.serve`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstore.config import DaemonConfig, TenantConfig, load_daemon_config
from kvstore.config_sources import Setting, token_from_environment
from kvstore.errors import ConfigError

log = logging.getLogger(__name__)

_SWITCHES = {"print_config", "adopt", "fresh"}


def settings_of_daemon() -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(DaemonConfig) if field.name != "tenants"]


def plain_arguments(words: Sequence[str]) -> dict[str, Any] | None:
    """Return what to call `run` with, or None where somebody else has to read the words.

    Read are full names of flags, with their value as the next word or behind "=".
    """
    are_switches = {field.name: isinstance(field.default, bool) for field in settings_of_daemon()}
    found: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        flag, has_value, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or "_" in flag:
            return None
        if name in _SWITCHES or are_switches.get(name.removeprefix("no_"), False):
            if has_value:
                return None
            found[name.removeprefix("no_")] = not name.startswith("no_")
        elif name == "config" or name in are_switches:
            if not has_value:
                value = next(rest, "-")
                if value.startswith("-"):
                    return None
            found[name] = Path(value) if name == "config" else value
        else:
            return None
    return found


def run(
    *,
    config: Path | None = None,
    print_config: bool = False,
    adopt: bool = False,
    fresh: bool = False,
    **flags: Any,
) -> None:
    """Run the daemon until it is told to stop.

    Raises:
        ConfigError: a setting is wrong; KVStoreError: see `kvstore.daemon.service`.
    """
    settings, found = load_daemon_config(config, **flags)
    if print_config:
        sys.stdout.write(config_text(settings, found))
        return
    if adopt and fresh:
        raise ConfigError("adopt: contradicts --fresh")
    from kvstore.daemon.logs import set_up_after
    from kvstore.daemon.service import Service

    with set_up_after(settings.log_level, settings.log_format):
        service = Service(
            settings,
            adopt="must" if adopt else "never" if fresh else "auto",
            environment_token=token_from_environment(),
            signals=True,
        )
    said = f"kvstored serves {', '.join(service.addresses)}"
    log.info("%s", said)
    sys.stdout.write(said + "\n")
    sys.stdout.flush()
    service.run()


def config_text(config: DaemonConfig, found: Mapping[str, Setting]) -> str:
    """Return a configuration as TOML, with where each value came from."""
    lines = []
    for field in settings_of_daemon():
        origin = found[field.name].origin if field.name in found else "default"
        lines.append(f"{field.name} = {_toml(getattr(config, field.name))}  # {origin}")
    for name, tenant in config.tenants.items():
        lines += ["", f'[tenants."{name}"]  # {found["tenants"].origin}']
        lines += [
            f"{field.name} = {_toml(getattr(tenant, field.name))}"
            for field in dataclasses.fields(TenantConfig)
        ]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # What JSON escapes, TOML's basic strings do in the same way; DEL alone may stand in JSON only.
    return json.dumps(value).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)

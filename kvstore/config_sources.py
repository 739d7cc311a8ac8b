"""Where settings come from, lowest first: defaults in the code, a TOML file, `KVSTORE_*` variables,
keyword arguments or flags. One file and one environment serve the embedded store and the daemon:
each takes the settings it has and leaves the other's alone; a name that neither has is an error.

This is the only module that reads the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kvstore.errors import ConfigError

_PREFIX = "KVSTORE_"
TOKEN_VARIABLE = "KVSTORE_TOKEN"  # a secret: no setting, since settings are shown
UCX_VARIABLE = "KVSTORE_UCX_LIB"
# Of SGLang's hand-off, whose flags leave no room for settings of ours, and the mark by which its
# processes know that it was asked for.
_TRANSFER_VARIABLES = {
    "token_file": "KVSTORE_TRANSFER_TOKEN_FILE",
    "timeout": "KVSTORE_TRANSFER_TIMEOUT",
    "movers": "KVSTORE_TRANSFER_MOVERS",
}
_SGLANG_TRANSFER_VARIABLE = "KVSTORE_SGLANG_TRANSFER"
# Variables of the build, of benches and of the transport, not settings.
_NOT_OURS = frozenset(
    (
        "KVSTORE_BUILD_JOBS",
        "KVSTORE_SANITIZE",
        "KVSTORE_UCX_LIB",
        TOKEN_VARIABLE,
        _SGLANG_TRANSFER_VARIABLE,
        *_TRANSFER_VARIABLES.values(),
    )
)

_Config = TypeVar("_Config")


class Setting(NamedTuple):
    """A value and where it was found: a file, a variable, a flag."""

    value: Any
    origin: str


def setting(default: Any, help: str) -> Any:
    """Declare a field of a configuration: its default, and what flags and printed settings say."""
    return field(default=default, metadata={"help": help})


def help_of(declared: Field[Any]) -> str:
    return str(declared.metadata.get("help", ""))


def _names(config: type) -> set[str]:
    return {declared.name for declared in fields(config)}


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a TOML file's tables.

    Raises:
        ConfigError: it cannot be read or is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"config: {path} is not TOML: {error}") from error


def _from_environment(environ: Mapping[str, str], known: set[str]) -> dict[str, Setting]:
    found = {}
    for name, value in environ.items():
        if not name.startswith(_PREFIX) or name in _NOT_OURS:
            continue
        key = name.removeprefix(_PREFIX).lower()
        if key not in known or key == "tenants":  # a table has no text form
            raise ConfigError(f"{name}: no such setting; there are {', '.join(sorted(known))}")
        found[key] = Setting(value, name)
    return found


def coerced(name: str, default: Any, value: Any) -> Any:
    """Turn text of a variable or flag into the type of the setting's default."""
    if not isinstance(value, str) or isinstance(default, str) or default is MISSING:
        return value
    if isinstance(default, bool):
        if value.lower() in ("1", "true", "yes", "on"):
            return True
        if value.lower() in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{name}: {value!r} is not true or false")
    if name in ("chunk", "ssd_write_budget", "peer_bandwidth"):  # sizes whose default is 0
        return value
    try:
        return type(default)(value)
    except ValueError:
        raise ConfigError(f"{name}: {value!r} is not a number") from None


def collect(
    config: type,
    known: set[str],
    path: str | os.PathLike[str] | None,
    environ: Mapping[str, str] | None,
    overrides: Mapping[str, Any],
    origin: Callable[[str], str],
) -> dict[str, Setting]:
    """Return what was set for `config`, by name.

    Args:
        config: a dataclass, whose settings are wanted.
        known: all names that a file or the environment may have.
        path: a TOML file whose top-level keys are settings; None for none.
        environ: variables to read `KVSTORE_*` from; None for the process's own.
        overrides: settings that win; those that are None are left out.
        origin: what to call an override.

    Raises:
        ConfigError: the file is missing or not TOML, or a name is unknown.
    """
    found: dict[str, Setting] = {}
    if path is not None:
        for name, value in read_toml(path).items():
            if name not in known:
                raise ConfigError(
                    f"{name}: no such setting; there are {', '.join(sorted(known))} ({path})"
                )
            found[name] = Setting(value, str(path))
    found.update(_from_environment(os.environ if environ is None else environ, known))
    for name, value in overrides.items():
        if name not in _names(config):
            raise ConfigError(
                f"{name}: no such setting; there are {', '.join(sorted(_names(config)))}"
            )
        if value is not None:
            found[name] = Setting(value, origin(name))
    mine = _names(config)
    return {name: value for name, value in found.items() if name in mine}


def build(config: type[_Config], found: Mapping[str, Setting]) -> _Config:
    """Return the configuration; an error says where the wrong value came from.

    Raises:
        ConfigError: a value is wrong.
    """
    defaults = {declared.name: declared.default for declared in fields(config)}  # type: ignore[arg-type]
    try:
        return config(
            **{name: coerced(name, defaults[name], got.value) for name, got in found.items()}
        )
    except ConfigError as error:
        name = str(error).partition(":")[0].partition(".")[0]
        if name not in found or found[name].origin in ("argument", ""):
            raise
        raise ConfigError(f"{error} ({found[name].origin})") from error


def runtime_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Return where a user's sockets belong: $XDG_RUNTIME_DIR, /run/user/UID, else in /tmp."""
    given = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "")
    uid = os.getuid()
    for path in (Path(given) if given else None, Path(f"/run/user/{uid}")):
        if path is not None and path.is_absolute() and path.is_dir() and os.access(path, os.W_OK):
            return path
    return fallback_directory()


def fallback_directory() -> Path:
    """Return where a user's sockets are where there is no runtime directory. Others may have made
    it: who uses it must see whose it is."""
    return Path(f"/tmp/kvstore-{os.getuid()}")


def token_from_environment(environ: Mapping[str, str] | None = None) -> bytes | None:
    """Return the default tenant's secret from $KVSTORE_TOKEN, None when there is none."""
    found = os.fsencode((os.environ if environ is None else environ).get(TOKEN_VARIABLE, ""))
    return found or None


def transfer_variables(environ: Mapping[str, str] | None = None) -> dict[str, Setting]:
    """Return what the environment says of a hand-off between engines: token_file, timeout and
    movers, those that are set."""
    found = os.environ if environ is None else environ
    return {
        name: Setting(found[variable], variable)
        for name, variable in _TRANSFER_VARIABLES.items()
        if found.get(variable)
    }


def choose_sglang_transfer() -> None:
    """Mark that SGLang's KV is to be handed over by kvstore, for this process and those that it
    starts."""
    os.environ[_SGLANG_TRANSFER_VARIABLE] = "1"


def is_sglang_transfer_chosen(environ: Mapping[str, str] | None = None) -> bool:
    found = os.environ if environ is None else environ
    return found.get(_SGLANG_TRANSFER_VARIABLE) == "1"


def ucx_library_from_environment(environ: Mapping[str, str] | None = None) -> str:
    """Return the path of the libucp to load from $KVSTORE_UCX_LIB; "" for whichever is found."""
    return (os.environ if environ is None else environ).get(UCX_VARIABLE, "")


def notify_socket(environ: Mapping[str, str] | None = None) -> str:
    """Return where a service manager waits for "READY=1"; "" for nowhere."""
    return (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")


def cache_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Return where what can be made again is kept for a user: $XDG_CACHE_HOME, else ~/.cache."""
    given = (os.environ if environ is None else environ).get("XDG_CACHE_HOME", "")
    base = Path(given) if given and Path(given).is_absolute() else Path("~/.cache").expanduser()
    return base / "kvstore"

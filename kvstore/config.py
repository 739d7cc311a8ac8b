"""Settings: one frozen dataclass a component, checked once, passed down as arguments.

This is the only module that reads the environment. A setting comes from, lowest first: the default
written here, a TOML file, `KVSTORE_*` variables, keyword arguments or flags. An unknown name or a
bad value is a `ConfigError` that names it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from kvstore.errors import ConfigError

Verify = Literal["boundary", "always"]
IoKind = Literal["auto", "uring", "threads"]
Admission = Literal["all", "reuse"]

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter + "b"] = 1000**_power


_SIZES = ("cpu", "chunk", "ssd_capacity", "ssd_segment", "write_behind", "ssd_write_budget")
_PREFIX = "KVSTORE_"
# Variables of the build, of benches and of the transport, not settings of a store.
_NOT_OURS = frozenset(("KVSTORE_BUILD_JOBS", "KVSTORE_SANITIZE", "KVSTORE_UCX_LIB"))


def parse_bytes(value: int | str, name: str = "size") -> int:
    """Return bytes: an int as it is, or text such as "8GiB", "512M" (= MiB), "1GB" (10^9).

    Raises:
        ConfigError: the text is not a size, or the size is negative; the message names `name`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"{name}: {value!r} is not a size such as 8GiB or 512M")
        size = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if size < 0:
        raise ConfigError(f"{name}: {value!r} is negative")
    if size >= 1 << 62:
        raise ConfigError(f"{name}: {str(value)[:40]} is too large")
    return size


def format_bytes(size: float) -> str:
    """Return a size for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _is_a(kind: type | tuple[type, ...], value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class StoreConfig:
    """An embedded store. Sizes are bytes or text such as "8GiB"; see `parse_bytes`."""

    cpu: int | str = "1GiB"  # DRAM for blocks; taken when the store is opened
    chunk: int | str = 0  # unit in which block sizes share the arena; 0: chosen from `cpu`
    huge_pages: bool = False  # back the arena with reserved huge pages (vm.nr_hugepages)
    eviction: str = "lru"
    verify: Verify = "boundary"  # "always": check every read, not only where bytes cross a boundary
    threads: int = 2  # upper bound of threads that copy one batch
    ssd: str = ""  # directory of the ssd tier; empty: none
    ssd_capacity: int | str = "16GiB"
    ssd_segment: int | str = "256MiB"
    ssd_io: IoKind = "auto"
    ssd_depth: int = 16  # requests in flight
    codec: str = "none"  # how blocks are encoded on ssd: none, zstd, int8 (lossy), fp8 (lossy)
    write_behind: int | str = (
        "256MiB"  # bytes that may wait for the ssd; over it, blocks are offered again later
    )
    ssd_admission: Admission = "all"  # "reuse": a block is written to ssd when it is used again
    ssd_write_budget: int | str = 0  # bytes a second that may be written to ssd; 0: no bound
    lease_seconds: float = 60.0  # how long acquired blocks stay pinned unless released

    def __post_init__(self) -> None:
        for name in _SIZES:
            object.__setattr__(self, name, parse_bytes(getattr(self, name), name))
        for name, kind in (("verify", Verify), ("ssd_io", IoKind), ("ssd_admission", Admission)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"{name}: {getattr(self, name)!r} is not one of {', '.join(get_args(kind))}"
                )
        for name in ("threads", "ssd_depth"):
            value = getattr(self, name)
            if not _is_a(int, value) or not 1 <= value <= 1024:
                raise ConfigError(f"{name}: {value!r} is not an integer between 1 and 1024")
        if not _is_a((int, float), self.lease_seconds):
            raise ConfigError(f"lease_seconds: {self.lease_seconds!r} is not a number")
        if not self.lease_seconds > 0:
            raise ConfigError(f"lease_seconds: {self.lease_seconds!r} is not positive")
        if self.cpu_bytes < 1 << 20:
            raise ConfigError(f"cpu: {self.cpu_bytes} bytes is less than 1 MiB")
        self._check_units()

    def _check_units(self) -> None:
        for small, large, times in (("chunk", "cpu", 1), ("ssd_segment", "ssd_capacity", 3)):
            unit, whole = parse_bytes(getattr(self, small)), parse_bytes(getattr(self, large))
            if unit * times > whole and (self.ssd or large == "cpu"):
                raise ConfigError(
                    f"{large}: {whole} bytes do not hold {times} x {small} ({unit} bytes)"
                )

    @property
    def cpu_bytes(self) -> int:
        return parse_bytes(self.cpu)

    def chunk_bytes(self, block_bytes: int) -> int:
        """Return the chunk size for an arena whose first blocks have `block_bytes`."""
        page = 4096
        chunk = parse_bytes(self.chunk) or min(64 << 20, max(1 << 20, self.cpu_bytes // 64))
        # One slot and its page of headers must fit, whatever the arena's size.
        needed = -(-block_bytes // page) * page + page
        chunk = max(chunk, needed)
        return -(-chunk // page) * page


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    known = {field.name for field in fields(StoreConfig)}
    found = {}
    for name, value in environ.items():
        if not name.startswith(_PREFIX) or name in _NOT_OURS:
            continue
        key = name.removeprefix(_PREFIX).lower()
        if key not in known:
            raise ConfigError(f"{name}: no such setting; there are {', '.join(sorted(known))}")
        found[key] = value
    return found


def _coerce(name: str, value: Any) -> Any:
    """Turn text of a variable or flag into the type of the setting's default."""
    default = getattr(StoreConfig, name)
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() in ("1", "true", "yes", "on"):
            return True
        if value.lower() in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{name}: {value!r} is not true or false")
    try:
        return value if name in _SIZES else type(default)(value)
    except ValueError:
        raise ConfigError(f"{name}: {value!r} is not a number") from None


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not TOML: {error}") from error


def load_config(
    path: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    **overrides: Any,
) -> StoreConfig:
    """Return the settings from a TOML file, then the environment, then `overrides`.

    Args:
        path: a TOML file whose top-level keys are settings; None for none.
        environ: variables to read `KVSTORE_*` from; None for the process's own.
        overrides: settings that win; those that are None are left out.

    Raises:
        ConfigError: the file is missing or not TOML, a name is unknown, or a value is wrong.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_read_toml(path))
    values.update(_environment(os.environ if environ is None else environ))
    values.update({name: value for name, value in overrides.items() if value is not None})
    known = {field.name for field in fields(StoreConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such setting; there are {', '.join(sorted(known))}")
    return StoreConfig(**{name: _coerce(name, value) for name, value in values.items()})

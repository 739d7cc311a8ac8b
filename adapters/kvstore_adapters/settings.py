"""AdapterSettings: what a user may set where the engine lets a connector be configured.

In vLLM `kv_connector_extra_config`, in SGLang the extra config of HiCache: one JSON object. An
unknown key or a wrong value is a ConfigError that names both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import kvstore
from kvstore import ConfigError

Load = Literal["async", "sync"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class AdapterSettings:
    """Checked when built. Times are seconds.

    address: of the daemon, "unix:/path.sock", "tcp:host:port" or "tls:host:port"; default: where
        `kvstore serve` listens.
    token_file, tenant: as for `kvstore.connect`.
    tls_ca, tls_cert, tls_key: PEM files for "tls:" addresses, as `kvstore.TlsFiles` has them.
    timeout: that the daemon has to answer one call.
    load: "async": a request waits aside while its blocks come; "sync": the step waits for them.
    load_deadline: after which a load counts as failed and its tokens are computed.
    lookup_wait: that the scheduler waits for a lookup before it asks again in the next step.
    pd_wait: that a decode waits for blocks that the prefill instance said it stored.
    save_decode: save blocks of generated tokens too, not only the prompt's.
    max_pinned_fraction: share of the engine's blocks that saves under way may hold.
    threads: loads at a time.
    push_targets: names that requests may use, and the daemon's address behind each.
    holder: where other daemons find ours, told to decode instances with what was stored.
    holders: the same of other instances' daemons, from which ours may fetch: requests name one.
    model: overrides the model's identity. Who sets it answers for equal weights.
    start_daemon: DRAM of a daemon that is started when nobody listens at `address`, such as "8GiB".
    """

    address: str = ""
    token_file: str = ""
    tenant: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    timeout: float = 1.0
    load: Load = "async"
    load_deadline: float = 5.0
    lookup_wait: float = 0.001
    pd_wait: float = 5.0
    save_decode: bool = True
    max_pinned_fraction: float = 0.25
    threads: int = 2
    push_targets: Mapping[str, str] = field(default_factory=dict)
    holder: str = ""
    holders: tuple[str, ...] = ()
    model: str = ""
    start_daemon: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> AdapterSettings:
        """Return the settings that an engine's configuration holds.

        Raises:
            ConfigError: a key is unknown or a value is wrong.
        """
        given = dict(values or {})
        known = [declared.name for declared in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise ConfigError(
                    f"{name}: no such setting (value {value!r}); there are {', '.join(known)}"
                )
        return cls(**given)

    def __post_init__(self) -> None:
        texts = ("address", "token_file", "tenant", "model", "start_daemon")
        for name in (*texts, "tls_ca", "tls_cert", "tls_key"):
            _require(name, getattr(self, name), _is_text, "text")
        for name, (least, most) in _SECONDS.items():
            _require(name, getattr(self, name), _within(least, most), f"between {least} and {most}")
        _require("load", self.load, lambda value: value in get_args(Load), "async or sync")
        _require("save_decode", self.save_decode, _is_switch, "true or false")
        _require("threads", self.threads, _is_count(64), "a whole number between 1 and 64")
        if not self.address:
            object.__setattr__(self, "address", kvstore.default_address())
        _check_address("address", self.address)
        self._check_targets()
        self._check_holders()
        self._check_start()

    def tls_for(self, address: str) -> kvstore.TlsFiles | None:
        """Return what `kvstore.connect` needs for an address; None where it is not encrypted."""
        if not address.startswith("tls:"):
            return None
        return kvstore.TlsFiles(self.tls_ca, self.tls_cert, self.tls_key)

    def _check_targets(self) -> None:
        targets = self.push_targets
        _require("push_targets", targets, _is_mapping, "an object of names and addresses")
        for name, address in targets.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ConfigError(
                    f"push_targets: {name!r} is not a name of letters, digits, '.', '_' and '-'"
                )
            _check_address(f"push_targets.{name}", address)
        object.__setattr__(self, "push_targets", dict(targets))  # a later change is not ours

    def _check_holders(self) -> None:
        _require("holder", self.holder, _is_text, "text")
        if self.holder:
            _check_address("holder", self.holder)
        _require("holders", self.holders, _is_list, "a list of addresses")
        for address in self.holders:
            _check_address("holders", address)
        object.__setattr__(self, "holders", tuple(self.holders))

    def _check_start(self) -> None:
        if not self.start_daemon:
            return
        if not self.address.startswith("unix:"):
            raise ConfigError(
                f"start_daemon: {self.start_daemon!r}: a daemon can be started on this host only,"
                f" not at {self.address}"
            )
        try:
            kvstore.StoreConfig(cpu=self.start_daemon)
        except ConfigError as error:
            reason = str(error).partition(": ")[2]
            raise ConfigError(f"start_daemon: {reason}") from error


_SECONDS: Mapping[str, tuple[float, float]] = {
    "timeout": (0.001, 600.0),
    "load_deadline": (0.001, 3600.0),
    "lookup_wait": (0.0, 1.0),  # the scheduler stands still meanwhile
    "pd_wait": (0.0, 600.0),
    "max_pinned_fraction": (0.0, 1.0),
}


def _require(name: str, value: object, is_right: Callable[[Any], bool], wanted: str) -> None:
    if not is_right(value):
        raise ConfigError(f"{name}: {value!r} is not {wanted}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_count(most: int) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
    )


def _within(least: float, most: float) -> Callable[[object], bool]:
    def is_right(value: object) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and least <= value <= most  # type: ignore[operator]

    return is_right


def _check_address(name: str, address: object) -> None:
    if not isinstance(address, str) or not address.startswith(("unix:/", "tcp:", "tls:")):
        raise ConfigError(
            f"{name}: {address!r} is not unix:/path.sock, tcp:host:port or tls:host:port"
        )

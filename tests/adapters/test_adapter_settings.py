"""AdapterSettings: what an engine's configuration may hold; all else is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

import kvstore
from kvstore import ConfigError
from kvstore_adapters.settings import AdapterSettings

WRONG: list[tuple[str, Any]] = [
    ("address", "localhost:7070"),
    ("address", "unix:relative.sock"),
    ("address", 7),
    ("token_file", 1),
    ("tenant", None),
    ("timeout", 0),
    ("timeout", "1"),
    ("timeout", True),
    ("timeout", float("nan")),
    ("timeout", float("inf")),
    ("load", "lazy"),
    ("load", ["async"]),
    ("load_deadline", -1),
    ("lookup_wait", 2.0),
    ("pd_wait", 1e9),
    ("save_decode", 1),
    ("save_decode", "yes"),
    ("max_pinned_fraction", 1.5),
    ("threads", 0),
    ("threads", 2.0),
    ("threads", True),
    ("push_targets", ["decode"]),
    ("push_targets", {"a b": "unix:/d/s"}),
    ("push_targets", {"decode": "nowhere"}),
    ("push_targets", {"decode": 5}),
    ("model", 3),
    ("start_daemon", 8),
    ("start_daemon", "8 gallons"),
    ("start_daemon", "1"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        AdapterSettings.of({name: value})


def test_an_unknown_key_is_named_with_its_value() -> None:
    with pytest.raises(ConfigError, match=r"load_dedline.*'5'.*load_deadline"):
        AdapterSettings.of({"load_dedline": "5"})


def test_what_json_can_hold_is_taken() -> None:
    text = """{"address": "tcp:[::1]:9000", "timeout": 2, "load": "sync", "save_decode": false,
        "push_targets": {"decode-1": "unix:/run/d.sock"}, "threads": 4, "max_pinned_fraction": 0}"""
    made = AdapterSettings.of(json.loads(text))
    assert (made.address, made.timeout, made.load, made.threads) == ("tcp:[::1]:9000", 2, "sync", 4)
    assert made.push_targets == {"decode-1": "unix:/run/d.sock"}
    assert not made.save_decode


def test_without_an_address_the_users_own_daemon_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_LISTEN", raising=False)
    assert AdapterSettings.of(None).address == kvstore.default_address()
    assert AdapterSettings().address.endswith("/kvstore.sock")
    monkeypatch.setenv("KVSTORE_LISTEN", "unix:/elsewhere/s")
    assert AdapterSettings.of({}).address == "unix:/elsewhere/s"


def test_a_daemon_is_started_on_this_host_only() -> None:
    with pytest.raises(ConfigError, match=r"start_daemon.*tcp:other:1"):
        AdapterSettings.of({"address": "tcp:other:1", "start_daemon": "8GiB"})
    assert AdapterSettings.of({"address": "unix:/x/s", "start_daemon": "8GiB"}).start_daemon


def test_later_changes_of_what_was_given_do_not_reach_us() -> None:
    targets = {"decode": "unix:/run/d.sock"}
    made = AdapterSettings.of({"push_targets": targets})
    targets["other"] = "nowhere"
    assert list(made.push_targets) == ["decode"]

"""The daemon's settings: each source, the order of sources, and that a wrong value names its key,
itself and where it came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kvstore.config import DaemonConfig, StoreConfig, load_config, load_daemon_config
from kvstore.config_sources import help_of
from kvstore.errors import ConfigError

WRONG: list[tuple[str, Any]] = [
    ("cpu", "much"),
    ("chunk", -1),
    ("huge_pages", "perhaps"),
    ("verify", "never"),
    ("threads", "many"),
    ("threads", 0),
    ("ssd_capacity", "4 apples"),
    ("ssd_segment", "x"),
    ("ssd_io", "aio"),
    ("ssd_depth", 5000),
    ("write_behind", "?"),
    ("lease_seconds", "soon"),
    ("lease_seconds", "-1"),
    ("listen", "/no/kind"),
    ("listen", "tcp:127.0.0.1:1"),
    ("tcp", "nowhere"),
    ("tcp", "::1:80"),
    ("tcp", "host:70000"),
    ("http", "localhost"),
    ("client_writes", "never"),
    ("hold_seconds", "-1"),
    ("hold_seconds", "nan"),
    ("scrub", "1 XB"),
    ("io_threads", 0),
    ("io_threads", "two"),
    ("log_level", "loud"),
    ("log_format", "xml"),
]


def toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_names_its_key_itself_and_its_source(
    name: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "kv.toml"
    path.write_text(f"{name} = {toml(value)}\n")
    variable = f"KVSTORE_{name.upper()}"
    flag = "--" + name.replace("_", "-")
    for source, arguments in (
        (str(path), {"path": path, "environ": {}}),
        (variable, {"environ": {variable: str(value)}}),
        (flag, {"environ": {}, name: value}),
    ):
        with pytest.raises(ConfigError) as caught:
            load_daemon_config(**arguments)
        assert str(caught.value).startswith(f"{name}: ")
        assert str(value).partition(":")[0] in str(caught.value)
        assert str(caught.value).endswith(f"({source})")


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    path.write_text('cpu = "3MiB"\nthreads = 3\nhttp = ""\nlisten = "unix:/run/x.sock"\n')
    config, found = load_daemon_config(
        path, {"KVSTORE_CPU": "2MiB", "KVSTORE_IO_THREADS": "5", "HOME": "/"}, cpu="4MiB"
    )
    assert (config.cpu, config.threads, config.io_threads) == (4 << 20, 3, 5)
    assert (config.http, config.state) == ("", "/run/x.state")
    assert {name: got.origin for name, got in found.items()} == {
        "cpu": "--cpu",
        "threads": str(path),
        "http": str(path),
        "listen": str(path),
        "io_threads": "KVSTORE_IO_THREADS",
    }


def test_one_file_and_environment_serve_store_and_daemon(tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    path.write_text('cpu = "3MiB"\nhttp = ""\n[tenants.a]\nuids = [7]\n')
    environ = {"KVSTORE_LOG_LEVEL": "debug", "KVSTORE_TOKEN": "x" * 16}
    assert load_config(path, environ) == StoreConfig(cpu="3MiB")
    config, _ = load_daemon_config(path, environ)
    assert config.tenants["a"].uids == (7,)
    assert config.log_level == "debug"
    with pytest.raises(ConfigError, match="http: no such setting"):
        load_config(path, environ, http="")  # said to an embedded store, it is a mistake


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tenants.a]\nuid = [7]", r"tenants.a.uid: no such setting"),
        ("[tenants.a]\nuids = 7", r"tenants.a.uids: 7"),
        ("[tenants.a]\nuids = [-7]", r"tenants.a.uids: \[-7\]"),
        ("[tenants.a]\ncpu_quota = 'lots'", r"tenants.a.cpu_quota: 'lots'"),
        ("[tenants.a]\ntoken_file = 7", r"tenants.a.token_file: 7"),
        ("[tenants.default]\nuids = [7]", r"tenants.default: "),
        ("[tenants.'a b']\nuids = [7]", r"tenants.a b: "),
        ("tenants = 7", r"tenants: 7"),
        ("[tenants]\na = 7", r"tenants.a: 7"),
        ("[tenants.a]\nuids = [7]\n[tenants.b]\nuids = [7]", r"tenants.b.uids: user 7"),
        ("[daemon]\ncpu = 7", r"daemon: no such setting"),
    ],
)
def test_wrong_tables_are_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_daemon_config(path, {})
    assert str(path) in str(caught.value)


def test_unknown_names_are_errors_in_each_source(tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    path.write_text("cup = 1\n")
    with pytest.raises(ConfigError, match="cup: no such setting"):
        load_daemon_config(path, {})
    for variable in ("KVSTORE_CUP", "KVSTORE_TENANTS"):
        with pytest.raises(ConfigError, match=f"{variable}: no such setting"):
            load_daemon_config(None, {variable: "1"})
    with pytest.raises(ConfigError, match="cup: no such setting"):
        load_daemon_config(None, {}, cup=1)


def test_every_setting_explains_itself() -> None:
    for declared in dataclasses.fields(DaemonConfig):
        assert help_of(declared), declared.name

"""ensure_daemon: engines that find no daemon start one, and only one, which outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvstore
from kvstore.admin import Admin
from kvstore_adapters.daemon_start import ensure_daemon, is_served
from kvstore_adapters.settings import AdapterSettings
from tests.daemon.daemon_support import is_gone, wait_until

SPEC = kvstore.BlockSpec(1, 1, 64, 16, "float32")
ENGINE = """
import sys
import kvstore
from kvstore_adapters.daemon_start import ensure_daemon
from kvstore_adapters.settings import AdapterSettings
assert ensure_daemon(AdapterSettings(address=sys.argv[1], start_daemon="4MiB"))
"""


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("KVSTORE_HTTP", "")
    monkeypatch.setenv("KVSTORE_HOLD_SECONDS", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    where = f"unix:{tmp_path}/new/s"
    yield where
    if (tmp_path / "new" / "s").exists():
        pid = pid_of(where)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_gone(pid))


def pid_of(address: str) -> int:
    with Admin(address, 20.0) as admin:
        return int(admin.status()["pid"])


def test_of_engines_that_start_at_once_one_starts_the_daemon_and_it_stays(
    address: str, tmp_path: Path
) -> None:
    engines = [subprocess.Popen([sys.executable, "-c", ENGINE, address]) for _ in range(3)]
    assert [engine.wait(60) for engine in engines] == [0, 0, 0]
    # All engines are gone. Whoever came second would have been told that the directory is in use.
    said = (tmp_path / "new" / "s.log").read_text()
    assert said.count("\nkvstored serves ") == 1
    assert "in use" not in said
    assert "belongs to another daemon" not in said
    pid = pid_of(address)
    assert ensure_daemon(AdapterSettings(address=address, start_daemon="4MiB"))
    assert pid_of(address) == pid
    kvstore.connect(address, SPEC, timeout=20.0).close()


def test_a_daemon_that_cannot_start_is_said_and_no_error(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_SSD", "/proc/no/such/place")
    assert not ensure_daemon(AdapterSettings(address=address, start_daemon="4MiB"))
    assert "/proc/no/such" in caplog.text
    assert not is_served(tmp_path / "new" / "s")


def test_a_place_that_cannot_be_written_is_said_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    settings = AdapterSettings(address=f"unix:{tmp_path}/file/s", start_daemon="4MiB")
    assert not ensure_daemon(settings)
    assert str(tmp_path / "file") in caplog.text


def test_without_the_setting_nothing_is_started(tmp_path: Path) -> None:
    assert ensure_daemon(AdapterSettings(address=f"unix:{tmp_path}/new/s"))
    assert not (tmp_path / "new").exists()

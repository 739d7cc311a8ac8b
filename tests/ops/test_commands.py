"""Proves what operators' commands print, how they end and what they refuse.

They run in process through the same application as on the command line. A daemon is a fake behind
the native connection; directories are real. Each is asked for JSON and for tables.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import kvstore.admin
from kvstore import wire
from kvstore.cli import build_app
from kvstore.config import DaemonConfig
from kvstore.ops import views
from kvstore.ops.inspect import parse_hashes
from kvstore.tiers.ssd_format import PAGE_BYTES
from tests.ops.fake_daemon import ADDRESS, FakeDaemon, status
from tests.ops.test_ssd_verify import flip, segment_path
from tests.ssd_support import hashes_of, open_tier, write

COMMANDS = ("status", "top", "inspect", "verify", "doctor")
WHOLE = {"checked_bytes": 10, "removed_blocks": 0, "whole": True}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build_app([]), list(arguments))


def told(result: Result) -> Any:
    """The JSON on stdout, which has nothing else on it."""
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_LISTEN", raising=False)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    fake = FakeDaemon()
    monkeypatch.setattr(kvstore.admin, "dial", fake.dial)
    return fake


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "ssd"
    with open_tier(path, capacity_bytes=1 << 20, segment_bytes=128 << 10) as tier:
        write(tier, list(range(30)), 3000)
        tier.forget(np.ones(10, np.uint32), hashes_of(list(range(10))))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_of_the_command(command: str) -> None:
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert f"kvstore {command}" in " ".join(shown.stdout.split())
    assert "--json" in shown.stdout


def test_help_of_serve_has_each_setting_with_its_default() -> None:
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", run("serve", "--help").stdout).split())
    for setting in fields(DaemonConfig):
        if setting.name != "tenants":
            assert "--" + setting.name.replace("_", "-") in shown
        if setting.default and setting.default is not MISSING:
            assert f"(default: {setting.default})" in shown
    assert "<bool>" not in shown


# -- status


def test_status_as_json_is_what_the_daemon_said(daemon: FakeDaemon) -> None:
    shown = run("status", "--connect", ADDRESS, "--json")
    assert (shown.exit_code, told(shown)) == (0, status())
    assert daemon.open == 0


def test_status_for_people_shows_every_part(daemon: FakeDaemon) -> None:
    shown = run("status", "--connect", ADDRESS)
    assert shown.exit_code == 0
    for part in (
        "1.2.3", "serving", "up 1.0 h", "75.0%", "4.7 GiB/s", "cpu", "3.0 MiB", "48", "engine",
        "red", "llama", "cdcdcdcd", "disk [bold]on fire", "2 blocks failed their checksum",
        "3 quarantined slots", "adopted 12",
    ):  # fmt: skip
        assert part in shown.stdout, part


def test_what_clients_call_themselves_cannot_drive_the_terminal(daemon: FakeDaemon) -> None:
    assert "\x1b" not in run("status", "--connect", ADDRESS).stdout


def test_a_status_with_parts_missing_is_shown_as_far_as_it_goes() -> None:
    shown = list(views.sections({"version": "9", "tiers": [{"tier": "cpu"}], "history": [[1]]}))
    assert shown


@pytest.mark.parametrize("command", ["status", "top --once", "inspect", "verify"])
@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ConnectionRefusedError("refused"), "PeerUnavailableError"),
        (TimeoutError(), "DeadlineExceededError"),
    ],
)
def test_no_daemon_is_one_line_and_status_1(
    daemon: FakeDaemon, command: str, failure: Exception, kind: str
) -> None:
    daemon.failing = [failure, failure]
    shown = run(*command.split(), "--connect", ADDRESS)
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert ADDRESS in shown.stderr
    assert "Traceback" not in shown.stderr
    shown = run(*command.split(), "--connect", ADDRESS, "--json")
    assert (shown.exit_code, told(shown)["error"]["kind"]) == (1, kind)


@pytest.mark.parametrize("command", ["status", "top", "inspect", "verify"])
def test_a_wrong_address_is_status_2(command: str) -> None:
    shown = run(command, "--connect", "somewhere")
    assert shown.exit_code == 2
    assert "'somewhere'" in shown.stderr


def test_a_wrong_setting_is_status_2(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("cpuu = 1\n")
    shown = run("status", "--config", str(tmp_path / "bad.toml"))
    assert shown.exit_code == 2
    assert "cpuu" in shown.stderr


def test_the_address_comes_from_settings(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvstore.toml").write_text('listen = "unix:/from/toml.sock"\n')
    daemon.failing = [ConnectionRefusedError("no"), ConnectionRefusedError("no")]
    shown = run("status", "--config", str(tmp_path / "kvstore.toml"))
    assert "unix:/from/toml.sock" in shown.stderr
    monkeypatch.setenv("KVSTORE_LISTEN", "unix:/from/environment.sock")
    assert "unix:/from/environment.sock" in run("status").stderr


def test_a_daemon_over_tcp_is_proved_and_proves(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.secret = b"a secret of twenty by"
    token = tmp_path / "token"
    token.write_bytes(daemon.secret)
    token.chmod(0o600)
    options = ("status", "--connect", "tcp:127.0.0.1:1", "--json")
    assert run(*options, "--token-file", str(token)).exit_code == 0
    assert run(*options).exit_code == 2
    token.write_bytes(b"another secret of ours")
    shown = run(*options, "--token-file", str(token))
    assert shown.exit_code == 2
    assert "another secret" in shown.stderr
    assert daemon.open == 0


# -- top


def test_top_as_json_is_one_object_a_line(daemon: FakeDaemon) -> None:
    shown = run("top", "--connect", ADDRESS, "--json", "--count", "3", "--interval", "0.1")
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    assert (shown.exit_code, len(lines)) == (0, 3)
    assert all(line["rates"]["hit_ratio"] == 0.75 and line["time"] > 1e9 for line in lines)


def test_top_goes_on_when_the_daemon_comes_back(daemon: FakeDaemon) -> None:
    daemon.failing = [ConnectionResetError("gone")]
    shown = run("top", "--connect", ADDRESS, "--json", "--count", "2", "--interval", "0.1")
    first, second = (json.loads(line) for line in shown.stdout.splitlines())
    assert first["error"]["kind"] == "PeerUnavailableError"
    assert second["state"] == "serving"
    assert shown.exit_code == 0


def test_top_once_shows_bars_and_a_sparkline(daemon: FakeDaemon) -> None:
    shown = run("top", "--connect", ADDRESS, "--once")
    assert shown.exit_code == 0
    assert "██████████████████······" in shown.stdout
    assert "▁▁▂▂▃▄▅▆▆▇" in shown.stdout


def test_top_live_ends_after_count_looks(daemon: FakeDaemon) -> None:
    shown = run("top", "--connect", ADDRESS, "--count", "2", "--interval", "0.1")
    assert shown.exit_code == 0
    assert len(daemon.asked) == 2


# -- inspect


def test_inspect_lists_namespaces(daemon: FakeDaemon) -> None:
    assert len(told(run("inspect", "--connect", ADDRESS, "--json"))["namespaces"]) == 2
    assert "llama" in run("inspect", "--connect", ADDRESS).stdout


def test_inspect_says_what_is_known_of_blocks(daemon: FakeDaemon, tmp_path: Path) -> None:
    one, two = "ab" * 32, "cd" * 32
    (tmp_path / "hashes").write_text(f"{two}\n\n0x{one}\n")
    digest = status()["namespaces"][1]["digest"][:6]
    options = ("inspect", "--connect", ADDRESS, "--namespace", digest, one, f"@{tmp_path}/hashes")
    found = told(run(*options, "--json"))
    assert found["namespace"]["model"] == "qwen"
    assert [block["hash"] for block in found["blocks"]] == [one, two, one]
    assert [block["tiers"] for block in found["blocks"]] == [["cpu", "ssd"], [], []]
    assert found["blocks"][0]["depth"] == 1
    assert one[:16] in run(*options).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("ab" * 32,),
        ("--namespace", "zz", "ab" * 32),
        ("--namespace", "", "ab" * 32),
        ("--namespace", "a", "xyz"),
        ("--namespace", "a", "@/no/such/file"),
        ("--ssd", "/nowhere", "--namespace", "a"),
        ("--ssd", "/nowhere"),
    ],
)
def test_inspect_refuses_what_it_cannot_do(daemon: FakeDaemon, arguments: tuple[str, ...]) -> None:
    shown = run("inspect", *arguments)
    assert shown.exit_code == 2
    assert "Traceback" not in shown.stderr


def test_hashes_of_no_file_are_read() -> None:
    assert parse_hashes(["AB" * 32]) == [b"\xab" * 32]


def test_inspect_shows_a_directory(directory: Path) -> None:
    found = told(run("inspect", "--ssd", str(directory), "--json"))
    assert found["blocks"] == 20
    assert found["index"] == "sound"
    assert found["namespaces"][0]["stored_bytes"] == 20 * 3000
    assert found["namespaces"][0]["codecs"] == {"none": 20}
    assert found["segments"][0]["live_blocks"] == 20
    assert "20 blocks in 1 segments" in run("inspect", "--ssd", str(directory)).stdout


def test_inspect_refuses_a_foreign_directory_and_one_in_use(
    directory: Path, tmp_path: Path
) -> None:
    shown = run("inspect", "--ssd", str(tmp_path))
    assert shown.exit_code == 1
    assert "not an SSD directory of kvstore" in shown.stderr
    with open_tier(directory):
        shown = run("inspect", "--ssd", str(directory), "--json")
    assert (shown.exit_code, told(shown)["error"]["kind"]) == (1, "InUseError")


# -- verify


def test_verify_of_a_whole_directory(directory: Path) -> None:
    shown = run("verify", "--ssd", str(directory), "--json")
    found = told(shown)
    assert (shown.exit_code, found["ok"], found["num_damaged"]) == (0, True, 0)
    assert found["checked_blocks"] == 20
    assert "no damage found" in run("verify", "--ssd", str(directory)).stdout


def test_verify_of_a_damaged_directory(directory: Path) -> None:
    flip(segment_path(directory, 1), 15 * PAGE_BYTES)
    shown = run("verify", "--ssd", str(directory), "--json")
    found = told(shown)
    assert (shown.exit_code, found["ok"], found["damage"]) == (1, False, {"payload": 1})
    assert found["findings"][0]["segment"] == 1
    assert found["findings"][0]["page"] == 15
    shown = run("verify", "--ssd", str(directory))
    assert shown.exit_code == 1
    assert "payload: segment 1 page 15" in shown.stdout


def test_verify_has_a_daemon_check_everything(daemon: FakeDaemon) -> None:
    daemon.answers = [WHOLE]
    shown = run("verify", "--connect", ADDRESS, "--json", "--seconds", "7")
    assert shown.exit_code == 0
    assert told(shown)["checked_bytes"] == 10
    assert told(shown)["ok"] is True
    assert wire.AdminVerify(7.0) in daemon.asked


def test_verify_that_did_not_get_through_is_no_success(daemon: FakeDaemon) -> None:
    daemon.answers = [{**WHOLE, "whole": False}]
    shown = run("verify", "--connect", ADDRESS)
    assert shown.exit_code == 1
    assert "not all was checked" in shown.stdout


def test_verify_tells_of_blocks_that_a_daemon_removed(daemon: FakeDaemon) -> None:
    daemon.answers = [{**WHOLE, "removed_blocks": 2}]
    shown = run("verify", "--connect", ADDRESS)
    assert shown.exit_code == 1
    assert "2 damaged blocks" in shown.stdout


@pytest.mark.parametrize(
    "arguments", [("--ssd", "/x", "--connect", ADDRESS), ("--ssd", "/x", "--io", "magic")]
)
def test_verify_refuses_what_it_cannot_do(arguments: tuple[str, ...]) -> None:
    assert run("verify", *arguments).exit_code == 2

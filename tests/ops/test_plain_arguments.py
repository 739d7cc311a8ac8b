"""The short way to start a daemon reads a command line as the long way does.

Proved by giving the same words to both: what the short way reads, the long way reads alike; and
what it leaves alone is all that it might misread.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore.cli import build_app
from kvstore.ops import serve
from kvstore.ops.serving import plain_arguments, settings_of_daemon


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--listen", "unix:/tmp/x", "--http", ""],
        ["--listen=unix:/tmp/x=y", "--http="],
        ["--cpu", "1GiB", "--cpu", "2GiB", "--io-threads", "3"],
        ["--huge-pages", "--fresh"],
        ["--no-huge-pages", "--adopt", "--print-config"],
        ["--config", "kv.toml", "--hold-seconds", "0"],
    ],
)
def test_both_ways_read_alike(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(serve, "run", lambda **given: seen.append(given))
    done = CliRunner().invoke(build_app([]), ["serve", *words])
    assert done.exit_code == 0, done.output
    plain = plain_arguments(words)
    assert plain is not None
    defaults = {"config": None, "print_config": False, "adopt": False, "fresh": False}
    unset = {field.name: None for field in settings_of_daemon()}
    assert {**defaults, **unset, **plain} == seen[0]


@pytest.mark.parametrize(
    "words",
    [
        ["--help"], ["-h"], ["x"], ["--cpu"], ["--cpu", "--fresh"], ["--cpus", "1"], ["--fresh=1"],
        ["--no-fresh"], ["--tenants", "x"], ["--no-cpu", "1"], ["--io_threads", "1"], ["--"],
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_alone(words: list[str]) -> None:
    assert plain_arguments(words) is None


def test_a_daemon_starts_without_what_it_does_not_need(tmp_path: Path) -> None:
    """Each takes a tenth of the time in which a daemon is to serve again, or more."""
    script = (
        "import sys; from unittest.mock import patch\n"
        "import kvstore.daemon.service as service\n"
        "from kvstore.__main__ import main\n"
        "def start(*_, **__):\n"
        "    slow = 'typer pydantic rich structlog waitress prometheus_client lmdb'.split()\n"
        "    print([name for name in slow if name in sys.modules])\n"
        "    sys.stdout.flush(); __import__('os')._exit(0)\n"
        "service.Service._start = start\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", "--state", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout == "[]\n", done.stderr

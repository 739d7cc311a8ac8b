"""`kvstore bench --daemon` gives its figures and leaves nothing; peers end with compare.py.

Sizes are cut; what is timed is not judged. That bytes are right is asserted by the benches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvstore
from kvstore.bench import command, daemon
from kvstore.bench.report import ABSENT
from kvstore.bench.serving import PrivateDaemon, RunningDaemon, accepts
from kvstore.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SPEC = kvstore.BlockSpec(1, 1, 16, 16, "int8")


def blocks_of(address: str) -> int:
    with kvstore.connect(address, SPEC) as store:
        return int(store.stats()["kvstore_cpu_blocks"])


@pytest.mark.slow
def test_a_quick_run_gives_every_figure() -> None:
    figures = {figure.name: figure for figure in command.run_daemon(quick=True)}
    assert figures.keys() == set(daemon.NAMES) - daemon.FULL_ONLY
    for figure in figures.values():
        assert figure.unit != ABSENT, figure
        assert figure.value is not None, figure
        assert figure.value > 0, figure


@pytest.mark.slow
def test_a_daemon_that_runs_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    with PrivateDaemon(tmp_path, cpu="72MiB") as running:
        running.start()
        figures = command.run_daemon(
            ["daemon_batch_rtt_us", "daemon_lookup_8192_ms", "tcp_load_16x1MiB"],
            running.address,
            quick=True,
        )
        assert blocks_of(running.address) == 0
        with pytest.raises(ConfigError, match="connect: the daemon has 72 MiB"):
            command.run_daemon(["shm_load_16x1MiB"], running.address, quick=True)
    absent = {figure.name for figure in figures if figure.unit == ABSENT}
    assert absent == {"tcp_load_16x1MiB"}
    assert {figure.name for figure in figures if figure.ratio} == {"daemon_batch_rtt_us"}


def test_names_and_addresses_that_do_not_exist_are_errors() -> None:
    with pytest.raises(ConfigError, match="only: 'put_16x1MiB' is not one of shm_load"):
        command.run_daemon(["put_16x1MiB"])
    with pytest.raises(ConfigError, match="give the daemon's Unix socket"):
        command.run_daemon(["shm_load_16x1MiB"], "tcp:127.0.0.1:1")


def test_a_killed_daemon_is_started_again_as_it_was(tmp_path: Path) -> None:
    with PrivateDaemon(tmp_path, cpu="2MiB") as private:
        private.start()
        first = private.pid
        other = RunningDaemon(private.address)
        other.kill()
        assert not accepts(private.path)
        other.start()
        try:
            assert blocks_of(private.address) == 0
            assert first != private.pid or not Path(f"/proc/{first}/exe").exists()
        finally:
            other.kill()


# Leaves a process behind, in a session of its own, as a crashed server leaves its helpers.
_LEAVE_BEHIND = """
import subprocess, sys
nothing = subprocess.DEVNULL
child = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=nothing, stderr=nothing)
print(child.pid, flush=True)
"""
_COMPARE = f"""
import subprocess, sys
from bench.peers.compare import adopt_descendants, end_descendants
adopt_descendants()
done = subprocess.run([sys.executable, "-c", {_LEAVE_BEHIND!r}], capture_output=True, text=True)
end_descendants()
print(done.stdout)
"""


def test_what_peers_leave_behind_is_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COMPARE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    left = int(done.stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(left, signal.SIGKILL)


@pytest.mark.slow
def test_a_comparison_of_nobody_else_has_our_figures() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "bench/peers/compare.py", "--daemon", "--json", "--rounds", "1"),
            *("--peers", "kvstore_tcp,mooncake_shm"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(done.stdout)["figures"]}
    assert figures["mooncake_shm"]["unit"] == ABSENT
    for way in ("kvstore_unix", "kvstore_tcp"):
        for operation in ("put_64KiB", "batch_get_16x1MiB", "lookup_16"):
            assert figures[f"{way}.{operation}"]["value"] > 0

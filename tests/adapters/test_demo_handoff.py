"""`kvstore demo --transport`: tokens are the same by every mover, on one host and on two, also when
the prefill worker is killed in mid-transfer, and nothing of the hosts is left, however it ends.

Whole runs with the smallest model are in the slow suites; wrong options are not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("torch")

from kvstore.bench.two_hosts import HostsUnavailableError, TwoHosts
from kvstore.cli import build_app
from kvstore.errors import KVStoreError
from kvstore.transport import Endpoint, TransportSettings
from kvstore.transport.handoff import HandoffCounters
from kvstore_adapters.reference.cluster_settings import Mode
from kvstore_adapters.reference.counters import TransferCounters
from kvstore_adapters.reference.demo_handoff import (
    HandoffDemoSettings,
    HandoffRun,
    handoff_report,
    handoff_table,
)
from kvstore_adapters.reference.demo_report import DemoRun
from kvstore_adapters.reference.messages import ModelSource
from kvstore_adapters.reference.results import RequestResult, RunResult

DEMO = EntryPoint("demo", "kvstore_adapters.reference.demo:command", "kvstore.commands")
NAMES = Path("/run/netns")
QUICK = ("--size", "nano", "--requests", "3", "--max-new-tokens", "4", "--document-tokens", "600")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(build_app([DEMO]), ["demo", *arguments])


def names_of(pid: int) -> list[str]:
    """Hosts that this process has made."""
    return [path.name for path in NAMES.glob(f"kvstore-{pid}-*")] if NAMES.is_dir() else []


@pytest.fixture
def need_hosts() -> None:
    try:
        TwoHosts().close()
    except HostsUnavailableError as error:
        pytest.skip(f"no two hosts: {error}")


def need_mover(name: str) -> None:
    try:
        Endpoint(TransportSettings(movers=(name,))).close()
    except (KVStoreError, ImportError) as error:
        pytest.skip(f"no {name} here: {error}")


@pytest.mark.slow
@pytest.mark.timeout(400)  # three clusters are started
@pytest.mark.usefixtures("need_hosts")
@pytest.mark.parametrize("transport", ["shm", "tcp", "ucx"])
def test_two_hosts_by_every_mover(transport: str) -> None:
    need_mover(transport)
    result = invoke(*QUICK, "--transport", transport, "--hosts", "2", "--kill-prefill", "--json")
    assert result.exit_code == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    assert printed["tokens_identical"] is True
    assert (printed["transport"], printed["hosts"]) == (transport, 2)
    runs = {run["name"]: run for run in printed["runs"]}
    assert list(runs) == ["colocated", "push", "push, killed", "pull", "pull, killed"]
    for direction in ("push", "pull"):
        run = runs[direction]
        moved = run["handoff_bytes"]
        assert (run["handoffs"], run["handoffs_failed"], run["recomputes"]) == (3, 0, 0)
        assert run["bytes_moved"] == {transport: moved}
        assert (run["cable_bytes"] >= moved) == (transport != "shm")
        assert 0 <= run["overlap"] <= 1
        assert run["handoff_tail_ms"] >= 0
        assert runs[f"{direction}, killed"]["recomputes"] > 0
    assert printed["recomputes"] > 0
    assert names_of(os.getpid()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("need_hosts")
def test_an_interrupt_leaves_no_hosts(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from kvstore.cli import build_app; "
        "from importlib.metadata import EntryPoint; "
        f"build_app([EntryPoint({DEMO.name!r}, {DEMO.value!r}, {DEMO.group!r})])"
        f"(['demo', *{QUICK!r}, '--transport', 'tcp', '--hosts', '2'])"
    )
    with (tmp_path / "output").open("w+b") as output:
        demo = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)
        give_up = time.monotonic() + 90
        while not names_of(demo.pid) and demo.poll() is None and time.monotonic() < give_up:
            time.sleep(0.02)
        assert len(names_of(demo.pid)) > 0
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) != 0
    assert names_of(demo.pid) == []


def test_options_that_do_not_fit_are_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for arguments, reason in (
        (("--hosts", "2"), "only with transport"),
        (("--kill-prefill",), "only with transport"),
        (("--transport", "pigeon"), "'pigeon' is not one of auto, shm"),
        (("--transport", "tcp", "--hosts", "3"), "hosts: 3"),
        (("--transport", "tcp", "--handoff", "store"), "not push, pull or both"),
        (("--transport", "tcp", "--layerwise"), "layerwise"),
        (("--transport", "tcp", "--max-new-tokens", "1"), "max_new_tokens"),
    ):
        wrong = invoke(*arguments)
        assert wrong.exit_code == 2, arguments
        assert reason in wrong.stderr
        assert wrong.stderr.count("\n") == 1


def test_two_hosts_without_root_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from contextlib import ExitStack

    from kvstore_adapters.reference.cluster_store import open_hosts

    settings = HandoffDemoSettings(ModelSource(size="nano"), "tcp", 2).cluster(Mode.PD, "push")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with ExitStack() as stack, pytest.raises(KVStoreError, match=r"hosts: .*need root"):
        open_hosts(settings, stack)


def test_figures_follow_from_what_moved() -> None:
    def one(name: str, mode: Mode, handoff: HandoffCounters, again: int, cable: int) -> HandoffRun:
        request = RequestResult("a", 20, [1, 2], [0.5, 1.0], latency_s=1.0, recomputes=again)
        result = RunResult([request], 1.0, TransferCounters(), TransferCounters(), {}, handoff)
        return HandoffRun(DemoRun(name, mode, result), cable)

    moved = HandoffCounters(
        received=2,
        received_bytes=400,
        early_bytes=100,
        tail_seconds=0.01,
        moved_bytes={"tcp": 400},
    )
    runs = [
        one("colocated", Mode.COLOCATED, HandoffCounters(), 0, 0),
        one("push", Mode.PD, moved, 0, 500),
        one("push, killed", Mode.PD, HandoffCounters(), 1, 0),
    ]
    settings = HandoffDemoSettings(ModelSource(), "tcp", 2, ("push",), kill_prefill=True)
    assert settings.num_runs == 3
    printed = handoff_report(settings, runs)
    figures = {figure["name"]: figure for figure in printed["figures"]}
    assert printed["bytes_moved"] == {"tcp": 400}
    assert printed["recomputes"] == 1
    assert figures["bytes_moved_tcp"]["value"] == 400
    assert figures["handoff_tail_push_ms"]["value"] == 5.0
    assert figures["overlap_push"]["value"] == 0.25
    assert figures["ttft_push_ms"]["ratio"] == 1.0
    assert printed["runs"][1]["cable_bytes"] == 500
    json.dumps(printed, allow_nan=False)
    handoff_table(runs, printed)

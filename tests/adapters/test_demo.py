"""`kvstore demo` prints the promised figures, and its texts are what the demo says they are.

Whole runs with the smallest model, through the command line (a dozen processes that load torch: in
the slow suites); the rest looks at single pieces.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("torch")

import kvstore
from kvstore.bench.serving import PrivateDaemon, RunningDaemon
from kvstore.cli import build_app
from kvstore_adapters.reference import workload
from kvstore_adapters.reference.cluster_settings import Mode
from kvstore_adapters.reference.counters import TransferCounters
from kvstore_adapters.reference.demo_report import (
    WARM,
    DemoRun,
    Name,
    report,
    table,
    tokens_identical,
)
from kvstore_adapters.reference.results import RequestResult, RunResult
from kvstore_adapters.reference.tokenizer import ByteTokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEMO = EntryPoint("demo", "kvstore_adapters.reference.demo:command", "kvstore.commands")
NAMES = ("ttft_cold_ms", *WARM, "tpot_ms", "bytes_moved")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(build_app([DEMO]), list(arguments))


@pytest.mark.slow
def test_a_small_run_prints_one_object_with_the_promised_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    result = invoke(
        *("demo", "--size", "nano", "--requests", "3", "--max-new-tokens", "4", "--json"),
        *("--document-tokens", "300", "--ssd", str(tmp_path), "--plot", str(picture)),
    )
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["tokens_identical"] is True
    assert {"commit", "machine", "figures"} <= printed.keys()
    figures = {figure["name"]: figure for figure in printed["figures"]}
    for figure in figures.values():
        assert figure.keys() == {"name", "value", "unit", "ratio", "against"}
    for name in NAMES:
        assert printed[name] > 0
        assert figures[name]["value"] == printed[name]
    assert figures["tokens_identical"]["value"] is True
    assert math.isclose(sum(printed["hit_ratio"].values()), 1.0)
    runs = {run["name"]: run for run in printed["runs"]}
    assert [run["mode"] for run in runs.values()] == ["colocated", "pd", *["pd+cache"] * 6]
    for name in (Name.DRAM, Name.SHARED, Name.ENGINE_KILLED, Name.DAEMON_KILLED):
        assert runs[name]["hit_ratio"]["cpu"] == 1.0, name
    assert runs[Name.SSD]["hit_ratio"]["ssd"] > 0
    assert runs[Name.SSD]["hit_ratio"]["missed"] == pytest.approx(0.0)
    assert runs[Name.SSD]["bytes_ssd_read"] > 0
    assert all(len(run["requests"]) == 3 for run in runs.values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture], "the daemon's directory is gone"


QUICK = ("--size", "nano", "--requests", "2", "--max-new-tokens", "2", "--document-tokens", "200")


def blocks_of(address: str) -> int:
    with kvstore.connect(address, kvstore.BlockSpec(1, 1, 16, 16, "int8")) as store:
        return int(store.stats()["kvstore_cpu_blocks"])


@pytest.mark.slow
def test_a_daemon_of_somebody_else_is_used_and_left_as_it_was(tmp_path: Path) -> None:
    with PrivateDaemon(tmp_path, cpu="64MiB") as daemon:
        daemon.start()
        result = invoke("demo", *QUICK, "--connect", daemon.address, "--json")
        assert result.exit_code == 0, result.stderr
        assert blocks_of(daemon.address) == 0
    printed = json.loads(result.stdout)
    runs = {run["name"]: run for run in printed["runs"]}
    assert runs[Name.SHARED]["hit_ratio"]["cpu"] == 1.0
    assert runs[Name.ENGINE_KILLED]["hit_ratio"]["cpu"] == 1.0
    assert printed["ttft_warm_engine_restart_ms"] > 0
    assert printed["ttft_warm_daemon_restart_ms"] is None
    assert Name.DAEMON_KILLED not in runs


@pytest.mark.slow
def test_a_daemon_of_somebody_else_is_killed_when_told_and_runs_again(tmp_path: Path) -> None:
    with PrivateDaemon(tmp_path, cpu="64MiB") as daemon:
        daemon.start()
        result = invoke("demo", *QUICK, "--connect", daemon.address, "--kill-daemon", "--json")
        assert result.exit_code == 0, result.stderr
        try:
            assert blocks_of(daemon.address) == 0
        finally:
            RunningDaemon(daemon.address).kill()
    printed = json.loads(result.stdout)
    assert printed["ttft_warm_daemon_restart_ms"] > 0
    runs = {run["name"]: run for run in printed["runs"]}
    assert runs[Name.DAEMON_KILLED]["hit_ratio"]["cpu"] == 1.0


def fake_runs() -> list[DemoRun]:
    """Runs of one request that took two seconds."""

    def one(name: str, mode: Mode) -> DemoRun:
        request = RequestResult("a", 20, [1, 2, 3], [0.5, 1.0, 2.0], latency_s=2.0)
        counters = TransferCounters(queried_blocks=4, hit_cpu_blocks=1, hit_ssd_blocks=2)
        return DemoRun(name, mode, RunResult([request], 2.0, counters, counters, {}))

    return [
        one(Name.COLOCATED, Mode.COLOCATED),
        one(Name.PD, Mode.PD),
        *(one(name, Mode.PD_CACHE) for name in (Name.COLD, *WARM.values())),
    ]


def test_runs_that_were_left_out_have_no_figure() -> None:
    runs = [run for run in fake_runs() if run.name not in (Name.DAEMON_KILLED, Name.SSD)]
    printed = report(runs)
    assert printed["ttft_warm_engine_restart_ms"] == 500.0
    assert printed["ttft_warm_daemon_restart_ms"] is None
    assert "ttft_warm_daemon_restart_ms" not in {each["name"] for each in printed["figures"]}
    table(runs, printed)


def test_figures_follow_from_the_requests() -> None:
    printed = report(fake_runs())
    assert printed["ttft_cold_ms"] == 500.0
    assert printed["tpot_ms"] == 750.0
    assert printed["hit_ratio"] == {"cpu": 0.25, "ssd": 0.5, "missed": 0.25}
    assert printed["runs"][0]["output_tokens_per_s"] == 1.5
    assert printed["runs"][0]["prompt_tokens_per_s"] == 10.0
    json.dumps(printed, allow_nan=False)


@pytest.mark.parametrize("what", ["other token", "failed", "missing"])
def test_tokens_are_not_identical_when_one_run_differs(what: str) -> None:
    runs = fake_runs()
    assert tokens_identical(runs)
    last = runs[-1].result
    if what == "other token":
        last.requests[0].token_ids[-1] = 9
    elif what == "failed":
        last.requests[0].error = "no worker is left"
    else:
        last.requests.clear()
    assert not tokens_identical(runs)
    json.dumps(report(runs), allow_nan=False)
    table(runs, report(runs))


def test_the_texts_are_a_long_document_and_a_long_conversation() -> None:
    tokenizer = ByteTokenizer()
    document = workload.document_tokens(tokenizer, None)
    assert 8_000 <= len(document) <= 12_000
    assert len(workload.document_tokens(tokenizer, 100)) == 100
    turns = workload.conversation_texts()
    assert len(turns) >= 6
    assert all(later.startswith(earlier) for earlier, later in pairwise(turns))
    questions = workload.question_tokens(tokenizer, document)
    assert len(questions) >= 3
    assert all(question[: len(document)] == document for question in questions)


def test_any_number_of_requests_can_be_made_and_copies_share_no_prefix() -> None:
    for count in (1, 2, 13, 40):
        sessions = workload.make_sessions(ByteTokenizer(), count, 4, 200)
        prompts = [prompt for session in sessions for prompt in session]
        assert len(prompts) == count
        assert len({prompt.request_id for prompt in prompts}) == count
    starts = {tuple(session[0].token_ids[:16]) for session in sessions}
    assert len(starts) == len(sessions)


def test_errors_are_one_line_and_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = invoke("demo", "--requests", "0")
    assert (wrong.exit_code, wrong.stderr) == (2, "kvstore: num_requests: 0 is not positive\n")
    alone = invoke("demo", "--kill-daemon")
    assert (alone.exit_code, alone.stderr[:22]) == (2, "kvstore: kill_daemon: ")
    missing = invoke("demo", "--ssd", str(tmp_path / "none"))
    assert missing.exit_code == 2
    find_spec: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    without = invoke("demo")
    assert without.exit_code == 2
    assert without.stderr == (
        "kvstore: torch is not installed; run: pip install 'kvstore-llm[torch]'\n"
    )


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_an_error_without_traceback(tmp_path: Path) -> None:
    missing = invoke("demo", "--model", str(tmp_path))
    assert missing.exit_code == 2
    assert missing.stderr == f"kvstore: model: there is no {tmp_path}/config.json\n"
    (tmp_path / "config.json").write_text('{"model_type": "parrot"}')
    foreign = invoke("demo", "--model", str(tmp_path))
    assert foreign.exit_code == 1
    assert "parrot" in foreign.stderr
    unknown = invoke("demo", "--size", "huge")
    assert unknown.exit_code == 2
    assert "'huge' is not one of" in unknown.stderr
    assert foreign.stderr.count("\n") == 1


def test_the_command_line_knows_its_version_and_its_plugins() -> None:
    assert invoke("--version").exit_code == 0
    assert "demo" in invoke("--help").stdout
    lost = EntryPoint("lost", "kvstore_no_such_module:command", "kvstore.commands")
    app = build_app([lost])
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0
    broken = CliRunner().invoke(app, ["lost"])
    assert broken.exit_code == 1
    assert "kvstore_no_such_module" in broken.stderr


def test_the_package_registers_the_demo_and_ships_its_texts() -> None:
    root = Path(kvstore.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["kvstore.commands"] == {"demo": DEMO.value}
    packages = project["tool"]["setuptools"]["package-data"]
    assert packages["kvstore_adapters.reference"] == ["data/*"]

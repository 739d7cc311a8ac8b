"""Proves that figures have one shape however they are printed, and that a quick bench gives them.

The command runs in process with sizes cut; what it times is not judged here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from kvstore.bench import command
from kvstore.bench.report import Figure, Report, commit, machine, rounded
from kvstore.bench.timing import in_turn, median, speedup
from kvstore.errors import ConfigError

FIGURES = [
    Figure("put", 12.345678, "GB/s", 0.98765, "memcpy"),
    Figure("alone", 3.0, "us"),
    Figure.absent("peer", "not installed"),
]
# What the design names; more are allowed.
PROMISED = {
    "put_16x1MiB",
    "load_16x1MiB",
    "get_64KiB_p50_us",
    "hash_128k_ms",
    "match_8192_ms",
    "hash_match_128k_ms",
    "index_bytes_per_block",
    "index_lookup_growth",
    "ssd_write_1MiB",
    "ssd_read_1MiB",
    "recover_100k_blocks_s",
}


def test_json_is_one_object_of_the_promised_shape(capsys: pytest.CaptureFixture[str]) -> None:
    Report(FIGURES).show(as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"commit", "machine", "figures"}
    assert printed["figures"] == [
        {"name": "put", "value": 12.35, "unit": "GB/s", "ratio": 0.9877, "against": "memcpy"},
        {"name": "alone", "value": 3.0, "unit": "us", "ratio": None, "against": None},
        {
            "name": "peer",
            "value": None,
            "unit": "absent",
            "ratio": None,
            "against": "not installed",
        },
    ]
    assert printed["commit"] == commit() != ""
    assert printed["machine"] == machine() != ""


def test_json_is_not_wrapped_or_marked_up_however_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "[bold]" + "x" * 500
    Report([Figure(name, 1.0, "s")]).show(as_json=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out)["figures"][0]["name"] == name


def test_a_quick_run_says_so() -> None:
    assert Report(FIGURES, quick=True).as_dict()["quick"] is True
    assert "Quick" in Report(FIGURES, quick=True).as_markdown()


def test_markdown_has_a_row_a_figure() -> None:
    rows = Report(FIGURES).as_markdown().splitlines()
    assert rows[2] == "| figure | value | unit | ratio | against |"
    assert rows[4] == "| put | 12.35 | GB/s | 0.9877 | memcpy |"
    assert rows[6] == "| peer |  | absent |  | not installed |"
    assert len(rows) == 4 + len(FIGURES)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_no_number_becomes_null(value: float | None) -> None:
    assert rounded(value) is None


def test_rounds_alternate_their_direction_and_keep_their_numbers() -> None:
    order: list[tuple[str, int]] = []
    calls = {name: (lambda number, name=name: order.append((name, number))) for name in ("a", "b")}
    taken = in_turn(calls, 3)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert all(len(seconds) == 3 and (seconds >= 0).all() for seconds in taken.values())


def test_speedup_is_the_median_of_ratios_of_one_round() -> None:
    ours, theirs = np.array([1.0, 10.0, 2.0]), np.array([2.0, 20.0, 4.0])
    assert speedup(ours, theirs) == 2.0
    assert median(ours) == 2.0


def test_every_promised_figure_can_be_asked_for() -> None:
    assert set(command.NAMES) >= PROMISED
    assert len(set(command.NAMES)) == len(command.NAMES)


def test_an_unknown_figure_is_named() -> None:
    with pytest.raises(ConfigError, match="only: 'speed' is not one of"):
        command.run(["speed"])


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ssd: .*absent is not a directory"):
        command.run(["recover_100k_blocks_s"], tmp_path / "absent", quick=True)


def test_quick_bench_prints_just_what_was_asked_for(tmp_path: Path) -> None:
    only = ["put_16x1MiB", "load_16x1MiB", "get_64KiB_p50_us", "match_8192_ms", "hash_128k_ms"]
    only.append("recover_100k_blocks_s")
    app = typer.Typer()
    app.command()(command.bench)
    arguments = ["--quick", "--json", "--ssd", str(tmp_path), "--only", ",".join(only)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["quick"] is True
    figures = {figure["name"]: figure for figure in printed["figures"]}
    assert set(figures) == set(only)
    assert all(figure["value"] > 0 for figure in figures.values())
    for name in ("put_16x1MiB", "load_16x1MiB", "get_64KiB_p50_us"):
        assert figures[name]["ratio"] > 0
        assert figures[name]["against"] == "memcpy, one thread"
    assert list(tmp_path.iterdir()) == []

"""One shape for all figures: {"commit", "machine", "figures"}, as JSON, table or Markdown."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore.config import format_bytes

ABSENT = "absent"  # unit of something that could not be measured here; `against` says why


@dataclass(frozen=True)
class Figure:
    """A measured value; `ratio` compares it with `against`, which was timed in the same run.

    Above 1 is better: ours / theirs for a rate, theirs / ours for a time.
    """

    name: str
    value: float | None
    unit: str
    ratio: float | None = None
    against: str | None = None

    @classmethod
    def absent(cls, name: str, why: str) -> Figure:
        return cls(name, None, ABSENT, None, why)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": rounded(self.value),
            "unit": self.unit,
            "ratio": rounded(self.ratio),
            "against": self.against,
        }


@dataclass(frozen=True)
class Report:
    """Figures of one run. `quick`: sizes and durations were cut, so the figures only indicate."""

    figures: Sequence[Figure]
    quick: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "commit": commit(),
            "machine": machine(),
            **({"quick": True} if self.quick else {}),
            "figures": [figure.as_dict() for figure in self.figures],
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), allow_nan=False)

    def as_markdown(self) -> str:
        lines = [
            f"Machine: {machine()}. Commit: {commit()}.{' Quick run.' if self.quick else ''}",
            "",
            "| figure | value | unit | ratio | against |",
            "|---|---:|---|---:|---|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in self._rows()]
        return "\n".join(lines)

    def as_table(self) -> Table:
        table = Table(title=f"{machine()}, {commit()}{', quick run' if self.quick else ''}")
        for column in ("figure", "value", "unit", "ratio", "against"):
            right = column in ("value", "ratio")
            table.add_column(
                column,
                justify="right" if right else "left",
                overflow="fold",
                no_wrap=column != "against",
            )
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> Iterable[tuple[str, str, str, str, str]]:
        for figure in self.figures:
            yield (
                figure.name,
                _text(figure.value),
                figure.unit,
                _text(figure.ratio),
                figure.against or "",
            )

    def show(self, *, as_json: bool = False, as_markdown: bool = False) -> None:
        """Print to stdout: one JSON object, Markdown, or a table."""
        if as_json or as_markdown:
            text = self.as_json() if as_json else self.as_markdown()
            Console(soft_wrap=True, markup=False, highlight=False).print(text, end="\n")
        else:
            Console().print(self.as_table())


def rounded(value: float | None) -> float | None:
    """Four significant digits: more would be noise. None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def _text(value: float | None) -> str:
    short = rounded(value)
    return "" if short is None else f"{short:,.10g}"


def commit() -> str:
    """The checkout's commit, "-dirty" when it has changes; without a checkout the version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return done.stdout.strip()
    try:
        return metadata.version("kvstore-llm")
    except metadata.PackageNotFoundError:
        return "unknown"


def machine() -> str:
    """CPU model, cores that we may use, memory, kernel."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {format_bytes(memory)}, "
        f"{platform.system()} {platform.release()}"
    )


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.lower().startswith(("model name", "cpu part")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()

"""What README.md shows is so.

Its Python examples run as they stand, one after the other as a reader would type them, in a
directory of their own, with the daemon running that they connect to. Its commands and their flags
exist. Its tables have every setting of the store, the daemon and tenants with its default, and say
what each means. Files that the documents link to exist.

`python tests/unit/test_readme.py` rewrites the tables' names and defaults and keeps the meanings.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from kvstore.cli import build_app
from kvstore.config import DaemonConfig, StoreConfig, TenantConfig
from kvstore.daemon.service import Service

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("[CS]*.md"))]

_HEAD = ["| setting | default | meaning |", "|---|---|---|"]
# By what stands in the comments around a table.
TABLES = {
    "settings": dataclasses.fields(StoreConfig),
    "daemon settings": dataclasses.fields(DaemonConfig)[len(dataclasses.fields(StoreConfig)) :],
    "tenant settings": dataclasses.fields(TenantConfig),
}
# Found out at the start; the meaning says how.
_DERIVED = {"listen", "state"}


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of each line in the documents' blocks that begins with `kvstore`, comments cut."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("kvstore ")]
    inline = re.findall(r"`(kvstore [a-z][^`]*)`", text)
    return [words[1:] for words in found + [shlex.split(line) for line in inline]]


def table_in(text: str, which: str) -> str:
    inside = text.partition(f"<!-- {which}:")[2].partition(f"<!-- end of {which} -->")[0]
    return inside.partition("-->\n")[2]


def meanings_in(table: str) -> dict[str, str]:
    rows = (row.split(" | ", 2) for row in table.splitlines()[len(_HEAD) :])
    return {row[0].strip("|` "): row[2].removesuffix(" |") for row in rows}


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.name in _DERIVED:
        return "derived"
    return f"`{field.default}`" if field.default not in ("", (), dataclasses.MISSING) else "none"


def settings_table(which: str, meanings: dict[str, str]) -> str:
    rows = [
        f"| `{field.name}` | {default_of(field)} | {meanings.get(field.name, '')} |\n"
        for field in TABLES[which]
    ]
    return "\n".join(_HEAD) + "\n" + "".join(rows)


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = examples(README.read_text())
    assert len(found) == 4
    names: dict[str, Any] = {}
    with Service(DaemonConfig(listen="unix:kvstore.sock", cpu="256MiB", http="")):
        for i, example in enumerate(found):
            exec(compile(example, f"README.md, example {i + 1}", "exec"), names)


def test_commands_and_their_flags_exist() -> None:
    known: Any = typer.main.get_command(build_app())
    context = known.make_context("kvstore", [], resilient_parsing=True)
    for words in commands(README.read_text()):
        command = known.get_command(context, words[0])
        assert command is not None, words
        flags = {flag for param in command.get_params(context) for flag in param.opts}
        assert {word for word in words if word.startswith("--")} <= flags, words


@pytest.mark.parametrize("which", TABLES)
def test_settings_tables_have_every_setting_with_its_default_and_meaning(which: str) -> None:
    table = table_in(README.read_text(), which)
    meanings = meanings_in(table)
    assert table == settings_table(which, meanings), "run python tests/unit/test_readme.py"
    assert not [name for name, meaning in meanings.items() if not meaning.strip()]


@pytest.mark.skipif(not (ROOT / "CONTRIBUTING.md").exists(), reason="a partial copy of the tree")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def _rewrite() -> None:
    text = README.read_text()
    for which in TABLES:
        table, end = table_in(text, which), f"<!-- end of {which} -->"
        text = text.replace(table + end, settings_table(which, meanings_in(table)) + end)
    README.write_text(text)


if __name__ == "__main__":
    _rewrite()

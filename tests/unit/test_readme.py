"""What README.md shows is so.

Its Python examples run as they stand, one after the other as a reader would type them, in a
directory of their own. Its settings table has every setting of `StoreConfig` with its default, and
says what each means. Files that the documents link to exist.

`python tests/unit/test_readme.py` rewrites the table's names and defaults and keeps the meanings.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from kvstore.config import StoreConfig

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("[CS]*.md"))]

_BEGIN, _END = "<!-- settings:", "<!-- end of settings -->"
_HEAD = ["| setting | default | meaning |", "|---|---|---|"]


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def table_in(text: str) -> str:
    inside = text.partition(_BEGIN)[2].partition(_END)[0]
    return inside.partition("-->\n")[2]


def meanings_in(table: str) -> dict[str, str]:
    rows = (row.split(" | ", 2) for row in table.splitlines()[len(_HEAD) :])
    return {row[0].strip("|` "): row[2].removesuffix(" |") for row in rows}


def settings_table(meanings: dict[str, str]) -> str:
    rows = []
    for field in dataclasses.fields(StoreConfig):
        default = "none" if field.default == "" else f"`{field.default}`"
        meaning = meanings.get(field.name, "")
        rows.append(f"| `{field.name}` | {default} | {meaning} |\n")
    return "\n".join(_HEAD) + "\n" + "".join(rows)


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = examples(README.read_text())
    assert len(found) == 3
    names: dict[str, Any] = {}
    for i, example in enumerate(found):
        exec(compile(example, f"README.md, example {i + 1}", "exec"), names)


def test_settings_table_has_every_setting_with_its_default_and_meaning() -> None:
    table = table_in(README.read_text())
    meanings = meanings_in(table)
    assert table == settings_table(meanings), "run python tests/unit/test_readme.py"
    assert not [name for name, meaning in meanings.items() if not meaning.strip()]


@pytest.mark.skipif(not (ROOT / "CONTRIBUTING.md").exists(), reason="a partial copy of the tree")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def _rewrite() -> None:
    text = README.read_text()
    table = table_in(text)
    README.write_text(text.replace(table + _END, settings_table(meanings_in(table)) + _END))


if __name__ == "__main__":
    _rewrite()

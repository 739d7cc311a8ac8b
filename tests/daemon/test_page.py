"""The status page in a real browser: what the daemon says is what a person reads.

Headless Chromium loads the page from a real HTTP server around a made-up daemon; the DOM after its
script ran, and a screenshot, are looked at. Time in the browser is virtual, so nothing waits.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import kvstore.daemon.http
from kvstore.daemon.http import HttpServer, page, page_policy, start_http
from kvstore.errors import StoreClosedError
from tests.daemon.served import HOSTILE, FakeService, make_status

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
PNG_SIZE = slice(16, 24)


class Document(HTMLParser):
    """The text of each element that has an id, and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self.tags: list[str] = []
        self.attributes: dict[str, dict[str, str | None]] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        identity = dict(attrs).get("id") or ""
        if identity:
            self.attributes[identity] = dict(attrs)
        if tag not in ("meta", "link", "input", "br"):
            self._open.append((tag, identity))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, identity in self._open:
            if identity:
                self.text[identity] = self.text.get(identity, "") + data.replace("\xa0", " ") + "|"


Browse = Callable[..., bytes]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    def run(server: HttpServer, *flags: str) -> bytes:
        assert CHROMIUM is not None
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--virtual-time-budget=9000",
                *flags,
                f"http://{server.address}/",
            ],
            capture_output=True,
            check=True,
            timeout=90,
        )
        return done.stdout

    return run


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def server(service: FakeService) -> Iterator[HttpServer]:
    with start_http(service, "127.0.0.1:0") as started:
        yield started


def document(browse: Browse, server: HttpServer) -> Document:
    return Document(browse(server, "--dump-dom").decode())


def test_values_of_the_status_are_on_the_page(browse: Browse, server: HttpServer) -> None:
    found = document(browse, server)
    text = found.text
    assert text["state"] == "serving|"
    for part in ("version 0.2.0", "up 1 d 2 h", "pid 4242", "unix:/run/kvstore/kvstore.sock"):
        assert part in text["about"]
    for part in ("65.1 %", "2.3 GiB/s", "512 MiB/s", "431/s", "12", "open: 2", "9001"):
        assert part in text["figures"]
    for part in ("9.1 GiB of 16.0 GiB · 56.9 %", "61.0 GiB of 64.0 GiB · 95.3 %", "9318 blocks"):
        assert part in text["tiers"]
    for part in ("hit in cpu|701 k · 56.8 %", "miss: was evicted|31.0 k", "miss: reason not told"):
        assert part in text["asked"]
    assert "00d41f0c00d41f0c…|1: Qwen/Qwen3-8B|512|9000" in text["hot"]
    assert "acquire|100|" in text["requests"]
    assert '(default)|9000|8.0 GiB| · no quota|60.0 GiB| · no quota|a"b\\c|318|' in text["tenants"]
    assert "1.1 GiB of 4.0 GiB" in text["tenants"]
    assert "Qwen/Qwen3-8B" in text["namespaces"]
    assert "engine-0|5001|unix|1 h 23 min|3|81.2 k|31.0 MiB|12.0 MiB" in text["clients"]
    assert "over its budget, 31 blocks stay in DRAM" in text["errors"]
    assert "hidden" in found.attributes["banner"]
    assert "hidden" not in found.attributes["all"]


def test_charts_have_lines_axes_and_units(browse: Browse, server: HttpServer) -> None:
    found = document(browse, server)
    for identity, ticks in (("hits", ("0 %", "50 %", "100 %")), ("flow", ("0 B/s", "2.0 GiB/s"))):
        for tick in ticks:
            assert f"|{tick}|" in found.text[identity]
        assert len(re.findall(r"\|\d\d:\d\d:\d\d", found.text[identity])) >= 3
    assert found.tags.count("path") == 3
    assert "load 1.5 GiB/s" in found.text["flow"]


@pytest.mark.parametrize(
    "act",
    [
        'box.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));' * 2,
        'const at = box.getBoundingClientRect(); box.dispatchEvent(new PointerEvent("pointermove",'
        " { clientX: at.right - 6 - (at.width - 60) / 299 }));",
    ],
    ids=["keys", "pointer"],
)
def test_values_of_the_past_can_be_read_by_keys_and_pointer(
    browse: Browse, server: HttpServer, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    script = f"<script>setTimeout(() => {{ const box = charts.hits.box; {act} }}, 1000);</script>"
    text = page().replace(b"</body>", script.encode() + b"</body>")
    monkeypatch.setattr(kvstore.daemon.http, "page", lambda: text)
    page_policy.cache_clear()
    try:
        found = document(browse, server)
    finally:
        monkeypatch.undo()
        page_policy.cache_clear()
    before_last = make_status()["history"][-2][1]
    assert f"hit ratio {round(before_last * 100, 1):g} %" in found.text["hits"]
    assert "now" not in found.text["hits"]
    assert "now" in found.text["flow"]
    assert found.tags.count("path") == 3


def test_text_of_clients_is_never_markup(browse: Browse, server: HttpServer) -> None:
    found = document(browse, server)
    assert HOSTILE in found.text["clients"]
    assert HOSTILE in found.text["errors"]
    assert "img" not in found.tags


def test_a_daemon_without_history_clients_or_ssd_is_shown_too(
    browse: Browse, server: HttpServer, service: FakeService
) -> None:
    status = make_status()
    status.update(history=[], hot_prefixes=[], tenants=[], namespaces=[], clients=[])
    status.update(recent_errors=[], metrics={}, adopted=None, tiers=status["tiers"][:1])
    status["rates"] = dict.fromkeys(status["rates"], None)
    service.values = status
    text = document(browse, server).text
    assert "Nobody is connected." in text["clients"]
    assert "some seconds of history" in text["hits"]
    assert "Hit ratio, 10 s|\u2013|" in text["figures"]
    assert "None yet." in text["asked"]
    assert not re.search(r"undefined|NaN|null|\[object", "".join(text.values()))


def failing(service: FakeService, fails: Callable[[int], bool]) -> Callable[[], dict[str, Any]]:
    asked = 0

    def status() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if fails(asked):
            raise StoreClosedError("the store is closed")
        return service.values

    return status


def test_a_daemon_that_stops_answering_is_said_so_and_values_stay(
    browse: Browse, server: HttpServer, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "status", failing(service, lambda asked: asked > 1))
    found = document(browse, server)
    assert "does not answer" in found.text["banner"]
    assert "Values are those of" in found.text["banner"]
    assert "hidden" not in found.attributes["banner"]
    assert found.text["state"] == "not answering|"
    assert "9.1 GiB of 16.0 GiB" in found.text["tiers"]


def test_a_page_recovers_with_its_daemon_and_says_that_it_is_a_new_one(
    browse: Browse, server: HttpServer, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = failing(service, lambda asked: asked == 2)

    def status() -> dict[str, Any]:
        found = answers()
        service.values = {**found, "epoch": "another", "uptime_seconds": 3.0}
        return found

    monkeypatch.setattr(service, "status", status)
    found = document(browse, server)
    assert found.text["state"] == "serving|"
    assert "The daemon was started again at" in found.text["banner"]


def test_beyond_loopback_the_page_asks_for_the_token(browse: Browse, service: FakeService) -> None:
    with start_http(service, "0.0.0.0:0", b"secret") as server:
        found = document(browse, server)
    assert "hidden" not in found.attributes["ask"]
    assert "hidden" in found.attributes["all"]
    assert found.text["state"] == "token needed|"


@pytest.mark.parametrize("size", ["1280,1500", "400,2600"])
def test_a_screenshot_has_its_size_and_is_not_blank(
    browse: Browse, server: HttpServer, tmp_path: Path, size: str
) -> None:
    path = tmp_path / "page.png"
    browse(server, f"--window-size={size}", f"--screenshot={path}")
    data = path.read_bytes()
    width, height = (int.from_bytes(data[PNG_SIZE][i : i + 4], "big") for i in (0, 4))
    assert f"{width},{height}" == size
    assert len(data) > 50_000

"""No client's slow request keeps another's, or its own others, from being answered.

Disks that are full up or hang are stood in for by what the write-behind queue says. Proved: a
flush, a check of everything and promised commits that wait for room hold up no removal and no
other promise past its own time; requests that were answered leave nothing behind, whatever deadline
they asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore import _native, wire
from kvstore.daemon.service import Service
from kvstore.daemon.waiting import Waiting
from kvstore.tiers.write_behind import WriteBehind
from tests.daemon.daemon_support import SECONDS, SPEC, RawClient, chain
from tests.daemon.test_requests import made


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    config = made(tmp_path, ssd=str(tmp_path / "ssd"), ssd_capacity="16MiB", ssd_segment="4MiB")
    with Service(config) as running:
        yield running


def clients(service: Service, count: int) -> list[RawClient]:
    return [RawClient(service.config.listen) for _ in range(count)]


def test_flushes_and_checks_hold_up_nobody(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, go_on = threading.Event(), threading.Event()

    def check(_: float) -> dict[str, Any]:
        checking.set()
        go_on.wait(SECONDS)
        return {}

    monkeypatch.setattr(service, "verify", check)
    assert service._tiers.ssd is not None
    writer = service._tiers.ssd._writer
    monkeypatch.setattr(WriteBehind, "_is_idle", lambda _: go_on.is_set())
    many = clients(service, 7)
    with ThreadPoolExecutor(8) as threads:
        slow = [threads.submit(client.call, wire.Flush(SECONDS)) for client in many[:6]]
        slow.append(threads.submit(many[6].call, wire.AdminVerify(SECONDS)))
        assert checking.wait(SECONDS)
        for client in clients(service, 6):  # on whichever lane
            with client:
                assert client.put(1, 4, ack=0) == 0
                assert client.call(wire.Remove(wire.pack_chain(chain(1, 4)))) >= 1
        assert not any(each.done() for each in slow)
        go_on.set()
        with RawClient(service.config.listen) as last:
            last.put(2, 4)  # what is written next finds that all is
        assert all(each.result(SECONDS) in (True, {}) for each in slow)
    with writer._condition:
        assert not writer._flushes
    for client in many:
        client.close()


def test_a_flush_ends_with_its_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WriteBehind, "_is_idle", lambda _: False)
    with RawClient(service.config.listen) as client:
        assert client.call(wire.Flush(0.05)) is False
        assert client.call(wire.Flush(0.0)) is False
    monkeypatch.undo()
    with RawClient(service.config.listen) as client:
        assert client.call(wire.Flush(SECONDS)) is True


def test_a_promise_that_waited_in_line_does_not_wait_as_long_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def no_room(_: object, job: object, timeout: float = 0.0) -> bool:
        waits.append(timeout)
        return False

    tiers = service._tiers
    assert tiers.ssd is not None
    monkeypatch.setattr(type(tiers.ssd), "write_later", no_room)
    with RawClient(service.config.listen) as client:
        assert client.put(1, 4, ack=1) == 0

        class Late:
            """A task that has been in line for longer than a promise may wait."""

            def __init__(self, body: bytes) -> None:
                self.id, self.kind, self.body, self.age_seconds = 0, wire.Op.COMMIT, body, 30.0

        requests = service._server._requests
        admitted = next(iter(service._server._clients.values()))
        task: Any = Late(wire.pack_u64(0, 1, 0) + wire.pack_chain(chain(1, 4)))
        assert requests.commit(task, admitted) == wire.pack_u64(0)
    assert 0 < waits[0] <= 10
    assert waits[1] == 0


def test_what_was_answered_is_forgotten_before_its_deadline() -> None:
    waiting = Waiting()
    ends: list[bool] = []
    far = time.monotonic() + 3600
    pending: list[Future[None]] = []
    for number in range(10_000):
        future: Future[None] = Future()
        if number % 100 == 0:
            pending.append(future)
        else:
            future.set_result(None)
        waiting.add(future, far + number, ends.append)
    assert len(waiting) == len(pending) == 100
    later: list[Future[None]] = [Future() for _ in range(2000)]
    for future in later:
        waiting.add(future, far, ends.append)
    for future in later:
        future.set_result(None)
    waiting.add(Future(), far, ends.append)
    assert len(waiting._heap) <= 2 * len(waiting) + 64
    for future in pending:
        future.set_result(None)
    assert ends == [True] * 12_000


def test_namespaces_of_a_tenant_are_bounded(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs memory for as long as the daemon lives, whether its client does or not."""
    monkeypatch.setattr("kvstore.tiers.local.NAMESPACES_MAX", 3)
    address = service.config.listen
    for number in (0, 1, 2, 1):
        RawClient(address, kvstore.Namespace(f"m{number}", SPEC)).close()
    with pytest.raises(_native.RemoteError, match="namespace: there are 3"):
        RawClient(address, kvstore.Namespace("m3", SPEC))
    tiers = service._tiers
    assert tiers.bind(kvstore.Namespace("m0", SPEC)) == 0

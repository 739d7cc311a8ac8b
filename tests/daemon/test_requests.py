"""What the daemon answers in Python: greetings over TCP and of tenants, reads that wait for the
ssd, levels above memory, and calls.

A service in this process, clients that speak frames by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import _native, wire
from kvstore.auth import proof_of
from kvstore.config import DaemonConfig
from kvstore.daemon.service import Service
from tests.daemon.daemon_support import (
    SECONDS,
    SIZE,
    SPEC,
    RawClient,
    chain,
    content,
    wait_until,
)

SECRET = b"0123456789abcdef"


def made(tmp_path: Path, **settings: Any) -> DaemonConfig:
    base: dict[str, Any] = {
        "cpu": "1MiB", "chunk": "128KiB", "listen": f"unix:{tmp_path}/s", "http": "",
        "hold_seconds": 0,
    }  # fmt: skip
    return DaemonConfig(**{**base, **settings})


@pytest.fixture
def with_ssd(tmp_path: Path) -> Iterator[Service]:
    config = made(tmp_path, ssd=str(tmp_path / "ssd"), ssd_capacity="16MiB", ssd_segment="4MiB")
    with Service(config) as service:
        yield service


def push_out(client: RawClient) -> None:
    """Put so much that what was there before leaves DRAM."""
    for first in range(100, 110):
        client.put(first, 16, ack=1)


def test_what_is_on_ssd_is_read_in_for_who_waits(with_ssd: Service) -> None:
    with RawClient(with_ssd.config.listen) as client:
        assert client.put(1, 8, ack=2) == 2
        push_out(client)
        assert len(client.get(1, 8)) == 0
        assert np.array_equal(client.get(1, 8, wait=SECONDS), content(1, 8))
        values = client.call(wire.Stats())
        assert values["kvstore_hit_ssd_blocks_total"] == 8
        assert values["kvstore_leases"] == 0


def test_a_read_that_waits_ends_at_its_deadline(
    with_ssd: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import Future

    tiers = with_ssd._tiers
    with RawClient(with_ssd.config.listen) as client:
        client.put(1, 8, ack=1)
        push_out(client)
        monkeypatch.setattr(tiers, "promote", lambda *_: Future())  # a disk that hangs
        assert len(client.get(1, 8, wait=0.05)) == 0
        assert client.call(wire.Stats())["kvstore_deadline_exceeded_total"] == 1
    wait_until(lambda: tiers.core.stats()["leases"] == 0)


def test_a_client_that_dies_while_it_waits_leaves_no_lease(
    with_ssd: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import Future

    tiers, hanging = with_ssd._tiers, Future[Any]()
    client = RawClient(with_ssd.config.listen)
    client.put(1, 8, ack=1)
    push_out(client)
    client.put(1, 8)
    client.put(2, 8, ack=1)
    monkeypatch.setattr(tiers, "promote", lambda *_: hanging)
    push_out(client)
    hashes = chain(1, 8)
    with pytest.raises(TimeoutError):
        client.connection.acquire(-1.0, 20.0, 0, hashes.array, 0, None, 0.05)
    client.close()
    wait_until(lambda: with_ssd._server.num_clients == 0)
    hanging.set_result(None)
    wait_until(lambda: tiers.core.stats()["leases"] == 0)


def test_damage_is_believed_only_when_it_is_seen(with_ssd: Service) -> None:
    with RawClient(with_ssd.config.listen) as client:
        client.put(1, 4)
        hashes = chain(1, 4)
        assert client.call(wire.Corrupt(hashes[3])) is False
        assert len(client.get(1, 4)) == 4
        lease, offsets, _, _, _ = client.connection.acquire(
            60.0, 0.0, 0, hashes.array, 0, None, SECONDS
        )
        client.connection.release(np.array([lease], np.uint64), SECONDS)
        client.memory[int(offsets[3])] ^= 1
        assert client.call(wire.Corrupt(hashes[3])) is True
        assert client.connection.match(hashes.array, 0, None, SECONDS) == 3
        assert client.call(wire.Corrupt(hashes[3])) is False  # not there any more
        with pytest.raises(_native.RemoteError, match="block_hash"):
            client.call(wire.Corrupt(b"short"))


def test_calls(with_ssd: Service) -> None:
    with RawClient(with_ssd.config.listen) as client:
        assert client.call(wire.Events()) == b""
        client.put(1, 4)
        packed = wire.pack_chain(chain(1, 4))
        assert client.call(wire.Flush(SECONDS)) is True
        assert len(client.call(wire.Events())) > 0
        assert len(client.call(wire.Describe(packed))) > 0
        push_out(client)
        assert client.call(wire.Prefetch(packed, SECONDS)) == 4
        assert client.call(wire.Remove(wire.pack_chain(chain(1, 4)[3:]))) == 1
        assert client.connection.match(chain(1, 4).array, 0, None, SECONDS) == 3
        assert client.call(wire.Clear()) is None
        assert client.connection.match(chain(1, 4).array, 0, None, SECONDS) == 0
        with pytest.raises(_native.RemoteError, match="chain"):
            client.call(wire.Remove(b"no chain"))


def test_more_connections_join_a_client_by_its_token_only(with_ssd: Service) -> None:
    address = with_ssd.config.listen
    with RawClient(address) as client:
        with RawClient(address, token=client.welcome.token) as joined:
            assert joined.welcome.client == client.welcome.client
            assert with_ssd._server.num_clients == 1
        other = kvstore.Namespace("other", SPEC)
        for token, namespace in ((b"x" * 16, None), (client.welcome.token, other)):
            with pytest.raises(_native.RemoteError, match="token: no such client"):
                RawClient(address, namespace, token=token)
    wait_until(lambda: with_ssd._server.num_clients == 0)
    with pytest.raises(_native.RemoteError, match="token: no such client"):
        RawClient(address, token=client.welcome.token)


def test_equal_namespaces_of_tenants_are_apart(tmp_path: Path) -> None:
    tenants = {"a": {"uids": [4001]}, "b": {"cpu_quota": "64KiB"}}
    with Service(made(tmp_path, tenants=tenants)) as service:
        address = service.config.listen
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o666  # the peer's uid decides
        with RawClient(address) as ours, RawClient(address, tenant="a") as a:
            ours.put(1, 4)
            assert len(a.get(1, 4)) == 0
            assert (ours.welcome.may_map, a.welcome.may_map) == (True, False)
            with pytest.raises(_native.RemoteError, match="may not map"):
                a.connection.map(False, SECONDS)
            named = {row["name"]: row for row in service.status()["tenants"]}
            assert set(named) == {"", "a", "b"}
            assert named["b"]["cpu_quota_bytes"] == 64 << 10
            assert (named[""]["blocks"], named["a"]["blocks"]) == (4, 0)
        with pytest.raises(_native.RemoteError, match="nobody"):
            RawClient(address, tenant="nobody")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_another_user_is_its_tenant_or_refused(tmp_path: Path) -> None:
    import subprocess
    import sys
    import tempfile

    code = (
        "import os, sys\nfrom kvstore import _native\n"
        "from tests.daemon.daemon_support import *\n"
        "os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))\n"
        "try:\n    client = RawClient(sys.argv[1])\n"
        "except _native.RemoteError as error:\n    print(error); sys.exit(3)\n"
        "print(client.welcome.may_map)\n"
        "try:\n    client.status()\nexcept _native.RemoteError as error:\n    print(error)\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o711)
        config = made(tmp_path, listen=f"unix:{directory}/s", tenants={"a": {"uids": [4001]}})
        with Service(config) as service:

            def connect_as(uid: int) -> tuple[int, str]:
                done = subprocess.run(
                    [sys.executable, "-c", code, service.config.listen, str(uid)],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    stdout=subprocess.PIPE, text=True, check=False,
                )  # fmt: skip
                return done.returncode, done.stdout

            code_of, said = connect_as(4001)
            assert (code_of, said.splitlines()[0]) == (0, "False")
            assert "own user" in said
            code_of, said = connect_as(4002)
            assert code_of == 3
            assert "user 4002" in said


def test_tcp_with_a_secret_proves_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    with Service(made(tmp_path, tcp="127.0.0.1:0", token_file=str(path))) as service:
        address = service.addresses[1]
        with RawClient(address, secret=SECRET) as client:
            assert not client.welcome.may_map
            assert client.status()["state"] == "serving"  # the secret is an administrator's
            with RawClient(service.config.listen) as writer:
                writer.put(1, 4)
            assert np.array_equal(client.get(1, 4), content(1, 4))
        connection = _native.Connection(address, SECONDS)
        hello = wire.encode(wire.Hello(wire.VERSION, {}, nonce=os.urandom(32)))
        challenge = wire.decode_greeting(connection.call(wire.Op.HELLO, hello, SECONDS))
        assert isinstance(challenge, wire.Challenge)
        proof = proof_of("client", b"another secret..", hello, challenge.nonce)
        with pytest.raises(_native.RemoteError, match="token is not"):
            connection.call(wire.Op.AUTH, wire.encode(wire.Auth(proof)), SECONDS)
        with pytest.raises(_native.RemoteError, match="no proof was asked for"):
            connection.call(wire.Op.AUTH, wire.encode(wire.Auth(proof)), SECONDS)
        connection.close()


def test_tcp_on_loopback_without_a_secret_does_not_administer(tmp_path: Path) -> None:
    with (
        Service(made(tmp_path, tcp="127.0.0.1:0")) as service,
        RawClient(service.addresses[1]) as client,
    ):
        with pytest.raises(_native.RemoteError, match="own user"):
            client.call(wire.AdminShutdown())
        hashes, blocks = chain(1, 4), content(1, 4)
        number, offsets, _ = client.connection.reserve(0.0, hashes.array, 0, None, SECONDS)
        assert len(offsets) == 4
        sums = np.array([_native.xxh3(block) for block in blocks], np.uint64)
        addresses = blocks.ctypes.data + SIZE * np.arange(4, dtype=np.uint64)
        _, matched = client.connection.write(
            number, 0, sums, hashes.array, 0, None, addresses.astype(np.uint64), SIZE, SECONDS
        )
        assert matched.all()
        assert np.array_equal(client.get(1, 4), blocks)


def test_administrators_look_and_check(with_ssd: Service) -> None:
    with RawClient(with_ssd.config.listen) as client:
        client.put(1, 4, ack=1)
        (namespace,) = client.call(wire.AdminNamespaces())
        assert (namespace["model"], namespace["block_bytes"]) == ("model", SIZE)
        packed = chain(1, 4).array.tobytes()
        found = client.call(wire.AdminInspect(namespace["number"], packed))
        assert found["residency"] == [3] * 4
        assert [block["depth"] for block in found["blocks"]] == [1, 2, 3, 4]
        verified = client.call(wire.AdminVerify(SECONDS))
        assert verified == {"checked_bytes": 4 * SIZE, "removed_blocks": 0, "whole": True}
        with pytest.raises(_native.RemoteError, match="namespace: there is no number 77"):
            client.call(wire.AdminInspect(77, packed))
        shown = client.status()["clients"][0]
        assert (shown["label"], shown["pid"], shown["address"]) == ("model", os.getpid(), "unix")


def test_history_and_rates_follow_what_is_done(
    with_ssd: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.daemon.report.SAMPLE_SECONDS", 0.0)  # the next that is due
    with RawClient(with_ssd.config.listen) as client:
        client.put(1, 4)
        client.get(1, 4)
        rates = with_ssd.status()["rates"]
        assert rates["hit_ratio"] == 1.0
        assert rates["store_bytes_per_second"] > 0
        wait_until(lambda: len(with_ssd.status()["history"]) > 0)
        assert len(with_ssd.status()["history"][0]) == 6

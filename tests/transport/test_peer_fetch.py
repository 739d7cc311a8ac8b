"""A daemon brings blocks from other daemons: exactly their bytes, by every way there is, or a miss.

Real daemons, most of them in this process, those that are killed or stopped in processes of their
own. Clients load through one daemon and name the others as holders; what arrives is compared byte
for byte. In "mid-fetch" means: a bandwidth makes the fetch last, and its count of blocks has begun
to grow.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import _native, wire
from kvstore.auth import proof_of
from kvstore.client.handshake import Target, dial
from kvstore.daemon.service import Service
from kvstore.errors import (
    ConfigError,
    IncompatibleError,
    PeerUnavailableError,
)
from kvstore.peers import flight
from kvstore.peers.holders import Holder, Means
from kvstore.transport import MOVERS, Endpoint
from tests.daemon.daemon_support import Daemon, clean_up
from tests.transport.peers_support import (
    NAMESPACE,
    SECRET,
    SIZE,
    address_of,
    chain,
    client_of,
    fetched,
    loaded,
    metrics,
    put,
    serving,
    token,
    wait_until,
    works,
)

SECONDS = 20.0
SLACK = 3.0  # of a deadline, on a busy machine
NOWHERE = "tcp:127.0.0.1:1"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIECE_BYTES_MIN", "PIECE_BYTES_FIRST", "PIECE_BYTES_MAX"):
        monkeypatch.setattr(flight, name, 4 * SIZE)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon in a process of its own, and that process may be treated badly."""
    home = tmp_path / "apart"
    home.mkdir()
    daemon = Daemon(
        home, "--tcp", "127.0.0.1:0", "--peer-token", token(home), "--hold-seconds", "0"
    )
    try:
        daemon.ready()
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGCONT)
        clean_up(daemon)


def peer_address(daemon: Daemon) -> str:
    from kvstore.admin import Admin

    with Admin(daemon.address) as admin:
        return next(one for one in admin.status()["addresses"] if one.startswith("tcp:"))


def in_mid_fetch(ours: Service, holder: Daemon, what: signal.Signals) -> threading.Thread:
    """Send the holder a signal once some blocks have come."""

    def strike() -> None:
        wait_until(lambda: sum(fetched(metrics(ours)).values()) >= 8)
        holder.process.send_signal(what)

    thread = threading.Thread(target=strike)
    thread.start()
    return thread


@pytest.mark.parametrize("mover", MOVERS)
def test_bytes_are_exact_by_each_mover(tmp_path: Path, mover: str) -> None:
    why = works(mover)
    if why:
        pytest.skip(why)
    with (
        serving(tmp_path, "a", movers=mover) as ours,
        serving(tmp_path, "b", movers=mover) as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 40)
        assert loaded(store, 1, 40, [address_of(theirs)]) == 40
        assert loaded(store, 1, 40, [NOWHERE]) == 40, "they are here now"
        assert fetched(metrics(ours)) == {mover: 40}
        assert other.stats()["kvstore_leases"] == 0


def test_another_process_on_this_host_is_read_in_place(tmp_path: Path, holder: Daemon) -> None:
    with (
        serving(tmp_path, "a") as ours,
        client_of(ours) as store,
        kvstore.connect(holder.address, NAMESPACE) as other,
    ):
        put(other, 1, 40)
        assert loaded(store, 1, 40, [holder.address]) == 40
        assert fetched(metrics(ours)) == {"shm": 40}


def test_payload_frames_are_the_last_resort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise IncompatibleError("no mover serves both")

    monkeypatch.setattr(Endpoint, "connect", refuse)
    with (
        serving(tmp_path, "a") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 40)
        assert loaded(store, 1, 40, [address_of(theirs)]) == 40
        assert fetched(metrics(ours)) == {"frames": 40}


def test_what_is_here_already_is_not_fetched(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "a") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 20)
        put(store, 1, 20)
        assert loaded(store, 1, 20, [address_of(theirs)]) == 20
        assert fetched(metrics(ours)) == {}
        store.remove(chain(1, 20)[12:])
        assert loaded(store, 1, 20, [address_of(theirs)]) == 20
        assert sum(fetched(metrics(ours)).values()) == 8


def test_blocks_are_striped_over_holders(tmp_path: Path, small_pieces: None) -> None:
    with (
        serving(tmp_path, "a", peer_bandwidth="4MiB") as ours,
        serving(tmp_path, "b") as one,
        serving(tmp_path, "c") as two,
        client_of(ours) as store,
    ):
        for service, count in ((one, 100), (two, 60)):
            with client_of(service) as other:
                put(other, 1, count)
        assert loaded(store, 1, 100, [address_of(one), address_of(two)]) == 100
        given = [metrics(service)["kvstore_hit_cpu_blocks_total"] for service in (one, two)]
        assert min(given) > 0
        assert sum(given) == 100


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_holder_that_dies_in_mid_fetch_costs_time_or_a_miss(
    tmp_path: Path, small_pieces: None, holder: Daemon, is_alone: bool
) -> None:
    with (
        serving(tmp_path, "a", peer_bandwidth="1MiB") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
        kvstore.connect(holder.address, NAMESPACE) as dying,
    ):
        put(other, 1, 100)
        put(dying, 1, 100)
        holders = [peer_address(holder)] + ([] if is_alone else [address_of(theirs)])
        killer = in_mid_fetch(ours, holder, signal.SIGKILL)
        began = time.monotonic()
        found = loaded(store, 1, 100, holders, timeout=SECONDS)
        killer.join()
        assert (found < 100) if is_alone else (found == 100)
        assert time.monotonic() - began < SECONDS
        values = metrics(ours)
        assert values["kvstore_peer_quarantined_bytes"] == 0
        assert ours.status()["reservations"] == 0


def test_a_holder_that_hangs_is_left_for_another(
    tmp_path: Path, small_pieces: None, holder: Daemon
) -> None:
    with (
        serving(tmp_path, "a", peer_bandwidth="1MiB") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
        kvstore.connect(holder.address, NAMESPACE, timeout=SECONDS) as hanging,
    ):
        put(other, 1, 100)
        put(hanging, 1, 100)
        address = peer_address(holder)
        stopper = in_mid_fetch(ours, holder, signal.SIGSTOP)
        assert loaded(store, 1, 100, [address, address_of(theirs)], timeout=SECONDS) == 100
        stopper.join()
        holder.process.send_signal(signal.SIGCONT)


def test_holders_that_do_not_answer_cost_no_more_than_the_deadline(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "a") as ours,
        client_of(ours) as store,
        socket.create_server(("127.0.0.1", 0)) as mute,
    ):
        address = f"tcp:127.0.0.1:{mute.getsockname()[1]}"
        began = time.monotonic()
        assert loaded(store, 1, 4, [address, NOWHERE], timeout=0.3) == 0
        assert time.monotonic() - began < 0.3 + SLACK
        began = time.monotonic()
        assert store.wait_for(chain(1, 4), timeout=0.0) == 0
        with pytest.raises(ConfigError, match="holders"):
            loaded(store, 1, 4, ["nonsense"])
        with pytest.raises(ConfigError, match="holders"):
            loaded(store, 1, 4, [f"tcp:h:{port}" for port in range(40)])


def test_what_the_holder_has_lost_is_a_miss(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "a") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 20)
        other.remove(chain(1, 20)[7:])
        assert loaded(store, 1, 20, [address_of(theirs)]) == 7
        other.clear()
        put(other, 2, 4)
        store.clear()
        assert loaded(store, 1, 20, [address_of(theirs)]) == 0
        assert metrics(ours)["kvstore_peer_failures_absent_total"] >= 1
        assert ours.status()["reservations"] == 0


def test_damaged_bytes_are_a_miss_and_the_holder_drops_them(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "a") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 20)
        lease = other.acquire(chain(1, 20))
        offset = int(lease._granted.offsets[11])
        lease.release()
        theirs._tiers.arena[offset + 100] ^= 1
        assert loaded(store, 1, 20, [address_of(theirs)]) == 11
        assert metrics(ours)["kvstore_peer_failures_damaged_total"] >= 1
        assert other.match(chain(1, 20)) == 11
        assert metrics(theirs)["kvstore_integrity_failures_total"] == 1


def test_two_requests_are_one_fetch(tmp_path: Path, small_pieces: None) -> None:
    with (
        serving(tmp_path, "a", peer_bandwidth="1MiB") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(theirs) as other,
    ):
        put(other, 1, 60)
        counts: list[int] = []

        def load() -> None:
            with client_of(ours) as store:
                counts.append(loaded(store, 1, 60, [address_of(theirs)]))

        threads = [threading.Thread(target=load) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts == [60] * 6
        assert sum(fetched(metrics(ours)).values()) == 60


def test_a_wrong_secret_gives_nothing(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "a") as ours,
        serving(tmp_path, "b", secret="another-" + "y" * 32) as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 4)
        assert loaded(store, 1, 4, [address_of(theirs)]) == 0
        assert loaded(store, 1, 4, [theirs.config.listen]) == 0, "nor on this host"
        assert metrics(ours)["kvstore_peer_failures_unreachable_total"] >= 1


def test_who_says_to_be_a_peer_must_prove_it(tmp_path: Path) -> None:
    with serving(tmp_path, "a") as ours:
        for address in (address_of(ours), ours.config.listen):
            connection = _native.Connection(address, SECONDS)
            hello = wire.encode(
                wire.Hello(wire.VERSION, NAMESPACE.describe(), nonce=bytes(32), peer=True)
            )
            reply = wire.decode_greeting(connection.call(wire.Op.HELLO, hello, SECONDS))
            assert isinstance(reply, wire.Challenge), "no proof is asked for"
            wrong = wire.Auth(proof_of("client", b"z" * 32, hello, reply.nonce))
            with pytest.raises(_native.RemoteError, match="peers"):
                connection.call(wire.Op.AUTH, wire.encode(wrong), SECONDS)
            connection.close()
    with serving(tmp_path, "b", peer_token="") as closed:
        target = Target(address_of(closed), NAMESPACE, "", SECRET.encode(), is_peer=True)
        with pytest.raises(PeerUnavailableError, match="peer_token"):
            dial(target, b"", SECONDS)


def test_a_peer_reads_and_does_nothing_else(tmp_path: Path) -> None:
    with serving(tmp_path, "a") as ours, client_of(ours) as store:
        put(store, 1, 4)
        target = Target(address_of(ours), NAMESPACE, "", SECRET.encode(), is_peer=True)
        connection, welcome = dial(target, b"", SECONDS)
        assert welcome.endpoint
        assert not welcome.may_map
        assert SECRET.encode() not in welcome.endpoint
        hashes = chain(1, 4)
        for call in (
            wire.Remove(wire.pack_chain(hashes)),
            wire.Clear(),
            wire.AdminShutdown(),
            wire.Fetch(wire.pack_chain(hashes), [NOWHERE], 1.0),
        ):
            with pytest.raises(_native.RemoteError):
                connection.call(wire.Op.CALL, wire.encode(call), SECONDS)
        more = chain(2, 4)
        with pytest.raises(_native.RemoteError, match="may read only"):
            connection.reserve(0.0, more.array, more.start, more.parent, SECONDS)
        connection.close()
        assert store.match(hashes) == 4


def test_clients_are_told_nothing_of_the_endpoint(tmp_path: Path) -> None:
    with serving(tmp_path, "a") as ours:
        connection, welcome = dial(Target(address_of(ours), NAMESPACE), b"", SECONDS)
        connection.close()
        assert welcome.endpoint == b""


def test_other_namespaces_and_tenants_stay_apart(tmp_path: Path) -> None:
    tenants: dict[str, Any] = {"red": {}, "blue": {}}
    stranger = kvstore.Namespace("another model", NAMESPACE.spec)
    with (
        serving(tmp_path, "a", tenants=tenants) as ours,
        serving(tmp_path, "b", tenants=tenants) as theirs,
        client_of(theirs, tenant="red") as red,
    ):
        put(red, 1, 4)
        holders = [address_of(theirs)]
        for namespace, tenant in ((NAMESPACE, ""), (NAMESPACE, "blue"), (stranger, "red")):
            with client_of(ours, namespace, tenant) as store:
                assert loaded(store, 1, 4, holders) == 0, (namespace.model, tenant)
        before = len(theirs.namespaces())
        with client_of(ours, NAMESPACE, "red") as store:
            assert loaded(store, 1, 4, holders) == 4
        assert len(theirs.namespaces()) == before, "fetches make no namespaces at a holder"


def test_a_holder_that_was_started_anew_is_found_again(tmp_path: Path) -> None:
    with serving(tmp_path, "a") as ours, client_of(ours) as store:
        with serving(tmp_path, "b") as theirs, client_of(theirs) as other:
            address = address_of(theirs)
            put(other, 1, 4)
            assert loaded(store, 1, 4, [address]) == 4
        assert loaded(store, 2, 4, [address]) == 0
        with serving(tmp_path, "c", tcp=address.removeprefix("tcp:")) as theirs:
            with client_of(theirs) as other:
                put(other, 2, 4)
            wait_until(lambda: loaded(store, 2, 4, [address]) == 4)


def test_an_embedded_store_fetches_too(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "b") as theirs,
        client_of(theirs) as other,
        kvstore.open(NAMESPACE, cpu="4MiB", peer_token=token(tmp_path)) as store,
        kvstore.open(NAMESPACE, cpu="4MiB") as lonely,
    ):
        put(other, 1, 20)
        assert loaded(store, 1, 20, [address_of(theirs)]) == 20
        assert sum(fetched(store.stats()).values()) == 20
        with pytest.raises(ConfigError, match="peer_token"):
            loaded(lonely, 1, 20, [address_of(theirs)])
        with store.acquire(chain(1, 20), holders=[NOWHERE]) as lease:
            assert len(lease) == 20


def test_a_prefetch_brings_them_in_the_background(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "a") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 20)
        done = store.prefetch(chain(1, 20), holders=[address_of(theirs)])
        assert done.wait(SECONDS).num_blocks == 20
        assert store.match(chain(1, 20)) == 20


def test_a_daemon_without_peers_misses(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "a", peer_token="") as ours,
        serving(tmp_path, "b") as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 4)
        assert loaded(store, 1, 4, [address_of(theirs)]) == 0


def test_a_holder_reads_in_from_its_ssd(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "a", cpu="8MiB") as ours,
        serving(
            tmp_path,
            "b",
            cpu="1MiB",
            ssd=str(tmp_path / "ssd"),
            ssd_capacity="64MiB",
            ssd_segment="4MiB",
        ) as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        for first in (1, 2):
            put(other, first, 80)
            assert other.flush(SECONDS)
        assert other.lookup(chain(1, 80)).num_ssd > 0
        assert loaded(store, 1, 80, [address_of(theirs)], timeout=SECONDS) == 80


def test_nothing_of_peers_is_left(tmp_path: Path) -> None:
    def once(name: str) -> None:
        with (
            serving(tmp_path, f"{name}a") as ours,
            serving(tmp_path, f"{name}b") as theirs,
            client_of(ours) as store,
            client_of(theirs) as other,
        ):
            put(other, 1, 4)
            assert loaded(store, 1, 4, [address_of(theirs)]) == 4

    def open_files() -> int:
        gc.collect()  # arenas of objects that refer to each other
        return len(os.listdir("/proc/self/fd"))

    once("first")
    fds, threads = open_files(), threading.active_count()
    once("second")
    wait_until(lambda: open_files() <= fds)
    wait_until(lambda: threading.active_count() <= threads)


def test_rdma_can_be_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an RDMA device on this machine the only way left is memory of this host."""
    with (
        serving(tmp_path, "a", movers="shm", peer_require_rdma=True) as ours,
        serving(tmp_path, "b", movers="shm", peer_require_rdma=True) as theirs,
        client_of(ours) as store,
        client_of(theirs) as other,
    ):
        put(other, 1, 4)
        assert loaded(store, 1, 4, [address_of(theirs)]) == 4
        store.clear()

        def refuse(*_: object, **__: object) -> None:
            raise IncompatibleError("another host")

        monkeypatch.setattr(Endpoint, "connect", refuse)
        assert ours._peers is not None
        for known in ours._peers.holders.list():
            assert known._link is not None
            known.drop_link(known._link)
        assert loaded(store, 1, 4, [address_of(theirs)]) == 0, "and no frames instead"
        target = Target(address_of(theirs), NAMESPACE, "", SECRET.encode(), is_peer=True)
        connection, _ = dial(target, b"", SECONDS)
        hashes = chain(1, 4)
        lease, *_ = connection.acquire(
            1.0, 0.0, 0, hashes.array, hashes.start, hashes.parent, SECONDS
        )
        buffer = np.zeros((4, SIZE), np.uint8)
        addresses = (buffer.ctypes.data + SIZE * np.arange(4)).astype(np.uint64)
        with pytest.raises(_native.RemoteError, match="may not read"):
            connection.read(lease, 0, addresses, SIZE, SECONDS)
        connection.close()


def test_a_holder_that_was_left_makes_nothing_that_nobody_closes(tmp_path: Path) -> None:
    """A lane may still use a holder that had to leave for others."""
    with serving(tmp_path, "theirs") as theirs, Endpoint() as endpoint:
        with client_of(theirs) as client:
            put(client, 1, 1)
        means = Means(endpoint, SECRET.encode(), lambda epoch: epoch, None, False, 1)
        holder = Holder(address_of(theirs), means)
        session = holder.session("", NAMESPACE)
        holder.close(5.0)
        assert session.is_lost
        assert holder.link(session.welcome, 1.0) is None
        with pytest.raises(PeerUnavailableError, match="not asked any more"):
            holder.session("", NAMESPACE)
        assert holder.num_sessions == 0

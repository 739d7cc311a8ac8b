"""TLS of the TCP port: who gets in, what others are told, and that bytes arrive as they were sent.

Certificates are made by trustme; the server is in this process, but for one daemon that is started
by its flags. That nothing is sent in the clear is seen by a listener between the two.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import trustme

import kvstore
from kvstore import _native
from kvstore.config import DaemonConfig
from kvstore.daemon.server import Server
from kvstore.daemon.sockets import listen_tcp
from kvstore.errors import ConfigError, IncompatibleError, KVStoreError, PeerUnavailableError
from kvstore.tiers.local import LocalControl
from tests.daemon.daemon_support import SIZE, SPEC, chain, content, running, wait_until
from tests.transport.peers_support import address_of, client_of, loaded, put, serving

TIMEOUT = 20.0
NAMESPACE = kvstore.Namespace("model", SPEC)


class Certificates:
    """One authority, and one that nobody trusts; files of what they signed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        authority, stranger = trustme.CA(), trustme.CA()
        self.ca = self._written("ca", authority.cert_pem.bytes())
        self.strangers_ca = self._written("strangers-ca", stranger.cert_pem.bytes())
        self.server = self._issued("server", authority, "127.0.0.1", "localhost")
        self.client = self._issued("client", authority, "engine.example")
        self.strangers_client = self._issued("stranger", stranger, "engine.example")

    def _written(self, name: str, pem: bytes) -> str:
        path = self._directory / f"{name}.pem"
        path.touch(0o600)
        path.write_bytes(pem)
        return str(path)

    def _issued(self, name: str, authority: trustme.CA, *hosts: str) -> tuple[str, str]:
        made = authority.issue_cert(*hosts)
        chain_pem = b"".join(blob.bytes() for blob in made.cert_chain_pems)
        key = self._written(f"{name}-key", made.private_key_pem.bytes())
        return self._written(name, chain_pem), key

    def trusting(self, own: tuple[str, str] = ("", "")) -> kvstore.TlsFiles:
        return kvstore.TlsFiles(self.ca, *own)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def server(stack: ExitStack) -> Server:
    store = stack.enter_context(kvstore.open(NAMESPACE, cpu="8MiB", chunk="256KiB"))
    assert isinstance(store.control, LocalControl)
    return stack.enter_context(Server(store.control.tiers, []))


def listening(server: Server, files: kvstore.TlsFiles | None) -> str:
    """Listen on one more port; return its address."""
    context = None if files is None else files.server_context()
    server.listen(listen_tcp("127.0.0.1", 0), context)
    return server.addresses[-1]


def connected(address: str, tls: kvstore.TlsFiles | None = None) -> kvstore.Store:
    return kvstore.connect(address, NAMESPACE, timeout=TIMEOUT, tls=tls)


def test_bytes_arrive_as_they_were_sent(
    server: Server, certificates: Certificates, stack: ExitStack
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    assert address.startswith("tls:127.0.0.1:")
    store = stack.enter_context(connected(address, certificates.trusting()))
    hashes, blocks = chain(1, 32), content(1, 32)
    assert store.put(hashes, kvstore.ContiguousBlocks(blocks)).wait().num_blocks == 32
    got = np.zeros_like(blocks)
    assert store.load(hashes, kvstore.ContiguousBlocks(got)).wait().num_blocks == 32
    assert np.array_equal(got, blocks)
    with connected(address, certificates.trusting()) as other:
        assert other.lookup(hashes).num_blocks == 32


def test_large_frames_pass_in_both_directions(
    server: Server, certificates: Certificates, stack: ExitStack
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    spec = kvstore.BlockSpec(4, 4, 64, 16, "float32")
    large = kvstore.Namespace("large", spec)
    tls = certificates.trusting()
    store = stack.enter_context(kvstore.connect(address, large, timeout=TIMEOUT, tls=tls))
    blocks = np.random.default_rng(7).integers(0, 256, (20, spec.block_bytes), np.uint8)
    hashes = chain(5, 20)
    with ExitStack() as threads:
        for _ in range(3):  # several connections at once
            thread = threading.Thread(
                target=lambda: store.put(hashes, kvstore.ContiguousBlocks(blocks)).wait()
            )
            thread.start()
            threads.callback(thread.join)
    got = np.zeros_like(blocks)
    assert store.load(hashes, kvstore.ContiguousBlocks(got)).wait().num_blocks == 20
    assert np.array_equal(got, blocks)


def test_nothing_is_sent_in_the_clear(
    server: Server, certificates: Certificates, stack: ExitStack
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    seen = bytearray()
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    host, _, port = address.removeprefix("tls:").rpartition(":")

    def tap() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server_end = socket.create_connection((host, int(port)))
            for source, target in ((client, server_end), (server_end, client)):
                threading.Thread(target=copy, args=(source, target), daemon=True).start()

    def copy(source: socket.socket, target: socket.socket) -> None:
        with source, target:
            while True:
                try:
                    some = source.recv(65536)
                    target.sendall(some)
                except OSError:
                    return
                seen.extend(some)
                if not some:
                    target.shutdown(socket.SHUT_WR)
                    return

    threading.Thread(target=tap, daemon=True).start()
    stack.callback(listener.shutdown, socket.SHUT_RDWR)
    tapped = f"tls:127.0.0.1:{listener.getsockname()[1]}"
    blocks = np.full((4, SIZE), ord("K"), np.uint8)
    with connected(tapped, certificates.trusting()) as store:
        assert store.put(chain(2, 4), kvstore.ContiguousBlocks(blocks)).wait().num_blocks == 4
    assert len(seen) > 4 * SIZE
    assert b"K" * 32 not in seen
    assert b"KVS2" not in seen
    assert b"model" not in seen


def test_a_server_of_another_authority_is_refused(
    server: Server, certificates: Certificates
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    with pytest.raises(IncompatibleError, match="certificate"):
        connected(address, kvstore.TlsFiles(certificates.strangers_ca))
    with pytest.raises(IncompatibleError, match="certificate"):
        connected(address)  # the system's authorities did not sign it either


def test_a_server_of_another_name_is_refused(server: Server, certificates: Certificates) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    with pytest.raises(IncompatibleError, match="mismatch"):
        connected(address, kvstore.TlsFiles(certificates.ca, server_name="elsewhere.example"))
    with connected(address, kvstore.TlsFiles(certificates.ca, server_name="localhost")):
        pass


def test_clients_need_a_certificate_where_the_server_has_an_authority(
    server: Server, certificates: Certificates
) -> None:
    address = listening(server, kvstore.TlsFiles(certificates.ca, *certificates.server))
    with connected(address, certificates.trusting(certificates.client)) as store:
        assert store.lookup(chain(3, 1)).num_blocks == 0
    for own in (("", ""), certificates.strangers_client):
        with pytest.raises(IncompatibleError, match=r"TLS: .*(CERTIFICATE|CA)"):
            connected(address, certificates.trusting(own))


def test_a_client_that_does_not_encrypt_is_told_so(
    server: Server, certificates: Certificates
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    with pytest.raises(IncompatibleError, match="speaks TLS"):
        connected(address.replace("tls:", "tcp:"))


def test_a_client_that_encrypts_is_told_where_nobody_does(
    server: Server, certificates: Certificates
) -> None:
    address = listening(server, None).replace("tcp:", "tls:")
    with pytest.raises(PeerUnavailableError, match="is it a tcp: port"):
        connected(address, certificates.trusting())


def test_bytes_that_are_neither_end_the_connection(
    server: Server, certificates: Certificates
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    host, _, port = address.removeprefix("tls:").rpartition(":")
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01 and no more of it", b"\x16" * 70000):
        with (
            contextlib.suppress(OSError),  # it may hang up before it has all
            socket.create_connection((host, int(port)), TIMEOUT) as connection,
        ):
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    with connected(address, certificates.trusting()):
        pass


def test_old_versions_of_tls_are_refused(server: Server, certificates: Certificates) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    host, _, port = address.removeprefix("tls:").rpartition(":")
    context = ssl.create_default_context(cafile=certificates.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((host, int(port)), TIMEOUT) as connection,
        pytest.raises(ssl.SSLError, match="VERSION"),
    ):
        context.wrap_socket(connection, server_hostname=host)


def test_what_a_client_held_is_free_when_it_is_gone(
    server: Server, certificates: Certificates, stack: ExitStack
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    store = connected(address, certificates.trusting())
    wait_until(lambda: server.num_clients == 1)
    store.close()
    wait_until(lambda: server.num_clients == 0)


def test_the_server_gone_is_noticed_and_its_return_too(
    server: Server, certificates: Certificates, stack: ExitStack
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    store = stack.enter_context(connected(address, certificates.trusting()))
    hashes = chain(4, 2)
    assert store.put(hashes, kvstore.ContiguousBlocks(content(4, 2))).wait().num_blocks == 2
    server.close()
    assert store.lookup(hashes).num_blocks == 0
    again = stack.enter_context(Server(server._tiers, []))
    port = int(address.rpartition(":")[2])
    context = kvstore.TlsFiles("", *certificates.server).server_context()
    again.listen(listen_tcp("127.0.0.1", port), context)
    wait_until(lambda: store.lookup(hashes).num_blocks == 2)


def test_a_forked_child_does_not_keep_its_parents_connections(
    server: Server, certificates: Certificates
) -> None:
    """The parent's end is seen although a child of it goes on."""
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    store = connected(address, certificates.trusting())
    wait_until(lambda: server.num_clients == 1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)  # until the parent closes its end
        os._exit(0)
    os.close(reading)
    try:
        store.close()
        wait_until(lambda: server.num_clients == 0)
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def test_closing_ends_connections_and_handshakes_under_way(
    server: Server, certificates: Certificates, stack: ExitStack
) -> None:
    address = listening(server, kvstore.TlsFiles("", *certificates.server))
    stack.enter_context(connected(address, certificates.trusting()))
    host, _, port = address.removeprefix("tls:").rpartition(":")
    silent = stack.enter_context(socket.create_connection((host, int(port)), TIMEOUT))
    wait_until(lambda: len(server._tls_ports[0]._open) >= 2)
    server.close()
    assert silent.recv(1) == b""
    left = [thread.name for thread in threading.enumerate() if thread.name == "kvstore-tls-peer"]
    assert left == []


def test_a_refusal_answers_the_frame_that_was_sent() -> None:
    header = b"KVS2" + bytes(12)
    frame = _native.refusal(header, 3, b"no")
    assert frame is not None
    assert frame.endswith(b"no")
    assert _native.refusal(b"GET / HTTP/1.1\r\n", 3, b"no") is None
    assert _native.refusal(b"", 3, b"no") is None


def test_a_daemon_serves_tls_by_its_flags(certificates: Certificates, tmp_path: Path) -> None:
    cert, key = certificates.server
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    secret = tmp_path / "token"
    secret.touch(0o600)
    secret.write_text("a secret of more than 16 bytes")
    flags = ("--tcp", f"127.0.0.1:{port}", "--token-file", str(secret))
    files = ("--tls-cert", cert, "--tls-key", key, "--tls-ca", certificates.ca)
    with running(tmp_path, *flags, *files):
        tls = certificates.trusting(certificates.client)
        address = f"tls:127.0.0.1:{port}"
        with pytest.raises(PeerUnavailableError, match="token"):
            kvstore.connect(address, NAMESPACE, timeout=TIMEOUT, tls=tls)
        with kvstore.connect(address, NAMESPACE, timeout=TIMEOUT, tls=tls, token=secret) as store:
            blocks = kvstore.ContiguousBlocks(content(6, 4))
            assert store.put(chain(6, 4), blocks).wait().num_blocks == 4


@pytest.mark.parametrize("movers", ["shm", "tcp"])
def test_blocks_come_from_a_daemon_that_asks_for_certificates(
    certificates: Certificates, tmp_path: Path, movers: str
) -> None:
    """Each shows its own. What they move between each other in bulk is not encrypted."""
    cert, key = certificates.server
    tls = {"tls_cert": cert, "tls_key": key, "tls_ca": certificates.ca, "movers": movers}
    with (
        serving(tmp_path, "holder", **tls) as holder,
        serving(tmp_path, "fetcher", **tls) as fetcher,
    ):
        assert address_of(holder).startswith("tls:")
        with client_of(holder) as store:
            put(store, 8, 6)
        with client_of(fetcher) as store:
            assert loaded(store, 8, 6, [address_of(holder)]) == 6


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tls_cert": "c"}, "tls_key"),
        ({"tls_key": "k"}, "tls_cert"),
        ({"tls_ca": "c"}, "tls_ca"),
        ({"tls_cert": "c", "tls_key": "k", "tcp": ""}, "tls_cert"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: "):
        DaemonConfig(**{"tcp": "127.0.0.1:0", **settings})  # type: ignore[arg-type]


def test_files_that_cannot_be_used_are_named(certificates: Certificates, tmp_path: Path) -> None:
    cert, key = certificates.server
    other_key = certificates.client[1]
    open_key = tmp_path / "key"
    open_key.write_bytes(Path(key).read_bytes())
    open_key.chmod(0o644)
    nothing = str(tmp_path / "nothing")
    for files, named in (
        (kvstore.TlsFiles("", nothing, key), "tls_cert: .*nothing"),
        (kvstore.TlsFiles("", cert, nothing), "nothing"),
        (kvstore.TlsFiles("", cert, other_key), "tls_cert: "),
        (kvstore.TlsFiles("", cert, str(open_key)), "tls_key: .*0600"),
        (kvstore.TlsFiles(nothing, cert, key), "tls_ca: .*nothing"),
        (kvstore.TlsFiles(key, cert, key), "tls_ca: "),
        (kvstore.TlsFiles("", cert, ""), "tls_key: "),
    ):
        with pytest.raises(ConfigError, match=named):
            files.server_context()
    with pytest.raises(ConfigError, match="tls: "):
        kvstore.connect("unix:/nowhere", NAMESPACE, tls=kvstore.TlsFiles())


def test_errors_of_the_wire_name_the_address(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tls:127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(KVStoreError, match=address):  # nobody answers
            kvstore.connect(address, NAMESPACE, timeout=0.2, tls=certificates.trusting())
    with pytest.raises(PeerUnavailableError, match=address):  # nobody listens
        kvstore.connect(address, NAMESPACE, timeout=TIMEOUT, tls=certificates.trusting())

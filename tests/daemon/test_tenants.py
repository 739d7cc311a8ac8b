"""Who a peer is taken for, and that a proof is good once, for one Hello, from one end.

Pure: what the kernel says of a peer is given, nothing listens.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from kvstore import wire
from kvstore.auth import is_proof, proof_of, read_secret
from kvstore.config import DaemonConfig, TenantConfig
from kvstore.daemon.tenants import Identity, Peer, Tenants, tenants_of
from kvstore.errors import ConfigError, PeerUnavailableError

OURS, THEIRS, STRANGER = 1000, 2000, 3000
SECRET = b"0123456789abcdef-a"
TCP = Peer(False, -1)


def tenants(*, default_secret: bool = False, network: bool = False) -> Tenants:
    secrets_by_name = {"a": SECRET} | ({"": b"x" * 20} if default_secret else {})
    configured = {"a": TenantConfig(uids=(THEIRS,)), "b": TenantConfig()}
    return Tenants(configured, secrets_by_name, OURS, open_to_network=network)


def hello(tenant: str = "a") -> tuple[wire.Hello, bytes]:
    made = wire.Hello(wire.VERSION, {"model": "m"}, b"", tenant, secrets.token_bytes(32))
    return made, wire.encode(made)


def test_the_daemons_own_user_is_whom_it_says() -> None:
    assert tenants().identify(Peer(True, OURS), "") == Identity(
        "", is_own_user=True, may_administer=True
    )
    named = tenants().identify(Peer(True, OURS), "a")
    assert named is not None
    assert named.tenant == "a"
    with pytest.raises(PeerUnavailableError, match="nobody"):
        tenants().identify(Peer(True, OURS), "nobody")


def test_another_user_is_its_tenant_and_no_other() -> None:
    for said in ("", "a"):
        assert tenants().identify(Peer(True, THEIRS), said) == Identity(
            "a", is_own_user=False, may_administer=False
        )
    with pytest.raises(PeerUnavailableError):
        tenants().identify(Peer(True, THEIRS), "b")
    for said in ("", "a", "b"):
        with pytest.raises(PeerUnavailableError):
            tenants().identify(Peer(True, STRANGER), said)


def test_over_tcp_only_the_default_tenant_without_a_secret_on_loopback_proves_nothing() -> None:
    assert tenants().identify(TCP, "") == Identity("", is_own_user=False, may_administer=False)
    assert tenants().identify(TCP, "a") is None
    assert tenants().identify(TCP, "b") is None  # has none, so no proof can be right
    assert tenants(default_secret=True).identify(TCP, "") is None
    assert tenants(network=True).identify(TCP, "") is None


def test_both_ends_prove_the_secret() -> None:
    who = tenants()
    said, body = hello()
    challenge = who.challenge(7, said, body)
    assert is_proof(challenge.proof, "server", SECRET, body, challenge.nonce)
    found, identity = who.settle(7, proof_of("client", SECRET, body, challenge.nonce))
    assert found == said
    assert identity == Identity("a", is_own_user=False, may_administer=False)


def test_the_default_tenants_secret_is_an_administrators() -> None:
    who = tenants(default_secret=True)
    said, body = hello("")
    challenge = who.challenge(7, said, body)
    _, identity = who.settle(7, proof_of("client", b"x" * 20, body, challenge.nonce))
    assert identity.may_administer


@pytest.mark.parametrize("case", ["wrong secret", "reflected", "replayed", "other hello", "again"])
def test_what_is_no_proof_is_refused(case: str) -> None:
    who = tenants()
    said, body = hello()
    challenge = who.challenge(7, said, body)
    proof = proof_of("client", SECRET, body, challenge.nonce)
    if case == "wrong secret":
        proof = proof_of("client", SECRET + b"!", body, challenge.nonce)
    elif case == "reflected":
        proof = challenge.proof
    elif case == "replayed":  # of an earlier connection, with the same Hello
        who.challenge(7, said, body)
    elif case == "other hello":
        other, other_body = hello()
        challenge = who.challenge(7, other, other_body)
        proof = proof_of("client", SECRET, body, challenge.nonce)
    else:
        who.settle(7, proof)
    with pytest.raises(PeerUnavailableError):
        who.settle(7, proof)
    with pytest.raises(PeerUnavailableError):
        who.settle(7, proof_of("client", SECRET, body, challenge.nonce))  # one try each


def test_a_tenant_that_is_not_there_looks_like_a_wrong_secret() -> None:
    who = tenants()
    for name in ("b", "nobody"):
        said, body = hello(name)
        challenge = who.challenge(7, said, body)
        assert len(challenge.proof) == 32
        for secret in (b"", SECRET):
            with pytest.raises(PeerUnavailableError):
                who.settle(7, proof_of("client", secret, body, challenge.nonce))
            who.challenge(7, said, body)


def test_handshakes_under_way_are_bounded() -> None:
    who = tenants()
    said, body = hello()
    first = who.challenge(0, said, body)
    for connection in range(1, 1025):
        who.challenge(connection, said, body)
    with pytest.raises(PeerUnavailableError, match="no proof was asked for"):
        who.settle(0, proof_of("client", SECRET, body, first.nonce))
    with pytest.raises(PeerUnavailableError, match="token"):
        who.challenge(1, wire.Hello(wire.VERSION, {}), b"")


def secret_file(tmp_path: Path, content: bytes = SECRET, mode: int = 0o600) -> str:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_a_secret_is_read_from_a_private_file(tmp_path: Path) -> None:
    assert read_secret(secret_file(tmp_path, SECRET + b"\n")) == SECRET
    for mode in (0o640, 0o604, 0o620):
        with pytest.raises(ConfigError, match=f"token_file: .*{mode:04o}"):
            read_secret(secret_file(tmp_path, mode=mode))
    with pytest.raises(ConfigError, match="16 or more"):
        read_secret(secret_file(tmp_path, b"short"))
    with pytest.raises(ConfigError, match="longer than"):
        read_secret(secret_file(tmp_path, b"x" * 5000))
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret(tmp_path / "missing")
    with pytest.raises(ConfigError, match="is not a file"):
        read_secret(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file away")
def test_a_secret_of_another_user_is_refused(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    os.chown(path, 4242, 4242)
    with pytest.raises(ConfigError, match="belongs to user 4242"):
        read_secret(path)


def test_beyond_loopback_nobody_listens_without_a_secret(tmp_path: Path) -> None:
    for tcp in ("0.0.0.0:1234", "[::]:1234", "192.0.2.1:1", "example.org:1"):
        config = DaemonConfig(tcp=tcp)
        with pytest.raises(ConfigError, match="token_file"):
            tenants_of(config, None, OURS)
        assert tenants_of(config, b"x" * 16, OURS).identify(TCP, "") is None
        with_file = DaemonConfig(tcp=tcp, token_file=secret_file(tmp_path))
        assert tenants_of(with_file, None, OURS).identify(TCP, "") is None
    for tcp in ("127.0.0.1:1", "localhost:1", "[::1]:1", ""):
        tenants_of(DaemonConfig(tcp=tcp), None, OURS)
    with pytest.raises(ConfigError, match="KVSTORE_TOKEN"):
        tenants_of(DaemonConfig(), b"short", OURS)
    with pytest.raises(ConfigError, match=r"tenants\.a\.token_file"):
        tenants_of(
            DaemonConfig(tenants={"a": TenantConfig(token_file=str(tmp_path / "no"))}), None, OURS
        )

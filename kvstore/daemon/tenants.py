"""Who a peer is: its tenant, and whether it has to prove that.

    peer                                       is                    must prove
    Unix socket, the daemon's own user         whom it says          nothing: it could read our
                                               (default: "")         memory anyway
    Unix socket, a user in a tenant's `uids`   that tenant           nothing
    TCP, a tenant with a secret                whom it says          the secret
    TCP on loopback, "" without a secret       the default tenant    nothing
    a daemon that acts for a tenant            that tenant, to read  the secret of peers
    anybody else                               refused

A tenant that does not exist and one whose secret is wrong look alike from outside.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore import wire
from kvstore.auth import SECRET_BYTES_MIN, check_secret, is_proof, proof_of, read_secret
from kvstore.config import DaemonConfig, TenantConfig
from kvstore.errors import ConfigError, PeerUnavailableError

DEFAULT = ""
_CHALLENGES_MAX = 1024  # handshakes under way


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection, as far as the kernel says."""

    is_local: bool  # a Unix socket
    uid: int  # -1 over TCP


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a peer is taken for."""

    tenant: str
    is_own_user: bool  # of the daemon, on this host
    may_administer: bool
    is_peer: bool = False  # a daemon: it may read what the tenant has, here and by our endpoint


@dataclass(frozen=True, slots=True)
class _Challenged:
    hello: wire.Hello
    body: bytes
    nonce: bytes
    secret: bytes | None


class Tenants:
    """The table above. Not thread-safe.

    Args:
        tenants: by name, without the default one.
        secrets_by_name: of those that have one; "" is the default tenant.
        uid: whose processes may do everything.
        open_to_network: TCP peers may be on other hosts, so all of them need a secret.
        peer_secret: what daemons prove that act for tenants of theirs; None: there are none.
    """

    def __init__(
        self,
        tenants: Mapping[str, TenantConfig],
        secrets_by_name: Mapping[str, bytes],
        uid: int,
        *,
        open_to_network: bool = False,
        peer_secret: bytes | None = None,
    ) -> None:
        self._tenants = dict(tenants)
        self._secrets = dict(secrets_by_name)
        self._uid = uid
        self._open_to_network = open_to_network
        self._peer_secret = peer_secret
        self._of_uid = {each: name for name, tenant in tenants.items() for each in tenant.uids}
        self._challenges: OrderedDict[int, _Challenged] = OrderedDict()
        self._decoy = secrets.token_bytes(SECRET_BYTES_MIN)

    @property
    def has_other_users(self) -> bool:
        """Whether processes of other users are to reach the Unix socket."""
        return any(uid != self._uid for uid in self._of_uid)

    def identify(self, peer: Peer, tenant: str, is_peer: bool = False) -> Identity | None:
        """Return who a peer is that says to be `tenant`; None where it has to prove it.

        Raises:
            PeerUnavailableError: it is refused.
        """
        if is_peer:
            if self._peer_secret is None:
                raise PeerUnavailableError("peer_token: this daemon serves no peers")
            return None  # on this host too: only the secret tells a daemon from a client
        if peer.is_local:
            return self._identify_local(peer.uid, tenant)
        if tenant == DEFAULT and DEFAULT not in self._secrets and not self._open_to_network:
            return Identity(DEFAULT, is_own_user=False, may_administer=False)
        return None

    def _identify_local(self, uid: int, tenant: str) -> Identity:
        if uid == self._uid:
            if tenant and tenant not in self._tenants:
                raise PeerUnavailableError(f"tenant: there is no {tenant!r}")
            return Identity(tenant, is_own_user=True, may_administer=True)
        name = self._of_uid.get(uid)
        if name is None or tenant not in (DEFAULT, name):
            raise PeerUnavailableError(f"tenant: user {uid} may not connect as {tenant!r}")
        return Identity(name, is_own_user=False, may_administer=False)

    def challenge(self, connection: int, hello: wire.Hello, body: bytes) -> wire.Challenge:
        """Return our proof and a question for the peer's. `body` is the Hello as it came.

        Raises:
            PeerUnavailableError: the Hello has no nonce.
        """
        if len(hello.nonce) != wire.NONCE_BYTES:
            raise PeerUnavailableError("a token is needed: see token_file")
        secret = self._peer_secret if hello.peer else self._secrets.get(hello.tenant)
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        proof = proof_of("server", secret or self._decoy, body, nonce)
        self._challenges[connection] = _Challenged(hello, body, nonce, secret)
        self._challenges.move_to_end(connection)
        while len(self._challenges) > _CHALLENGES_MAX:
            self._challenges.popitem(last=False)
        return wire.Challenge(nonce, proof)

    def settle(self, connection: int, proof: bytes) -> tuple[wire.Hello, Identity]:
        """Return the Hello that was challenged, and who the peer has proved to be. Once.

        Raises:
            PeerUnavailableError: it has not.
        """
        asked = self._challenges.pop(connection, None)
        if asked is None:
            raise PeerUnavailableError("no proof was asked for")
        is_right = is_proof(proof, "client", asked.secret or self._decoy, asked.body, asked.nonce)
        if asked.secret is None or not is_right:
            whose = "the peers'" if asked.hello.peer else "the tenant's"
            raise PeerUnavailableError(f"the token is not {whose}")
        hello = asked.hello
        may_administer = hello.tenant == DEFAULT and not hello.peer
        if hello.peer and hello.tenant != DEFAULT and hello.tenant not in self._tenants:
            raise PeerUnavailableError(f"tenant: there is no {hello.tenant!r} here")
        return hello, Identity(
            hello.tenant, is_own_user=False, may_administer=may_administer, is_peer=hello.peer
        )


def tenants_of(config: DaemonConfig, environment_token: bytes | None, uid: int) -> Tenants:
    """Return the tenants of a configuration; reads their secrets.

    Raises:
        ConfigError: a secret cannot be read, or `tcp` is open to others without any.
    """
    found: dict[str, bytes] = {}
    if config.token_file:
        found[DEFAULT] = read_secret(config.token_file)
    elif environment_token is not None:
        found[DEFAULT] = check_secret(environment_token, "KVSTORE_TOKEN")
    for name, tenant in config.tenants.items():
        if tenant.token_file:
            found[name] = read_secret(tenant.token_file, f"tenants.{name}.token_file")
    if config.is_open_to_the_network and not found and not config.peer_token:
        raise ConfigError(
            f"tcp: {config.tcp} can be reached from other hosts; set token_file, or listen on "
            f"127.0.0.1"
        )
    return Tenants(
        config.tenants,
        found,
        uid,
        open_to_network=config.is_open_to_the_network,
        peer_secret=read_secret(config.peer_token, "peer_token") if config.peer_token else None,
    )

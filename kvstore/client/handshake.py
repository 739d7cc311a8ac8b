"""The first words on a connection: who we are, and proof that both ends know a secret."""

from __future__ import annotations

import builtins
import secrets
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path

from kvstore import auth, errors, tls, wire
from kvstore._native import Connection, ProtocolError, RemoteError
from kvstore.address import tcp_address, unix_path
from kvstore.block import Namespace
from kvstore.certificates import TlsFiles
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    IncompatibleError,
    KVStoreError,
    PeerUnavailableError,
)

_SECONDS_MIN = 0.001  # what is left of a deadline, at least: 0 could mean none


@dataclass(frozen=True)
class Target:
    """Whom to connect to, and as whom."""

    address: str  # unix:/path, tcp:host:port or tls:host:port
    namespace: Namespace
    tenant: str = ""
    secret: bytes = field(default=b"", repr=False)
    tls: ssl.SSLContext | None = None
    tls_name: str = ""  # what its certificate must have; "": the host
    is_peer: bool = False  # we are a daemon, `tenant` is whom we act for, `secret` the peers' own

    @classmethod
    def of(
        cls,
        address: str,
        namespace: Namespace,
        tenant: str = "",
        token: str | Path | None = None,
        tls: TlsFiles | None = None,
    ) -> Target:
        """Check what a user gave; `token` is the secret itself, or the path of its file.

        Raises:
            ConfigError: the address, the token or a file of TLS is wrong.
        """
        context, tls_name = None, ""
        if address.startswith("tls:"):
            tcp_address(address)
            files = tls or TlsFiles()
            context, tls_name = files.client_context(), files.server_name
        elif tls is not None:
            raise ConfigError(f"tls: {address} is not of the form tls:host:port")
        elif address.startswith("tcp:"):
            tcp_address(address)
        else:
            unix_path(address)
        secret = b""
        if isinstance(token, Path):
            secret = auth.read_secret(token, "token")
        elif token is not None:
            secret = auth.check_secret(token.encode(), "token")
        return cls(address, namespace, tenant, secret, tls=context, tls_name=tls_name)


def error_of(error: RemoteError) -> Exception:
    """Return the exception that a reply's status names."""
    status, message = error.args
    name = wire.ERRORS[status - 1] if 0 < status <= len(wire.ERRORS) else "KVStoreError"
    kind = getattr(errors, name, None) or getattr(builtins, name)
    made: Exception = kind(0, message) if name == "StorageError" else kind(message)
    return made


def unreachable(error: BaseException) -> KVStoreError:
    """Return our error for what a native connection raised; its message names the address."""
    if isinstance(error, TimeoutError):
        return DeadlineExceededError(str(error))
    if isinstance(error, ProtocolError):
        return IncompatibleError(str(error))
    return PeerUnavailableError(str(error))


def dial(target: Target, token: bytes, timeout: float) -> tuple[Connection, wire.Welcome]:
    """Return a connection that has been welcomed.

    Args:
        token: of an earlier Welcome, to be one more connection of that client; or empty.
        timeout: for all of it.

    Raises:
        PeerUnavailableError, DeadlineExceededError: nobody there, or no answer.
        IncompatibleError: not a daemon, or of another version, or one that cannot prove that it
            knows the secret.
        KVStoreError: the daemon refused; the message is its own.
    """
    deadline = time.monotonic() + timeout
    relay = None
    try:
        if target.tls is not None:
            connection, relay = tls.dial(target.address, target.tls, target.tls_name, timeout)
        else:
            connection = Connection(target.address, timeout)
    except (OSError, ProtocolError) as error:
        raise unreachable(error) from error
    try:
        return connection, _greet(connection, target, token, deadline)
    except (OSError, ProtocolError) as error:
        connection.close()
        if relay is not None and relay.failure:
            # In TLS 1.3 a server looks at our certificate when we think that all is well.
            raise IncompatibleError(f"{target.address}: TLS: {relay.failure}") from error
        raise unreachable(error) from error
    except RemoteError as error:
        connection.close()
        raise error_of(error) from error
    except BaseException:
        connection.close()
        raise


def _greet(connection: Connection, target: Target, token: bytes, deadline: float) -> wire.Welcome:
    nonce = secrets.token_bytes(wire.NONCE_BYTES) if target.secret else b""
    hello = wire.encode(
        wire.Hello(
            wire.VERSION,
            target.namespace.describe(),
            token,
            target.tenant,
            nonce,
            target.is_peer,
        )
    )
    reply = wire.decode_greeting(connection.call(wire.Op.HELLO, hello, _left(deadline)))
    if isinstance(reply, wire.Challenge):
        if not target.secret:
            raise ConfigError(f"token: {target.address} asks for one")
        if not auth.is_proof(reply.proof, "server", target.secret, hello, reply.nonce):
            raise IncompatibleError(f"{target.address} does not know our token's secret")
        proof = wire.encode(wire.Auth(auth.proof_of("client", target.secret, hello, reply.nonce)))
        reply = wire.decode_greeting(connection.call(wire.Op.AUTH, proof, _left(deadline)))
    elif target.is_peer or (target.secret and not target.address.startswith("unix:")):
        # Whoever takes us without a proof may be anybody, also in the place of one that proved it.
        raise IncompatibleError(f"{target.address} did not prove that it knows our token's secret")
    if not isinstance(reply, wire.Welcome):
        raise IncompatibleError(f"{target.address}: challenged twice")
    return reply


def _left(deadline: float) -> float:
    return max(_SECONDS_MIN, deadline - time.monotonic())

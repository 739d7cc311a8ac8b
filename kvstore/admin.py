"""Asks a daemon about itself, and to check, restart or stop: what operators' commands stand on.

An admin connection says Hello with an empty namespace; only CALL works on it. Every call has a
deadline. Whether the daemon obeys is its decision: it knows the peer's uid, or wants a secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Protocol, cast

from kvstore import _native, errors, wire
from kvstore.auth import is_proof, proof_of
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    IncompatibleError,
    KVStoreError,
    PeerUnavailableError,
)
from kvstore.status import Status


class Connection(Protocol):
    """What is used of a native connection."""

    def call(self, op: int, body: bytes, timeout: float) -> bytes: ...
    def close(self) -> None: ...


def dial(address: str, timeout: float) -> Connection:
    """Connect. Raises ConnectionError or TimeoutError."""
    return _native.Connection(address, timeout)


class Admin:
    """Use as a context manager. Not thread-safe.

    Raises, from here and from every call:
        PeerUnavailableError: nobody listens there, or the connection is lost.
        DeadlineExceededError: no answer in `timeout` seconds.
        IncompatibleError: what answers is no daemon of this version.
        ConfigError: the daemon wants a secret, or another one.
        KVStoreError: what the daemon refused with.
    """

    def __init__(
        self,
        address: str,
        timeout: float = 2.0,
        secret: bytes | None = None,
        *,
        is_peer: bool = False,
    ) -> None:
        """`is_peer`: with the peers' secret; then the Welcome tells of the daemon's endpoint."""
        self.address = address
        self._is_peer = is_peer
        self._timeout = timeout
        self._connection: Connection | None = None
        self._connection = self._guarded(timeout, lambda: dial(address, timeout))
        try:
            self.welcome = self._greet(secret)
        except BaseException:
            self.close()
            raise

    def _greet(self, secret: bytes | None) -> wire.Welcome:
        hello = wire.encode(
            wire.Hello(
                wire.VERSION,
                {},
                nonce=secrets.token_bytes(wire.NONCE_BYTES),
                peer=self._is_peer,
            )
        )
        greeting = wire.decode_greeting(self._ask(wire.Op.HELLO, hello, self._timeout))
        if isinstance(greeting, wire.Welcome):
            return greeting
        if secret is None:
            raise ConfigError(f"token_file: the daemon at {self.address} wants a secret")
        if not is_proof(greeting.proof, "server", secret, hello, greeting.nonce):
            raise ConfigError(f"token_file: the daemon at {self.address} has another secret")
        proof = wire.encode(wire.Auth(proof_of("client", secret, hello, greeting.nonce)))
        welcome = wire.decode_greeting(self._ask(wire.Op.AUTH, proof, self._timeout))
        if not isinstance(welcome, wire.Welcome):
            raise IncompatibleError(f"{self.address}: asks for a proof twice")
        return welcome

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, message: wire.Call, timeout: float | None = None) -> Any:
        """Return what the daemon answers."""
        wait = self._timeout if timeout is None else timeout
        return wire.decode_value(self._ask(wire.Op.CALL, wire.encode(message), wait))

    def status(self) -> Status:
        answer = self.call(wire.AdminStatus())
        if not isinstance(answer, dict):
            raise IncompatibleError(f"{self.address}: answered no status")
        return cast(Status, answer)

    def _ask(self, op: int, body: bytes, timeout: float) -> bytes:
        connection = self._connection
        if connection is None:
            raise PeerUnavailableError(f"{self.address}: the connection is closed")
        return bytes(self._guarded(timeout, lambda: connection.call(int(op), body, timeout)))

    def _guarded(self, timeout: float, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"{self.address}: no answer in {timeout:g} s; is the daemon stopped?"
            ) from error
        except ConnectionError as error:
            raise PeerUnavailableError(
                f"{self.address}: no daemon answers there ({error}); start it with `kvstore serve`"
            ) from error
        except _native.RemoteError as error:
            raise _refusal(self.address, error) from error
        except _native.ProtocolError as error:
            raise IncompatibleError(
                f"{self.address}: what answers there is no kvstore daemon of this version: {error}"
            ) from error


def _refusal(address: str, error: _native.RemoteError) -> KVStoreError:
    """The library's error for a reply with a status."""
    name = wire.ERRORS[error.status - 1] if 0 < error.status <= len(wire.ERRORS) else ""
    kind = getattr(errors, name, KVStoreError)
    return cast(KVStoreError, kind(f"{address}: {error.message}"))

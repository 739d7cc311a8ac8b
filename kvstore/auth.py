"""Tenants' secrets: where they are read from, and how two ends prove that they know one.

Each end sends a nonce, and the HMAC-SHA256 of the other's under the secret; the secret itself never
travels. A proof covers the whole Hello (so its namespace and tenant too) and both nonces, and names
the end that made it: it is of no use for another connection, nor sent back to its maker.

A proof lets whoever sees it try guesses offline, so secrets must be long; `read_secret` refuses
short ones. Nothing after the handshake is encrypted: over networks that are not trusted, use a
tunnel.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from pathlib import Path
from typing import Literal

from kvstore.errors import ConfigError

SECRET_BYTES_MIN = 16
_SECRET_BYTES_MAX = 4096


def proof_of(
    role: Literal["client", "server"], secret: bytes, hello: bytes, server_nonce: bytes
) -> bytes:
    """Return what proves that `role` knows the secret.

    Args:
        role: who makes the proof.
        secret: the tenant's.
        hello: the body of the Hello frame, with the client's nonce in it, as it was sent.
        server_nonce: of the Challenge.
    """
    said = b"\0".join((b"kvstore-2 " + role.encode(), hashlib.sha256(hello).digest(), server_nonce))
    return hmac.new(secret, said, hashlib.sha256).digest()


def is_proof(
    proof: bytes,
    role: Literal["client", "server"],
    secret: bytes,
    hello: bytes,
    server_nonce: bytes,
) -> bool:
    return hmac.compare_digest(proof, proof_of(role, secret, hello, server_nonce))


def check_secret(secret: bytes, name: str) -> bytes:
    """Return a secret that is long enough.

    Raises:
        ConfigError: it is not; the message names the setting, not the secret.
    """
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigError(
            f"{name}: a secret of {len(secret)} bytes; it needs {SECRET_BYTES_MIN} or more"
        )
    return secret


def read_secret(path: str | os.PathLike[str], name: str = "token_file") -> bytes:
    """Return the secret in a file, without white space around it.

    Raises:
        ConfigError: the file cannot be read, belongs to another user, may be read or written by
            others, or holds too short a secret.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {Path(path)}: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{name}: {Path(path)} is not a file")
        if found.st_mode & 0o077:
            raise ConfigError(
                f"{name}: {Path(path)} has mode {found.st_mode & 0o777:04o}: others may read it; "
                f"make it 0600"
            )
        if found.st_uid not in (os.geteuid(), 0):
            raise ConfigError(f"{name}: {Path(path)} belongs to user {found.st_uid}")
        secret = os.read(fd, _SECRET_BYTES_MAX + 1)
    finally:
        os.close(fd)
    if len(secret) > _SECRET_BYTES_MAX:
        raise ConfigError(f"{name}: {Path(path)} is longer than {_SECRET_BYTES_MAX} bytes")
    return check_secret(secret.strip(), f"{name}: {Path(path)}")

"""Tenants' secrets: where they are read from, and how two ends prove that they know one.

Each end sends a nonce, and the HMAC-SHA256 of the other's under the secret; the secret itself never
travels. A proof covers the whole Hello (so its namespace and tenant too) and both nonces, and names
the end that made it: it is of no use for another connection, nor sent back to its maker.

A proof lets whoever sees it try guesses offline, so secrets must be long; `read_secret` refuses
short ones. Nothing after the handshake is encrypted: over networks that are not trusted, use a
tunnel.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Literal

from kvstore.config_sources import fallback_directory, runtime_directory
from kvstore.errors import ConfigError, StorageError

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


def private_directory(path: Path, name: str) -> None:
    """Make a directory that only we can enter, or see that it is one.

    Raises:
        ConfigError: it is another user's, or others may enter it; the message begins with `name`.
        StorageError: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise StorageError(error.errno or 0, f"{name}: {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{name}: {path} is not a directory")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{name}: {path} belongs to user {found.st_uid}")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"{name}: {path} has mode {found.st_mode & 0o777:04o}, so others may enter it; "
            f"make it 0700"
        )


def user_secret(name: str) -> tuple[bytes, Path]:
    """Return a secret that this user's processes on this host share, and the file that holds it:
    made by whoever asks first, and for nobody else to read.

    Raises:
        ConfigError: the file or its directory could be another user's doing.
        StorageError: it cannot be made.
    """
    around = runtime_directory()
    if around == fallback_directory():
        private_directory(around, name)
    directory = around / "kvstore-secrets"
    private_directory(directory, name)
    path = directory / name
    if not path.exists():
        _make_secret(path, name)
    return read_secret(path, name), path


def _make_secret(path: Path, name: str) -> None:
    """Under its name only once it is whole; of several that do this at once, one's."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    except OSError as error:
        raise StorageError(error.errno or 0, f"{name}: {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()

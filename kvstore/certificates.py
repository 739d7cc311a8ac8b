"""TlsFiles: certificates and whom to trust, from files."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import ConfigError

if TYPE_CHECKING:
    import ssl  # loaded by those who use it: `import kvstore` shall be fast


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files.

    Args:
        ca: who must have signed the other end's certificate; "": a client trusts the system's
            authorities, a server asks clients for no certificate.
        cert: our own certificate, with what is between it and the authority.
        key: its private key, not encrypted, that others may not read.
        server_name: what a client looks for in the server's certificate; "": the host it dials.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""

    def server_context(self) -> ssl.SSLContext:
        """
        Raises:
            ConfigError: a file is missing or wrong; the message begins with "tls_" and its name.
        """
        import ssl

        if not self.cert or not self.key:
            raise ConfigError(f"tls_{'key' if self.cert else 'cert'}: a server needs one")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A connection lasts; nothing is gained by resuming one.
        context.num_tickets = 0
        return self._filled(context)

    def client_context(self) -> ssl.SSLContext:
        """
        Raises:
            ConfigError: as for `server_context`.
        """
        import ssl

        return self._filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _filled(self, context: ssl.SSLContext) -> ssl.SSLContext:
        import ssl

        context.minimum_version = ssl.TLSVersion.TLSv1_3
        is_server = not context.check_hostname
        if bool(self.cert) != bool(self.key):
            raise ConfigError(f"tls_{'key' if self.cert else 'cert'}: it belongs to the other")
        try:
            if self.cert:
                _check_key(self.key)
                context.load_cert_chain(self.cert, self.key, _no_password)
        except OSError as error:
            raise ConfigError(f"tls_cert: {self.cert} with {self.key}: {why(error)}") from error
        try:
            if self.ca:
                context.load_verify_locations(self.ca)
            elif not is_server:
                context.load_default_certs()
        except OSError as error:
            raise ConfigError(f"tls_ca: {self.ca}: {why(error)}") from error
        if self.ca and is_server:
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _check_key(path: str) -> None:
    found = os.stat(path)
    if found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(
            f"tls_key: {path} has mode {found.st_mode & 0o777:04o}: others may read it; "
            f"make it 0600"
        )


def _no_password() -> str:
    raise OSError("the key is encrypted; give it without a password, mode 0600")


def why(error: OSError) -> str:
    """Return what OpenSSL says, without its file and line."""
    said = getattr(error, "verify_message", "") or getattr(error, "reason", None)
    return str(said or error.strerror or error)

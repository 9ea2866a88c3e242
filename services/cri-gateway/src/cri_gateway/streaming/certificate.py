"""The streaming server's TLS certificate, which is read again when its files have changed."""

import ssl
from pathlib import Path

from cri_gateway.settings import GatewaySettings
from servicekit import logs
from servicekit.errors import InvalidArgument

_log = logs.get()


def configured(settings: GatewaySettings) -> "Certificate | None":
    """Returns the certificate that the settings name, if they name one. Raises InvalidArgument."""
    certificate, key = settings.stream_tls_certificate, settings.stream_tls_key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InvalidArgument(
            "gateway.stream_tls_certificate and gateway.stream_tls_key go together; one of them is empty",
            field="gateway.stream_tls_key",
        )
    try:
        return Certificate(certificate, key)
    except OSError as error:
        raise InvalidArgument(
            f"the streaming server's certificate {certificate} or its key can't be used: {error}",
            field="gateway.stream_tls_certificate",
        ) from error


class Certificate:
    """A certificate and its key. Raises OSError (also as ssl.SSLError) if they can't be used."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._loaded_versions = self._versions()
        self.context = self._load()

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self._files)
        context.sni_callback = self._refresh  # called in each handshake, even without a server name
        return context

    def _versions(self) -> tuple[int, ...]:
        return tuple(file.stat().st_mtime_ns for file in self._files)

    def _refresh(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Gives a connection the current certificate, or the last good one if loading fails."""
        try:
            versions = self._versions()
            if versions != self._loaded_versions:
                self.context, self._loaded_versions = self._load(), versions
                _log.info("certificate-reloaded", file=str(self._files[0]))
        except OSError as error:
            _log.error("certificate-unreadable", file=str(self._files[0]), error=str(error))
        connection.context = self.context

"""A certificate authority for one test or node (openssl(1)).

kubelet and the API server need certificates, and ask their clients for one.
"""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

_DAYS = "30"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Keys and certificates in one folder; those of `ca.crt` and `ca.key` sign the others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate = folder / "ca.crt"
        self._key = folder / "ca.key"
        if not self.certificate.exists():
            subject = ["-subj", "/CN=crisp-lab", "-days", _DAYS]
            _openssl("req", "-x509", *_new_key(self._key), *subject, "-out", str(self.certificate))

    def issue(self, name: str, subject: str) -> Certificate:
        """Returns a certificate for a client or a server on 127.0.0.1; issues it the first time.

        `subject` has openssl's syntax: `/O=system:masters/CN=me`.
        """
        issued = Certificate(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        if issued.certificate.exists():
            return issued
        request = self._folder / f"{name}.csr"
        _openssl("req", *_new_key(issued.key), "-subj", subject, "-out", str(request))
        extensions = self._folder / "extensions"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n")
        signed_by = ["-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial", "-days", _DAYS]
        files = ["-in", str(request), "-extfile", str(extensions), "-out", str(issued.certificate)]
        _openssl("x509", "-req", *signed_by, *files)
        return issued

    def client_context(self) -> ssl.SSLContext:
        """Returns a TLS context for a client with all rights (system:masters)."""
        own = self.issue("client", "/O=system:masters/CN=crisp-lab")
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.load_cert_chain(own.certificate, own.key)
        return context


def _new_key(key: Path) -> list[str]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]


def _openssl(*arguments: str) -> None:
    finished = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]} failed: {finished.stderr[-500:]}")

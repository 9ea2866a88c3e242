"""A certificate authority for one test or node: kubelet and the API server want certificates, of their clients too (openssl(1))."""

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
    """Keys and certificates in one folder: `ca.crt` signs the rest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate = folder / "ca.crt"
        self._key = folder / "ca.key"
        if not self.certificate.exists():
            _openssl(
                "req",
                "-x509",
                *_new_key(self._key),
                "-subj",
                "/CN=crisp-lab",
                "-days",
                _DAYS,
                "-out",
                str(self.certificate),
            )

    def issue(self, name: str, subject: str) -> Certificate:
        """A certificate that a client or a server on 127.0.0.1 can show; the subject is openssl's, as `/O=system:masters/CN=me`."""
        made = Certificate(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        if made.certificate.exists():
            return made
        request = self._folder / f"{name}.csr"
        _openssl("req", *_new_key(made.key), "-subj", subject, "-out", str(request))
        extensions = self._folder / "extensions"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n")
        signed_by = ["-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial"]
        _openssl(
            "x509",
            "-req",
            "-in",
            str(request),
            *signed_by,
            "-days",
            _DAYS,
            "-extfile",
            str(extensions),
            "-out",
            str(made.certificate),
        )
        return made

    def client_context(self) -> ssl.SSLContext:
        """What a client needs that may do everything: system:masters' certificate, and trust in ours."""
        shown = self.issue("client", "/O=system:masters/CN=crisp-lab")
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.load_cert_chain(shown.certificate, shown.key)
        return context


def _new_key(key: Path) -> list[str]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]


def _openssl(*arguments: str) -> None:
    finished = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]} failed: {finished.stderr[-500:]}")

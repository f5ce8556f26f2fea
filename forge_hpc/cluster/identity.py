"""The identity of one start of a job: a certificate authority and one certificate that all of its nodes share.

Monarch's TLS admits a peer only if it presents a certificate of this authority. The authority's own key is never
written: it lives in the memory of the first node's supervisor, which signs requests of nodes that other jobs lend
(``joining``), and ends with that start. Without it nobody, not even the job's owner, can make another certificate.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an import of a quarter of a second: only who makes certificates pays for it
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

VALID_DAYS = 60  # longer than any walltime; every start of a job makes a new identity


class Authority:
    """Signs certificates of one start, as long as this object lives."""

    def __init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.x509.oid import NameOID

        self._key = _new_key()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forge_hpc job authority")])
        self._ca = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def ca(self) -> bytes:
        """Its own certificate, PEM: what peers are checked against."""
        return _pem(self._ca)

    def certify(self, request: bytes, names: Iterable[str]) -> bytes:
        """A certificate, PEM, for the key that has signed ``request`` (PEM, of ``new_request``) and for ``names``.

        Raises:
            ValueError: the request is none, or was signed with another key.
        """
        from cryptography import x509

        asked = x509.load_pem_x509_csr(request)
        key = asked.public_key()
        if not asked.is_signature_valid or type(key).__name__ != type(self._key.public_key()).__name__:
            raise ValueError("the request for a certificate is not signed with its key")
        return self.issue(key, names)  # type: ignore[arg-type]

    def issue(self, key: ec.EllipticCurvePublicKey, names: Iterable[str]) -> bytes:
        """A certificate, PEM, of a node that has ``key`` and is reached by ``names``, host names or addresses."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

        alternatives = [_alternative_name(name) for name in sorted(set(names))]
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forge_hpc node")])
        return _pem(
            self._builder(subject, key)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        from cryptography import x509

        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))  # nodes' clocks differ
            .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        )


def make_job_identity(directory: Path, names: Iterable[str]) -> Authority:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem`` into ``directory`` (0700), readable by the owner alone (0600), and
    return the authority, which is written nowhere.

    ``names`` are the host names and addresses by which the nodes reach each other.
    """
    authority, key = Authority(), _new_key()
    keep_identity(directory, ca=authority.ca, cert=authority.issue(key.public_key(), names), key=_key_pem(key))
    return authority


def new_request() -> tuple[bytes, bytes]:
    """A new key, and a request for a certificate of it (``Authority.certify``); both PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key = _new_key()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return _key_pem(key), request.public_bytes(serialization.Encoding.PEM)


def keep_identity(directory: Path, *, ca: bytes, cert: bytes, key: bytes) -> None:
    """Write the three files, PEM, into ``directory`` (0700), readable by the owner alone (0600)."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in (("ca", ca), ("cert", cert), ("key", key)):
        fd = os.open(directory / f"{name}.pem", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o600)
            file.write(content)


def tls_environment(directory: Path) -> dict[str, str]:
    """The variables by which Monarch finds the job's certificates."""
    return {f"HYPERACTOR_TLS_{name.upper()}": str(directory / f"{name}.pem") for name in ("ca", "cert", "key")}


def _new_key() -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    pem, format = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, format, serialization.NoEncryption())


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def _alternative_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)

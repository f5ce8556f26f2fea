"""The identity of one start of a job: a certificate authority and one certificate that all of its nodes share.

Monarch's TLS admits a peer only if it presents a certificate of this authority. The authority's own key is thrown
away once the certificate is signed, so nobody, not even the job's owner, can make another.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

VALID_DAYS = 60  # longer than any walltime; every start of a job makes a new identity


def make_job_identity(directory: Path, names: Iterable[str]) -> None:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem`` into ``directory`` (0700), readable by the owner alone (0600).

    ``names`` are the host names and addresses by which the nodes reach each other.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def alternative_name(name: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            return x509.DNSName(name)

    def builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))  # nodes' clocks differ
            .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        )

    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forge_hpc job authority")])
    ca = (
        builder(ca_name, ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(ca_key, hashes.SHA256())
    )

    key = ec.generate_private_key(ec.SECP256R1())
    cert = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forge_hpc node")]), ca_name, key.public_key())
        .add_extension(x509.SubjectAlternativeName([alternative_name(n) for n in sorted(set(names))]), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key_pem = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in (("ca", ca.public_bytes(pem)), ("cert", cert.public_bytes(pem)), ("key", key_pem)):
        fd = os.open(directory / f"{name}.pem", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o600)
            file.write(content)


def tls_environment(directory: Path) -> dict[str, str]:
    """The variables by which Monarch finds the job's certificates."""
    return {f"HYPERACTOR_TLS_{name.upper()}": str(directory / f"{name}.pem") for name in ("ca", "cert", "key")}

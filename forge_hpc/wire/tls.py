"""The job's certificates on sockets of our own: TLS 1.3, and both ends present a certificate of the job's authority."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_KINDS = ("CA", "CERT", "KEY")
KEEPALIVE_S = 10
SILENT_S = 60
"""A host that acknowledges nothing for so long is gone."""


@dataclass(frozen=True)
class Certificates:
    """Files of PEM, as ``cluster.identity`` writes them."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Certificates | None:
        """Those that Monarch uses in this process; None where it has none."""
        names = [f"HYPERACTOR_TLS_{kind}" for kind in _KINDS]
        return cls(*(Path(environ[name]) for name in names)) if all(name in environ for name in names) else None

    def environment(self) -> dict[str, str]:
        """By which another process finds them."""
        return {
            f"HYPERACTOR_TLS_{kind}": str(path)
            for kind, path in zip(_KINDS, (self.ca, self.cert, self.key), strict=True)
        }

    def server(self) -> ssl.SSLContext:
        """For who listens: a peer without a certificate of the job is refused in the handshake."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        return context

    def client(self) -> ssl.SSLContext:
        """For who connects: the certificate has to be the job's, and for the address that was asked for."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.ca)
        context.load_cert_chain(self.cert, self.key)
        return context


def prepare(connection: socket.socket) -> None:
    """Messages go out at once, and a host that is gone is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_S),
        ("TCP_KEEPCNT", SILENT_S // KEEPALIVE_S),
        ("TCP_USER_TIMEOUT", SILENT_S * 1000),
    ):
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

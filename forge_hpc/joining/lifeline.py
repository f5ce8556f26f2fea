"""A connection between each lent node and the controller, which says one thing: that the node is there.

When the processes of a node are killed its kernel ends the connection, and the controller knows at once; of a host that
falls silent it knows after ``SILENT_S``, half of the time that Monarch gives a host. It costs the controller a socket a
lent node, and no thread. Both ends present a certificate of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Callable
from typing import Any

from forge_hpc.wire.tls import Certificates

LIFELINE = "lifeline"
"""The record of where the controller listens."""
CONNECT_S = 5.0
SILENT_S = 10
_PROBE_S = 2


class Lifelines:
    """The controller's end.

    Args:
        host: address to listen on; the port is the kernel's choice.
        on_cut: called with the number of a node whose connection has ended.
    """

    def __init__(self, host: str, certificates: Certificates, on_cut: Callable[[int], None]) -> None:
        self._host, self._certificates, self._on_cut = host, certificates, on_cut
        self._server: asyncio.Server | None = None

    async def open(self) -> dict[str, Any]:
        """Listen; what ``hold`` has to know. Raises OSError."""
        context = self._certificates.server()
        self._server = await asyncio.start_server(self._attend, self._host, 0, ssl=context)
        return {"host": self._host, "port": self._server.sockets[0].getsockname()[1]}

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _probe(writer.get_extra_info("socket"))
            async with asyncio.timeout(CONNECT_S):
                number = json.loads(await reader.readline())["node"]
        except (OSError, TimeoutError, ValueError, KeyError, TypeError):  # another's, or one that died at once
            writer.close()
            return
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()
        self._on_cut(number)


def hold(record: dict[str, Any], node: int, certificates: Certificates) -> ssl.SSLSocket:
    """A lent node's end, which lives as long as its process, or until it is closed. Raises OSError."""
    plain = socket.create_connection((record["host"], record["port"]), timeout=CONNECT_S)
    try:
        line = certificates.client().wrap_socket(plain, server_hostname=record["host"])
        line.sendall(json.dumps({"node": node}).encode() + b"\n")
    except BaseException:
        plain.close()
        raise
    return line


def _probe(connection: socket.socket) -> None:
    """Have the kernel look whether the other host is there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (("TCP_KEEPIDLE", _PROBE_S), ("TCP_KEEPINTVL", _PROBE_S), ("TCP_KEEPCNT", SILENT_S // _PROBE_S - 1))
    for name, value in options:
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

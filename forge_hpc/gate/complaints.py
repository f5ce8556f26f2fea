"""How a node that cannot write to the run directory tells the first one: over TCP, to an address that it can read."""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import threading
from typing import Any

_MAX_BYTES = 4096
_PATIENCE_S = 5.0


class ComplaintsDesk:
    """Takes complaints while the gate is open.

    Example:
        with ComplaintsDesk("10.0.0.1") as desk:
            rendezvous.publish("gate", {"desk": desk.where})
            ...
            print(desk.complaints)  # {3: {"node": 3, "slurm_name": "n4", "problem": "cannot write ..."}}
    """

    def __init__(self, address: str) -> None:
        self.complaints: dict[int, dict[str, Any]] = {}
        self._token = secrets.token_hex(16)
        self._socket = socket.create_server((address, 0))
        self.where = {"address": address, "port": self._socket.getsockname()[1], "token": self._token}

    def __enter__(self) -> ComplaintsDesk:
        threading.Thread(target=self._serve, name="complaints", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close alone does not
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                connection.settimeout(_PATIENCE_S)
                with connection.makefile("rb") as stream:
                    said = json.loads(stream.readline(_MAX_BYTES))
                if hmac.compare_digest(said.pop("token"), self._token):
                    self.complaints[int(said["node"])] = said


def complain(where: dict[str, Any], complaint: dict[str, Any]) -> None:
    """Tell the desk at ``where``. Raises OSError."""
    with socket.create_connection((where["address"], where["port"]), timeout=_PATIENCE_S) as connection:
        connection.sendall(json.dumps(complaint | {"token": where["token"]}).encode() + b"\n")

"""The newest value of every figure for Prometheus to scrape (``logging.prometheus_port``): ``/metrics``, as text.

Every figure is a gauge: its key with what Prometheus does not allow replaced, ``forge_hpc_reward_mean{run="demo"}``.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

logger = logging.getLogger(__name__)
_REQUEST_S = 5.0


class PrometheusWriter:
    """Serves on ``host:port`` from now until ``close``. A port that cannot be had is said once, and nothing is served.

    Example:
        scrape_configs: [{job_name: forge_hpc, static_configs: [{targets: ["127.0.0.1:9400"]}]}]
    """

    def __init__(self, host: str, port: int, run: str) -> None:
        self._run = run
        self._values: dict[str, float] = {}
        self._server: _Server | None = None
        try:
            self._server = _Server(host, port, self)
        except OSError as error:
            reason = error.strerror or error
            logger.warning("nothing is served to Prometheus on %s:%d, the training goes on: %s", host, port, reason)
            return
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it serves; None where it could not."""
        return None if self._server is None else self._server.server_address[:2]  # type: ignore[return-value]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Replace the values of these figures."""
        self._values = {**self._values, "step": float(step), **values}

    def text(self) -> str:
        """In Prometheus' text format."""
        gauges = {re.sub(r"[^a-zA-Z0-9_]", "_", f"forge_hpc_{key}"): value for key, value in self._values.items()}
        run = self._run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return "".join(f'# TYPE {name} gauge\n{name}{{run="{run}"}} {value!r}\n' for name, value in gauges.items())

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, writer: PrometheusWriter) -> None:
        self.writer = writer
        super().__init__((host, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is nobody's concern."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_S
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        body = self.server.writer.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scrape is no event."""

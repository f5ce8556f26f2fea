"""The side that has the bytes: it answers whoever presents a certificate of the job, a thread a stream.

Large pieces go out of the memory as it is, in one call that lets other threads run.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Protocol

from forge_hpc.wire import messages, tls
from forge_hpc.wire.messages import Address

logger = logging.getLogger(__name__)
HANDSHAKE_S = 10.0
CLOSE_S = 5.0
"""A thread that makes a link whose other end is gone may not hear of it."""


class Link(Protocol):
    """Another way for the bytes, between this process and the one at the other end of a stream."""

    def find(self, version: int) -> int:
        """The bytes of a version; 0 where it is not there."""

    def send(self, version: int, is_open: Callable[[], bool]) -> None:
        """Send what was found, as long as the stream is open. Raises OSError."""

    def end(self) -> None:
        """Give it up."""


class Source(Protocol):
    """Versions in the memory of this process. Called from many threads."""

    def piece(self, version: int, start: int, stop: int) -> memoryview | None:
        """Bytes of a version; None where it is not there."""

    def changes(self, held: int, version: int, start: int, stop: int) -> bytes | None:
        """What makes that piece out of an older version's (``changes.encode``); None where the bytes are better."""

    def is_there(self, version: int) -> bool:
        """Whether nobody has begun to overwrite the version."""

    def link(self, name: int) -> Callable[[], Link] | None:
        """What makes a link of this name, once the other end makes it too; None where there are none."""


class Server:
    """Serves a source as long as the process lives, or until ``close``.

    Args:
        host: the address to listen on; the port is the kernel's choice.
    """

    def __init__(self, source: Source, host: str, certificates: tls.Certificates) -> None:
        self._source, self._context = source, certificates.server()
        self._socket = socket.create_server((host, 0), backlog=256)
        self.address = Address(host, self._socket.getsockname()[1], secrets.token_hex(16))
        self._has_refused, self._closed = False, threading.Event()
        self._streams: dict[threading.Thread, socket.socket] = {}
        self._thread = threading.Thread(target=self._accept, name="wire", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody is served any more."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._thread.join()
        self._socket.close()
        for thread, stream in list(self._streams.items()):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            thread.join(CLOSE_S)

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._socket.accept()
            except OSError as error:
                if self._closed.wait(0.1):
                    return
                logger.warning("a connection could not be accepted: %s", error)
                continue
            threading.Thread(target=self._serve, args=(connection, peer[0]), name="wire", daemon=True).start()

    def _serve(self, connection: socket.socket, peer: str) -> None:
        with connection:
            try:
                tls.prepare(connection)
                connection.settimeout(HANDSHAKE_S)
                stream = self._context.wrap_socket(connection, server_side=True)
                stream.settimeout(None)
            except OSError as error:  # also of ssl
                log = logger.debug if self._has_refused else logger.warning
                log("a connection from %s was refused: %s (the next ones are not reported)", peer, error)
                self._has_refused = True
                return
            self._streams[threading.current_thread()] = stream
            try:
                with stream, contextlib.suppress(OSError):
                    while not self._closed.is_set():
                        self._answer(stream)
            finally:
                del self._streams[threading.current_thread()]

    def _answer(self, stream: ssl.SSLSocket) -> None:
        is_ours, version, held, start, stop = self._next_request(stream)
        if is_ours and held == messages.LINK:
            self._serve_link(stream, version)
            return
        kind, body = messages.GONE, None
        if is_ours and start < stop:
            kind, body = self._look_up(version, held, start, stop)
        stream.sendall(messages.ANSWER.pack(kind, len(body or b"")))
        if body is not None:
            stream.sendall(body)
        stream.sendall(bytes([body is not None and self._source.is_there(version)]))

    def _next_request(self, stream: ssl.SSLSocket) -> tuple[bool, int, int, int, int]:
        data = bytearray(messages.REQUEST.size)
        messages.read_exactly(stream, memoryview(data))
        token, *numbers = messages.REQUEST.unpack(data)
        return (token.hex() == self.address.token, *numbers)

    def _serve_link(self, stream: ssl.SSLSocket, name: int) -> None:
        """Until the stream ends, or the link breaks; then the stream ends too. Raises OSError."""
        make = self._source.link(name)
        stream.sendall(messages.ANSWER.pack(messages.GONE if make is None else messages.LINKED, 0))
        if make is None:
            return
        link = make()
        try:
            while not self._closed.is_set():
                is_ours, version, held, _, _ = self._next_request(stream)
                num_bytes = link.find(version) if is_ours and held == messages.SEND else 0
                stream.sendall(messages.ANSWER.pack(messages.LINKED if num_bytes else messages.GONE, num_bytes))
                if num_bytes:
                    link.send(version, lambda: is_open(stream))
                    stream.sendall(bytes([self._source.is_there(version)]))
        finally:
            link.end()

    def _look_up(self, version: int, held: int, start: int, stop: int) -> tuple[int, memoryview | bytes | None]:
        if held != messages.NOTHING:
            changes = self._source.changes(held, version, start, stop)
            if changes is not None:
                return messages.CHANGES, changes
        piece = self._source.piece(version, start, stop)
        if piece is None or len(piece) != stop - start:
            return messages.GONE, None
        return messages.BYTES, piece


def is_open(stream: socket.socket) -> bool:
    """Whether the other side has neither closed a stream nor said anything."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return not poll.poll(0)

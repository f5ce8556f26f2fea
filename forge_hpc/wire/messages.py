"""What the two ends of a stream say: a request names a piece of a version, the answer is its bytes or its changes.

    request   token ‖ version ‖ version held ‖ start ‖ stop
    answer    kind ‖ number of bytes ‖ bytes ‖ whole

``whole`` comes last: false where the memory was overwritten while it was being sent.

Two more requests, in place of the version held, are for bytes that go another way (``weights.links``): LINK makes a
link of the stream, whose name stands in place of the version; SEND has a whole version sent over it. Both are answered
before it is done, with the number of bytes; ``whole`` follows SEND, when they have left.
"""

from __future__ import annotations

import ssl
import struct
from dataclasses import dataclass

REQUEST = struct.Struct("!16sqqQQ")
ANSWER = struct.Struct("!BQ")
GONE, BYTES, CHANGES, LINKED = range(4)
"""Kinds of an answer: the version is not there, its bytes, what differs from the version held, by the link."""
NOTHING, LINK, SEND = -1, -2, -3
"""The version held, of who holds none; a link is asked for, and a version over it."""
PIECE_BYTES = 16 * 2**20
"""Of a request. A multiple of 2."""


@dataclass(frozen=True)
class Address:
    """Where a server listens. The token tells it from the one that was there before: versions of two trainings may
    bear one number."""

    host: str
    port: int
    token: str
    """32 hexadecimal digits."""


def read_exactly(stream: ssl.SSLSocket, buffer: memoryview) -> None:
    """Fill the buffer. Raises ConnectionError where the stream ends before."""
    position, size = 0, len(buffer)
    receive = stream.recv_into
    while position < size:
        num = receive(buffer[position:])
        if not num:
            raise ConnectionResetError("the other side has closed the stream")
        position += num


def read_struct(stream: ssl.SSLSocket, layout: struct.Struct) -> tuple[int, ...]:
    """The next numbers. Raises ConnectionError."""
    data = bytearray(layout.size)
    read_exactly(stream, memoryview(data))
    return layout.unpack(data)

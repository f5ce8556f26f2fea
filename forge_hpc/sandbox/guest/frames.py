"""Messages over a pipe or a socket: the length (4 bytes, big endian), then the message.

Each side writes what the other can read safely and quickly. Into the sandbox goes ``marshal``: it is built in, where an
import would cost every start, and its writer is trusted. Out of it come Python literals, which run nothing when they
are read. Between a program and its tester goes JSON.
"""

from __future__ import annotations

import marshal
import os

TYPE_CHECKING = False  # typing costs milliseconds
if TYPE_CHECKING:
    from typing import Any

_MARSHAL_VERSION = 2  # read by every Python 3


def pack(payload: bytes) -> bytes:
    """One frame."""
    return len(payload).to_bytes(4, "big") + payload


def pack_inward(message: Any) -> bytes:
    """A frame for process 1: dicts, lists, strings, numbers."""
    return pack(marshal.dumps(message, _MARSHAL_VERSION))


def receive_inward(fd: int) -> Any:
    """What the host sends next; None where it has hung up."""
    payload = receive(fd, max_bytes=2**31)
    return None if payload is None else marshal.loads(payload)


def send(fd: int, payload: bytes) -> None:
    """Write one frame. Raises BrokenPipeError where nobody reads any more."""
    data = memoryview(pack(payload))
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int, max_bytes: int) -> bytes | None:
    """Read one frame and not a byte more; None at the end. Raises ValueError where it is too long."""
    length = int.from_bytes(_read(fd, 4), "big")
    if length > max_bytes:
        raise ValueError(f"a frame of {length} bytes, at most {max_bytes} are taken")
    payload = _read(fd, length)
    return payload if payload and len(payload) == length else None


def _read(fd: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = os.read(fd, min(length - len(data), 2**20))
        if not chunk:
            break
        data += chunk
    return bytes(data)

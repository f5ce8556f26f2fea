"""The pool, seen from a worker process.

Requests come on the standard input, each a length (8 bytes, little endian) and a pickle with an ``id``. Answers go to
what was the standard output, in any order: one JSON object a line, with the request's ``id``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import struct
import threading
import traceback
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError

Answer = dict[str, Any]
"""What was asked for; or ``error`` and ``kind``, and perhaps ``hint``. JSON."""

_HEADER = struct.Struct("<Q")
_MAX_ERROR_CHARS = 2000


class Channel:
    """Requests of the pool, and answers to it.

    Once it is made the standard input is empty, and what is printed goes to the standard error.
    """

    def __init__(self) -> None:
        self._requests, self._answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
        with Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def receive(self) -> dict[str, Any] | None:
        """The next request; None at the end of the input."""
        header = self._requests.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        return pickle.loads(self._requests.read(*_HEADER.unpack(header)))

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """All requests from here on, beside other tasks of the event loop."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._requests)
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                length = _HEADER.unpack(await reader.readexactly(_HEADER.size))[0]
                yield pickle.loads(await reader.readexactly(length))

    def answer(self, request: Mapping[str, Any], answer: Answer) -> None:
        """From any thread."""
        if os.getpid() != self._pid:
            os._exit(0)  # a user's code forked, and its child came back from the call
        line = json.dumps({**answer, "id": request["id"]})
        with self._lock:
            try:
                print(line, file=self._answers, flush=True)
            except BrokenPipeError:  # the pool is gone: nobody waits, and the log is no place to say so
                os._exit(0)


def frame(request: Mapping[str, Any]) -> bytes:
    """A request as ``receive`` takes it."""
    payload = pickle.dumps(dict(request))
    return _HEADER.pack(len(payload)) + payload


def failure(error: BaseException) -> Answer:
    """What was raised, and the line that raised it: the end of its traceback in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    kind = "memory" if isinstance(error, MemoryError) else "timeout" if isinstance(error, TimeoutError) else "raised"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return {"error": f"{text[:_MAX_ERROR_CHARS]} ({frame.filename}:{frame.lineno})", "kind": kind}


def refusal(error: Exception) -> Answer:
    """Why something cannot be loaded: a UserError says it, anything else was raised by a user's code."""
    return {"error": error.message, "hint": error.hint} if isinstance(error, UserError) else failure(error)

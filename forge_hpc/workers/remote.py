"""Worker processes on another node of the run, which its Monarch worker starts (``host``): a TLS stream each.

A node that ends a stream without having told how the process ended, or does not answer for ``ANSWER_S``, is lost, with
all that ran there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
from typing import TypeAlias

from forge_hpc.wire.tls import Certificates, prepare
from forge_hpc.workers.link import END_TIMEOUT_S, MAX_LINE_BYTES, Link

logger = logging.getLogger(__name__)

ANSWER_S = 20.0
"""A node that starts no process and answers no question for so long is lost."""
LOOKS = 20
"""In which that time is counted: a controller that is held up itself finds no node silent for it."""
AT_ONCE = 64
"""Connections being made: hundreds of nodes with ten processes each would all wait for each other's handshakes."""
STATUS, STARTED = b"\0", b"ok\n"
END = struct.pack("<Q", 0)
"""In place of a request's length: end the process."""
_Answer: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
"""This process, or this node, may open no more connections: no fault of the other's."""


class Caller:
    """Asks other nodes, ``AT_ONCE`` at a time."""

    def __init__(self, certificates: Certificates) -> None:
        self._context = certificates.client()
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def ask(self, where: tuple[str, int], line: bytes) -> _Answer:
        """Connect and send a line: the connection, and the line that is said to it. Raises OSError."""
        async with self._turns:
            asking = asyncio.create_task(self._ask(where, line))
            try:
                for _ in range(LOOKS):
                    if (await asyncio.wait({asking}, timeout=ANSWER_S / LOOKS))[0]:
                        return asking.result()
                raise TimeoutError(f"not a word for {ANSWER_S:g} s")
            except BaseException:
                if not asking.cancel() and not asking.cancelled() and asking.exception() is None:
                    asking.result()[1].transport.abort()
                raise

    async def _ask(self, where: tuple[str, int], line: bytes) -> _Answer:
        reader, writer = await asyncio.open_connection(*where, ssl=self._context, limit=MAX_LINE_BYTES)
        try:
            prepare(writer.get_extra_info("socket"))
            writer.write(line)
            return reader, writer, await reader.readline()
        except BaseException:
            writer.transport.abort()
            raise


class OtherNode:
    """Another node of the run, by the address at which its ``WorkerHost`` listens."""

    def __init__(self, name: str, where: tuple[str, int], num_cpus: int, caller: Caller) -> None:
        self.name, self.num_cpus, self.is_lost = name, num_cpus, False
        self._where, self._caller = where, caller
        self._streams: set[_Stream] = set()

    async def open(self, module: str, venv: str | None = None) -> Link:
        """Start ``python -m module`` there. Raises OSError: the node is lost, or says why not; or this process may
        open no more connections."""
        if self.is_lost:
            raise OSError(f"{self.name} is lost")
        try:
            reader, writer, said = await self._ask(module, venv)
        except OSError as error:  # also TimeoutError
            if error.errno in _OUT_OF_FILES:
                raise
            self.lose(f"it starts no process: {error or type(error).__name__}")
            raise OSError(f"{self.name} does not answer") from error
        if said != STARTED:
            writer.close()
            raise OSError(said.decode().strip() or f"{self.name} ended the connection")
        stream = _Stream(self, reader, writer)
        self._streams.add(stream)
        return stream

    async def answers(self) -> bool:
        """As ``Place``."""
        if self.is_lost:
            return False
        try:
            _, writer, said = await self._ask("")
        except OSError as error:
            if error.errno in _OUT_OF_FILES:  # nothing is known of it
                return True
            self.lose(f"it does not answer: {error or type(error).__name__}")
        else:
            writer.close()
            if said != STARTED:
                self.lose("it has ended a connection instead of answering")
        return not self.is_lost

    def lose(self, reason: str) -> None:
        """Everything there is gone; those that wait for it are told."""
        if not self.is_lost:
            self.is_lost = True
            logger.warning("%s is lost, what it was asked is asked elsewhere: %s", self.name, reason)
            for stream in list(self._streams):
                stream.abort()

    def forget(self, stream: _Stream) -> None:
        """It has ended."""
        self._streams.discard(stream)

    async def _ask(self, module: str, venv: str | None = None) -> _Answer:
        line = f"{module}\t{venv or ''}\n".encode(errors="surrogateescape")
        return await self._caller.ask(self._where, line)


class _Stream:
    """To one process."""

    def __init__(self, node: OtherNode, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._node, self._reader, self._writer = node, reader, writer
        self._status: int | None = None
        self._giving_up: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        if not self._writer.transport.is_closing():  # else Python 3.11's raises AttributeError
            self._writer.write(data)

    async def readline(self) -> bytes:
        try:
            line = await self._reader.readline()
        except OSError:
            return b""
        if line.startswith(STATUS):  # no answer begins with it
            self._status = int(line[1:])
            return b""
        return line

    def kill(self) -> None:
        if self._giving_up is None:
            self.write(END)
            self._giving_up = asyncio.get_running_loop().call_later(2 * END_TIMEOUT_S, self.abort)

    def abort(self) -> None:
        self._writer.transport.abort()

    async def wait(self) -> int | None:
        while self._status is None:
            try:
                if not await self.readline():
                    break
            except ValueError:  # too long
                continue
        self._node.forget(self)
        self._writer.close()
        if self._giving_up is not None:
            self._giving_up.cancel()
        elif self._status is None:
            self._node.lose("a connection has ended")
        return self._status

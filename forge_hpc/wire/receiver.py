"""Brings bytes of servers into memory: a process of its own, ``python -m forge_hpc.wire.receiver PARENT``.

    host ──a line of JSON: which parts, from where, into which memory──► receiver ──streams──► servers
         ◄──a line of JSON: bytes that came, or what went wrong───────

Python's TLS hands over 16 KiB a call, and each call waits for the interpreter's lock: in the process of an engine that
computes in Python too, it would wait longer than it reads, and where there are cores several processes read more than
the threads of one. The memory belongs to the owner; who reads it does so when all receivers say that all is there.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from forge_hpc.wire import messages, tls

NUM_STREAMS = 4
"""To one server; where there are several, at least one to each and so many in all."""
_MAX_AT_ONCE = 16
CONNECT_S = 10.0
STALLED_S = 60.0
"""A transfer of which nothing comes for so long has failed."""


class TransferFailed(Exception):
    """The version did not come; the memory holds nothing that may be used."""


@dataclass(frozen=True)
class Task:
    """One server's bytes of a version, or a share of them, and the memory that takes them."""

    host: str
    port: int
    token: str
    version: int
    num_bytes: int
    held: int
    """The version that the memory holds, or ``messages.NOTHING``."""
    memory: str
    """The path of a file that can be mapped."""
    memory_id: int
    """Another one where the owner has taken other memory."""
    share: int = 0
    num_shares: int = 1
    """Of all pieces those from ``share`` on, each ``num_shares``-th."""

    def shared(self, share: int, num_shares: int) -> Task:
        """One of several shares of it."""
        return replace(self, share=share, num_shares=num_shares)


class _Stream:
    """One connection, kept for the next version."""

    def __init__(self, context: ssl.SSLContext, task: Task) -> None:
        connection = socket.create_connection((task.host, task.port), CONNECT_S)
        try:
            tls.prepare(connection)
            self.socket = context.wrap_socket(connection, server_hostname=task.host)
        except BaseException:
            connection.close()
            raise
        self.socket.settimeout(None)
        self.is_kept = False

    def fetch(self, task: Task, start: int, stop: int, target: memoryview) -> int:
        """Make a piece the task's version's; how many bytes came. Raises OSError, TransferFailed."""
        request = messages.REQUEST.pack(bytes.fromhex(task.token), task.version, task.held, start, stop)
        self.socket.sendall(request)
        kind, size = messages.read_struct(self.socket, messages.ANSWER)
        piece, changes = target[start:stop], bytearray()
        if kind == messages.BYTES and size == len(piece):
            messages.read_exactly(self.socket, piece)
        elif kind == messages.CHANGES:
            changes = bytearray(size)
            messages.read_exactly(self.socket, memoryview(changes))
        is_whole = bytearray(1)
        messages.read_exactly(self.socket, memoryview(is_whole))
        if not is_whole[0]:
            raise TransferFailed(f"version {task.version} is no longer in the trainers' memory")
        if kind == messages.CHANGES:
            import numpy as np

            from forge_hpc.wire import changes as coding

            coding.apply(np.frombuffer(piece, np.int16), changes)
        return messages.ANSWER.size + size + 1

    def end(self) -> None:
        """Wake who reads, too."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class Receiver:
    """Fills the memory of a policy; keeps its streams and mappings."""

    def __init__(self, certificates: tls.Certificates, owner: int) -> None:
        self._context = certificates.client()
        self._owner = owner
        self._memory: dict[int, mmap.mmap] = {}
        self._idle: dict[str, list[_Stream]] = {}
        self._busy: set[_Stream] = set()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def receive(self, tasks: Sequence[Task]) -> int:
        """Do all of them; how many bytes came. With none, everything is given up. Raises TransferFailed."""
        self._forget_others(tasks)
        self._num_bytes = 0
        jobs = []
        for task in tasks:
            pieces, memory = _Pieces(task), memoryview(self._map(task))
            jobs += [(task, pieces, memory)] * max(1, NUM_STREAMS // len(tasks))
        with ThreadPoolExecutor(max(1, min(len(jobs), _MAX_AT_ONCE))) as pool:
            self._watch([pool.submit(self._bring, *job) for job in jobs])
        return self._num_bytes

    def _forget_others(self, parts: Sequence[Task]) -> None:
        for token in self._idle.keys() - {part.token for part in parts}:
            for stream in self._idle.pop(token):
                stream.socket.close()
        for memory_id in self._memory.keys() - {part.memory_id for part in parts}:
            del self._memory[memory_id]

    def _map(self, part: Task) -> mmap.mmap:
        if part.memory_id not in self._memory:
            try:
                with Path(part.memory).open("r+b") as file:
                    self._memory[part.memory_id] = mmap.mmap(file.fileno(), part.num_bytes)
            except (OSError, ValueError) as error:
                raise TransferFailed(f"the memory cannot be mapped: {error}") from error
        return self._memory[part.memory_id]

    def _bring(self, part: Task, pieces: _Pieces, memory: memoryview) -> None:
        """What one stream does of a task."""
        stream: _Stream | None = None
        for start, stop in pieces:
            stream = stream or self._take(part)
            try:
                num_bytes = stream.fetch(part, start, stop, memory)
            except OSError:
                self._busy.discard(stream)
                stream.socket.close()
                if not stream.is_kept:
                    raise
                stream = self._connect(part)  # the server may have closed it since the last version
                num_bytes = stream.fetch(part, start, stop, memory)
            with self._lock:
                self._num_bytes += num_bytes
        if stream is not None:
            stream.is_kept = True
            with self._lock:
                self._busy.discard(stream)
                self._idle.setdefault(part.token, []).append(stream)

    def _take(self, part: Task) -> _Stream:
        with self._lock:
            if idle := self._idle.get(part.token):
                self._busy.add(idle[-1])
                return idle.pop()
        return self._connect(part)

    def _connect(self, part: Task) -> _Stream:
        stream = _Stream(self._context, part)
        self._busy.add(stream)
        return stream

    def _watch(self, jobs: list[Future[None]]) -> None:
        """Wait for all; where one fails, nothing comes or the owner is gone, end the others."""
        seen, since = -1, time.monotonic()
        failure: BaseException | None = None
        while pending := [job for job in jobs if not job.done()]:
            wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
            failure = failure or next((job.exception() for job in jobs if job.done() and job.exception()), None)
            if self._num_bytes != seen:
                seen, since = self._num_bytes, time.monotonic()
            if os.getppid() != self._owner:
                os._exit(1)
            if time.monotonic() - since > STALLED_S:
                failure = failure or TransferFailed(f"nothing came for {STALLED_S:.0f} s")
            if failure is not None:
                for stream in list(self._busy):
                    stream.end()
        failure = failure or next((job.exception() for job in jobs if job.exception()), None)
        if failure is not None:
            for stream in list(self._busy):
                stream.socket.close()
            self._busy.clear()
            raise TransferFailed(f"{type(failure).__name__}: {failure}") from failure


class _Pieces:
    """Ranges of a task; each is taken by one stream."""

    def __init__(self, task: Task) -> None:
        starts = range(0, task.num_bytes, messages.PIECE_BYTES)[task.share :: task.num_shares]
        self._ranges = deque((start, min(start + messages.PIECE_BYTES, task.num_bytes)) for start in starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            try:
                yield self._ranges.popleft()
            except IndexError:
                return


def main() -> None:
    """Serve the owner until it closes our standard input, or is gone."""
    certificates = tls.Certificates.from_environment()
    assert certificates is not None, "the owner has seen to it"
    receivers: dict[int, Receiver] = {}
    for line in sys.stdin:
        request = json.loads(line)
        policy, tasks = request["policy"], [Task(**task) for task in request["tasks"]]
        if policy not in receivers:
            receivers[policy] = Receiver(certificates, owner=int(sys.argv[1]))
        try:
            answer: dict[str, object] = {"num_bytes": receivers[policy].receive(tasks)}
        except TransferFailed as error:
            answer = {"error": str(error)}
        if not tasks:
            del receivers[policy]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""The side that wants the bytes: a process of its own, ``python -m forge_hpc.wire.receiver FD``.

    client ──a line of JSON: which parts, from where────────────────► receiver ──streams──► servers
           ◄──a line of JSON: where they lie, or what went wrong─────
           ──an empty line: they have been read─────────────────────►

Clients are the generators of a host (FD listens), or one alone (FD is its connection). What one has asked for the
others find there: a version comes to a host once. It is overwritten when all that asked for it have read it, or are
gone. The process ends when no client is left. What its memory holds is known here alone, so a new one begins with
everything.

Python's TLS hands over 16 KiB a call, and each call waits for the interpreter's lock: in the process of an engine that
computes in Python too, it would wait longer than it reads.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from forge_hpc.wire import messages, tls
from forge_hpc.wire.server import is_open

NUM_STREAMS = 4
"""To one server; where there are several, at least one to each and so many in all."""
_MAX_AT_ONCE = 16
CONNECT_S = 10.0
STALLED_S = 60.0
"""A transfer of which nothing comes for so long has failed."""


class TransferFailed(Exception):
    """The version did not come; the memory holds nothing that may be used."""


@dataclass(frozen=True)
class Wanted:
    """One server's bytes of a version, and the memory that takes them."""

    host: str
    port: int
    token: str
    version: int
    num_bytes: int


class _Stream:
    """One connection, kept for the next version."""

    def __init__(self, context: ssl.SSLContext, wanted: Wanted) -> None:
        connection = socket.create_connection((wanted.host, wanted.port), CONNECT_S)
        try:
            tls.prepare(connection)
            self.socket = context.wrap_socket(connection, server_hostname=wanted.host)
        except BaseException:
            connection.close()
            raise
        self.socket.settimeout(None)
        self.is_kept = False

    def fetch(self, wanted: Wanted, held: int, start: int, stop: int, target: memoryview) -> int:
        """Make a piece the wanted version's; how many bytes came. Raises OSError, TransferFailed."""
        request = messages.REQUEST.pack(bytes.fromhex(wanted.token), wanted.version, held, start, stop)
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
            raise TransferFailed(f"version {wanted.version} is no longer in the trainers' memory")
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
    """Fills memory of its own, a file for each part; keeps its streams, and in mind what the memory holds."""

    def __init__(self, certificates: tls.Certificates) -> None:
        self._context = certificates.client()
        self._memory: list[tuple[int, mmap.mmap]] = []
        self._held: list[tuple[str, int]] = []
        self._idle: dict[str, list[_Stream]] = {}
        self._busy: set[_Stream] = set()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def paths(self) -> list[str]:
        """The files, for other processes of this host that are the same user's."""
        return [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor, _ in self._memory]

    def receive(self, parts: Sequence[Wanted], is_wanted: Callable[[], bool]) -> int:
        """Bring a version, as long as somebody wants it; how many bytes came. Raises TransferFailed."""
        self._forget_others(parts)
        self._num_bytes = 0
        held, self._held = self._held, []  # until it is whole
        jobs = []
        for number, part in enumerate(parts):
            token, version = held[number] if held else ("", 0)
            base = version if token == part.token else messages.NOTHING
            pieces, memory = _Pieces(part.num_bytes), memoryview(self._memory[number][1])
            jobs += [(part, base, pieces, memory)] * max(1, NUM_STREAMS // len(parts))
        with ThreadPoolExecutor(min(len(jobs), _MAX_AT_ONCE)) as pool:
            self._watch([pool.submit(self._bring, *job) for job in jobs], is_wanted)
        self._held = [(part.token, part.version) for part in parts]
        return self._num_bytes

    def close(self) -> None:
        """Give the memory back, and close the streams. Who has it mapped keeps what it holds."""
        self._forget_others(())

    def _forget_others(self, parts: Sequence[Wanted]) -> None:
        for token in self._idle.keys() - {part.token for part in parts}:
            for stream in self._idle.pop(token):
                stream.socket.close()
        sizes = [part.num_bytes for part in parts]
        if sizes == [len(memory) for _, memory in self._memory]:
            return
        self._held = []
        while self._memory:
            os.close(self._memory.pop()[0])
        try:
            for size in sizes:
                self._memory.append(_allocate(size))
        except (OSError, ValueError) as error:
            raise TransferFailed(f"no memory for it: {error}") from error

    def _bring(self, part: Wanted, held: int, pieces: _Pieces, memory: memoryview) -> None:
        """One stream's share of a part."""
        stream: _Stream | None = None
        for start, stop in pieces:
            stream = stream or self._take(part)
            try:
                num_bytes = stream.fetch(part, held, start, stop, memory)
            except OSError:
                self._busy.discard(stream)
                stream.socket.close()
                if not stream.is_kept:
                    raise
                stream = self._connect(part)  # the server may have closed it since the last version
                num_bytes = stream.fetch(part, held, start, stop, memory)
            with self._lock:
                self._num_bytes += num_bytes
        if stream is not None:
            stream.is_kept = True
            with self._lock:
                self._busy.discard(stream)
                self._idle.setdefault(part.token, []).append(stream)

    def _take(self, part: Wanted) -> _Stream:
        with self._lock:
            if idle := self._idle.get(part.token):
                self._busy.add(idle[-1])
                return idle.pop()
        return self._connect(part)

    def _connect(self, part: Wanted) -> _Stream:
        stream = _Stream(self._context, part)
        self._busy.add(stream)
        return stream

    def _watch(self, jobs: list[Future[None]], is_wanted: Callable[[], bool]) -> None:
        """Wait for all; where one fails, nothing comes or nobody wants it, end the others."""
        seen, since = -1, time.monotonic()
        failure: BaseException | None = None
        while any(not job.done() for job in jobs):
            wait(jobs, timeout=1.0, return_when=FIRST_EXCEPTION)
            failure = failure or next((job.exception() for job in jobs if job.done() and job.exception()), None)
            if self._num_bytes != seen:
                seen, since = self._num_bytes, time.monotonic()
            if time.monotonic() - since > STALLED_S:
                failure = failure or TransferFailed(f"nothing came for {STALLED_S:.0f} s")
            if not is_wanted():
                failure = failure or TransferFailed("nobody waits for it")
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
    """Ranges of a part; each is taken by one stream."""

    def __init__(self, num_bytes: int) -> None:
        starts = range(0, num_bytes, messages.PIECE_BYTES)
        self._ranges = deque((start, min(start + messages.PIECE_BYTES, num_bytes)) for start in starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            try:
                yield self._ranges.popleft()
            except IndexError:
                return


def _allocate(num_bytes: int) -> tuple[int, mmap.mmap]:
    """A file that is memory, and its mapping."""
    descriptor = os.memfd_create("forge_hpc_weights", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, num_bytes)
        return descriptor, mmap.mmap(descriptor, num_bytes)
    except BaseException:
        os.close(descriptor)
        raise


@dataclass
class _Version:
    """What a policy's memory holds, or will when it is done."""

    parts: list[Wanted]
    is_there: Future[int] = field(default_factory=Future)
    readers: set[_Client] = field(default_factory=set)
    """Who waits for it or reads it."""

    def serves(self, parts: list[Wanted]) -> bool:
        """Whether who wants those may have it, or wait for it."""
        return self.parts == parts and not (self.is_there.done() and self.is_there.exception())


class _Policy:
    """The newest version of the trainers' weights that a client of this host has asked for."""

    def __init__(self, certificates: tls.Certificates) -> None:
        self._receiver = Receiver(certificates)
        self._version: _Version | None = None
        self._changed = threading.Condition()

    def read(self, client: _Client, parts: list[Wanted]) -> tuple[list[str], int]:
        """Where a version lies, which stays until ``has_read``, and how many bytes came for it now.

        Raises TransferFailed.
        """
        with self._changed:
            while (version := self._version) is not None and not version.serves(parts) and version.readers:
                self._changed.wait(timeout=1.0)
                if not client.is_connected:
                    raise TransferFailed("nobody waits for it")
            is_new = version is None or not version.serves(parts)
            if version is None or is_new:
                version = self._version = _Version(parts)
            version.readers.add(client)
        if is_new:
            try:
                version.is_there.set_result(self._receiver.receive(parts, self._is_waited_for))
            except BaseException as error:
                version.is_there.set_exception(error)
        try:
            num_bytes = version.is_there.result()
        except BaseException:
            self.has_read(client)
            raise
        return self._receiver.paths, num_bytes if is_new else 0

    def _is_waited_for(self) -> bool:
        with self._changed:
            return self._version is not None and any(client.is_connected for client in self._version.readers)

    def has_read(self, client: _Client) -> None:
        """The client needs it no more."""
        with self._changed:
            if self._version is not None:
                self._version.readers.discard(client)
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody needs it any more."""
        self._receiver.close()


class Host:
    """The clients of a host, and the policies that they read."""

    def __init__(self, certificates: tls.Certificates) -> None:
        self._certificates = certificates
        self._policies: dict[tuple[str, ...], _Policy] = {}
        self._lock = threading.Lock()
        self._clients: set[_Client] = set()

    def join(self, client: _Client) -> None:
        """A client is there."""
        with self._lock:
            self._clients.add(client)

    def policy(self, client: _Client, parts: list[Wanted]) -> _Policy:
        """That of those trainers. What the client had before goes where no other one has it."""
        servers = tuple(part.token for part in parts)
        with self._lock:
            client.servers, before = servers, client.servers
            self._close_unless_used(before)
            if servers not in self._policies:
                self._policies[servers] = _Policy(self._certificates)
            return self._policies[servers]

    def leave(self, client: _Client) -> None:
        """A client is gone. With the last one the process ends, whatever it is doing."""
        with self._lock:
            self._clients.discard(client)
            if not self._clients:
                os._exit(0)
            self._close_unless_used(client.servers)

    def _close_unless_used(self, servers: tuple[str, ...]) -> None:
        if all(client.servers != servers for client in self._clients) and servers in self._policies:
            self._policies.pop(servers).close()


class _Client:
    """A connection, in a thread of its own."""

    def __init__(self, host: Host, connection: socket.socket) -> None:
        self._host, self._connection = host, connection
        self.servers: tuple[str, ...] = ()
        """Whose weights it has asked for last."""
        host.join(self)

    @property
    def is_connected(self) -> bool:
        """While it waits for an answer it says nothing."""
        return is_open(self._connection)

    def serve(self) -> None:
        """Until it closes the connection, or is gone."""
        policy: _Policy | None = None
        try:
            with self._connection, self._connection.makefile("rw") as stream:
                for line in stream:
                    if policy is not None:
                        policy.has_read(self)
                        policy = None
                    if not line.strip():
                        continue
                    parts = [Wanted(**part) for part in json.loads(line)]
                    answer: dict[str, object] = {}
                    try:
                        policy = self._host.policy(self, parts)
                        answer["paths"], answer["num_bytes"] = policy.read(self, parts)
                    except Exception as error:
                        answer["error"] = str(error) if isinstance(error, TransferFailed) else repr(error)
                    stream.write(json.dumps(answer) + "\n")
                    stream.flush()
        except OSError:  # it has died
            pass
        finally:
            if policy is not None:
                policy.has_read(self)
            self._host.leave(self)


def main() -> None:
    """Serve whoever connects to the socket, or the one whose connection it is."""
    certificates = tls.Certificates.from_environment()
    assert certificates is not None, "the client has seen to it"
    host, own = Host(certificates), socket.socket(fileno=int(sys.argv[1]))
    if not own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        _Client(host, own).serve()
        return
    own.settimeout(CONNECT_S)  # who has begun this process connects at once, unless it has died
    while True:
        try:
            connection, _ = own.accept()
        except TimeoutError:
            return
        if own.gettimeout() is not None:
            own.settimeout(None)
            with Path(os.devnull).open(
                "w"
            ) as nowhere:  # it may outlive who began it, and whoever reads that one's output
                os.dup2(nowhere.fileno(), 2)
        threading.Thread(target=_Client(host, connection).serve, name="client", daemon=True).start()


if __name__ == "__main__":
    main()

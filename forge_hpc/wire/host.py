"""The side that wants the bytes: a process for a host, ``python -m forge_hpc.wire.host FD``.

    client ──a line of JSON: which parts, from where────────────────► host ──► receivers ──streams──► servers
           ◄──a line of JSON: where they lie, or what went wrong─────
           ──an empty line: they have been read─────────────────────►

           ──or "bad": they are not what was sent────────────────────►

Clients are the generators of a host (FD listens), or one alone (FD is its connection). What one has asked for the
others find there: a version comes to a host once. It is overwritten when all that asked for it have read it, or are
gone; one that has not read it for long keeps that memory, and the next version comes into other memory. The process
ends when no client is left. What its memory holds is known here alone, so a new one begins with everything.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field

from forge_hpc.wire import messages, tls
from forge_hpc.wire.receiver import CONNECT_S, Task, TransferFailed
from forge_hpc.wire.server import is_open

_MAX_RECEIVERS = 8
_CORES_A_RECEIVER = 4
"""Two at most are busy with its streams, and engines have the others."""
PATIENCE_S = 60.0
"""A reader that still has a version after so long is not waited for."""


@dataclass(frozen=True)
class Wanted:
    """One server's bytes of a version."""

    host: str
    port: int
    token: str
    version: int
    num_bytes: int


def num_receivers() -> int:
    """As many as the cores of this process allow."""
    return max(1, min(_MAX_RECEIVERS, len(os.sched_getaffinity(0)) // _CORES_A_RECEIVER))


class Receivers:
    """Processes that share the work of a transfer; one transfer at a time, whichever policy's."""

    def __init__(self, num: int) -> None:
        self._processes: list[subprocess.Popen[str] | None] = [None] * num
        self._turn = secrets.randbits(16)  # of this host: not all of them begin with the same servers
        self._lock = threading.Lock()

    def bring(self, policy: int, tasks: Sequence[Task], is_wanted: Callable[[], bool]) -> int:
        """Have the tasks done, as long as somebody wants it; how many bytes came. Raises TransferFailed."""
        with self._lock:
            first = self._turn % max(1, len(tasks))
            shares = [share for share in _divided([*tasks[first:], *tasks[:first]], len(self._processes)) if share]
            with ThreadPoolExecutor(len(shares)) as pool:
                jobs = [pool.submit(self._ask, number, policy, share) for number, share in enumerate(shares)]
                failure: BaseException | None = None
                while pending := [job for job in jobs if not job.done()]:
                    wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
                    failure = failure or next((e for job in jobs if job.done() and (e := job.exception())), None)
                    if failure is None and not is_wanted():
                        failure = TransferFailed("nobody waits for it")
                    if failure is not None:
                        self._kill([number for number, job in enumerate(jobs) if not job.done()])
            failure = failure or next((e for job in jobs if (e := job.exception())), None)
            if failure is not None:
                raise failure
            return sum(job.result() for job in jobs)

    def forget(self, policy: int) -> None:
        """Close its streams."""
        with self._lock:
            for number, process in enumerate(self._processes):
                if process is not None and process.poll() is None:
                    with contextlib.suppress(TransferFailed):  # it has just ended
                        self._ask(number, policy, [])

    def _ask(self, number: int, policy: int, tasks: Sequence[Task]) -> int:
        """Raises TransferFailed."""
        process = self._processes[number]
        if process is None or process.poll() is not None:
            command = [sys.executable, "-m", "forge_hpc.wire.receiver", str(os.getpid())]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._processes[number] = process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"policy": policy, "tasks": [asdict(task) for task in tasks]}) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or "{}")
        except (OSError, ValueError):
            answer = {}
        if "num_bytes" in answer:
            return answer["num_bytes"]
        raise TransferFailed(answer.get("error") or f"a receiver has ended with {process.wait()}")

    def _kill(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if (process := self._processes[number]) is not None:
                process.kill()


def _divided(tasks: Sequence[Task], num: int) -> list[list[Task]]:
    """For each of so many receivers the servers that it asks; several share one where there are fewer servers."""
    sharers = max(1, num // len(tasks))
    shares: list[list[Task]] = [[] for _ in range(num)]
    for number, task in enumerate(tasks):
        for share in range(sharers):
            shares[(number * sharers + share) % num].append(task.shared(share, sharers))
    return shares


class _Memory:
    """A file that is memory, for the bytes of one server."""

    _ids = itertools.count()

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError."""
        self.id, self.num_bytes = next(self._ids), num_bytes
        self._descriptor = os.memfd_create("forge_hpc_weights", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._descriptor, num_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def path(self) -> str:
        """For other processes of this host that are the same user's."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Who has it mapped keeps what it holds."""
        os.close(self._descriptor)


@dataclass
class _Version:
    """What a policy's memory holds, or will when it is done."""

    parts: list[Wanted]
    memory: list[_Memory] = field(default_factory=list)
    is_there: Future[int] = field(default_factory=Future)
    readers: set[_Client] = field(default_factory=set)
    """Who waits for it or reads it."""
    is_given_up: bool = False
    """Nobody waited for it, or it is not what was sent."""

    def serves(self, parts: list[Wanted]) -> bool:
        """Whether who wants those may have it, or wait for it."""
        has_failed = self.is_given_up or (self.is_there.done() and self.is_there.exception() is not None)
        return self.parts == parts and not has_failed


class _Policy:
    """The version of the trainers' weights that was asked for last."""

    _ids = itertools.count()

    def __init__(self, receivers: Receivers) -> None:
        self._id, self._receivers = next(self._ids), receivers
        self._held: list[int] = []
        self._version: _Version | None = None
        self._left: list[_Version] = []
        """Earlier ones that somebody still reads."""
        self._changed = threading.Condition()

    def read(self, client: _Client, parts: list[Wanted]) -> tuple[list[str], int]:
        """Where a version lies, which stays until ``has_read``, and how many bytes came for it now.

        Raises TransferFailed.
        """
        with self._changed:
            until = time.monotonic() + PATIENCE_S
            while (before := self._version) is not None and not before.serves(parts) and before.readers:
                if before.is_there.done() and time.monotonic() > until:
                    self._left.append(before)
                    self._version, self._held = None, []
                    break
                self._changed.wait(timeout=1.0)
                if not client.is_connected:
                    raise TransferFailed("nobody waits for it")
            version, is_new = self._version, False
            if version is None or not version.serves(parts):
                version, is_new = _Version(parts, [] if version is None else version.memory), True
                self._version = version
            version.readers.add(client)
        if is_new:
            try:
                version.is_there.set_result(self._bring(version))
            except BaseException as error:
                version.is_there.set_exception(error)
        try:
            num_bytes = version.is_there.result()
        except BaseException:
            self.has_read(client)
            raise
        return [memory.path for memory in version.memory], num_bytes if is_new else 0

    def has_read(self, client: _Client, is_good: bool = True) -> None:
        """The client needs it no more; or it is not what was sent, and comes whole to whoever asks next."""
        with self._changed:
            if (version := self._version) is not None and client in version.readers:
                version.readers.discard(client)
                if not is_good:
                    version.is_given_up, self._held = True, []
            for version in list(self._left):
                version.readers.discard(client)
                if not version.readers:
                    self._left.remove(version)
                    self._close_memory(version)
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody needs it any more."""
        for version in (*self._left, self._version):
            self._close_memory(version)
        self._receivers.forget(self._id)

    def _bring(self, version: _Version) -> int:
        parts = version.parts
        held, self._held = self._held, []  # until it is whole
        if [part.num_bytes for part in parts] != [memory.num_bytes for memory in version.memory]:
            held = []
            self._close_memory(version)
            try:
                for part in parts:
                    version.memory.append(_Memory(part.num_bytes))
            except OSError as error:
                raise TransferFailed(f"no memory for it: {error}") from error
        held = held or [messages.NOTHING] * len(parts)
        tasks = [
            Task(part.host, part.port, part.token, part.version, part.num_bytes, base, memory.path, memory.id)
            for part, base, memory in zip(parts, held, version.memory, strict=True)
        ]
        num_bytes = self._receivers.bring(self._id, tasks, self._is_waited_for)
        self._held = [part.version for part in parts]
        return num_bytes

    def _is_waited_for(self) -> bool:
        with self._changed:
            assert self._version is not None
            if not any(client.is_connected for client in self._version.readers):
                self._version.is_given_up = True  # who comes now begins anew
            return not self._version.is_given_up

    @staticmethod
    def _close_memory(version: _Version | None) -> None:
        while version is not None and version.memory:
            version.memory.pop().close()


class Host:
    """The clients of a host, and the policies that they read."""

    def __init__(self) -> None:
        self._receivers = Receivers(num_receivers())
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
            client.servers = servers
            found = self._policies.setdefault(servers, _Policy(self._receivers))
            unused = self._take_unused()
        for policy in unused:  # it may wait for a transfer, and nobody else for it
            policy.close()
        return found

    def leave(self, client: _Client) -> None:
        """A client is gone. With the last one the process ends, whatever it is doing."""
        with self._lock:
            self._clients.discard(client)
            if not self._clients:
                os._exit(0)
            unused = self._take_unused()
        for policy in unused:
            policy.close()

    def _take_unused(self) -> list[_Policy]:
        used = {client.servers for client in self._clients}
        return [self._policies.pop(servers) for servers in self._policies.keys() - used]


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
                        policy.has_read(self, is_good=line.strip() != "bad")
                        policy = None
                    if line.strip() in ("", "bad"):
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
    assert tls.Certificates.from_environment() is not None, "the client has seen to it"
    host, own = Host(), socket.socket(fileno=int(sys.argv[1]))
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
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)  # it may outlive who began it, and whoever reads that one's output
            os.close(nowhere)
        threading.Thread(target=_Client(host, connection).serve, name="client", daemon=True).start()


if __name__ == "__main__":
    main()

"""Weights of another host, brought over TLS streams into memory of this one.

    trainer rank                                     generators' host
    Snapshots ◄── Served ◄── wire.Server ──streams──► wire.host ──► memory ──► opened(offer), each generator

The bytes lie here as they do there, so that an offer of what came is read like one of this host. A version comes to a
host once, and is there once: the generators of the host share the receiver, and every tensor-parallel worker takes its
shards of the one copy. Where a trainer dies in the middle nothing has been loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from forge_hpc.weights import shared_memory
from forge_hpc.weights.links import Sender, link_file
from forge_hpc.weights.memory import Handle, Unreachable
from forge_hpc.weights.offers import Offer
from forge_hpc.weights.snapshots import Snapshots
from forge_hpc.wire import changes as coding
from forge_hpc.wire.host import Wanted
from forge_hpc.wire.tls import Certificates

logger = logging.getLogger(__name__)


class Served:
    """A rank's snapshots, as a server sends them (``wire.server.Source``).

    Args:
        sends_changes: find what changed since the version before, where that is still there.
        links: where the ends of links (``links``) find each other; None: there are none.
    """

    def __init__(self, snapshots: Snapshots, sends_changes: bool, links: Path | None = None) -> None:
        self._snapshots, self._sends_changes, self._links = snapshots, sends_changes, links
        self._mirrors: dict[int, _Mirror] = {}
        self._changes: dict[tuple[int, int, int, int], _Changes] = {}
        self._lock = threading.Lock()

    def is_there(self, version: int) -> bool:
        """Whether nobody has begun to overwrite the version."""
        return self._snapshots.find(version) is not None

    def piece(self, version: int, start: int, stop: int) -> memoryview | None:
        """Bytes of a version, on the CPU; None where it is not there."""
        if (found := self._snapshots.find(version)) is None:
            return None
        data = found[1]
        if data.device.type == "cpu":
            return _view(data)[start:stop]
        with self._lock:
            mirror = self._mirrors.setdefault(data.data_ptr(), _Mirror(data))
        return mirror.piece(version, start, stop)

    def link(self, name: int) -> Callable[[], Sender] | None:
        """What makes the rank's end of a link; None where there are no links."""
        if self._links is None:
            return None
        return partial(Sender, self._snapshots, link_file(self._links, name))

    def changes(self, held: int, version: int, start: int, stop: int) -> bytes | None:
        """What changed in a piece; None where an end of it is not there, or the bytes are fewer."""
        if not self._sends_changes:
            return None
        with self._lock:
            if any(key[1] != version for key in self._changes):
                self._changes.clear()
            changes = self._changes.setdefault((held, version, start, stop), _Changes())
        with changes.lock:  # one thread finds them for all that ask
            if not changes.are_known:
                changes.encoded, changes.are_known = self._find(held, version, start, stop), True
        return changes.encoded

    def _find(self, held: int, version: int, start: int, stop: int) -> bytes | None:
        old, new = self._snapshots.find(held), self._snapshots.find(version)
        if old is None or new is None:
            return None
        before, after = (block[1][start:stop].view(torch.int16) for block in (old, new))
        if before.device.type == "cpu":
            found = coding.find(before.numpy(), after.numpy())
        else:
            found = _find_on_gpu(before, after)
        encoded = coding.encode(*found) if found is not None else None
        is_less = encoded is not None and len(encoded) < stop - start
        return encoded if is_less and self.is_there(held) else None


def _find_on_gpu(old: torch.Tensor, new: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """As ``changes.find``."""
    with _beside(old.device):
        places = (old != new).nonzero().flatten()
        if len(places) > len(old) * coding.WORTHWHILE:
            return None
        return places.cpu().numpy(), old[places].cpu().numpy(), new[places].cpu().numpy()


@dataclass
class _Changes:
    lock: threading.Lock = field(default_factory=threading.Lock)
    are_known: bool = False
    encoded: bytes | None = None


class _Mirror:
    """A block of GPU memory on the host, page-locked: each piece is copied when it is first asked for."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data
        self._host: torch.Tensor | None = None
        self._version: int | None = None
        self._pieces: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def piece(self, version: int, start: int, stop: int) -> memoryview:
        with self._lock:
            if self._host is None:
                self._host = torch.empty(self._data.numel(), dtype=torch.uint8, pin_memory=True)
            if self._version != version:
                self._version = version
                self._pieces.clear()
            if (start, stop) not in self._pieces:
                with _beside(self._data.device):
                    self._host[start:stop].copy_(self._data[start:stop], non_blocking=True)
                self._pieces.add((start, stop))
            return _view(self._host)[start:stop]


def _view(data: torch.Tensor) -> memoryview:
    return memoryview(cast(Any, data.numpy()))


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """The body runs beside the training on the GPU, and is done when it ends."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


class RemoteReader:
    """Brings offers of other hosts here, by a receiver that the readers of a host share, or by one of its own.

    Args:
        meeting: a folder of this host, the same for all that share one, and this user's alone; None: it shares none.

    Example:
        >>> reader = RemoteReader(certificates)
        >>> local, num_bytes = reader.receive(offer)  # valid until `has_read`, or the next
        >>> with opened(local) as weights: ...
        >>> reader.has_read()
    """

    def __init__(self, certificates: Certificates, meeting: Path | None = None) -> None:
        self._certificates = certificates
        self._meeting = meeting
        self._receiver: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._is_closed = False

    def receive(self, offer: Offer) -> tuple[Offer, int]:
        """An offer of the same version in memory of this host, and how many bytes came over the wire for it: none where
        another reader has brought it. It blocks, also as long as others still read an earlier version.

        Raises:
            Unreachable: it did not come. Nothing that was received before is valid any more.
        """
        wanted, places = [], offer.places
        for handle, address in zip(places.handles, places.addresses, strict=True):
            if address is None:
                raise Unreachable("the trainers serve no streams")
            wanted.append(asdict(Wanted(address.host, address.port, address.token, offer.version, handle.num_bytes)))
        answer = self._ask(wanted)
        if self._is_closed:
            raise Unreachable("its reader has been closed")
        if "error" in answer:
            raise Unreachable(answer["error"])
        host, here = shared_memory.host_identity(), []
        for handle, path in zip(places.handles, answer["paths"], strict=True):
            here.append(Handle(host, "cpu", handle.num_bytes, path))
        return replace(offer, places=replace(places, handles=tuple(here))), answer["num_bytes"]

    def has_read(self, is_good: bool = True) -> None:
        """What was received may be overwritten; where it is not good, it comes whole to whoever asks for it next."""
        if (connection := self._connection) is not None:
            with contextlib.suppress(OSError):
                connection.sendall(b"\n" if is_good else b"bad\n")

    def _ask(self, wanted: list[dict[str, Any]]) -> dict[str, Any]:
        for _ in range(3):  # ours may have ended, and one of others may end as we connect to it
            try:
                connection = self._connection = self._connection or self._connect()
                if self._is_closed:
                    break
                connection.sendall(json.dumps(wanted).encode() + b"\n")
                with connection.makefile() as stream:
                    if (line := stream.readline()).endswith("\n"):
                        return json.loads(line)
            except OSError as error:
                logger.debug("no connection to the receiver: %s", error)
            if self._is_closed:
                break
            self._hang_up()
        self._hang_up()
        return {"error": "the receiver has ended"}

    def _connect(self) -> socket.socket:
        """Raises OSError."""
        if self._meeting is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self._start(theirs)
            return ours
        # Who has other certificates shares nothing with us.
        name = hashlib.sha256(self._certificates.cert.read_bytes()).hexdigest()[:12]
        path = str(self._meeting / f"weights-{name}")
        with (self._meeting / f"weights-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):  # none yet, or its process has ended
                Path(path).unlink(missing_ok=True)
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(path)
                    listener.listen()
                    self._start(listener)
                connection.connect(path)
            return connection

    def _start(self, own: socket.socket) -> None:
        """Start a receiver that serves a socket."""
        self._receiver = subprocess.Popen(
            [sys.executable, "-m", "forge_hpc.wire.host", str(own.fileno())],
            pass_fds=[own.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **self._certificates.environment()},
        )

    def close(self) -> None:
        """Let go of the receiver, which ends with its last reader; a ``receive`` under way fails. What was received is
        not valid any more."""
        self._is_closed = True
        self._hang_up()
        if self._receiver is not None and self._meeting is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._receiver.wait(timeout=1.0)

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes who reads, and is heard though that one has a copy
            connection.close()
        if self._receiver is not None:
            self._receiver.poll()

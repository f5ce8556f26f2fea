"""Weights of another host from GPU to GPU over NCCL: as fast as the network, and neither encrypted nor authenticated.

    trainer rank                                      generator
    Served ◄── wire.Server ◄── TLS: link, send 7 ──── LinkReader.receive(offer)
    its snapshot ──────── NCCL, a group of two ─────► memory of the generator's GPU ──► opened(offer)

A rank and a generator have a group of their own, so that generators do not wait for each other, and one that dies
takes no other with it. What is sent when, and whether it is whole, is said over TLS; the two find each other through a
file in the run directory, as trainers do.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forge_hpc.weights import memory
from forge_hpc.weights.memory import Unreachable
from forge_hpc.weights.offers import Offer
from forge_hpc.weights.snapshots import Snapshots
from forge_hpc.wire import messages, tls
from forge_hpc.wire.server import is_open

CONNECT_S = 60.0
STALLED_S, SLOWEST_BYTES_PER_S = 60.0, 100e6
"""Who waits for a transfer gives up after so long, and the time that the bytes take at this rate."""
_POLL_S = 0.0005
_SENDER, _READER = 0, 1


class LinkBroken(OSError):
    """The other end is gone, or a transfer has failed: the link is of no use any more."""


class Link:
    """One end of a group of two processes that exchange bytes, from GPU to GPU.

    Args:
        file: both ends name the same; it must not exist yet.
        end: 0 sends, 1 receives.
        device: where the bytes are. On the CPU, which tests use, the group is gloo's.

    Raises:
        LinkBroken: the other end has not come.
    """

    def __init__(self, file: Path, end: int, device: torch.device) -> None:
        store = dist.FileStore(str(file), 2)
        store.set_timeout(timedelta(seconds=CONNECT_S))
        self._device = device
        try:
            self._group: Any = _group(store, end, device)
        except RuntimeError as error:
            raise LinkBroken(_first_line(error)) from error

    def send(self, data: torch.Tensor, is_open: Callable[[], bool]) -> None:
        """Bytes [num_bytes] to the other end; they have left when it returns. Raises LinkBroken."""
        self._exchange(data, is_open)

    def receive(self, data: torch.Tensor, is_open: Callable[[], bool]) -> None:
        """Fill the bytes [num_bytes] with what the other end sends. Raises LinkBroken."""
        self._exchange(data, is_open)

    def _exchange(self, data: torch.Tensor, is_open: Callable[[], bool]) -> None:
        limit_s = STALLED_S + data.numel() / SLOWEST_BYTES_PER_S
        options = dist.BroadcastOptions()  # which, bare, is a third quicker over sockets than send and receive
        options.rootRank = _SENDER
        try:
            if self._device.type == "cpu":
                self._group.broadcast([data], options).wait(timedelta(seconds=limit_s))
                return
            with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)) as stream:
                del stream
                work, done = self._group.broadcast([data], options), torch.cuda.Event()
                work.wait()  # of this stream, not of the host
                done.record()
                end = time.monotonic() + limit_s
                while not done.query():
                    if not is_open() or time.monotonic() > end:
                        raise LinkBroken("the other end is gone, or sends nothing")
                    time.sleep(_POLL_S)
                work.is_completed()  # looks for errors
                if (error := work.exception()) is not None:
                    raise LinkBroken(str(error))
        except LinkBroken:
            self.end()
            raise
        except RuntimeError as error:  # also torch.distributed's own
            self.end()
            raise LinkBroken(_first_line(error)) from error

    def end(self) -> None:
        """Give it up, in the middle of a transfer too."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _group(store: dist.Store, end: int, device: torch.device) -> Any:
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, end, 2, timedelta(seconds=CONNECT_S))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=1)  # what takes too long is ours to say
    with _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0"):  # else torch ends the process where the other end dies
        return dist.ProcessGroupNCCL(store, end, 2, options)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def links_dir(log_dir: Path) -> Path:
    """Where the links of a start find each other; it is there."""
    (directory := log_dir / "links").mkdir(exist_ok=True)
    return directory


def link_file(directory: Path, name: int) -> Path:
    """Through which the two ends of a link find each other."""
    return directory / f"link-{name:016x}"


class Sender:
    """A rank's end of a link, as a server uses it (``wire.server.Link``)."""

    def __init__(self, snapshots: Snapshots, file: Path) -> None:
        self._snapshots = snapshots
        self._link = Link(file, _SENDER, snapshots.device)
        self._data: torch.Tensor | None = None

    def find(self, version: int) -> int:
        found = self._snapshots.find(version)
        self._data = None if found is None else found[1]
        return 0 if self._data is None else self._data.numel()

    def send(self, version: int, is_open: Callable[[], bool]) -> None:
        assert self._data is not None, "it has been found"
        self._link.send(self._data, is_open)

    def end(self) -> None:
        self._link.end()


class LinkReader:
    """Brings offers of other hosts into memory of this process's GPU.

    Args:
        directory: on the file system that all nodes share.

    Example:
        >>> reader = LinkReader(certificates, log_dir, torch.device("cuda", 0))
        >>> local, num_bytes = reader.receive(offer)  # valid until the next
        >>> with opened(local) as weights: ...
    """

    def __init__(self, certificates: tls.Certificates, directory: Path, device: torch.device) -> None:
        self._context, self._directory, self._device = certificates.client(), directory, device
        self._blocks: list[torch.Tensor] = []
        self._handles: list[memory.Handle] = []
        self._lines: dict[str, _Line] = {}

    def receive(self, offer: Offer) -> tuple[Offer, int]:
        """An offer of the same version in memory of this GPU, and how many bytes came. It blocks.

        Raises:
            Unreachable: it did not come. Nothing that was received before is valid any more.
        """
        places = offer.places
        sizes = [handle.num_bytes for handle in places.handles]
        if sizes != [block.numel() for block in self._blocks]:
            self._blocks.clear()
            for size in sizes:
                if (block := memory.allocate(size, self._device)) is None:
                    self._blocks.clear()
                    raise Unreachable(f"the GPU has no {sum(sizes) / 2**30:.1f} GiB to spare for a copy of the weights")
                self._blocks.append(block)
            try:
                self._handles = [memory.share(block) for block in self._blocks]
            except Unreachable:
                self._blocks.clear()
                raise
        try:
            with ThreadPoolExecutor(len(sizes)) as pool:  # each may have a communicator to make
                list(pool.map(partial(self._bring, offer.version), places.addresses, self._blocks))
        except OSError as error:
            self.close()
            raise Unreachable(f"NCCL: {error}") from error
        return replace(offer, places=replace(places, handles=tuple(self._handles))), sum(sizes)

    def _bring(self, version: int, address: messages.Address | None, block: torch.Tensor) -> None:
        if address is None:
            raise LinkBroken("the trainers serve no streams")
        line = self._lines.get(address.token)
        if line is None:
            line = self._lines[address.token] = _Line(self._context, address, self._directory, self._device)
        line.bring(version, block)

    def close(self) -> None:
        """End all links."""
        for line in self._lines.values():
            line.close()
        self._lines.clear()


class _Line:
    """A link to one rank, and the stream on which is said what it is for."""

    def __init__(self, context: Any, address: messages.Address, directory: Path, device: torch.device) -> None:
        self._token = bytes.fromhex(address.token)
        connection = socket.create_connection((address.host, address.port), CONNECT_S)
        try:
            tls.prepare(connection)
            self._stream = context.wrap_socket(connection, server_hostname=address.host)
            name = secrets.randbits(63)
            self._ask(name, messages.LINK)
            self._link = Link(link_file(directory, name), _READER, device)
        except BaseException:
            connection.close()
            raise

    def _ask(self, version: int, what: int) -> int:
        self._stream.sendall(messages.REQUEST.pack(self._token, version, what, 0, 1))
        kind, size = messages.read_struct(self._stream, messages.ANSWER)
        if kind != messages.LINKED:
            raise LinkBroken("the trainer sends nothing over NCCL, or the version is no longer there")
        return size

    def bring(self, version: int, block: torch.Tensor) -> None:
        """Raises LinkBroken, OSError."""
        self._stream.settimeout(STALLED_S + block.numel() / SLOWEST_BYTES_PER_S)
        if self._ask(version, messages.SEND) != block.numel():
            raise LinkBroken("the trainer holds another number of bytes")
        said = [0]

        def still_open() -> bool:  # what it says is that all has left; the rest may be on its way
            if not said[0] and not is_open(self._stream):
                said[0] = self._read_end()
            return True

        self._link.receive(block, still_open)
        if not said[0]:
            self._read_end()

    def _read_end(self) -> int:
        """Raises LinkBroken where what came is not whole, ConnectionError where the trainer is gone."""
        is_whole = bytearray(1)
        try:
            messages.read_exactly(self._stream, memoryview(is_whole))
        except OSError as error:
            raise LinkBroken(f"the trainer is gone: {error}") from error
        if not is_whole[0]:
            raise LinkBroken("the version is no longer in the trainers' memory")
        return 1

    def close(self) -> None:
        self._link.end()
        with contextlib.suppress(OSError):
            self._stream.close()

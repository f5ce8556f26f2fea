"""Weights between hosts: TLS streams between real processes, changes to the last bit, and ends in the middle."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from runs import PROJECT

from forge_hpc.actors.reading import PolicyReader
from forge_hpc.cluster import folders
from forge_hpc.cluster.identity import make_job_identity
from forge_hpc.config import Config
from forge_hpc.weights import (
    UNKNOWN,
    Brief,
    LinkReader,
    Offer,
    Place,
    Places,
    RemoteReader,
    Served,
    Snapshots,
    Unreachable,
    links_dir,
    memory,
    opened,
)
from forge_hpc.weights.checksum import Checksum, CorruptWeightsError
from forge_hpc.weights.layout import Manifest
from forge_hpc.weights.memory import Handle
from forge_hpc.wire import changes, host, messages
from forge_hpc.wire.host import Receivers, _divided, _Memory, num_receivers
from forge_hpc.wire.receiver import Task, _Pieces
from forge_hpc.wire.server import Server
from forge_hpc.wire.tls import Certificates

CPU = torch.device("cpu")
NUM = 600_000


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return identity(tmp_path_factory.mktemp("tls"))


def identity(directory: Path) -> Certificates:
    make_job_identity(directory, ["127.0.0.1", "localhost"])
    return Certificates(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")


@pytest.fixture
def reader(certificates: Certificates) -> Iterator[RemoteReader]:
    remote = RemoteReader(certificates)
    yield remote
    remote.close()


class Rank:
    """A trainer rank that serves its snapshots, here in this process."""

    def __init__(self, certificates: Certificates, sends_changes: bool = False, seed: int = 0, num: int = NUM) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            "a": torch.randn(num // 100, 100, generator=generator).mul_(0.02).bfloat16(),
            "b": torch.randn(7, generator=generator).bfloat16(),
        }
        self.snapshots = Snapshots(0, torch.bfloat16, CPU, 1 << 24, keeps_previous=sends_changes)
        self.server = Server(Served(self.snapshots, sends_changes), "127.0.0.1", certificates)
        self.snapshots.address = self.server.address

    def offer(self, version: int, **options: Any) -> Offer:
        part = self.snapshots.take(version, lambda: self.weights, self.weights.values(), **options)
        assert part is not None
        return Offer.of([part])


def read(offer: Offer) -> dict[str, torch.Tensor]:
    with opened(offer) as weights:
        weights.verify()
        return {name: weights.tensor(name).clone() for name in offer.shapes}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """To the last bit: a NaN is itself, and -0 is not 0."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in expected.items()
    )


SERVER = """
import sys, threading
import numpy as np
from forge_hpc.wire.host import Receivers, _divided, _Memory, num_receivers
from forge_hpc.wire.receiver import Task, _Pieces
from forge_hpc.wire.server import Server
from forge_hpc.wire.tls import Certificates

data, stops_at = np.random.default_rng(int(sys.argv[1])).bytes(int(sys.argv[2])), int(sys.argv[3])

class Fixed:
    def piece(self, version, start, stop):
        if 0 < stops_at <= start:
            print("stopped", flush=True)
            threading.Event().wait()
        return memoryview(data)[start:stop]
    def changes(self, held, version, start, stop):
        return None
    def is_there(self, version):
        return True

address = Server(Fixed(), "127.0.0.1", Certificates.from_environment()).address
print(address.host, address.port, address.token, flush=True)
sys.stdin.read()
"""


class Processes:
    """Servers in processes of their own, of bytes from a seed."""

    def __init__(self, certificates: Certificates) -> None:
        self._environment = {**os.environ, **certificates.environment()}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, seed: int, num_bytes: int, stops_at: int = 0) -> Place:
        command = [sys.executable, "-c", SERVER, str(seed), str(num_bytes), str(stops_at)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self._environment, cwd=PROJECT)
        self.started.append(process)
        assert process.stdout is not None
        host, port, token = process.stdout.readline().split()
        handle = Handle("another host", "cpu", num_bytes, None)
        return Place(handle, Manifest(0, 0, (), ()), messages.Address(host, int(port), token))

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


@pytest.fixture
def processes(certificates: Certificates) -> Iterator[Processes]:
    servers = Processes(certificates)
    yield servers
    servers.close()


def bytes_of(seed: int, num_bytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


def bytes_at(*places: Place, version: int = 1) -> Offer:
    """An offer of bytes, of which nobody says what they mean."""
    handles, addresses = (tuple(getattr(place, name) for place in places) for name in ("handle", "address"))
    return Offer(version, Places(tuple(range(len(places))), handles, addresses, b""), (None,) * len(places))


def held(local: Offer) -> list[bytes]:
    return [memory.open_memory(handle).numpy().tobytes() for handle in local.places.handles]


# ---- whole versions


def test_a_version_of_another_process_arrives_whole_and_in_the_same_memory_every_time(
    certificates: Certificates, reader: RemoteReader
) -> None:
    rank, handles = Rank(certificates), []
    for version in range(3):
        rank.weights["a"].add_(version)
        local, num_bytes = reader.receive(rank.offer(version, with_checksum=True))
        assert equal(read(local), rank.weights)
        assert num_bytes > 2 * NUM
        handles.append(local.places.handles)
    assert handles[0] == handles[1] == handles[2]
    rank.server.close()


@pytest.mark.parametrize("sizes", [(64,), (40_000_000,), (20_000_000, 128, 999_936, 64, 64)])
def test_the_parts_of_other_processes_arrive_together(
    processes: Processes, reader: RemoteReader, sizes: tuple[int, ...]
) -> None:
    offer = bytes_at(*(processes.start(seed, size) for seed, size in enumerate(sizes)))
    local, num_bytes = reader.receive(offer)
    assert held(local) == [bytes_of(seed, size) for seed, size in enumerate(sizes)]
    assert num_bytes >= sum(sizes)


def test_a_trainer_that_dies_in_the_middle_leaves_nothing_to_load_and_the_next_one_serves(
    processes: Processes, reader: RemoteReader
) -> None:
    part = processes.start(1, 40_000_000, stops_at=messages.PIECE_BYTES)
    [process] = processes.started

    def kill_in_the_middle() -> None:
        assert process.stdout is not None and process.stdout.readline().startswith("stopped")
        process.kill()

    end = threading.Thread(target=kill_in_the_middle)
    end.start()
    with pytest.raises(Unreachable):
        reader.receive(bytes_at(part))
    end.join()
    local, num_bytes = reader.receive(bytes_at(processes.start(2, 40_000_000)))
    assert held(local) == [bytes_of(2, 40_000_000)]
    assert num_bytes >= 40_000_000  # what came from the dead one counts for nothing


def test_a_receiver_that_was_killed_is_started_again(certificates: Certificates, reader: RemoteReader) -> None:
    rank = Rank(certificates, sends_changes=True)
    reader.receive(rank.offer(1))
    assert reader._receiver is not None
    reader._receiver.kill()
    reader._receiver.wait()
    local, num_bytes = reader.receive(rank.offer(2))
    assert equal(read(local), rank.weights) and num_bytes > 2 * NUM
    rank.server.close()


READER = """
import os, sys
from pathlib import Path
from forge_hpc.weights import Offer, Places, RemoteReader
from forge_hpc.weights.memory import Handle
from forge_hpc.wire.messages import Address
from forge_hpc.wire.tls import Certificates

reader = RemoteReader(Certificates.from_environment(), Path(sys.argv[1]) if sys.argv[1] else None)
host, port, token, num_bytes = sys.argv[2:]
handle, address = Handle("another host", "cpu", int(num_bytes), None), Address(host, int(port), token)
print("asks", flush=True)
reader.receive(Offer(1, Places((0,), (handle,), (address,), b""), (None,)))
print(reader._receiver.pid, flush=True)
sys.stdin.read()
"""


def start_reader(part: Place, certificates: Certificates, meeting: Path | str = "") -> subprocess.Popen[str]:
    """A process that asks for a part, and keeps what it has received until its standard input ends."""
    assert part.address is not None
    where = (part.address.host, str(part.address.port), part.address.token, str(part.handle.num_bytes))
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(meeting), *where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **certificates.environment()},
        cwd=PROJECT,
    )
    assert process.stdout is not None and process.stdout.readline() == "asks\n"
    return process


def ends(pid: int) -> bool:
    """Whether a process ends within a minute."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 60)[0])
    finally:
        os.close(process)


@pytest.mark.parametrize("shared", [False, True])
def test_the_receiver_ends_with_its_last_reader(
    certificates: Certificates, processes: Processes, tmp_path: Path, shared: bool
) -> None:
    process = start_reader(processes.start(1, 1000), certificates, tmp_path if shared else "")
    assert process.stdout is not None
    receiver = int(process.stdout.readline())
    process.kill()
    process.communicate()
    assert ends(receiver), "it lives on"


def test_the_receiver_of_a_reader_that_is_killed_in_the_middle_ends(
    certificates: Certificates, processes: Processes
) -> None:
    part = processes.start(1, 40_000_000, stops_at=messages.PIECE_BYTES)
    process = start_reader(part, certificates)
    [server] = processes.started
    assert server.stdout is not None and server.stdout.readline().startswith("stopped")
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 1 + num_receivers()
    process.kill()
    process.communicate()
    assert all(ends(each.pid) for each in started), "they live on"


# ---- several receivers of a host


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("num_servers", [1, 2, 4])
def test_the_pieces_of_all_servers_are_divided_among_the_receivers(num: int, num_servers: int) -> None:
    num_bytes = 10 * messages.PIECE_BYTES + 64
    tasks = [Task("host", i, "00", 1, num_bytes, messages.NOTHING, "", i) for i in range(num_servers)]
    shares = _divided(tasks, num)
    assert len(shares) == num and sum(map(bool, shares)) == min(num, num_servers * max(1, num // num_servers))
    for task in tasks:
        pieces = [piece for share in shares for each in share if each.port == task.port for piece in _Pieces(each)]
        assert sorted(pieces) == list(_Pieces(task)) and pieces[-1][1] <= num_bytes


@pytest.mark.parametrize("sizes", [(40_000_000,), (20_000_000, 128, 999_936)])
def test_several_receivers_bring_a_version_together_and_one_that_is_killed_is_replaced(
    certificates: Certificates, processes: Processes, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    for name, value in certificates.environment().items():
        monkeypatch.setenv(name, value)
    receivers, parts = Receivers(3), [processes.start(seed, size) for seed, size in enumerate(sizes)]
    for version in range(2):
        memories = [_Memory(size) for size in sizes]
        tasks = [
            Task(*astuple(part.address), version, memory.num_bytes, messages.NOTHING, memory.path, memory.id)
            for part, memory in zip(parts, memories, strict=True)
            if part.address is not None
        ]
        num_bytes = receivers.bring(0, tasks, lambda: True)
        assert sum(sizes) <= num_bytes < sum(sizes) + 2000
        assert [Path(memory.path).read_bytes() for memory in memories] == [
            bytes_of(seed, size) for seed, size in enumerate(sizes)
        ]
        started = [process for process in receivers._processes if process is not None]
        assert len(started) == 3
        started[version].kill()
        started[version].wait()
    for process in receivers._processes:
        assert process is not None
        process.kill()
        process.communicate()


# ---- readers of one host


@pytest.fixture
def readers(certificates: Certificates, tmp_path: Path) -> Iterator[list[RemoteReader]]:
    """Three that share what comes."""
    several = [RemoteReader(certificates, tmp_path) for _ in range(3)]
    yield several
    for each in several:
        each.close()


def test_a_version_comes_to_a_host_once(certificates: Certificates, readers: list[RemoteReader]) -> None:
    rank = Rank(certificates)
    for version in range(3):
        rank.weights["a"].add_(version)
        offer = rank.offer(version, with_checksum=True)
        with ThreadPoolExecutor(3) as pool:
            received = list(pool.map(lambda reader, offer=offer: reader.receive(offer), readers))  # type: ignore[misc]
        assert sorted(num_bytes > 2 * NUM for _, num_bytes in received) == [False, False, True]
        assert sum(num_bytes for _, num_bytes in received) < 3 * NUM
        assert len({local.places.handles for local, _ in received}) == 1
        for (local, _), reader in zip(received, readers, strict=True):
            assert equal(read(local), rank.weights)
            reader.has_read()
    assert sum(reader._receiver is not None for reader in readers) == 1
    rank.server.close()


def test_what_one_still_reads_is_not_overwritten(certificates: Certificates, readers: list[RemoteReader]) -> None:
    rank, (first, second, third) = Rank(certificates), readers
    before = {name: tensor.clone() for name, tensor in rank.weights.items()}
    offer = rank.offer(1)
    first.receive(offer)
    local, _ = second.receive(offer)
    first.has_read()
    rank.weights["a"].add_(1)
    newer = rank.offer(2)
    with ThreadPoolExecutor(2) as pool:
        wanted = [pool.submit(reader.receive, newer) for reader in (first, third)]
        assert not wait(wanted, timeout=2.0).done
        assert equal(read(local), before)
        second.has_read()
        assert all(equal(read(each.result(60)[0]), rank.weights) for each in wanted)
    rank.server.close()


def test_a_reader_that_has_died_holds_nobody_up(
    certificates: Certificates, readers: list[RemoteReader], processes: Processes, tmp_path: Path
) -> None:
    old, new = processes.start(1, 1000), processes.start(1, 1000)
    process = start_reader(old, certificates, tmp_path)  # it has begun the receiver, and never says that it has read
    assert process.stdout is not None
    receiver = int(process.stdout.readline())
    readers[0].receive(bytes_at(old))
    readers[0].has_read()
    process.kill()
    process.communicate()
    newer = bytes_at(old, version=2)  # of the same trainers, into the same memory
    assert held(readers[0].receive(newer)[0]) == [bytes_of(1, 1000)]
    assert held(readers[1].receive(bytes_at(new))[0]) == [bytes_of(1, 1000)]
    assert psutil.pid_exists(receiver) and readers[0]._receiver is readers[1]._receiver is None
    for reader in readers:
        reader.close()
    assert ends(receiver)


def test_a_version_that_fails_is_told_to_all_and_can_be_asked_for_again(
    readers: list[RemoteReader], processes: Processes
) -> None:
    part = processes.start(1, 40_000_000, stops_at=messages.PIECE_BYTES)
    [process] = processes.started
    assert process.stdout is not None
    with ThreadPoolExecutor(3) as pool:
        wanted = [pool.submit(reader.receive, bytes_at(part)) for reader in readers]
        assert process.stdout.readline().startswith("stopped")
        process.kill()
        for each in wanted:
            with pytest.raises(Unreachable):
                each.result(60)
        offer = bytes_at(processes.start(2, 40_000_000))
        received = list(pool.map(lambda reader: reader.receive(offer), readers))
    assert all(held(local) == [bytes_of(2, 40_000_000)] for local, _ in received)


def test_readers_of_other_trainers_have_memory_of_their_own(
    certificates: Certificates, readers: list[RemoteReader]
) -> None:
    ranks = [Rank(certificates, seed=seed) for seed in range(2)]
    locals_ = [reader.receive(rank.offer(1))[0] for reader, rank in zip(readers, ranks, strict=False)]
    assert all(equal(read(local), rank.weights) for local, rank in zip(locals_, ranks, strict=True))
    for rank in ranks:
        rank.server.close()


def test_a_shared_receiver_that_was_killed_is_started_again_by_one_of_them(
    certificates: Certificates, readers: list[RemoteReader]
) -> None:
    rank = Rank(certificates)
    for reader in readers:
        reader.receive(rank.offer(1))
        reader.has_read()
    [receiver] = [reader._receiver for reader in readers if reader._receiver is not None]
    receiver.kill()
    receiver.wait()
    offer = rank.offer(2)
    with ThreadPoolExecutor(3) as pool:
        received = list(pool.map(lambda reader: reader.receive(offer), readers))
    assert all(equal(read(local), rank.weights) for local, _ in received)
    assert sum(num_bytes > 2 * NUM for _, num_bytes in received) == 1
    rank.server.close()


class FakeClient:
    """A generator that is there."""

    is_connected = True


def test_a_reader_that_is_stuck_keeps_what_it_has_and_holds_nobody_up_for_long(
    certificates: Certificates, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in certificates.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host, "PATIENCE_S", 0.0)
    address = processes.start(1, 1000).address
    assert address is not None
    policy, (stuck, other) = host._Policy(Receivers(1)), (FakeClient(), FakeClient())
    first, second, third = ([host.Wanted(*astuple(address), version, 1000)] for version in (1, 2, 3))
    [kept], _ = policy.read(stuck, first)  # type: ignore[arg-type]
    Path(kept).write_bytes(b"as it was" * 100)
    for wanted in (second, third):
        [path], num_bytes = policy.read(other, wanted)  # type: ignore[arg-type]
        assert path != kept and num_bytes > 1000 and Path(path).read_bytes() == bytes_of(1, 1000)
        policy.has_read(other)  # type: ignore[arg-type]
    assert Path(kept).read_bytes()[:900] == b"as it was" * 100
    policy.has_read(stuck)  # type: ignore[arg-type]
    assert not Path(kept).exists() and Path(path).exists()
    policy.close()
    assert not Path(path).exists()
    for process in policy._receivers._processes:
        assert process is not None
        process.kill()
        process.communicate()


def test_what_was_not_what_was_sent_comes_anew(certificates: Certificates, readers: list[RemoteReader]) -> None:
    rank = Rank(certificates, sends_changes=True)
    offer = rank.offer(1, with_checksum=True)
    local, _ = readers[0].receive(offer)
    with Path(local.places.handles[0].where).open("r+b") as file:
        file.write(b"\0\1\2\3")
    with pytest.raises(CorruptWeightsError):
        read(local)
    readers[0].has_read(is_good=False)
    local, num_bytes = readers[0].receive(offer)
    assert equal(read(local), rank.weights) and num_bytes > 2 * NUM
    assert equal(read(readers[1].receive(offer)[0]), rank.weights)
    for reader in readers[:2]:
        reader.has_read()
    rank.weights["a"][0] += 1
    local, num_bytes = readers[2].receive(rank.offer(2, with_checksum=True))
    assert equal(read(local), rank.weights) and num_bytes < NUM  # the changes, onto what is good
    rank.server.close()


def test_a_reader_that_is_closed_while_it_waits_has_received_nothing(
    certificates: Certificates, readers: list[RemoteReader]
) -> None:
    rank = Rank(certificates)
    readers[0].receive(rank.offer(1))
    newer = rank.offer(2)
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(readers[1].receive, newer)
        assert not wait([waits], timeout=1.0).done
        readers[1].close()
        with pytest.raises(Unreachable, match="closed"):
            waits.result(60)
        readers[0].has_read()
        assert equal(read(readers[2].receive(newer)[0]), rank.weights)
    rank.server.close()


def test_trainers_that_send_nothing_hold_up_no_reader_of_others(
    certificates: Certificates, readers: list[RemoteReader], processes: Processes, tmp_path: Path
) -> None:
    rank, (first, second, third) = Rank(certificates), readers
    offer, gone = rank.offer(1), bytes_at(processes.start(1, 1000))
    first.receive(offer)
    first.has_read()
    third.receive(gone)
    silent = start_reader(processes.start(2, 40_000_000, stops_at=messages.PIECE_BYTES), certificates, tmp_path)
    server = processes.started[-1]
    assert server.stdout is not None and server.stdout.readline().startswith("stopped")
    third.close()  # the last reader of its trainers
    with ThreadPoolExecutor(1) as pool:
        assert equal(read(pool.submit(second.receive, offer).result(30)[0]), rank.weights)
    silent.kill()
    silent.communicate()
    rank.server.close()


def test_who_has_other_certificates_has_a_receiver_of_its_own(
    certificates: Certificates, readers: list[RemoteReader], tmp_path: Path
) -> None:
    rank, other = Rank(certificates), identity(tmp_path / "other")
    readers[0].receive(rank.offer(1))
    stranger = RemoteReader(replace(other, ca=certificates.ca), tmp_path)
    with pytest.raises(Unreachable):
        stranger.receive(rank.offer(1))
    stranger.close()
    rank.server.close()


def test_a_version_that_is_overwritten_while_it_is_sent_is_refused(
    certificates: Certificates, reader: RemoteReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(certificates)
    served = rank.server._source
    offer, piece = rank.offer(1), served.piece

    def slow(version: int, start: int, stop: int) -> memoryview | None:
        found = piece(version, start, stop)
        rank.offer(2)  # the controller would not have it so
        return found

    monkeypatch.setattr(served, "piece", slow)
    with pytest.raises(Unreachable, match="no longer in the trainers' memory"):
        reader.receive(offer)
    monkeypatch.undo()
    local, _ = reader.receive(rank.offer(3))
    assert equal(read(local), rank.weights)
    rank.server.close()


def test_a_server_that_is_gone_is_unreachable_at_once(certificates: Certificates, reader: RemoteReader) -> None:
    rank = Rank(certificates)
    offer = rank.offer(1)
    rank.server.close()
    with pytest.raises(Unreachable, match="refused"):
        reader.receive(offer)


# ---- who may read


def test_a_certificate_of_another_job_is_refused_on_both_sides(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = identity(tmp_path / "foreign")
    rank = Rank(certificates)
    for ca in (foreign.ca, certificates.ca):  # neither knows the other; then it trusts us, and we do not know it
        stranger = RemoteReader(replace(foreign, ca=ca))
        with pytest.raises(Unreachable):
            stranger.receive(rank.offer(1))
        stranger.close()
    assert "a connection from 127.0.0.1 was refused" in caplog.text
    rank.server.close()


def test_a_peer_without_a_certificate_or_without_tls_learns_nothing(certificates: Certificates) -> None:
    rank = Rank(certificates)
    rank.offer(1)
    where = (rank.server.address.host, rank.server.address.port)
    context = ssl.create_default_context(cafile=str(certificates.ca))
    raw = socket.create_connection(where, timeout=10)
    with pytest.raises(OSError), context.wrap_socket(raw, server_hostname="127.0.0.1") as stream:
        stream.sendall(messages.REQUEST.pack(bytes.fromhex(rank.server.address.token), 1, messages.NOTHING, 0, 64))
        if not stream.recv(1):  # TLS 1.3 tells the client of its refusal with the first read
            raise ConnectionResetError
    raw.close()
    with socket.create_connection(where, timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        try:
            answer = plain.recv(64)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or answer[0] == 21  # closed, or a TLS alert
    rank.server.close()


def test_who_knows_not_the_token_gets_nothing(certificates: Certificates, reader: RemoteReader) -> None:
    rank = Rank(certificates)
    offer = rank.offer(1)
    [address] = offer.places.addresses
    assert address is not None
    other = replace(offer.places, addresses=(replace(address, token="0" * 32),))
    with pytest.raises(Unreachable, match="no longer"):
        reader.receive(replace(offer, places=other))
    rank.server.close()


# ---- changes


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.001, 0.03, 0.3, 1.0])
def test_changes_make_the_new_version_to_the_last_bit(share: float) -> None:
    random = np.random.default_rng(int(share * 1e6))
    for size in (1, 255, 256, 257, 100_000):
        old = random.integers(-(2**15), 2**15, size).astype(np.int16)
        new, places = old.copy(), random.random(size) < share
        steps = random.choice([-1, 1, 100, -128, 127, 128, 30_000], size).astype(np.int16)
        new[places] += steps[places]
        places = np.flatnonzero(old != new)
        encoded = changes.encode(places, old[places], new[places])
        found = old.copy()
        changes.apply(found, encoded)
        assert np.array_equal(found, new)


def test_a_change_far_away_and_a_new_sign_and_a_nan_are_carried() -> None:
    old = torch.zeros(100_000).bfloat16()
    new = old.clone()
    new[0], new[254], new[255], new[511], new[99_999] = -0.0, 1e-40, float("nan"), float("-inf"), 2.0
    before, after = (tensor.view(torch.int16).numpy() for tensor in (old, new))
    found = changes.find(before, after)
    assert found is not None and found[0].tolist() == [0, 254, 255, 511, 99_999]
    changes.apply(before, changes.encode(*found))
    assert np.array_equal(before, after)


def test_only_what_an_optimizer_changed_is_sent_and_the_result_is_the_same(
    certificates: Certificates, reader: RemoteReader
) -> None:
    num = 9_000_000  # more than a piece
    rank = Rank(certificates, sends_changes=True, num=num)
    master = rank.weights["a"].float()
    optimizer = torch.optim.AdamW([parameter := torch.nn.Parameter(master)], lr=1e-6, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    sent = []
    for version in range(3):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        rank.weights["a"].copy_(parameter.detach())
        local, num_bytes = reader.receive(rank.offer(version))
        assert equal(read(local), rank.weights)
        sent.append(num_bytes / (2 * num))
    assert sent[0] > 1 and max(sent[1:]) < 0.05


def test_where_most_has_changed_all_of_it_is_sent(certificates: Certificates, reader: RemoteReader) -> None:
    rank = Rank(certificates, sends_changes=True)
    for version in range(3):
        rank.weights["a"].normal_()
        local, num_bytes = reader.receive(rank.offer(version))
        assert equal(read(local), rank.weights)
        assert 2 * NUM < num_bytes < 2.01 * NUM


def test_who_missed_a_version_or_holds_one_of_other_trainers_gets_all_of_it(
    certificates: Certificates, reader: RemoteReader
) -> None:
    rank = Rank(certificates, sends_changes=True)
    late = RemoteReader(certificates)
    received = {}
    for version in range(4):
        rank.weights["a"][version] += 1
        offer = rank.offer(version)
        local, received[version] = reader.receive(offer)
        assert equal(read(local), rank.weights)
        if version in (0, 2):
            local, num_bytes = late.receive(offer)
            assert equal(read(local), rank.weights)
            assert num_bytes > 2 * NUM
    assert received[0] > 2 * NUM and max(received[1], received[2], received[3]) < 10_000
    late.close()
    other = Rank(certificates, sends_changes=True, seed=7)  # goes on from version 3 of its own
    other.offer(3)
    local, num_bytes = reader.receive(other.offer(4))
    assert equal(read(local), other.weights) and num_bytes > 2 * NUM
    rank.server.close()
    other.server.close()


def test_without_memory_for_a_second_copy_all_is_sent(
    certificates: Certificates, reader: RemoteReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(certificates, sends_changes=True)
    reader.receive(rank.offer(1))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "allocate", lambda num_bytes, device: None)
        offer = rank.offer(2)
    local, num_bytes = reader.receive(offer)
    assert equal(read(local), rank.weights) and num_bytes > 2 * NUM
    rank.server.close()


# ---- the generator


class FakeEngine:
    """What a generator loads into."""

    def __init__(self) -> None:
        self.loaded: dict[int, dict[str, torch.Tensor]] = {}

    async def load_weights(self, version: int, tensors: Any, adapter: int = 0) -> None:
        self.loaded[version] = {name: tensor.clone() for name, tensor in tensors}


@pytest.fixture
def reads(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[PolicyReader, FakeEngine]]]:
    """Makes what reads for a generator of this process, and what it loads into."""
    for name, value in certificates.environment().items():
        monkeypatch.setenv(name, value)
    made = []

    def make(**config: Any) -> tuple[PolicyReader, FakeEngine]:
        cfg, engine = Config(), FakeEngine()
        for key, value in config.items():
            setattr(cfg.generator, key, value)
        made.append(PolicyReader(engine, cfg, tmp_path))  # type: ignore[arg-type]
        return made[-1], engine

    yield make
    for each in made:
        each.close()


def elsewhere(offer: Offer, **handle: Any) -> Offer:
    """As a generator of another host sees it, or otherwise."""
    [own] = offer.places.handles
    return replace(offer, places=replace(offer.places, handles=(replace(own, **(handle or {"host": "another"})),)))


def test_where_memory_of_this_host_cannot_be_opened_streams_serve(
    certificates: Certificates, reads: Callable[..., tuple[PolicyReader, FakeEngine]]
) -> None:
    rank, (reader, engine) = Rank(certificates), reads()
    for version in (1, 2):
        rank.weights["a"].add_(version)
        offer = elsewhere(rank.offer(version, with_checksum=True), where="/proc/self/fd/1000000")
        assert asyncio.run(reader.load(None, version, offer, False)) == "TLS streams"
        assert equal(engine.loaded[version], rank.weights)
    alone = replace(
        offer, version=3, places=replace(offer.places, addresses=(None,))
    )  # a run on one host has no streams
    assert asyncio.run(reader.load(None, 3, alone, False)) is None
    rank.server.close()


def test_where_memory_cannot_be_shared_streams_serve(
    certificates: Certificates,
    reads: Callable[..., tuple[PolicyReader, FakeEngine]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(data: torch.Tensor) -> Any:
        raise Unreachable("RuntimeError: no IPC here")

    rank, (reader, engine) = Rank(certificates), reads()
    monkeypatch.setattr(memory, "share", refuse)
    for version in (1, 2):
        rank.weights["a"].add_(version)
        offer = rank.offer(version, with_checksum=True)
        assert asyncio.run(reader.load(None, version, offer, False)) == "TLS streams"
        assert equal(engine.loaded[version], rank.weights)
    assert caplog.text.count("TLS streams serve: RuntimeError: no IPC here") == 1
    rank.server.close()


def test_where_a_version_lies_is_told_once(
    certificates: Certificates, reads: Callable[..., tuple[PolicyReader, FakeEngine]]
) -> None:
    rank, (reader, engine) = Rank(certificates), reads()

    def load(version: int, told: Offer | Brief, again: bool = False) -> str | None:
        return asyncio.run(reader.load(None, version, told, again))

    offer = rank.offer(1, with_checksum=True)
    assert load(1, offer.brief) == UNKNOWN and not engine.loaded
    assert load(1, offer, again=True) == "shared memory"
    assert load(1, offer, again=True) == ""  # another generator did not know it
    for version in (2, 3):
        rank.weights["a"].add_(1)
        assert load(version, rank.offer(version, with_checksum=True).brief) == "shared memory"
        assert equal(engine.loaded[version], rank.weights)
    corrupt = replace(rank.offer(4).brief, checksums=(Checksum(1, 1),))
    with pytest.raises(CorruptWeightsError, match="version 4"):
        load(4, corrupt)
    second = rank.offer(5, in_use={4})  # into other memory
    assert load(5, second.brief) == UNKNOWN and load(5, second, again=True) == "shared memory"
    assert load(6, rank.offer(6, in_use={5}).brief) == "shared memory"  # the first is still known
    other = Rank(certificates, seed=1)  # others take the trainers' place
    newest = other.offer(7)
    assert load(7, newest.brief) == UNKNOWN and load(7, newest, again=True) == "shared memory"
    assert equal(engine.loaded[7], other.weights)
    for each in (rank, other):
        each.server.close()


def test_generators_of_a_host_share_what_comes(
    certificates: Certificates,
    reads: Callable[..., tuple[PolicyReader, FakeEngine]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path))  # as the node's supervisor gives it
    rank, both = Rank(certificates), [reads() for _ in range(2)]

    async def load(version: int, offer: Offer) -> None:
        loads = (reader.load(None, version, offer, False) for reader, _ in both)
        assert await asyncio.gather(*loads) == ["TLS streams"] * 2

    for version in (1, 2):
        rank.weights["a"].add_(version)
        with caplog.at_level("INFO"):
            asyncio.run(load(version, elsewhere(rank.offer(version, with_checksum=True))))
        assert all(equal(engine.loaded[version], rank.weights) for _, engine in both)
    assert caplog.text.count("1.2 of 1.2 MB came") == caplog.text.count("0.0 of 1.2 MB came") == 2
    rank.server.close()


def test_a_generator_that_is_closed_while_it_loads_lets_go_of_the_weights_after_it(
    certificates: Certificates,
    reads: Callable[..., tuple[PolicyReader, FakeEngine]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path))
    rank, (reader, engine), (other, _) = Rank(certificates), reads(), reads()

    async def scenario() -> None:
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def load_weights(version: int, tensors: Any, adapter: int = 0) -> None:
            begun.set()
            await may_end.wait()
            engine.loaded[version] = {name: tensor.clone() for name, tensor in tensors}

        monkeypatch.setattr(engine, "load_weights", load_weights)
        before = {name: tensor.clone() for name, tensor in rank.weights.items()}
        loads = asyncio.create_task(reader.load(None, 1, elsewhere(rank.offer(1)), False))
        await begun.wait()
        reader.close()
        rank.weights["a"].add_(1)
        waits = asyncio.create_task(other.load(None, 2, elsewhere(rank.offer(2)), False))
        assert not (await asyncio.wait({waits}, timeout=2.0))[0], "it has been overwritten"
        may_end.set()
        assert await loads == await waits == "TLS streams"
        assert equal(engine.loaded[1], before)
        assert await reader.load(None, 3, elsewhere(rank.offer(3)), False) is None  # nothing is taken any more

    asyncio.run(scenario())
    rank.server.close()


@pytest.mark.parametrize("serves_links", [True, False])
def test_where_no_link_comes_about_streams_serve(
    certificates: Certificates,
    reads: Callable[..., tuple[PolicyReader, FakeEngine]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    serves_links: bool,
) -> None:
    rank, (reader, engine) = Rank(certificates), reads(weight_transport="nccl")
    if serves_links:  # gloo has the place of NCCL on the CPU
        rank.server.close()
        served = Served(rank.snapshots, False, links_dir(tmp_path))
        rank.server = Server(served, "127.0.0.1", certificates)
        rank.snapshots.address = rank.server.address
    for version in (1, 2):
        rank.weights["a"].add_(version)
        offer = elsewhere(rank.offer(version))
        way = asyncio.run(reader.load(None, version, offer, False))
        assert way == ("NCCL" if serves_links else "TLS streams")
        assert equal(engine.loaded[version], rank.weights)
    assert caplog.text.count("no weights over NCCL, TLS streams serve") == (0 if serves_links else 1)
    reader.close()
    rank.server.close()


def test_a_generator_takes_streams_where_it_can_and_tries_again_after_a_break_but_not_where_none_came_through(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge_hpc.actors.generator import Generator

    for name, value in certificates.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("forge_hpc.actors.generator.setup_logging", lambda *args: None)
    generator, engine = Generator(Config(), 0, tmp_path), FakeEngine()
    generator._engine = engine  # type: ignore[assignment]
    generator._open_readers()
    [reader] = generator._readers
    load = Generator.load._method.__wrapped__  # type: ignore[attr-defined]

    async def scenario() -> None:
        rank = Rank(certificates)
        first = elsewhere(rank.offer(1, with_checksum=True))
        assert await load(generator, None, 1, first) == "TLS streams"
        assert equal(engine.loaded[1], rank.weights)
        second = elsewhere(rank.offer(2))
        rank.offer(3)  # 2 is gone
        assert await load(generator, None, 2, second) is None and 2 not in engine.loaded
        assert await load(generator, None, 4, elsewhere(rank.offer(4))) == "TLS streams"
        assert await load(generator, None, 4, None, True) == ""  # it does not wait for the store
        rank.server.close()
        deaf = Rank(certificates)
        offer = elsewhere(deaf.offer(5))
        deaf.server.close()
        assert await load(generator, None, 5, offer) is None
        assert reader._unreachable == offer.places.origin  # from now on the store, without a try
        silent = replace(offer.places, addresses=(None,))  # served to nobody
        assert await load(generator, None, 6, replace(offer, version=6, places=silent)) is None

    asyncio.run(scenario())
    assert reader._remote is not None
    reader.close()


# ---- links: from GPU to GPU over NCCL; here, from memory to memory over gloo


class LinkedRank(Rank):
    def __init__(self, certificates: Certificates, links: Path | None, seed: int = 0, num: int = NUM) -> None:
        super().__init__(certificates, seed=seed, num=num)
        self.server.close()
        self.server = Server(Served(self.snapshots, False, links), "127.0.0.1", certificates)
        self.snapshots.address = self.server.address


def test_versions_come_over_a_link_that_stays_open(certificates: Certificates, tmp_path: Path) -> None:
    rank = LinkedRank(certificates, tmp_path)
    reader = LinkReader(certificates, tmp_path, CPU)
    for version in range(3):
        rank.weights["a"].add_(1)
        local, num_bytes = reader.receive(rank.offer(version, with_checksum=True))
        assert equal(read(local), rank.weights)
        assert num_bytes == local.places.handles[0].num_bytes
        assert len(list(tmp_path.iterdir())) == 1  # the file by which they found each other
    reader.close()
    rank.server.close()


def test_each_rank_sends_its_part_over_a_link_of_its_own(certificates: Certificates, tmp_path: Path) -> None:
    ranks = [LinkedRank(certificates, tmp_path, seed, NUM + 100 * seed) for seed in range(2)]
    reader = LinkReader(certificates, tmp_path, CPU)
    offers = [rank.offer(1) for rank in ranks]
    addresses, handles = (tuple(getattr(each.places, of)[0] for each in offers) for of in ("addresses", "handles"))
    local, _ = reader.receive(Offer(1, Places((0, 1), handles, addresses, b""), (None, None)))
    for rank, own, handle in zip(ranks, offers, local.places.handles, strict=True):
        assert equal(read(replace(own, places=replace(own.places, handles=(handle,)))), rank.weights)
    reader.close()
    for rank in ranks:
        rank.server.close()


def test_a_trainer_without_links_a_version_that_is_gone_and_a_trainer_that_ended_are_unreachable(
    certificates: Certificates, tmp_path: Path
) -> None:
    reader = LinkReader(certificates, tmp_path, CPU)
    rank = LinkedRank(certificates, None)
    with pytest.raises(Unreachable, match="sends nothing over NCCL"):
        reader.receive(rank.offer(1))
    rank.server.close()
    rank = LinkedRank(certificates, tmp_path)
    offer = rank.offer(1)
    rank.offer(2)
    with pytest.raises(Unreachable, match="no longer there"):
        reader.receive(offer)
    local, _ = reader.receive(rank.offer(3))  # by a new link
    assert equal(read(local), rank.weights)
    offer = rank.offer(4)
    rank.server.close()
    with pytest.raises(Unreachable):
        reader.receive(offer)
    reader.close()


def test_a_reader_that_dies_in_the_middle_leaves_the_others_their_links(
    certificates: Certificates, tmp_path: Path, processes: Processes
) -> None:
    rank = LinkedRank(certificates, tmp_path)
    other = LinkReader(certificates, tmp_path, CPU)
    other.receive(rank.offer(1))
    offer = rank.offer(2)
    context = certificates.client()
    [address] = offer.places.addresses
    assert address is not None
    with socket.create_connection((address.host, address.port)) as connection:
        stream = context.wrap_socket(connection, server_hostname=address.host)
        token = bytes.fromhex(address.token)
        stream.sendall(messages.REQUEST.pack(token, 1, messages.LINK, 0, 1))  # and never makes its end
        assert messages.read_struct(stream, messages.ANSWER)[0] == messages.LINKED
        stream.close()
    local, _ = other.receive(offer)
    assert equal(read(local), rank.weights)
    other.close()
    rank.server.close()

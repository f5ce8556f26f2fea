"""Weights between the GPUs of two processes by `generator.weight_transport=nccl`, beside one bare NCCL broadcast.

    python benchmarks/links.py [--megabytes 1200] [--rounds 5] [--fabric]

Two GPUs of one machine stand for two hosts: NCCL may use neither NVLink nor shared memory, only sockets (on loopback);
with ``--fabric`` it may use what it finds. A round changes all weights and brings them over by ``bare`` (one broadcast
of as many bytes between the same two), by ``nccl`` (what generators use: the snapshot, the request over TLS, the
transfer) and by ``streams`` (TLS, into memory of the reader's host), one after the other; checksums are compared. At
the end a second reader is killed in the middle of a transfer, and the first reads on; then the sender is.
Without two GPUs it runs on the CPU with gloo, for its own sake.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rows import row

from forge_hpc.cluster.identity import make_job_identity
from forge_hpc.weights import LinkReader, Offer, RemoteReader, Served, Snapshots, Unreachable, opened
from forge_hpc.wire.server import Server
from forge_hpc.wire.tls import Certificates

DEATH_S = 2.0
"""So long may it take until a death in the middle of a transfer is over for the others."""


def device_of(index: int) -> torch.device:
    if torch.cuda.device_count() < 2:
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare(rank: int, folder: Path, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder / 'bare'}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )


def certificates_in(folder: Path) -> Certificates:
    return Certificates(folder / "tls/ca.pem", folder / "tls/cert.pem", folder / "tls/key.pem")


def send(folder: Path, num_bytes: int, ends: list[Connection]) -> None:
    """Serve weights; do what the readers say."""
    device = device_of(0)
    weights = {f"w{i}": torch.randn(num_bytes // 200, device=device).bfloat16() for i in range(100)}
    snapshots = Snapshots(0, torch.bfloat16, device, 1 << 24)
    server = Server(Served(snapshots, False, folder), "127.0.0.1", certificates_in(folder))
    snapshots.address = server.address
    buffer = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    bare(0, folder, device)
    [end] = ends
    while True:
        what, version = end.recv()
        if what == "offer":
            for tensor in weights.values():
                tensor.add_(0.01)
            synchronize(device)
            start = time.perf_counter()
            part = snapshots.take(version, lambda: weights, weights.values(), with_checksum=False)
            seconds = time.perf_counter() - start
            part = snapshots.take(version, lambda: weights, weights.values(), with_checksum=True)
            assert part is not None
            end.send((Offer.of([part]), seconds))
        elif what == "bare":
            end.send(None)
            dist.broadcast(buffer, 0)
            synchronize(device)
        else:
            os._exit(0)


def die_reading(folder: Path, offer: Offer, is_reading: Any) -> None:
    """A reader that takes a version, and takes it again when it is killed."""
    reader = LinkReader(certificates_in(folder), folder, device_of(1))
    reader.receive(offer)
    is_reading.set()
    while True:
        reader.receive(offer)


def receive(folder: Path, args: argparse.Namespace, end: Connection, sender: int) -> None:
    device, num_bytes = device_of(1), args.megabytes * 10**6
    links, streams = LinkReader(certificates_in(folder), folder, device), RemoteReader(certificates_in(folder))
    buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    bare(1, folder, device)
    seconds: dict[str, list[float]] = {"bare": [], "nccl": [], "streams": []}

    def offered(version: int) -> tuple[Offer, float]:
        end.send(("offer", version))
        return end.recv()

    def verified(local: Offer) -> None:
        if device.type == "cuda":
            with opened(local) as weights:
                weights.verify()

    for version in range(args.rounds + 1):
        offer, snapshot_s = offered(version)
        end.send(("bare", 0))
        end.recv()
        start = time.perf_counter()
        dist.broadcast(buffer, 0)
        synchronize(device)
        seconds["bare"].append(time.perf_counter() - start)
        start = time.perf_counter()
        local, num = links.receive(offer)
        seconds["nccl"].append(snapshot_s + time.perf_counter() - start)
        verified(local)
        start = time.perf_counter()
        streams.receive(offer)
        seconds["streams"].append(snapshot_s + time.perf_counter() - start)
        print({way: round(found[-1], 4) for way, found in seconds.items()}, flush=True)
    rates = {way: num / 1e6 / statistics.median(found[1:]) for way, found in seconds.items()}
    name = "what NCCL finds" if args.fabric else "sockets"
    row(f"weights from GPU to GPU by NCCL over {name}", rates["nccl"], rates["bare"], target=0.9,
        unit="MB/s", peer="a bare broadcast", note=f"TLS streams {rates['streams']:.0f} MB/s")  # fmt: skip
    streams.close()
    deaths(folder, links, offered, args.rounds + 1, verified, sender)


def deaths(folder: Path, links: LinkReader, offered: Any, version: int, verified: Any, sender: int) -> None:
    context = mp.get_context("spawn")
    is_reading = context.Event()
    offer, _ = offered(version)
    other = context.Process(target=die_reading, args=(folder, offer, is_reading))
    other.start()
    assert is_reading.wait(120)
    time.sleep(0.05)
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    offer, _ = offered(version + 1)
    start = time.perf_counter()
    local, _ = links.receive(offer)
    verified(local)
    row("a reader killed in the middle: the next version of another", time.perf_counter() - start, target=DEATH_S,
        better="less", unit="s")  # fmt: skip
    threading.Timer(0.02, os.kill, (sender, signal.SIGKILL)).start()
    start = time.perf_counter()
    said = ""
    while not said and time.perf_counter() - start < 60:
        try:
            links.receive(offer)
        except Unreachable as error:
            said = str(error)
    row("the trainer killed in the middle: until a reader says so", time.perf_counter() - start if said else None,
        target=DEATH_S, better="less", unit="s", note=said or "it has not said so")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Weights between two GPUs over NCCL, beside a bare broadcast.")
    parser.add_argument("--megabytes", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fabric", action="store_true")
    args = parser.parse_args()
    if not args.fabric:
        os.environ.update(NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="forge-hpc-links-") as name:
        folder = Path(name)
        make_job_identity(folder / "tls", ["127.0.0.1", "localhost"])
        ours, theirs = context.Pipe()
        sender = context.Process(target=send, args=(folder, args.megabytes * 10**6, [theirs]), daemon=True)
        sender.start()
        assert sender.pid is not None
        try:
            receive(folder, args, ours, sender.pid)
        finally:
            sender.kill()
            sender.join()
    os._exit(0)  # the bare group, whose other end was killed, would wait for it


if __name__ == "__main__":
    main()

"""Weights between two hosts on the CPU, mutual TLS on: ours against four plain TLS streams.

    python benchmarks/wire.py [--megabytes 1200] [--rounds 5] [--json FILE]
    python benchmarks/wire.py --generators 4 [--megabytes 300] [--rounds 5]
    python benchmarks/wire.py --changes [--json FILE]

With --changes: what share of the bytes is sent in steps 20 to 40 of a small Qwen3 from random weights, bfloat16 out of
float32 masters, AdamW at 1e-6, where only what changed is; each version is compared bit by bit. One process, no wire.

As root: it makes two network namespaces, each a host with a Monarch worker. The model is bfloat16 and changes wholly
every round. A round brings it over by ``plain`` (four streams of Python's ssl, from a buffer into a buffer), by
``streams`` (what generators use) and by ``messages`` (TorchStore's volumes, the way of last resort, and the only one
before there were streams), one after the other. Seconds are from the trainer's weights to the reader's memory, copies
included; connections and memory are warm, but for ``messages``, which keeps none. Medians in MB/s (10^6 bytes), ratios.
With --generators: until so many generators of a host have a version, by receivers that they share (what a run does)
and by some each, in turns, and the bytes that crossed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from monarch.actor import Actor, default_bootstrap_cmd, endpoint
from rows import row

from forge_hpc.cluster.identity import make_job_identity, tls_environment
from forge_hpc.cluster.meshes import attach
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.weights import Offer, Part, RemoteReader, Served, Snapshots, StoreSpec, WeightStore, publish, pull
from forge_hpc.wire.changes import apply
from forge_hpc.wire.messages import ANSWER, PIECE_BYTES
from forge_hpc.wire.server import Server
from forge_hpc.wire.tls import Certificates, prepare

ADDRESSES = ("198.18.7.1", "198.18.7.2")  # of the range that is set aside for benchmarks
NUM_PLAIN = 4


def certificates() -> Certificates:
    found = Certificates.from_environment()
    assert found is not None
    return found


# ---- the limit: four plain streams, a process on each side


def plain_send(num_bytes: int) -> None:
    """Print the port; whenever a byte comes on a stream, send its share of the buffer."""
    data, context = memoryview(bytearray(os.urandom(1 << 20)) * (num_bytes >> 20)), certificates().server()
    listener = socket.create_server((ADDRESSES[0], 0))
    print(listener.getsockname()[1], flush=True)

    def serve(connection: socket.socket) -> None:
        prepare(connection)
        with context.wrap_socket(connection, server_side=True) as stream:
            while place := stream.recv(1):
                share = len(data) // NUM_PLAIN
                stream.sendall(data[place[0] * share : (place[0] + 1) * share])

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()  # until the owner has ended


def plain_receive(num_bytes: int, port: int) -> None:
    """For each line of the standard input print how many seconds all shares took."""
    data, context = memoryview(bytearray(b"\1") * (num_bytes >> 20 << 20)), certificates().client()
    share, streams = len(data) // NUM_PLAIN, []
    for _ in range(NUM_PLAIN):
        connection = socket.create_connection((ADDRESSES[0], port))
        prepare(connection)
        streams.append(context.wrap_socket(connection, server_hostname=ADDRESSES[0]))

    def fetch(place: int) -> None:
        streams[place].sendall(bytes([place]))
        view = data[place * share : (place + 1) * share]
        while view:
            view = view[streams[place].recv_into(view) :]

    for _ in sys.stdin:
        start = time.perf_counter()
        threads = [threading.Thread(target=fetch, args=(place,)) for place in range(NUM_PLAIN)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(time.perf_counter() - start, flush=True)


class Plain(Actor):
    """Owns the process of one side."""

    @endpoint
    async def start(self, *args: str) -> str:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        return self.answers.readline() if args[0] == "--plain-send" else ""

    @endpoint
    async def fetch(self) -> float:
        self.requests.write("\n")
        self.requests.flush()
        return float(await asyncio.to_thread(self.answers.readline))

    @endpoint
    async def end(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- ours


class Trainer(Actor):
    @endpoint
    async def build(self, num_bytes: int, changes: bool) -> None:
        self.weights = {f"w{i}": torch.randn(num_bytes // 2 // 100).bfloat16() for i in range(100)}
        self.snapshots = Snapshots(0, torch.bfloat16, torch.device("cpu"), 1 << 24, keeps_previous=changes)
        self.server = Server(Served(self.snapshots, changes), ADDRESSES[0], certificates())
        self.snapshots.address = self.server.address

    @endpoint
    async def offer(self, version: int) -> tuple[Part, float]:
        for tensor in self.weights.values():
            tensor.add_(1)
        start = time.perf_counter()
        part = self.snapshots.take(version, lambda: self.weights, self.weights.values(), with_checksum=version == 0)
        assert part is not None
        return part, time.perf_counter() - start

    @endpoint
    async def publish(self, spec: StoreSpec, version: int) -> None:
        await publish(spec, version, self.weights, rank=0)


class Generator(Actor):
    def __init__(self, meeting: Path | None = None) -> None:
        self.reader, self.shared = RemoteReader(certificates()), RemoteReader(certificates(), meeting)

    @endpoint
    async def receive(self, offer: Offer) -> float:
        start = time.perf_counter()
        await asyncio.to_thread(self.reader.receive, offer)
        return time.perf_counter() - start

    @endpoint
    async def bring(self, offer: Offer, shared: bool) -> int:
        """How many bytes came."""
        reader = self.shared if shared else self.reader
        _, num_bytes = await asyncio.to_thread(reader.receive, offer)
        reader.has_read()
        return num_bytes

    @endpoint
    async def pull(self, spec: StoreSpec, version: int) -> float:
        start = time.perf_counter()
        await pull(spec, version)
        return time.perf_counter() - start

    @endpoint
    async def end(self) -> None:
        self.reader.close()
        self.shared.close()


def spawn(hosts: Any, host: int, name: str, actor: Any, *args: Any, num: int = 1) -> Any:
    """So many processes on a host, with an actor each."""
    folders = os.pathsep.join([str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)])
    command = default_bootstrap_cmd().with_env({"OMP_NUM_THREADS": "2", "PYTHONPATH": folders})
    procs = hosts.slice(hosts=slice(host, host + 1)).spawn_procs(
        per_host={"procs": num}, name=f"{name}s", bootstrap_command=command
    )
    return procs if actor is None else procs.spawn(name, actor, *args)


async def measure_sharing(args: argparse.Namespace, workers: list[str], meeting: Path) -> None:
    """Several generators of a host, by a receiver that they share and by one each."""
    hosts = await attach(workers, ADDRESSES[0], 120)
    trainer = spawn(hosts, 0, "trainer", Trainer)
    generators = spawn(hosts, 1, "generator", Generator, meeting, num=args.generators)
    num_bytes = args.megabytes * 10**6
    await trainer.build.call_one(num_bytes, False)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    crossed: dict[bool, float] = {}
    for version in range(args.rounds + 1):
        part, _ = await trainer.offer.call_one(version)
        for shared, found in seconds.items():
            start = time.perf_counter()
            brought = await generators.bring.call(Offer.of([part]), shared)
            found.append(time.perf_counter() - start)
            crossed[shared] = sum(each for _, each in brought) / num_bytes
    (shared_s, alone_s) = (statistics.median(found[1:]) for found in seconds.values())
    print(f"{args.megabytes} MB to {args.generators} generators of a host, {os.cpu_count()} cores for both hosts")
    print(
        f"shared {shared_s:.2f} s, {crossed[True]:.2f} versions cross; each alone {alone_s:.2f} s, {crossed[False]:.2f}"
    )
    row(f"a version to {args.generators} generators of a host: by a receiver each ÷ shared", alone_s, shared_s,
        unit="s", peer="shared", note=f"{crossed[True]:.2f} and {crossed[False]:.2f} versions cross")  # fmt: skip
    await generators.end.call()
    await hosts.shutdown()


async def measure(args: argparse.Namespace, workers: list[str]) -> None:
    hosts = await attach(workers, ADDRESSES[0], 120)
    sender, receiver = spawn(hosts, 0, "plain0", Plain), spawn(hosts, 1, "plain1", Plain)
    trainer, generator = spawn(hosts, 0, "trainer", Trainer), spawn(hosts, 1, "generator", Generator)
    num_bytes = args.megabytes * 10**6
    port = await sender.start.call_one("--plain-send", str(num_bytes))
    await receiver.start.call_one("--plain-receive", str(num_bytes), port.strip())
    await trainer.build.call_one(num_bytes, False)
    store = await WeightStore.start(spawn(hosts, 0, "volume", None), 1, keep=1)
    seconds: dict[str, list[float]] = {"plain": [], "messages": [], "streams": []}
    for version in range(args.rounds + 1):
        part, snapshot_s = await trainer.offer.call_one(version)
        seconds["plain"].append(await receiver.fetch.call_one())
        seconds["streams"].append(snapshot_s + await generator.receive.call_one(Offer.of([part])))
        start = time.perf_counter()
        await trainer.publish.call_one(store.spec, version)
        await store.commit(version)
        stored_s = time.perf_counter() - start
        seconds["messages"].append(stored_s + await generator.pull.call_one(store.spec, version))
        print({way: round(found[-1], 3) for way, found in seconds.items()}, flush=True)
    rates = {way: num_bytes / 1e6 / statistics.median(found[1:]) for way, found in seconds.items()}
    print(f"{args.megabytes} MB, {os.cpu_count()} cores for both hosts, median of {args.rounds}")
    for way, rate in rates.items():
        ratio = f"{rate / rates['plain']:6.2f} of plain, {rate / rates['messages']:6.1f} times messages"
        print(f"{way:10}{rate:8.0f} MB/s {ratio}")
    row("weights between hosts", rates["streams"], rates["plain"], target=0.8, unit="MB/s", peer="plain streams")
    most = rates["plain"] / rates["messages"]
    known = f"plain streams are {most:.1f} times the messages" if rates["streams"] >= 0.8 * rates["plain"] else ""
    row("weights between hosts", rates["streams"], rates["messages"], target=5, unit="MB/s", peer="messages",
        known=known)  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps({"megabytes": args.megabytes, "seconds": seconds, "mb_per_s": rates}, indent=1))
    await asyncio.gather(sender.end.call_one(), receiver.end.call_one(), generator.end.call_one())
    await hosts.shutdown()


# ---- what changes in a step


def measure_changes(json_file: Path | None) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 32}
    shape |= {"vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    snapshots = Snapshots(0, torch.bfloat16, torch.device("cpu"), 1 << 24, keeps_previous=True)
    served, shares, held = Served(snapshots, sends_changes=True), [], torch.Tensor()
    tokens = torch.randint(0, 2048, (41, 8, 65)).cumsum(-1) % 8192  # not all alike, something to learn
    for step in range(41):
        loss = model(input_ids=tokens[step], labels=tokens[step]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        part = snapshots.take(step, lambda: dict(model.state_dict()), model.parameters())
        assert part is not None
        size, found = part.place.handle.num_bytes, snapshots.find(step)
        assert found is not None
        if step:
            num_bytes = 0
            for start in range(0, size, PIECE_BYTES):
                stop = min(start + PIECE_BYTES, size)
                if (encoded := served.changes(step - 1, step, start, stop)) is None:
                    held[start:stop] = found[1][start:stop]
                else:
                    apply(held[start:stop].view(torch.int16).numpy(), encoded)
                num_bytes += (stop - start if encoded is None else len(encoded)) + ANSWER.size + 1
            assert torch.equal(held, found[1])
            shares.append(num_bytes / size)
        held = found[1].clone()
    share = statistics.median(shares[19:])
    print(f"{size / 1e6:.1f} MB, steps 20 to 40: {share:.4f} of the bytes (step 1: {shares[0]:.4f}), bitwise the same")
    row("bytes of changed weights ÷ all", share, target=0.05, better="less")
    if json_file is not None:
        json_file.write_text(json.dumps({"num_bytes": size, "shares": shares, "median": share}, indent=1))


# ---- two hosts


@contextlib.contextmanager
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable. The kernel ends them with the last process in them."""
    names = [f"wire{secrets.token_hex(2)}{side}" for side in "ab"]

    def ip(*command: str) -> None:
        subprocess.run(["ip", *command], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def run_on_two_hosts(arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="forge-hpc-wire-") as folder, namespaces() as names:
        make_job_identity(Path(folder) / "tls", [*ADDRESSES, "localhost", "127.0.0.1"])
        environment = {**os.environ, **tls_environment(Path(folder) / "tls")}
        rendezvous = Rendezvous(Path(folder) / "rendezvous")
        workers = []
        try:
            for node, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
                rename = f'echo {name} > /proc/sys/kernel/hostname; exec "$@"'  # memory is not shared between hosts
                command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", rename, "sh"]
                command += [sys.executable, "-m", "forge_hpc.cluster.worker"]
                command += ["--rendezvous", str(rendezvous.directory), "--node", str(node)]
                command += ["--address", address, "--parent", str(os.getpid())]
                workers.append(subprocess.Popen(command, env=environment))
            found = [record["address"] for record in rendezvous.wait(["worker-0", "worker-1"], 120)]
            command = ["ip", "netns", "exec", names[0], sys.executable, __file__, *arguments]
            subprocess.run([*command, "--workers", *found, "--meeting", folder], env=environment, check=True)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Weights between two hosts on the CPU.")
    parser.add_argument("--megabytes", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--changes", action="store_true")
    parser.add_argument("--generators", type=int, default=1, help="of a host, that share what comes")
    parser.add_argument("--workers", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain-send", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--plain-receive", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain_send is not None:
        plain_send(args.plain_send)
    elif args.plain_receive is not None:
        plain_receive(*args.plain_receive)
    elif args.changes:
        measure_changes(args.json)
    elif args.workers is not None and args.generators > 1:
        asyncio.run(measure_sharing(args, args.workers, args.meeting))
    elif args.workers is not None:
        asyncio.run(measure(args, args.workers))
    else:
        run_on_two_hosts(sys.argv[1:])


if __name__ == "__main__":
    # The processes import this file by its name.
    folders = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = folders
    import wire

    wire.main()

"""What each node costs the controller: CPU time of attaching to the workers of many hosts, and of a call to all ranks.

    python benchmarks/hosts.py [--hosts 16 64 128] [--calls 20] [--megabytes 1]

Every emulated host is a worker of the cluster (`python -m forge_hpc.cluster.worker`, some 100 MB) at an address of its
own on loopback, with the certificates of a job; on each the controller starts one process with an actor, and asks all
of them at once as it asks trainers, with nothing to say and with documents of a step (9 bytes a token). CPU time is
that of the controller's process with all its threads. Starting processes takes the machine's cores, so its seconds are
those of this machine, and only their slope says something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rows import PROJECT, row

sys.path.insert(0, str(PROJECT))

import numpy as np
from monarch.actor import Actor, endpoint

from forge_hpc.actors.errors import collective
from forge_hpc.cluster.identity import make_job_identity, tls_environment
from forge_hpc.cluster.meshes import attach
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.controller.ranks import Ranks

TARGETS_MS = {"attach": 5.0, "call": 1.0}


class Rank(Actor):
    @endpoint
    @collective
    async def number(self) -> int:
        return os.getpid()

    @endpoint
    @collective
    async def take(self, documents: np.ndarray) -> int:
        return len(documents)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def control(addresses: list[str], num_calls: int, megabytes: float) -> dict[str, float]:
    """CPU time and seconds of each, the controller being this process."""
    found: dict[str, float] = {}

    def note(name: str, start: tuple[float, float]) -> None:
        found[f"{name}_cpu"], found[f"{name}_s"] = cpu_s() - start[0], time.perf_counter() - start[1]

    start = cpu_s(), time.perf_counter()
    hosts = await attach(addresses, "127.0.0.1", 600)
    note("attach", start)
    start = cpu_s(), time.perf_counter()
    procs = hosts.spawn_procs(per_host={"procs": 1}, name="rank")
    ranks = Ranks(procs.spawn("rank", Rank), "the ranks", asyncio.get_running_loop().create_future())
    pids = await ranks.ask("number", timeout_s=600)
    assert len(set(pids)) == len(addresses)
    note("spawn", start)
    documents = np.zeros(int(megabytes * 10**6), np.uint8)
    for name, endpoint_name, args in (("call", "number", ()), ("documents", "take", (documents,))):
        each: list[tuple[float, float]] = []
        for _ in range(num_calls):
            start = cpu_s(), time.perf_counter()
            await ranks.ask(endpoint_name, *args, timeout_s=600)
            each.append((cpu_s() - start[0], time.perf_counter() - start[1]))
        found[f"{name}_cpu"], found[f"{name}_s"] = (statistics.median(values) for values in zip(*each, strict=True))
    await hosts.shutdown()
    return found


@contextmanager
def workers(num: int, directory: Path) -> Iterator[list[str]]:
    """Addresses of so many, which end with this."""
    rendezvous = Rendezvous(directory / "rendezvous")
    env = {**os.environ, **tls_environment(directory / "tls"), "MONARCH_TOKIO_WORKER_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "forge_hpc.cluster.worker", "--rendezvous", str(rendezvous.directory)]
    processes = [
        subprocess.Popen(
            [*command, "--node", str(n), "--address", f"127.0.1.{n + 1}", "--parent", str(os.getpid())],
            env=env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for n in range(num)
    ]
    try:
        yield [each["address"] for each in rendezvous.wait([f"worker-{n}" for n in range(num)], 600)]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def measure(num: int, num_calls: int, megabytes: float) -> dict[str, float]:
    return controlled(num, __file__, "--calls", str(num_calls), "--megabytes", str(megabytes))


def controlled(num: int, script: str, *arguments: str) -> dict[str, float]:
    """What a script prints at last, as JSON, that controls so many hosts: it gets their addresses as ``--control``."""
    with tempfile.TemporaryDirectory(prefix="forge-hpc-hosts-") as name:
        directory = Path(name)
        make_job_identity(directory / "tls", ["127.0.0.1", *(f"127.0.1.{n + 1}" for n in range(num))])
        with workers(num, directory) as addresses:
            command = [sys.executable, script, "--control", *addresses, *arguments]
            env = {**os.environ, **tls_environment(directory / "tls")}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="*", default=[16, 64, 128])
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--megabytes", type=float, default=1.0, help="of documents")
    parser.add_argument("--control", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.control:
        print(json.dumps(asyncio.run(control(args.control, args.calls, args.megabytes))))
        return
    for num in args.hosts:
        found = measure(num, args.calls, args.megabytes)
        print(json.dumps({"hosts": num} | {name: round(value, 4) for name, value in found.items()}), flush=True)
        for name, target in TARGETS_MS.items():
            row(f"controller, {num} hosts: {name}, CPU time a host", 1000 * found[f"{name}_cpu"] / num, target=target,
                better="less", unit="ms", note=f"{1000 * found[f'{name}_s']:.0f} ms in all")  # fmt: skip


if __name__ == "__main__":
    main()

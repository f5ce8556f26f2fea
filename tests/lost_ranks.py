"""Four trainer ranks on two hosts, one of which is killed while the others wait for it: how long the rest lives on.

    python tests/lost_ranks.py RANK

Run by itself, since hosts are attached to before anything else is done with Monarch; prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from failing_actor import Failing

from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.meshes import Cluster
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config.split import Placement

NUM_HOSTS = NUM_RANKS = 2
WORKER = "import sys; from monarch.actor import run_worker_loop_forever as run; "
WORKER += "run(ca='trust_all_connections', address=sys.argv[1])"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def scenario(addresses: list[str], killed: int, directory: Path) -> dict[str, Any]:
    from monarch.actor import attach_to_workers, enable_transport

    faults = Faults(Rendezvous(directory))
    enable_transport("tcp://127.0.0.1:0")
    hosts = attach_to_workers(ca="trust_all_connections", workers=addresses)
    await asyncio.wait_for(hosts.initialized, 60)
    placement = Placement(range(NUM_HOSTS), range(0), range(0), 0, ((),) * NUM_RANKS, ())
    cluster = Cluster(hosts, placement, 2, [[]] * NUM_HOSTS, directory, faults)
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    faults.watch("trainer", lambda reason: lost.done() or lost.set_result(reason))
    procs = cluster.spawn_trainers("trainer")
    ranks: Any = procs.spawn("trainer", Failing)
    pids = [pid for _, pid in await asyncio.wait_for(ranks.pid.call(), 60)]
    ranks.wait_for_others.broadcast()
    os.kill(pids[killed], signal.SIGKILL)
    await asyncio.wait_for(lost, 60)
    faults.forget("trainer")
    cluster.end_at_once("trainer")
    start = time.monotonic()
    await asyncio.wait_for(procs.stop(), 60)
    seconds = time.monotonic() - start
    alive = [pid for pid in pids if psutil.pid_exists(pid)]
    return {
        "seconds": seconds,
        "alive": alive,
        "unexpected": faults.unexpected.result() if faults.unexpected.done() else None,
    }


def main() -> None:
    addresses = [f"tcp://127.0.0.1:{free_port()}" for _ in range(NUM_HOSTS)]
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, address]) for address in addresses]
    try:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(asyncio.run(scenario(addresses, int(sys.argv[1]), Path(name)))), flush=True)
    finally:
        for worker in workers:
            for process in [*psutil.Process(worker.pid).children(recursive=True), worker]:
                process.kill()
            worker.wait()
    os._exit(0)  # Monarch's threads wait for hosts that are gone


if __name__ == "__main__":
    main()

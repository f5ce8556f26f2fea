"""The Monarch worker of a node: ``python -m forge_hpc.cluster.worker --rendezvous DIR --node N --address A``.

It binds a port that the kernel chooses, publishes it, and serves until the controller shuts the host down. On a node
beside the controller's it also starts worker processes of rewards and environments (``workers.host``).
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from forge_hpc.cluster.processes import allow_open_files, die_with_parent, num_cpus
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.cluster.stacks import stand_by

ORDER = "CUDA_DEVICE_ORDER"


def listening_port(deadline_s: float = 30.0) -> int:
    """The TCP port that this process listens on. Raises RuntimeError if it opens none in time."""
    import psutil

    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        ports = [c.laddr.port for c in psutil.Process().net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
        if ports:
            return ports[0]
        time.sleep(0.02)
    raise RuntimeError("the Monarch worker opened no port")


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names by which CUDA_VISIBLE_DEVICES calls this node's GPUs. No CUDA library is loaded for it.

    Slurm sets the variable to what the job may use; where it is not set, all GPUs that the driver lists are visible.
    Numbers are the driver's (``gpu_order``).
    """
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1", "NoDevFiles")]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(driver.iterdir())] if driver.is_dir() else []


def gpu_order(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for processes that may load CUDA: it numbers GPUs by their PCI bus then, as NVML and Slurm do, so that
    a number in CUDA_VISIBLE_DEVICES is the same GPU to all. By itself it begins with the fastest one. Whoever has set
    the order keeps it (``other_order``)."""
    return {ORDER: environ.get(ORDER) or "PCI_BUS_ID"}


def other_order(gpus: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """The user's own order of GPUs, where these are named by numbers, which mean others to NVML then; else empty."""
    order = gpu_order(environ)[ORDER]
    return order if order != "PCI_BUS_ID" and any(name.isdecimal() for name in gpus) else ""


def worker_host(address: str) -> tuple[str, int] | None:
    """Where this node starts worker processes from now on; None where the job has no certificates."""
    from forge_hpc.wire.tls import Certificates
    from forge_hpc.workers.host import WorkerHost

    certificates = Certificates.from_environment()
    return None if certificates is None else (address, WorkerHost(address, certificates).port)


def main(argv: list[str] | None = None) -> None:
    """Serve this node until the controller shuts it down; never returns before."""
    parser = argparse.ArgumentParser(description="Monarch worker loop of one node.")
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--processes", action="store_true", help="start worker processes for the controller")
    args = parser.parse_args(argv)
    die_with_parent(args.parent)
    allow_open_files()
    stand_by(f"worker-{args.node}")

    from monarch.actor import enable_transport, start_worker_loop_forever

    endpoint = f"tls://{args.address}:0"
    enable_transport(endpoint)
    # "trust_all_connections" is the only value that Monarch 0.7.0 takes; with tls:// addresses both ends are
    # authenticated by the certificates that HYPERACTOR_TLS_* name.
    loop = start_worker_loop_forever(address=endpoint, ca="trust_all_connections")
    record = {
        "host": socket.gethostname(),
        "address": f"tls://{args.address}:{listening_port()}",
        "cpus": num_cpus(),
        "gpus": visible_gpus(),
        "processes": worker_host(args.address) if args.processes else None,  # after Monarch, whose port is the only one
    }
    Rendezvous(args.rendezvous).publish(f"worker-{args.node}", record)
    loop.get()


if __name__ == "__main__":
    main()

"""What this node knows of its allocation, read from Slurm's environment or, outside Slurm, one node alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """This process's place among the nodes of a job."""

    job_id: str
    """Slurm's job id, or ``local``."""
    node_id: int
    """0 is the first node: it holds the controller."""
    num_nodes: int
    requeues: int
    """How often Slurm has started this job again."""

    @property
    def in_slurm(self) -> bool:
        return self.job_id != "local"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Allocation:
        """One task a node is assumed, as the job scripts ask for it."""
        if "SLURM_PROCID" not in environ or "SLURM_JOB_ID" not in environ:
            return cls(job_id="local", node_id=0, num_nodes=1, requeues=0)
        return cls(
            job_id=environ["SLURM_JOB_ID"],
            node_id=int(environ["SLURM_PROCID"]),
            num_nodes=int(environ.get("SLURM_NTASKS", "1")),
            requeues=int(environ.get("SLURM_RESTART_COUNT", "0")),
        )


def host_address(num_nodes: int, environ: Mapping[str, str] = os.environ) -> str:
    """The address by which the other nodes reach this one: loopback where there are none.

    A host name that resolves to loopback on its own host (Debian's habit) is no use to others; then the interface
    that routes to the node that launched the job is taken.
    """
    if num_nodes == 1:
        return "127.0.0.1"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return address
    peer = environ.get("SLURM_LAUNCH_NODE_IPADDR", "192.0.2.1")  # TEST-NET-1: no packet is sent, only a route looked up
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The network interface that has ``address``. Raises OSError where none has."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise OSError(f"no network interface has the address {address}")

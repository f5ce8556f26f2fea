"""What this node knows of its allocation, read from Slurm's environment or, outside Slurm, one node alone."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from forge_hpc.slurm import own_job_id


@dataclass(frozen=True)
class Allocation:
    """This process's place among the nodes of a job."""

    job_id: str
    """What names the job to Slurm, ``ARRAY_TASK`` for a task of an array; or ``local``."""
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
        """One task a node is assumed, as the job scripts ask for it; they unset SLURM_NTASKS in the batch shell."""
        if "SLURM_PROCID" not in environ or "SLURM_JOB_ID" not in environ:
            return cls(job_id="local", node_id=0, num_nodes=1, requeues=0)
        return cls(
            job_id=own_job_id(environ) or "",
            node_id=int(environ["SLURM_PROCID"]),
            num_nodes=int(environ.get("SLURM_NTASKS") or environ.get("SLURM_JOB_NUM_NODES", "1")),
            requeues=int(environ.get("SLURM_RESTART_COUNT", "0")),
        )


def host_address(num_nodes: int, environ: Mapping[str, str] = os.environ) -> str:
    """The address by which the other nodes reach this one: loopback where there are none.

    A host name that resolves to loopback on its own host (Debian's habit) is no use to others; then the interface
    that routes to the node that launched the job is taken, else the one with the default route, else any.

    Raises:
        OSError: the host has no address but loopback.
    """
    if num_nodes == 1:
        return "127.0.0.1"
    with contextlib.suppress(OSError):
        if not (address := socket.gethostbyname(socket.gethostname())).startswith("127."):
            return address
    for peer in (environ.get("SLURM_LAUNCH_NODE_IPADDR"), "192.0.2.1"):  # TEST-NET-1
        if peer and (source := _source_address(peer)) is not None:
            return source
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = [e.address for name, entries in psutil.net_if_addrs().items() if name in up for e in entries
                 if e.family == socket.AF_INET]  # fmt: skip
    for address in addresses:
        if not address.startswith(("127.", "169.254.")):
            return address
    raise OSError(f"{socket.gethostname()} has no address by which other nodes reach it: only loopback")


def run_address(num_nodes: int, takes_lent: bool) -> str:
    """The address that a node of a run listens on: as ``host_address``, but where other jobs may lend the run nodes
    (``joining``) one by which they reach it, if the host has any.

    Raises:
        OSError: of several nodes, this one has no address but loopback.
    """
    if num_nodes == 1 and takes_lent:
        with contextlib.suppress(OSError):
            return host_address(2)
    return host_address(num_nodes)


def _source_address(peer: str) -> str | None:
    """The address from which this host would send to ``peer``; None where it has no route, or only loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))  # no packet is sent, only a route looked up
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def interface_of(address: str) -> str:
    """The network interface that has ``address``. Raises OSError where none has."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise OSError(f"no network interface has the address {address}")

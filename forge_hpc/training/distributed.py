"""Starting torch.distributed for the trainer: no listening store, loopback where one host suffices."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from forge_hpc.models.device import device_type, dist_backend, local_device

EAGER_RANKS = 64
"""Gloo connects all of so many ranks with all at once. Of more that would be W * W looks at a file of a shared disk,
and W open connections in each process."""


def init_distributed(
    store_path: Path, rank: int, world_size: int, local_rank: int, *, timeout_s: float = 1800.0
) -> None:
    """Join the trainer's process group.

    Ranks meet through a FileStore, since a TCPStore would take commands from anyone who reaches its port. Each says on
    which host it runs; where all share one, gloo is bound to loopback.

    Args:
        store_path: file on a file system that all ranks share; new for each start of the trainer.
        local_rank: place among the ranks of this host; picks the CUDA device.
        timeout_s: a collective that waits longer has lost a rank; it raises. (Of more than ``EAGER_RANKS`` ranks gloo
            connects those that speak to each other when they first do, and does not raise for one that died before.)
    """
    timeout = timedelta(seconds=timeout_s)
    os.environ["LOCAL_RANK"] = str(local_rank)  # torchtitan and torch read the local rank here
    store = dist.FileStore(str(store_path), world_size)
    store.set_timeout(timeout)
    store.set(f"host/{rank}", socket.gethostname())
    if rank == 0:  # each look into the file is some operations of the file system: W, not W * W of them
        store.set("hosts", json.dumps([store.get(f"host/{other}").decode() for other in range(world_size)]))
    hosts = json.loads(store.get("hosts"))
    os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(hosts[rank]))
    if len(set(hosts)) == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the only way to tell all of gloo's groups
    if world_size > EAGER_RANKS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    device = local_device()
    if device_type() == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        dist_backend(), store=dist.PrefixStore("trainer", store), rank=rank, world_size=world_size, timeout=timeout
    )

"""A Slurm cluster whose nodes claim to have GPUs: Slurm gives them out, nobody uses them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from slurm_cluster import SlurmCluster


class GpuCluster(SlurmCluster):
    """Nodes of four GPUs, of which each may be shared."""

    def __init__(self, nodes: int = 4) -> None:
        super().__init__(nodes, options={"GresTypes": "gpu,shard", "MCSPlugin": "mcs/user"})

    def _write_conf(self, munge_socket: Path, port: int) -> None:
        super()._write_conf(munge_socket, port)
        more = " Gres=gpu:h100:4,shard:16 TmpDisk=100 State=UNKNOWN"
        self.conf.write_text(self.conf.read_text().replace(" State=UNKNOWN", more))
        for number in range(4):
            if not (device := self.state / f"gpu{number}").exists():
                os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        gpus = f"Name=gpu Type=h100 File={self.state}/gpu[0-3]\nName=shard Count=16\n"
        (self.state / "gres.conf").write_text(gpus)

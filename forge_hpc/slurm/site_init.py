"""A site profile from what Slurm, and the shell, say of this cluster: ``forge-hpc site init``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_hpc.config import UserError
from forge_hpc.container.runtimes import binary as container_binary
from forge_hpc.sizing.gpus import gpu_named
from forge_hpc.slurm.accounts import associations
from forge_hpc.slurm.client import SlurmRefused, ask, at_a_terminal
from forge_hpc.slurm.facts import word
from forge_hpc.slurm.partitions import Partition, partitions

_DAY_S = 86400


@dataclass(frozen=True)
class Findings:
    """What was found of a cluster."""

    cluster: str
    known: tuple[Partition, ...]
    partition: Partition
    accounts: tuple[str, ...]
    takes_gpus_per_node: bool
    local_disk: str
    interfaces: tuple[str, ...]
    """Fast networks of this machine, which compute nodes may have by the same names."""
    modules: tuple[str, ...]
    containers: str | None = None
    """The runtime that ``slurm.container`` would name here."""


def find(partition: str | None = None, environ: Mapping[str, str] = os.environ) -> Findings:
    """Ask Slurm.

    Args:
        partition: the one to use; by default $SBATCH_PARTITION, else the default one, or where that has no GPUs the one
            with most.

    Raises:
        UserError: there is no Slurm here, or no such partition.
    """
    with at_a_terminal("site init asks Slurm: call it on a login node of the cluster"):
        said = ask("scontrol", "show", "config")
    known = partitions()
    loaded = filter(None, environ.get("LOADEDMODULES", "").split(":"))
    return Findings(
        word(said, "ClusterName") or "cluster",
        tuple(known),
        _choose(known, partition or environ.get("SBATCH_PARTITION")),
        tuple(dict.fromkeys(each.account for each in associations())),
        word(said, "SelectType") not in ("select/cons_res", "select/linear"),
        word(said, "TmpFS") or "/tmp",
        tuple(sorted(p.name for p in Path("/sys/class/net").glob("*") if p.name.startswith(("ib", "hsn")))),
        tuple(loaded),
        _containers(),
    )


def _containers() -> str | None:
    with contextlib.suppress(SlurmRefused):
        if "--container-image" in ask("srun", "--help"):
            return "pyxis"
    return "apptainer" if container_binary() is not None else None


def _choose(known: Sequence[Partition], name: str | None) -> Partition:
    names = ", ".join(p.name for p in known)
    if name is not None:
        for partition in known:
            if partition.name == name:
                return partition
        raise UserError(f"no partition {name}", f"there are: {names or 'none'}")
    if not known:
        raise UserError("this cluster has no partition that you may use", "ask the site")
    first = next((p for p in known if p.is_default), known[0])
    return first if _gpus(first) else max(known, key=_gpus)


def _gpus(partition: Partition) -> int:
    return sum(kind.gpus * kind.nodes for kind in partition.kinds)


def profile(found: Findings) -> str:
    """The text of a site profile; what could only be guessed is commented out."""
    return "\n".join([*_lines(found), ""])


def _lines(found: Findings) -> Iterator[str]:
    chosen = found.partition
    kinds = [kind for kind in chosen.kinds if kind.gpus]
    gpus, types = min((kind.gpus for kind in kinds), default=0), {kind.gpu for kind in kinds}
    gpu = types.pop() if len(types) == 1 else ""
    features = sorted({feature for kind in chosen.kinds for feature in kind.features})
    yield f"# Cluster {found.cluster}: what is the same for every run here, by forge-hpc site init. Change it."
    yield "# It wins over configuration files, and loses to key=value. All keys: docs/configuration.md"
    yield "slurm:"
    yield "  # " + "; ".join(map(_described, found.known))
    yield f"  partition: {chosen.name}"
    if found.accounts:
        yield f"  account: {found.accounts[0]}" + (f" # or {', '.join(found.accounts[1:])}" * (len(found.accounts) > 1))
    else:
        yield "  # account: NAME"
    yield f"  # constraint: {'&'.join(features[:1]) or 'FEATURE'} # of: {', '.join(features) or 'none'}"
    if chosen.time_limit_s < _DAY_S:
        yield f'  time: "{int(chosen.time_limit_s) // 60}" # minutes, the most that {chosen.name} allows'
    if gpus and not found.takes_gpus_per_node:
        yield f"  gres: gpu:{gpu + ':' if gpu else ''}{gpus} # this Slurm takes no --gpus-per-node"
    yield "  requeue: auto # successor where the site forbids --requeue"
    setup = [f"module load {' '.join(found.modules)}"] if found.modules else []
    setup += [f"export NCCL_SOCKET_IFNAME={','.join(found.interfaces)}"] if found.interfaces else []
    setup += [f"export TMPDIR={found.local_disk}"] if found.local_disk != "/tmp" else []
    yield "  setup: # shell lines on each node, before the run" if setup else "  # setup: # shell lines on each node"
    yield from (f"    - {line}" for line in setup)
    yield "  #   - export HF_HOME=/shared/huggingface # a cache that all nodes read"
    yield "  #   - export GLOO_SOCKET_IFNAME=eth0 # only where hosts have names that lead to another network"
    yield "  # extra: {mail-type: END, mail-user: YOU, exclude: NODE} # any option of sbatch"
    yield "  # srun: [--mpi=none] # any option of srun"
    yield "  # script: /path/to/job.sh # your own job script, with @OPTIONS@ and @COMMAND@"
    if found.containers is not None:
        image = f"/shared/forge_hpc.{'sqsh' if found.containers == 'pyxis' else 'sif'}"
        yield f"  # container: {{runtime: {found.containers}, image: {image}}} # found here; see docs/containers.md"
    yield f"  # stage_environment: {found.local_disk} # for starts on many nodes: docs/staging.md"
    yield "cluster:"
    yield "  # offline: true # nodes reach no model hub: docs/offline.md"
    yield f"  gpus_per_node: {gpus}"
    if gpus:
        known = gpu_named(gpu)
        if known is not None and known.memory_gib:
            yield f"  gpu_memory_gib: {known.memory_gib:g} # {gpu}"
        else:
            yield "  # gpu_memory_gib: 80 # submit then says whether a model fits"
    yield "# sandbox: {runtime: apptainer, image: /images/python.sif} # where bubblewrap is not allowed"


def _described(partition: Partition) -> str:
    text = f"{partition.name}: {partition.nodes} nodes"
    if gpus := max((kind.gpus for kind in partition.kinds), default=0):
        types = ", ".join(sorted({kind.gpu for kind in partition.kinds if kind.gpu}))
        text += f" of {gpus} {types or 'GPUs'}"
    return text if partition.is_up else f"{text}, down"

"""What Slurm says of its partitions, and whether a job can ever run there: before it is queued."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass

from forge_hpc.config import Config, UserError, walltime_s
from forge_hpc.slurm.client import PATIENT_S, ask, at_a_terminal

_HINT = "try `sinfo`, or --cluster local"
_NO_CLUSTER = "configuration source"  # Slurm's commands are installed, but belong to no cluster


@dataclass(frozen=True)
class Kind:
    """Nodes of a partition that are alike."""

    nodes: int
    gpus: int
    """Of each node."""
    features: frozenset[str] = frozenset()
    gpu: str = ""
    """The GPUs' type, as ``gres:gpu:TYPE:8`` has it; empty where the site gives none, or several."""


@dataclass(frozen=True)
class Partition:
    """One partition, as `sinfo` lists it."""

    name: str
    is_default: bool
    is_up: bool
    time_limit_s: float
    """inf where there is none."""
    kinds: tuple[Kind, ...]
    max_nodes: float = math.inf
    """Of one job."""

    @property
    def nodes(self) -> int:
        return sum(kind.nodes for kind in self.kinds)

    @property
    def gpus_per_node(self) -> int:
        """Of the nodes that have the fewest; 0 where one has none."""
        return min((kind.gpus for kind in self.kinds), default=0)

    def gpus_on(self, nodes: int, constraint: str | None = None) -> int:
        """The most GPUs that so many nodes have each, among those with the features that ``constraint`` names; 0 where
        there are not so many nodes."""
        kinds = self._kinds(constraint)
        return max((kind.gpus for kind in kinds if self.nodes_with(kind.gpus, constraint) >= nodes), default=0)

    def nodes_with(self, gpus: int, constraint: str | None = None) -> int:
        """Nodes that have so many GPUs, or more."""
        return sum(kind.nodes for kind in self._kinds(constraint) if kind.gpus >= gpus)

    def _kinds(self, constraint: str | None) -> list[Kind]:
        """Alternatives and counts (``a|b``, ``[rack1*2]``) are Slurm's to judge: then all may do."""
        wanted = set((constraint or "").split("&"))
        named = all(re.fullmatch(r"[\w.-]+", feature) for feature in wanted)
        return [kind for kind in self.kinds if not named or wanted <= kind.features]


def slurm_is_here() -> bool:
    """Whether this machine belongs to a Slurm cluster: its commands are installed and configured."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return False
    try:
        with at_a_terminal(_HINT):
            ask("sinfo", "--noheader", timeout_s=PATIENT_S)
    except UserError as error:
        return _NO_CLUSTER not in error.message
    return True


def partitions() -> list[Partition]:
    """All partitions of the cluster. Raises UserError where Slurm does not answer."""
    with at_a_terminal(_HINT):
        answer = ask("sinfo", "--noheader", "--all", "--format=%P|%a|%D|%l|%s|%G|%f", timeout_s=PATIENT_S)
    found: dict[str, Partition] = {}
    for line in answer.splitlines():
        name, up, nodes, limit, size, gres, features = line.split("|", 6)  # one line for each kind of node
        is_default, name = name.endswith("*"), name.removesuffix("*")
        kind = Kind(int(nodes), _gpus(gres), frozenset(features.split(",")) - {"(null)"}, _gpu_type(gres))
        before = found[name].kinds if name in found else ()
        kinds = (*before, kind) if kind.nodes else before
        found[name] = Partition(name, is_default, up == "up", _limit_s(limit), kinds, _max_nodes(size))
    return list(found.values())


def candidates(cfg: Config, known: list[Partition]) -> list[Partition]:
    """The partitions that the job asks for: `slurm.partition` (one or several, by commas), else the default one.

    Raises:
        UserError: there is no such partition.
    """
    if cfg.slurm.partition is None:
        default = [p for p in known if p.is_default]
        if not default:
            names = ", ".join(p.name for p in known) or "none"
            raise UserError("this cluster has no default partition", f"set slurm.partition to one of: {names}")
        return default
    by_name = {p.name: p for p in known}
    for name in cfg.slurm.partition.split(","):
        if name not in by_name:
            raise UserError(f"slurm.partition: no partition {name}", f"there are: {', '.join(by_name) or 'none'}")
    return [by_name[name] for name in cfg.slurm.partition.split(",")]


def gpus_per_node(cfg: Config, known: list[Partition]) -> int | None:
    """GPUs on each of the nodes that the job asks for, wherever it may run; None where Slurm counts none."""
    found = [partition.gpus_on(cfg.cluster.nodes, cfg.slurm.constraint) for partition in candidates(cfg, known)]
    return min(found, default=0) or None


def gpu_types(cfg: Config, known: list[Partition]) -> set[str]:
    """Types of the GPUs that the job may get; "" among them for those that the site does not name."""
    kinds = [kind for partition in candidates(cfg, known) for kind in partition._kinds(cfg.slurm.constraint)]
    return {kind.gpu for kind in kinds if kind.gpus and kind.gpus >= (cfg.cluster.gpus_per_node or 1)}


def check_job(cfg: Config, known: list[Partition]) -> None:
    """Raise a UserError if no partition that the job asks for can ever run it."""
    reasons = [_misfit(cfg, partition) for partition in candidates(cfg, known)]
    if all(reasons):
        raise next(reason for reason in reasons if reason)


def _misfit(cfg: Config, partition: Partition) -> UserError | None:
    name, nodes, wanted_s = partition.name, cfg.cluster.nodes, walltime_s(cfg.slurm.time)
    if not partition.is_up:
        return UserError(f"partition {name} is down", "ask the site, or set slurm.partition")
    if partition.nodes < nodes:
        return UserError(
            f"{nodes} nodes asked for, partition {name} has {partition.nodes}",
            f"--nodes {partition.nodes} or fewer, or another slurm.partition",
        )
    if partition.max_nodes < nodes:
        return UserError(
            f"{nodes} nodes asked for, partition {name} allows {partition.max_nodes:g} to one job",
            f"--nodes {partition.max_nodes:g} or fewer, or another slurm.partition",
        )
    if (wanted_s or math.inf) > partition.time_limit_s:
        return UserError(
            f"slurm.time={cfg.slurm.time} is longer than partition {name} allows ({_clock(partition.time_limit_s)})",
            f"set slurm.time={_clock(partition.time_limit_s)} or less",
        )
    gpus, constraint = cfg.cluster.gpus_per_node or 0, cfg.slurm.constraint
    if (enough := partition.nodes_with(gpus, constraint)) < nodes:
        of = f"{gpus} GPUs" if gpus else f"slurm.constraint={constraint}"
        if gpus and constraint:
            of += f" and {constraint}"
        fitting = partition.gpus_on(nodes, constraint)
        hints = [f"cluster.gpus_per_node={fitting}"] * (0 < fitting < gpus) + [f"--nodes {enough}"] * (enough > 0)
        return UserError(
            f"{nodes} nodes with {of} asked for, partition {name} has {enough} of them",
            " or ".join([*hints, "another slurm.partition"]),
        )
    return None


def _gpus(gres: str) -> int:
    """GPUs in Slurm's list of generic resources, such as ``gpu:h100:8(S:0-1),nvme:1``."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres)
    return sum(map(int, counts))


def _gpu_type(gres: str) -> str:
    types = set(re.findall(r"(?:^|,)gpu:([^:,(]*[^:,(\d][^:,(]*):\d+", gres))
    return types.pop() if len(types) == 1 else ""


def _max_nodes(size: str) -> float:
    """Of ``sinfo``'s job sizes: ``1-infinite``, ``2-8``, ``4``."""
    most = size.rpartition("-")[2]
    return int(most) if most.isdigit() else math.inf


def _limit_s(text: str) -> float:
    return math.inf if text in ("infinite", "n/a") else walltime_s(text)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour:02d}:{minute:02d}:{second:02d}"

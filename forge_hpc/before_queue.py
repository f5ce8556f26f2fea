"""What can be known on the login node of a job that would not run: said before anything is queued.

What is certain is a UserError, what is likely a line of warning. Imports no torch.
"""

from __future__ import annotations

import math
import os
import re
import resource
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_hpc.config import Config, Placement, UserError, plan, walltime_s
from forge_hpc.config.recipes import named_paths, needs_of
from forge_hpc.config.sources import run_sources
from forge_hpc.container.problems import check_container
from forge_hpc.files import is_there
from forge_hpc.gate.memory import available_memory, memory_limit
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.gpus import Gpu, gpu_named
from forge_hpc.sizing.gpus_here import gpu_here, num_gpus_here
from forge_hpc.sizing.host import HostPlan, Room, plan_host, room_of
from forge_hpc.sizing.memory import MemoryPlan, plan_memory
from forge_hpc.sizing.model import ModelSize, model_size, sizes_with
from forge_hpc.sizing.table import host_table, split_table
from forge_hpc.slurm.accounts import check_account
from forge_hpc.slurm.client import PATIENT_S
from forge_hpc.slurm.job import job_facts
from forge_hpc.slurm.partitions import Partition, candidates, check_job, gpu_types
from forge_hpc.supervisor.lead import lead_s

_OWN_DISKS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_START_S = 180.0
"""From the start of a job to its first step, where it was not measured: what 0.6B took without caches."""


@dataclass(frozen=True)
class Outlook:
    """A job before it is queued: its split, its memory, and what will hardly work."""

    placement: Placement
    memory: MemoryPlan | None
    warnings: tuple[str, ...]
    host: HostPlan | None = None

    def table(self, prefix: str = "") -> str:
        """The split, with the memory of each GPU and of each node where it can be estimated."""
        lines = split_table(self.placement, self.memory) + host_table(self.host)
        return "\n".join(f"{prefix}{line}".rstrip() for line in lines)


def look_ahead(
    cfg: Config,
    run_dir: RunDir,
    known: Sequence[Partition],
    *,
    for_slurm: bool,
    here: bool = False,
    model: str | None = None,
) -> Outlook:
    """What can be said of the job of `cfg`.

    Args:
        known: the cluster's partitions.
        for_slurm: it goes to other machines.
        here: it has this machine's GPUs.
        model: the policy's model, where ``model.path`` is a warm start.

    Raises:
        UserError: the run directory cannot be written, a GPU or a node's memory is too small, or the container's image
            is not there.
    """
    check_writable(run_dir.path)
    placement = plan(cfg, num_gpus_here(cfg) if here else cfg.cluster.gpus_per_node)
    model, gpu = model or cfg.model.path, (gpu_here(cfg) if here else None) or gpu_of(cfg, known)
    memory = memory_of(cfg, placement, gpu, model)
    warnings = [] if memory is None else list(memory.warnings)
    rooms = memory_here() if here else (asked_memory(cfg) if for_slurm else None,)
    host, warnings_of_host = host_of(cfg, placement, model, *rooms)
    warnings += warnings_of_host
    warnings += _keys_that_are_not_set(cfg)
    if for_slurm:
        warnings += check_container(cfg)
        warnings += not_shared(cfg, run_dir)
        warnings += _first_checkpoint(cfg, run_dir, placement, gpu, model_size(model))
    else:
        warnings += _ends_long_processes()
    return Outlook(placement, memory, tuple(f"warning: {text}" for text in warnings), host)


def check_queue(cfg: Config, known: Sequence[Partition]) -> None:
    """Raise a UserError where no partition can ever run the job, or its account or QOS may not."""
    check_job(cfg, list(known))
    check_account(cfg, [partition.name for partition in candidates(cfg, list(known))])


def starts(cfg: Config, run_dir: RunDir, options: Sequence[str] = ()) -> str:
    """When Slurm would start the job, in a line; its id, which it has not yet, is JOB there.

    Args:
        options: of sbatch, besides the job's own.

    Raises:
        UserError: Slurm would refuse it.
    """
    from launchers.slurm import RunExecutor

    start = RunExecutor(cfg, run_dir.path, options).expected_start()
    if waits := starts_later(options):
        return waits  # Slurm 22.05 answers 6 hours from now for such, whatever they wait for
    return f"starts         {start}, as things are" if start else "starts         Slurm does not say when"


def starts_later(options: Sequence[str], job_id: str | None = None) -> str | None:
    """What a job with these options of sbatch waits for besides its nodes, in a line; None where that is nothing.

    Args:
        job_id: once it is queued. A time to begin is then said as Slurm has understood it, in local time: nobody sees
            later when ``now+2hours`` was asked for.
    """
    if "--hold" in options:
        return f"starts         when it is released: scontrol release {job_id or 'JOB'}"
    given = dict(option.split("=", 1) for option in options if "=" in option)
    if begin := given.get("--begin"):
        facts = job_facts(job_id, timeout_s=PATIENT_S) if job_id else None
        if facts is not None and facts.eligible_time is not None:
            begin = f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(facts.eligible_time))} ({begin})"
        return f"starts         not before {begin}"
    if jobs := given.get("--dependency", "").split(":")[1:]:
        named = f"jobs {', '.join(jobs)} have" if len(jobs) > 1 else f"job {jobs[0]} has"
        return f"starts         after {named} ended well"
    return None


def memory_of(cfg: Config, placement: Placement, gpu: Gpu | None, model: str) -> MemoryPlan | None:
    """The memory plan, where the memory of a GPU and the sizes of the models are known. Raises as ``plan_memory``."""
    gpu_gib = cfg.cluster.gpu_memory_gib or (gpu and gpu.memory_gib)
    return plan_memory(cfg, needs_of(cfg), placement, gpu_gib, sizes_with(model)) if gpu_gib else None


def host_of(
    cfg: Config, placement: Placement, model: str, room: Room | None, now: Room | None = None
) -> tuple[HostPlan | None, tuple[str, ...]]:
    """What the run keeps in the memory of its nodes, where it can be estimated, and what is to be said of it.

    Args:
        room: what a node may have of its memory; None: it is not known here.
        now: what is free of that.

    Raises:
        UserError: it is more than a node may have.
    """
    host = plan_host(cfg, needs_of(cfg), placement, sizes_with(model))
    if host is None or room is None:
        return host, ()
    said = []
    for nodes in host.alike().values():
        who = f"node {nodes[0]}" if len(nodes) == 1 else f"each of {len(nodes)} nodes"
        if (error := host.refusal(nodes[0], room, who)) is not None:
            raise error
        said.append(host.warning(nodes[0], now or room, who))
    return host, tuple(filter(None, said))


def memory_here() -> tuple[Room, Room]:
    """What a run may have of this machine's memory, and what is free of it."""
    return room_of(*memory_limit()), room_of(*memory_limit(), available_memory())


def asked_memory(cfg: Config) -> Room | None:
    """Memory of each node that the job asks Slurm for; None where that is all of it, or depends on more than the run
    knows: on the GPUs or cores that Slurm gives it."""
    given = {name: value for name, value in cfg.slurm.extra.items() if value not in (None, False)}  # as launchers do
    plain = {name.lstrip("-").replace("_", "-"): name for name in given}
    if plain.keys() & {"mem-per-gpu", "mem-per-cpu"}:
        return None
    written = plain.get("mem")
    key, text = ("slurm.mem", cfg.slurm.mem) if written is None else (f"slurm.extra.{written}", given[written])
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", str(text).upper())
    if found is None or not int(found[1]):
        return None
    num_bytes = int(found[1]) << {"K": 10, "M": 20, "": 20, "G": 30, "T": 40}[found[2]]
    return Room(num_bytes, f"{key}={text}", f"raise {key}")


def gpu_of(cfg: Config, known: Sequence[Partition]) -> Gpu | None:
    """The smallest GPU that the job may get, by the types that Slurm or the constraint names; None where one of them is
    not known."""
    if cfg.cluster.gpus_per_node == 0:
        return None
    names = (gpu_types(cfg, list(known)) if known else set()) or {""}
    if names == {""}:  # the site counts GPUs without a type, but nodes may have a feature
        names = {f"{cfg.slurm.constraint} {cfg.slurm.extra.get('gres')}"}
    found = [gpu_named(name) for name in names]
    gpus = [gpu for gpu in found if gpu is not None]
    return min(gpus, key=lambda gpu: gpu.memory_gib) if len(gpus) == len(found) else None


def check_writable(path: Path) -> None:
    """Raise a UserError unless the directory can be made, or written. It is tried, where permissions say less: a
    read-only or special file system, a full quota. Nothing stays."""
    there = next(folder for folder in (path, *path.parents) if is_there(folder))
    what = "run directory" if there == path else f"run directory {path}:"
    if not there.is_dir():
        raise UserError(f"{what} {there} is not a directory", "choose another --run-dir")
    try:
        Path(tempfile.mkdtemp(prefix=".forge-hpc-", dir=there)).rmdir()
    except OSError as error:
        raise UserError(f"{what} {there} cannot be written: {error.strerror}", "choose another --run-dir") from None


def _keys_that_are_not_set(cfg: Config) -> Iterator[str]:
    """Of judges. Not certain: what a job runs before the run may set them."""
    for run in run_sources(cfg):
        for reward in run.config.reward:
            name = reward.args.get("api_key_env")
            if isinstance(name, str) and name and not os.environ.get(name):
                yield f"the reward {reward.name} takes its key from the environment variable {name}, which is not set"


def not_shared(cfg: Config, run_dir: RunDir) -> Iterator[str]:
    """Paths on disks that are this machine's own. Not certain: a site may share /tmp."""
    named = {f"{key}=": Path(value) for key, value, rule in named_paths(cfg) if rule.path}
    for what, path in {"run directory ": run_dir.path, **named}.items():
        if any(path.is_relative_to(disk) for disk in _own_disks()):
            yield f"{what}{path} is on a disk of this machine: compute nodes see it only where your site shares it"


def _own_disks() -> set[str]:
    own = {os.environ.get("TMPDIR", ""), os.environ.get("XDG_RUNTIME_DIR", "")} - {"", "/"}
    return {*_OWN_DISKS, *own}


def _ends_long_processes() -> Iterator[str]:
    """A run in the foreground of a machine that is not meant for it."""
    limit_s, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if limit_s != resource.RLIM_INFINITY:
        yield f"this machine ends processes after {limit_s} s of CPU (ulimit -t), and the run is one: queue it instead"
    elif "SLURM_JOB_ID" not in os.environ and Path(os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf")).exists():
        yield "the run is a process of this machine: a login node may end it; --cluster slurm queues it"


def _first_checkpoint(
    cfg: Config, run_dir: RunDir, placement: Placement, gpu: Gpu | None, size: ModelSize | None
) -> Iterator[str]:
    """A job that is over before the first save of its schedule: a crash then takes all its work with it."""
    needs = needs_of(cfg)
    if not needs.trains:
        return
    step_s, source = measured_step_s(run_dir), "in the last start"
    if step_s is None and gpu is not None and size is not None and needs.learns_from == "samples":
        from forge_hpc.sizing.speed import estimated

        speed = estimated(cfg, size, gpu)
        step_s, source = speed.step_s(placement, needs, synchronous=cfg.rollout.max_staleness == 0)[0], "estimated"
    if step_s is None:
        return
    steps, interval, time = cfg.trainer.training.steps, cfg.checkpoint.interval, cfg.slurm.time
    until_s, left_s = (
        _START_S + min(interval or steps, steps) * step_s,
        (walltime_s(time) or math.inf) - lead_s(cfg, run_dir),
    )
    if until_s > left_s:
        yield (
            f"checkpoint.interval={interval} saves first after some {_span(until_s)} ({step_s:.1f} s a step, {source}) "
            f"and slurm.time={time} is over before: the job saves at its end alone, and a crash loses it all; "
            f"checkpoint.interval={max(1, int(left_s / 4 / step_s))} saves four times"
        )


def measured_step_s(run_dir: RunDir) -> float | None:
    """Median seconds of the last steps that the run has done; None where it has done none."""
    records = deque(read_jsonl(run_dir.metrics), maxlen=20)
    times = sorted(record["time/step_s"] for record in records if "time/step_s" in record)
    return times[len(times) // 2] if times else None


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"

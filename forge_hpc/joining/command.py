"""``forge-hpc join``: from a command line to a queued job that lends its nodes to a running run. No torch here.

What is certain not to work is said before anything is queued; the first node of the run looks again at each node.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass

from forge_hpc.config import Config, UserError, read_config
from forge_hpc.config.lending import check_takes_lent, lent_replicas
from forge_hpc.files import reading
from forge_hpc.gate.environment import differences, environment
from forge_hpc.joining.door import Door, open_door
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm.job import is_job_id

LEAD_S = 60
"""A lent node needs a second or two to leave; Slurm may send its warning up to a minute late, or early."""
_NOT_A_LENDERS = ("array", "begin", "dependency", "hold", "job-name", "nodelist", "output", "signal")
"""Options of sbatch in ``slurm.extra`` that are the run's alone."""


@dataclass(frozen=True)
class JoinRequest:
    """What a command line asks for."""

    run_dir: RunDir
    nodes: int = 1
    partition: str | None = None
    array: int | None = None
    """So many jobs of ``nodes`` nodes each."""
    at_once: int | None = None
    overrides: tuple[str, ...] = ()

    @property
    def tasks(self) -> str | None:
        """As sbatch has it: ``0-7%4``."""
        if self.array is None:
            return None
        return f"0-{self.array - 1}" + (f"%{self.at_once}" if self.at_once else "")


def join(request: JoinRequest, *, dry_run: bool = False) -> int:
    """Queue the job; the exit code for the shell.

    Raises:
        UserError: the run takes no nodes, or the job could not run; nothing is queued.
    """
    from launchers.slurm import LentExecutor

    cfg, warnings, generators = check_join(request)
    run_dir = request.run_dir
    executor = LentExecutor(cfg, run_dir.path, request.tasks)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if dry_run:
        print(executor.script())
        print("Dry run: nothing was created or queued.", file=sys.stderr)
        return 0
    starts = executor.expected_start()
    job_id = executor.submit_run()
    what = _count(request.nodes, "node") + (f" in each of {_count(request.array, 'job')}" if request.array else "")
    what = what if generators is None else f"{_count(generators, 'generator')} on {what}"
    print(f"{'job array' if request.array else 'job':<15}{job_id}")
    print(f"lends          {what} to {run_dir}")
    print(f"starts         {f'{starts}, as things are' if starts else 'Slurm does not say when'}")
    print(f"next           forge-hpc status {shlex.quote(str(run_dir))}")
    print(f"               forge-hpc cancel {job_id}", flush=True)
    return 0


def check_join(request: JoinRequest) -> tuple[Config, list[str], int | None]:
    """The job's configuration, what will hardly work, and how many generators a job lends; None where that
    is not known before it runs.

    Raises:
        UserError: as ``join``.
    """
    from forge_hpc.before_queue import check_queue, check_writable, not_shared
    from forge_hpc.slurm import partitions
    from launchers.slurm import check_array, check_share

    for name, value in (("--nodes", request.nodes), ("--array", request.array), ("--at-once", request.at_once)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}", "give 1 or more")
    if request.at_once is not None and request.array is None:
        raise UserError("--at-once is for the jobs of an --array", "leave it out")
    run_dir = request.run_dir
    _check_owner(run_dir)
    run = read_config(run_dir.config)
    check_takes_lent(run)
    found = _check_state(run_dir)
    if found is not None:
        _check_environment(found)
    if not partitions.slurm_is_here():
        raise UserError("there is no Slurm here", "join from a login node of the cluster that the run is on")
    cfg = _configuration(request, run_dir)
    known = tuple(partitions.partitions())
    check_share(cfg)
    check_array(cfg)
    if cfg.cluster.gpus_per_node is None:
        cfg.cluster.gpus_per_node = partitions.gpus_per_node(cfg, list(known))
    run_gpus = run.cluster.gpus_per_node if found is None else found.gpus
    generators = None
    if run_gpus is not None and (run_gpus == 0 or cfg.cluster.gpus_per_node is not None):
        generators = request.nodes * len(lent_replicas(run, run_gpus, cfg.cluster.gpus_per_node or 0))
    check_queue(cfg, known)
    check_writable(run_dir.path)
    return cfg, list(not_shared(cfg, run_dir)), generators


def _check_owner(run_dir: RunDir) -> None:
    with reading(run_dir.path):
        owner = run_dir.path.stat().st_uid
    if owner != os.getuid():
        raise UserError(f"{run_dir} is another user's", "only who runs it can lend it nodes")


def _check_state(run_dir: RunDir) -> Door | None:
    """The door of the start that runs; None where it has not opened yet."""
    status, again = run_dir.read_status(), f"forge-hpc resume {shlex.quote(str(run_dir))} goes on with it"
    state = "not begun" if status is None else status.state
    if status is not None and status.is_terminal:
        hint = "a completed run needs no more generators" if state == "completed" else again
        raise UserError(f"{run_dir} has ended: it is {state}", hint)
    if status is None or state in ("pending", "preempted"):
        raise UserError(f"{run_dir} is queued: it is {state}", "join it when it runs; forge-hpc status tells")
    if not is_job_id(status.job_id):
        raise UserError(
            f"{run_dir} is a process of one machine, which other nodes do not reach",
            "nodes can be lent to runs that are jobs of Slurm",
        )
    found = open_door(run_dir)
    if found is None and state != "starting":
        raise UserError(
            f"the start of {run_dir} that runs now takes no nodes: it is one of an older forge_hpc, or is ending",
            "its next start does, with this one",
        )
    return None if found is None else found[1]


def _check_environment(found: Door) -> None:
    if problem := differences({0: found.environment, 1: environment()}).get(1):
        raise UserError(
            f"this is another environment than the run's: {problem.partition(': ')[2]}".replace("elsewhere", "the run"),
            "take the environment and the clone of forge_hpc that the run was started with; an edited one is another",
        )


def _configuration(request: JoinRequest, run_dir: RunDir) -> Config:
    """The run's own, with what concerns its job replaced by what concerns ours."""
    allowed = ("slurm.", "cluster.gpus_per_node=", "cluster.gpu_memory_gib=")
    if other := [override for override in request.overrides if not override.startswith(allowed)]:
        raise UserError(
            f"{other[0]}: a job that lends nodes has the run's configuration",
            "of the job itself there are slurm.* and cluster.gpus_per_node",
        )
    cfg = read_config(run_dir.config, request.overrides)
    given = {override.partition("=")[0] for override in request.overrides}
    cfg.name = f"{cfg.name}-lent"
    cfg.cluster.nodes, cfg.cluster.spare_nodes = request.nodes, 0
    if request.partition is not None:
        cfg.slurm.partition = request.partition
        if "cluster.gpus_per_node" not in given:  # of the other partition
            cfg.cluster.gpus_per_node = None
    if "slurm.signal_lead_s" not in given:
        cfg.slurm.signal_lead_s = LEAD_S
    if "slurm.extra" not in given:
        extra = {name.lstrip("-").replace("_", "-"): value for name, value in cfg.slurm.extra.items()}
        cfg.slurm.extra = {name: value for name, value in extra.items() if name not in _NOT_A_LENDERS}
    return cfg


def _count(num: int, what: str) -> str:
    return f"{num} {what}{'s' * (num != 1)}"

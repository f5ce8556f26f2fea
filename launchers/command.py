"""The command that every node runs, whichever door the run came in by."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from forge_hpc.config import Config

_OPTIONS_OF_SRUN = (
    *("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV"),  # of sbatch --export: the tasks have the batch shell's environment
    *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_OVERCOMMIT", "SLURM_DISTRIBUTION", "SLURM_HINT", "SLURM_THREADS_PER_CORE"),
    *(f"SLURM_NTASKS_PER_{what}" for what in ("CORE", "GPU", "NODE", "SOCKET", "TRES")),
    *("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_CPUS_PER_GPU", "SLURM_TRES_PER_TASK", "SLURM_GRES"),
    *("SLURM_GPUS", *(f"SLURM_GPUS_PER_{what}" for what in ("NODE", "SOCKET", "TASK"))),
    *("SLURM_GPU_BIND", "SLURM_TRES_BIND"),
    *(f"SLURM_MEM_PER_{what}" for what in ("CPU", "GPU", "NODE")),
    *("SLURM_EXACT", "SLURM_EXCLUSIVE", "SLURM_CORE_SPEC", "SLURM_THREAD_SPEC", "SLURM_TIMELIMIT"),
)
"""Variables that srun takes for options, and that may be another job's, which this one was submitted in, or a shell's.
Without them a step has all that its job has (seen with Slurm 22.05, 24.11 and 26.05)."""


def run_command(run_dir: Path, python: str = sys.executable) -> list[str]:
    """What starts the run on a node: the run directory alone says what to do, also after a requeue."""
    return [python, "-u", "-m", "forge_hpc.run", "--run-dir", str(run_dir)]


def with_setup(command: Sequence[str], setup: Sequence[str]) -> list[str]:
    """`command` after the shell lines `setup`, of which each must succeed; arguments that follow go to `command`."""
    if not setup:
        return list(command)
    return ["bash", "-c", "\n".join(["set -e", *setup, f'exec {shlex.join(command)} "$@"']), "bash"]


def job_command(cfg: Config, run_dir: Path) -> str:
    """The lines of a job script that start the run on every node of the allocation, once a node.

    One failed task ends the others (--kill-on-bad-exit); one that ends well does not (--wait=0: generators may leave
    before the controller has written the export). The run sizes its threads itself, so no task is bound to cores. Where
    nodes are kept in reserve the others go on without a node that dies (--no-kill).

    Where srun does not end well the batch shell sees whether the run knows how it ended (--after): the supervisor of
    the first node, which sees to all else, may be what has died, or was killed by srun when another's had died.
    """
    # Not --unbuffered: it gives the tasks a terminal, and a terminal gets a progress bar.
    flags = ["--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=0", "--cpu-bind=none"]
    if cfg.cluster.spare_nodes:
        flags.append("--no-kill")
    flags += cfg.slurm.srun
    run, setup = run_command(run_dir), cfg.slurm.setup
    after = shlex.join(with_setup([*run, "--after"], setup))
    start = f"{shlex.join(['srun', *flags, *with_setup(run, setup)])} || {after} $?"
    return f"unset {' '.join(_OPTIONS_OF_SRUN)}\n{start}"


def with_variables(variables: Mapping[str, str | None], command: str) -> str:
    """`command` after shell lines that set these variables; None unsets one."""
    lines = [f"unset {name}" if value is None else f"export {name}={value}" for name, value in variables.items()]
    return "\n".join([*lines, command])

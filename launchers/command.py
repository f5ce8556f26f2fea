"""The command that every node runs, whichever door the run came in by."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_hpc.config import Config
from forge_hpc.container.runtimes import pyxis_options, within_pyxis

OPTIONS_OF_SRUN = (
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


def run_command(run_dir: Path, python: str = sys.executable, *, array: bool = False) -> list[str]:
    """What starts the run on a node: the run directory alone says what to do, also after a requeue.

    With ``array`` it is that of the task of an array, in the sweep ``run_dir``.
    """
    return [python, "-u", "-m", "forge_hpc.run", "--run-dir", str(run_dir), *["--array"] * array]


def _srun(cfg: Config, run_dir: Path, options: Sequence[str], *, array: bool = False) -> list[str]:
    """The srun that starts the run on every node. Apptainer is started there by the run itself (``container.outside``),
    pyxis by srun, beside which somebody asks Slurm for what is inside (``container.relay``)."""
    setup = cfg.slurm.setup
    if cfg.slurm.container.runtime != "pyxis":
        return ["srun", *options, *with_setup(run_command(run_dir, array=array), setup)]
    inside = within_pyxis(run_command(run_dir, cfg.slurm.container.python, array=array))
    relay = [sys.executable, "-m", "forge_hpc.container.relay"]
    return [*relay, "srun", *options, *pyxis_options(cfg, run_dir), *with_setup(inside, setup)]


def with_setup(command: Sequence[str], setup: Sequence[str]) -> list[str]:
    """`command` after the shell lines `setup`, of which each must succeed; arguments that follow go to `command`."""
    if not setup:
        return list(command)
    return ["bash", "-c", "\n".join(["set -e", *setup, f'exec {shlex.join(command)} "$@"']), "bash"]


def srun_options(cfg: Config) -> list[str]:
    """Options of the srun that starts the run on every node of the allocation, once a node.

    One failed task ends the others (--kill-on-bad-exit); one that ends well does not (--wait=0: generators may leave
    before the controller has written the export). The run sizes its threads itself, so no task is bound to cores. Where
    nodes are kept in reserve the others go on without a node that dies (--no-kill).
    """
    # Not --unbuffered: it gives the tasks a terminal, and a terminal gets a progress bar.
    flags = ["--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=0", "--cpu-bind=none"]
    return [*flags, *["--no-kill"] * bool(cfg.cluster.spare_nodes), *cfg.slurm.srun]


def job_command(cfg: Config, run_dir: Path, *, array: bool = False) -> str:
    """The lines of a job script that start the run; with ``array``, that of its task in the sweep ``run_dir``.

    Where srun does not end well the batch shell sees whether the run knows how it ended (--after): the supervisor of
    the first node, which sees to all else, may be what has died, or was killed by srun when another's had died.
    """
    run, setup = run_command(run_dir, array=array), cfg.slurm.setup
    after, lines = shlex.join(with_setup([*run, "--after"], setup)), [f"unset {' '.join(OPTIONS_OF_SRUN)}"]
    if cfg.slurm.stage_environment is None:
        start = shlex.join(_srun(cfg, run_dir, srun_options(cfg), array=array))
    else:
        # The last line on stdout starts Python on a node; it is empty where nothing is staged.
        srun = ["srun", *srun_options(cfg)]
        stage = [sys.executable, "-m", "forge_hpc.staging.broadcast", cfg.slurm.stage_environment, *srun]
        lines += [f"staged=$({shlex.join(with_setup(stage, setup))} | tail -n 1)"]
        start = f'{shlex.join(srun)} env FORGE_HPC_STAGED="$staged" {shlex.join(with_setup(_staged(run), setup))}'
    return "\n".join([*lines, f"{start} || {after} $?"])


def _staged(run: Sequence[str]) -> list[str]:
    """`run` by what FORGE_HPC_STAGED says, if it says anything."""
    return ["bash", "-c", 'exec $FORGE_HPC_STAGED "$@"', "bash", *run]


def lent_job_command(cfg: Config, run_dir: Path, python: str = sys.executable) -> str:
    """The lines of a job script that lend the job's nodes to the run in ``run_dir``.

    Its nodes know nothing of each other: one that fails, or is taken away, ends no other.
    """
    flags = ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--no-kill", "--wait=0", "--cpu-bind=none"]
    lend = with_setup([python, "-u", "-m", "forge_hpc.join", "--run-dir", str(run_dir)], cfg.slurm.setup)
    return f"unset {' '.join(OPTIONS_OF_SRUN)}\n{shlex.join(['srun', *flags, *cfg.slurm.srun, *lend])}"


def with_variables(variables: Mapping[str, str | None], command: str) -> str:
    """`command` after shell lines that set these variables; None unsets one."""
    lines = [f"unset {name}" if value is None else f"export {name}={value}" for name, value in variables.items()]
    return "\n".join([*lines, command])


@dataclass(frozen=True)
class Start:
    """What starts a run from this process."""

    command: list[str]
    environ: dict[str, str]
    after: list[str] | None = None
    """What is told the exit code of `command` where it does not end well."""


def start_here(cfg: Config, run_dir: Path, run: Sequence[str] | None = None) -> Start:
    """On this machine: inside an allocation, too, it must not take itself for one task of several. ``run`` is what is
    started there, where it is not the run itself."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return Start(with_setup(run or run_command(run_dir), cfg.slurm.setup), environ)


def start_in_allocation(
    cfg: Config, run_dir: Path, variables: Mapping[str, str | None], started: Sequence[str] | None = None
) -> Start:
    """On ``cluster.nodes`` nodes of the allocation that this process is in.

    Args:
        variables: of Slurm's, those that are another job's, by `corrections`.
        started: what is started on them, where it is not the run itself.
    """
    right = os.environ | variables
    environ = {key: value for key, value in right.items() if value is not None and key not in OPTIONS_OF_SRUN}
    # A shell that srun has started may hold all that the allocation has; Ctrl-C is for the run, not to show its state.
    options = [f"--nodes={cfg.cluster.nodes}", "--overlap", "--disable-status", *srun_options(cfg)]
    first_node = ["env", "SLURM_PROCID=0"]
    after = [*first_node, *with_setup([*run_command(run_dir), "--after"], cfg.slurm.setup)]
    if started is not None:
        return Start(["srun", *options, *with_setup(started, cfg.slurm.setup)], environ, after)
    return Start(_srun(cfg, run_dir, options), environ, after)


def start_on_kept_engines(keeper: Start, engines: Path, run_dir: Path, keep_s: float) -> Start:
    """On engines that are kept in a directory, and that are started as ``keeper`` says where there are none."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "forge_hpc.kept.client",
        "--engines",
        str(engines),
        "--run-dir",
        str(run_dir),
    ]
    return Start([*command, "--keep", str(keep_s), "--", *keeper.command], keeper.environ, keeper.after)


def keeper_command(engines: Path, python: str = sys.executable) -> list[str]:
    """What keeps engines on a node."""
    return [python, "-u", "-m", "forge_hpc.kept.keeper", "--engines", str(engines)]

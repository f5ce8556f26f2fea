"""The command that every node runs, whichever door the run came in by."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from forge_hpc.config import Config


def run_command(run_dir: Path, python: str = sys.executable) -> list[str]:
    """What starts the run on a node: the run directory alone says what to do, also after a requeue."""
    return [python, "-u", "-m", "forge_hpc.run", "--run-dir", str(run_dir)]


def with_setup(command: Sequence[str], setup: Sequence[str]) -> list[str]:
    """`command` after the shell lines `setup`, of which each must succeed; arguments that follow go to `command`."""
    if not setup:
        return list(command)
    return ["bash", "-c", "\n".join(["set -e", *setup, f'exec {shlex.join(command)} "$@"']), "bash"]


def job_command(cfg: Config, run_dir: Path) -> str:
    """The line of a job script that starts the run on every node of the allocation, once a node.

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
    if cfg.slurm.cpus_per_task is not None:  # srun does not take the job's own over (since Slurm 22.05)
        flags.append(f"--cpus-per-task={cfg.slurm.cpus_per_task}")
    run, setup = run_command(run_dir), cfg.slurm.setup
    after = shlex.join(with_setup([*run, "--after"], setup))
    return f"{shlex.join(['srun', *flags, *with_setup(run, setup)])} || {after} $?"

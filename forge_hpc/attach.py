"""``forge-hpc attach``: a shell, or a command, beside a run on a node of its allocation.

Where the run is in a container, in another one of the same image with the same mounts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from forge_hpc.config import Config, read_config
from forge_hpc.config.errors import UserError
from forge_hpc.container.runtimes import pyxis_options, within_pyxis
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm.client import PATIENT_S, SlurmAbsent, ask, at_a_terminal
from forge_hpc.slurm.job import is_job_id
from forge_hpc.slurm.queue import queued_jobs
from forge_hpc.supervisor.starts import StartLog

_SHELL_OF_IMAGE = ("sh", "-c", "command -v bash >/dev/null && exec bash -l; exec sh -l")


def attach(run_dir: RunDir, node: str | None, command: Sequence[str]) -> None:
    """Become srun. ``node`` is a name, or a number as ``forge-hpc stacks`` has it: from 0, without the nodes that the
    gate has left out; by default the first, which has the controller.

    Raises:
        UserError: there is no allocation to attach to, or no such node in it.
    """
    status = run_dir.read_status()
    job_id = status.job_id if status else None
    if status is not None and status.is_terminal:
        raise UserError(f"{run_dir} is {status.state}: it has no nodes any more", "forge-hpc logs shows what it said")
    if not is_job_id(job_id):
        raise UserError(
            f"{run_dir} is not a job of Slurm",
            "it runs on the machine that it was started on: a shell there is beside it",
        )
    if not command and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("a shell needs a terminal", f"or give a command: forge-hpc attach {run_dir} -- nvidia-smi")
    with at_a_terminal("attach works where Slurm's commands do"):
        job = queued_jobs([job_id]).get(job_id)
        if job is None or not job.is_active:
            raise UserError(f"job {job_id} has left the queue", f"forge-hpc status {run_dir}")
        if not job.nodes:
            raise UserError(f"job {job_id} has no nodes yet: {job.waits_for()}", f"forge-hpc watch {run_dir}")
        nodes = ask("scontrol", "show", "hostnames", job.nodes, timeout_s=PATIENT_S).split()
        if shutil.which("srun") is None:
            raise SlurmAbsent("there is no srun here")
    left_out = " ".join(StartLog(run_dir).without())
    numbered = [name for name in nodes if f"({name})" not in left_out] or nodes  # as the run numbers them
    where = numbered[int(node or 0)] if node is None or (node.isdecimal() and int(node) < len(numbered)) else node
    if where not in nodes:
        raise UserError(
            f"job {job_id} has no node {node}", f"it has {', '.join(nodes[:8])}{' …' if len(nodes) > 8 else ''}"
        )
    line = srun(job_id, where, command, run_dir, read_config(run_dir.config))
    os.execvpe(line[0], line, environment(os.environ))


def srun(job_id: str, node: str, command: Sequence[str], run_dir: RunDir, cfg: Config) -> list[str]:
    """The step shares all that the run's own has (--overlap), its GPUs too."""
    from launchers.command import with_setup

    options = [f"--jobid={job_id}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--cpu-bind=none"]
    options += ["--pty"] * (not command)
    runtime, setup = cfg.slurm.container.runtime, cfg.slurm.setup
    if runtime is None:
        return ["srun", *options, *(command or (os.environ.get("SHELL", "/bin/bash"), "-l"))]
    inside = list(command or _SHELL_OF_IMAGE)
    if runtime == "pyxis":
        return ["srun", *options, *pyxis_options(cfg, run_dir.path), *with_setup(within_pyxis(inside), setup)]
    enter = [sys.executable, "-m", "forge_hpc.container.enter", "--run-dir", str(run_dir), "--", *inside]
    return ["srun", *options, *with_setup(enter, setup)]


def environment(environ: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """Without the variables of a job that we may be in, which srun would take for options."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {name: value for name, value in environ.items() if name in kept or not name.startswith(("SLURM_", "SRUN_"))}

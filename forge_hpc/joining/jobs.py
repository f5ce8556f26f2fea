"""The jobs that lend a run nodes, as its directory and Slurm know them; for `forge-hpc status` and others. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from forge_hpc.files import is_there
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm.client import SlurmRefused
from forge_hpc.slurm.queue import QueuedJob, queued_jobs

NUM_ASKED = 50
"""Slurm is asked for so many of the jobs submitted last."""


def lending_jobs(run_dir: RunDir) -> list[str]:
    """Ids of the jobs, those of arrays as a whole, that were submitted to lend the run nodes; the newest first."""
    scripts = run_dir.lent.glob("*_submission.sh") if is_there(run_dir.lent) else ()
    return sorted((path.name.removesuffix("_submission.sh") for path in scripts), key=_number, reverse=True)


def is_lending_job(run_dir: RunDir, job_id: str) -> bool:
    """Whether a job, or a task of an array, lends the run nodes."""
    return re.split(r"[_+]", job_id)[0] in lending_jobs(run_dir)


def lending_text(run_dir: RunDir, num_generators: int) -> str | None:
    """What ``status`` says of them: generators that serve, and the jobs in the queue; None where there is nothing."""
    jobs: Sequence[QueuedJob] = ()
    ids = lending_jobs(run_dir)[:NUM_ASKED]
    try:
        jobs = [job for job in queued_jobs(ids).values() if job.is_active] if ids else ()
    except SlurmRefused:
        jobs = ()  # what the run itself knows stands
    if not jobs and not num_generators:
        return None
    said = [f"{num_generators} generator{'s' * (num_generators != 1)}"]
    for job in sorted(jobs, key=lambda job: _number(job.job_id))[:4]:
        where = f"on {job.nodes}" if job.nodes else f"{job.num_nodes} node{'s' * (job.num_nodes != 1)}"
        said.append(f"job {job.job_id} {job.state}, {where}{f', {job.reason}' if job.waits and job.reason else ''}")
    if len(jobs) > 4:
        said.append(f"and {len(jobs) - 4} jobs more")
    return "; ".join(said)


def _number(job_id: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", job_id)]

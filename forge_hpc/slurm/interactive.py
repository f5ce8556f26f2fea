"""The allocation that a shell or a notebook's kernel is in, made with salloc: what is submitted there runs there."""

from __future__ import annotations

import os
from collections.abc import Mapping

from forge_hpc.slurm.facts import JobFacts
from forge_hpc.slurm.job import job_facts


def own_allocation(environ: Mapping[str, str] = os.environ, *, of_batch_jobs: bool = False) -> JobFacts | None:
    """What Slurm says of the allocation of salloc (or srun) that this process is in; None elsewhere.

    Args:
        of_batch_jobs: that of a job of sbatch, too: some sites start notebooks so.
    """
    job_id = environ.get("SLURM_JOB_ID")
    facts = job_facts(job_id) if job_id else None
    if facts is None or facts.state != "RUNNING":  # the shell has outlived it
        return None
    return facts if of_batch_jobs or not facts.is_batch else None

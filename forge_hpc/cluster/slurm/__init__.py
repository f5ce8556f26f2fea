"""The job as Slurm sees it: why it is signalled (`job`), and how it comes back (`job`, `successor`)."""

from forge_hpc.cluster.slurm.environment import corrections, own_job_id
from forge_hpc.cluster.slurm.job import (
    Cause,
    JobFacts,
    SlurmRefused,
    SlurmSilent,
    cause_of,
    controller_time,
    forbid_requeue,
    job_facts,
    requeue,
)
from forge_hpc.cluster.slurm.successor import CONTINUE, script_arguments, submit_successor

__all__ = [
    "CONTINUE",
    "Cause",
    "JobFacts",
    "SlurmRefused",
    "SlurmSilent",
    "cause_of",
    "controller_time",
    "corrections",
    "forbid_requeue",
    "job_facts",
    "own_job_id",
    "requeue",
    "script_arguments",
    "submit_successor",
]

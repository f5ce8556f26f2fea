"""The job as Slurm sees it: why it is signalled (`job`), and how it comes back (`job`, `preemption`, `successor`)."""

from forge_hpc.slurm.environment import corrections, own_job_id
from forge_hpc.slurm.job import (
    JobFacts,
    SlurmRefused,
    SlurmSilent,
    cause_of,
    controller_time,
    forbid_requeue,
    job_facts,
    requeue,
)
from forge_hpc.slurm.preemption import (
    Preemption,
    controller_release,
    known_of,
    parse_release,
    preemption,
    release_text,
)
from forge_hpc.slurm.successor import CONTINUE, script_arguments, submit_successor

__all__ = [
    "CONTINUE",
    "JobFacts",
    "Preemption",
    "SlurmRefused",
    "SlurmSilent",
    "cause_of",
    "controller_release",
    "controller_time",
    "corrections",
    "forbid_requeue",
    "job_facts",
    "known_of",
    "own_job_id",
    "parse_release",
    "preemption",
    "release_text",
    "requeue",
    "script_arguments",
    "submit_successor",
]

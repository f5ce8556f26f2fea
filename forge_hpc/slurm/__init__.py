"""Slurm: one client of its commands, one reader of what they print, and over these what a run needs of it.

client       asks (`ask`), and tells a Slurm that refuses from one that is silent
facts        reads: of a job (`JobFacts`), of the cluster (`ClusterFacts`)
job          why a job is signalled, its requeue, its state, its end
queue        many jobs by one question (`forge-hpc status`)
preemption   what a release does with a preempted job
successor    another job in place of one that is not requeued
partitions   whether a job can ever run (`forge-hpc submit`)
interactive  the allocation of salloc that a shell is in
environment  what Slurm's variables say, and what they do not
accounts     whom a user may charge
expected_start  when Slurm would start a job
site         site profiles; site_init writes one
"""

from forge_hpc.slurm.client import SlurmRefused, SlurmSilent
from forge_hpc.slurm.environment import corrections, own_job_id
from forge_hpc.slurm.facts import JobFacts, controller_release, controller_time, parse_release
from forge_hpc.slurm.job import cause_of, forbid_requeue, host_names, job_facts, requeue
from forge_hpc.slurm.preemption import Preemption, known_of, preemption, release_text
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
    "host_names",
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

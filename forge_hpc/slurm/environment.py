"""What Slurm's variables say of the job that they are found in, and what they do not.

A job that is submitted inside another inherits the other's environment, and has the other's value of each variable that
Slurm sets in some jobs only: which task of an array it is, how often it was requeued, how much of a node was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from forge_hpc.slurm.facts import JobFacts

_ARRAY = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
_RESTARTS = "SLURM_RESTART_COUNT"


def own_job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """What names this job, and nothing else, to Slurm's commands; None outside Slurm.

    The last task of an array to start has the array's own id as SLURM_JOB_ID, and to scontrol and scancel that id means
    all of its tasks.
    """
    array, task = (environ.get(name) for name in _ARRAY)
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID")


def corrections(facts: JobFacts | None, environ: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """Variables that are another job's, with the values of this one, None where it has none.

    Args:
        facts: of the job that SLURM_JOB_ID names. Where Slurm does not answer a task of an array that has an id of its
            own goes by that.
    """
    right: dict[str, str | None] = {}
    is_task = "_" in facts.job_id if facts else environ.get(_ARRAY[0]) == environ.get("SLURM_JOB_ID")
    if not is_task:
        right |= {name: None for name in environ if name.startswith("SLURM_ARRAY_")}
    if facts is not None and facts.restarts != int(environ.get(_RESTARTS, "0")):
        right[_RESTARTS] = str(facts.restarts)
    return right

"""Queued and running Slurm jobs, by their id; ``ARRAY_TASK`` names a task of an array."""

from __future__ import annotations

import re
import subprocess
from typing import TypeGuard

from forge_hpc.config import UserError
from forge_hpc.slurm import JobFacts

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
          "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip
_TIMEOUT_S = 30


def is_job_id(job_id: str | None) -> TypeGuard[str]:
    """Whether a run's ``job_id`` is one of Slurm's, and not None or ``local``."""
    return re.fullmatch(r"\d+(_\d+)?", job_id or "") is not None


def job_state(job_id: str) -> tuple[str, str] | None:
    """Slurm's state of the job and the reason it gives; None for a job that Slurm does not know (any more).

    Raises:
        UserError: Slurm does not answer.
    """
    try:
        answer = _slurm("scontrol", "show", "job", job_id)
    except FileNotFoundError:
        return None
    if answer.returncode != 0:
        if "Invalid job id" in answer.stderr:
            return None
        raise UserError(f"Slurm does not answer: {' '.join(answer.stderr.split())}", "try `sinfo`")
    facts = JobFacts.parse(answer.stdout, job_id)
    return facts.state, facts.reason


def is_active(job_id: str) -> bool:
    """Whether the job waits, runs, or may run again."""
    state = job_state(job_id)
    return state is not None and state[0] in ACTIVE


def cancel_job(job_id: str) -> None:
    """End the job, also one that is held or that would be requeued. Raises UserError where Slurm refuses."""
    answer = _slurm("scancel", job_id)
    if answer.returncode != 0:
        raise UserError(f"scancel {job_id}: {' '.join(answer.stderr.split())}")


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, text=True, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer within {_TIMEOUT_S} s", "try again") from None

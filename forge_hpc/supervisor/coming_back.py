"""How a run that has left is started again: by Slurm, by a requeue of its job, or by another job."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from forge_hpc import slurm
from forge_hpc.config import Config
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import RULES, Ending, Return
from forge_hpc.supervisor.job import OwnJob
from forge_hpc.supervisor.signals import Stopped, StopRequests


def is_to_come_back(config: Config) -> bool:
    """Whether the run is to be started again by itself."""
    return config.slurm.requeue in ("auto", "successor")


def come_back(
    run_dir: RunDir, config: Config, ending: Ending, job: OwnJob, requests: StopRequests
) -> tuple[str, str | None]:
    """See that the run is started again: how, and the id of the job that goes on where it is another.

    A Slurm that does not answer is asked again until it kills, or for ``COME_BACK_S``.

    Raises:
        Stopped: the run is cancelled in the meantime.
    """
    by_hand = f"go on with forge-hpc resume {run_dir}"
    if RULES[ending.cause].comes_back is Return.SLURM:
        return "Slurm starts it again", None
    if job.is_interactive:
        return f"nobody starts an interactive job again: {by_hand}", None
    if not is_to_come_back(config):
        return f"slurm.requeue={config.slurm.requeue}: {by_hand}", None
    facts, requeues = job.facts, config.slurm.requeue == "auto"
    if facts is not None and facts.preempted and (how := job.how_preempted(facts)) is not None:
        way = how.way_back(facts)
        if way is Return.SLURM and not ending.lost_nodes:
            return "Slurm starts it again", None
        requeues = requeues and way is not Return.SUCCESSOR
    until = _patience_ends(job)
    while True:
        try:
            if requeues and _requeued(job, ending):
                return "requeued", None
            successor = _submit_successor(run_dir, config, ending, job)
            return f"job {successor} goes on", successor
        except (slurm.SlurmSilent, OSError) as silence:
            if time.monotonic() > until:
                return f"Slurm has not been reached ({silence}): {by_hand}", None
            print(f"asking again: {silence}", file=sys.stderr, flush=True)
        except slurm.SlurmRefused as refusal:
            if config.slurm.requeue != "auto" or requeues:
                return f"Slurm takes no successor ({refusal}): {by_hand}", None
            print(f"no successor: {refusal}", file=sys.stderr)
            requeues = True  # better a job that ends as PREEMPTED than none
            continue
        if (request := requests.next()) is not None and request.cancels:
            raise Stopped(request)
        time.sleep(deadlines.RETRY_S)


def _patience_ends(job: OwnJob) -> float:
    """Monotonic time until which a silent Slurm is asked."""
    now = time.monotonic()
    if job.kill_at is None:
        return now + deadlines.COME_BACK_S
    return min(now + deadlines.COME_BACK_S, max(job.kill_at, now + deadlines.KILL_WAIT_S))


def _requeued(job: OwnJob, ending: Ending) -> bool:
    """Requeue the job; False where Slurm refuses. Raises SlurmSilent."""
    try:
        slurm.requeue(job.allocation.job_id, ending.lost_nodes)
    except slurm.SlurmSilent:
        raise
    except slurm.SlurmRefused as refusal:
        print(f"no requeue: {refusal}", file=sys.stderr)
        return False
    return True


def _submit_successor(run_dir: RunDir, config: Config, ending: Ending, job: OwnJob) -> str:
    facts = job.facts or job.ask()
    if facts is None:
        raise slurm.SlurmSilent("it says nothing of the job")
    # A job that outlives its nodes has fewer now than it began with.
    facts = replace(facts, num_nodes=job.allocation.num_nodes)
    no_kill = config.cluster.spare_nodes > 0
    return slurm.submit_successor(facts, run_dir.path, ending.lost_nodes, no_kill=no_kill, arguments=job.arguments)

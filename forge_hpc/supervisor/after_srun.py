"""What the job script sees to when srun has ended: a start whose supervisor has died without a word. And how a start
ends whose container does not start: the first node sees to it, and the job script where that could not, or where srun
was to start the container (pyxis)."""

from __future__ import annotations

import signal
import sys
import time

from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import read_config
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import RULES, Cause, Ending, Exit
from forge_hpc.supervisor.first_node import INSIDE, FirstNode
from forge_hpc.supervisor.gate import Verdict
from forge_hpc.supervisor.job import OwnJob
from forge_hpc.supervisor.signals import StopRequests
from forge_hpc.supervisor.starts import StartLog


def _unfit(first: FirstNode) -> Ending | None:
    """How the start has ended whose first node could not even start its container, as the nodes have left word for the
    gate (``container.outside``); None where that was not so."""
    allocation = first.allocation
    for directory in first.run_dir.rendezvous.glob(f"{allocation.job_id}.{allocation.requeues}.*"):
        rendezvous, nodes = Rendezvous(directory), range(allocation.num_nodes)
        records = {node: record for node in nodes if (record := rendezvous.look(f"node-{node}")) is not None}
        unfit = {node: "; ".join(said) for node, record in records.items() if (said := record["report"]["problems"])}
        if 0 in unfit:
            members = [node for node in nodes if node not in unfit]
            names = {node: record["slurm_name"] for node, record in records.items()}
            return Verdict(members, unfit, {}, names).ending(num_spares=0)
    return None


def _not_started(first: FirstNode, job: OwnJob, code: int) -> Ending | None:
    """How the start has ended whose container srun was to start, and did not; None where the first node's supervisor
    has run in it, which has left or has said that it is there, or where Slurm ends the job."""
    start = f"{first.allocation.job_id}.{first.allocation.requeues}.*"
    is_inside = any(
        Rendezvous(directory).look(INSIDE) is not None for directory in first.run_dir.rendezvous.glob(start)
    )
    if code == Exit.LEFT or is_inside or job.cause_of(signal.SIGTERM)[0] is not Cause.UNKNOWN:
        return None
    why = f"srun has not started the run in its container ({code}): the job's output says where and why"
    return Ending(Cause.GATE, why)


def see_to_the_end(first: FirstNode, job: OwnJob, requests: StopRequests, code: int) -> int:
    """Have the run started again where nobody else has; returns what the job is to end with.

    Args:
        code: srun's. It stands, except where the run is complete and srun complains of a node that was lost.

    Raises:
        Stopped: the job is being ended.
        UserError: another start has the run.
    """
    run_dir, requeues = first.run_dir, first.allocation.requeues
    config, starts, job_id = read_config(run_dir.config), StartLog(run_dir), first.allocation.job_id
    with run_dir.lock(job_id, requeues=requeues, stop=requests.check) as first.lock:
        begin, end = starts.newest()
        if begin is None or (begin["job_id"], begin.get("requeues")) != (job_id, requeues):
            unfit = _unfit(first)
            if unfit is None and config.slurm.container.runtime == "pyxis":
                unfit = _not_started(first, job, code)
            return code if unfit is None else first.end_before_it_began(config, unfit, starts)
        if end is not None and end["state"] == "completed":
            print(f"the run is complete; srun's exit code {code} is that of a lost node", file=sys.stderr)
            return Exit.DONE
        if end is not None or code == Exit.LEFT:  # it has seen to its return, even if it could not write that
            return code
        until = time.monotonic() + deadlines.COME_BACK_S
        cause, facts = job.cause_of(signal.SIGTERM)
        while facts is None and time.monotonic() < until:
            requests.check()
            time.sleep(deadlines.RETRY_S)
            cause, facts = job.cause_of(signal.SIGTERM)
        if cause is not Cause.REQUEUED:
            died = f"a supervisor has died without a word (srun: {code})"  # one that dies takes the others with it
            ending = Ending(cause, f"{RULES[cause].meaning}; {died}")
            if cause is Cause.UNKNOWN:
                ending = Ending(Cause.CRASH, died)
            first.finish(config, ending, starts, run_dir.log_dir(job_id, begin["restart"]), began=True)
    return code

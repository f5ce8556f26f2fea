"""The supervisor of a node: what ``python -m forge_hpc.run --run-dir D`` is, on every node of an allocation.

This process is the node's supervisor. It imports nothing heavy, starts the node's Monarch worker and, on the first
node, the controller, and is the owner of all that these start: whatever the way out, it ends every process below it,
and on the first node it leaves the true state in ``status.json``.

    node 0   lock ─ certificates ─ worker ─ (warm start) ─ controller ─► Ending ─► status.json ─► requeue   first_node
    node n              certificates ─ worker ────────────────────────► outcome                             other_node
    job script, where srun fails     did the first node say how it ended? ──► status.json ─► requeue        after_srun

It finds everything in the run directory, so the first start, a restart and a new job on the same directory are one.
What signals mean: ``signals``. Why a start ends and what follows from that: ``ending``. How it comes back:
``coming_back``. How long each of them waits: ``deadlines``.

A file system that fails keeps nobody from coming back: what cannot be written on the way out is said on stderr.
"""

from __future__ import annotations

import contextlib
import sys

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.cluster.processes import become_subreaper
from forge_hpc.cluster.rendezvous import RendezvousTimeout
from forge_hpc.config import UserError, print_error, read_config
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.after_srun import see_to_the_end
from forge_hpc.supervisor.coming_back import come_back
from forge_hpc.supervisor.ending import Ending, Exit
from forge_hpc.supervisor.first_node import FirstNode
from forge_hpc.supervisor.job import OwnJob
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.other_node import serve_node
from forge_hpc.supervisor.robust import best_effort
from forge_hpc.supervisor.signals import Stopped, StopRequests


class Supervisor:
    """One node's part of one start of a run."""

    def __init__(self, run_dir: RunDir, allocation: Allocation, *, summary: bool = True) -> None:
        self.run_dir = run_dir
        self.allocation = allocation
        self.job = OwnJob(allocation)
        self.requests = StopRequests(run_dir, self.job)
        self.node = Node(run_dir, allocation)
        self.first = FirstNode(self.node, self.job, self.requests, summary=summary)

    def run(self) -> int:
        """Exit code of this node."""
        become_subreaper()
        try:
            return self.first.run() if self.allocation.node_id == 0 else serve_node(self.node, self.requests)
        except UserError as error:
            print_error(error)
            return Exit.FAILED if self.allocation.in_slurm else Exit.USAGE
        except (Stopped, RendezvousTimeout, OSError) as error:
            print(f"node {self.allocation.node_id}: {error}", file=sys.stderr)
            if isinstance(error, Stopped) and not error.request.cancels and self.allocation.in_slurm:
                with best_effort(), contextlib.suppress(Stopped):  # still without the lock: the status is another's
                    config, ending = read_config(self.run_dir.config), Ending(error.request.cause)
                    print(come_back(self.run_dir, config, ending, self.job, self.requests)[0], file=sys.stderr)
            return Exit.FAILED
        finally:
            self.node.close()

    def after(self, code: int) -> int:
        """The job script's part, when srun has ended with ``code``, and that of a first node that cannot start its
        container; returns what the job, or the node, is to end with."""
        try:
            return see_to_the_end(self.first, self.job, self.requests, code)
        except (UserError, OSError, Stopped) as error:  # another start has the run, or the job is being ended
            print(f"nothing is done about the end of the start: {error}", file=sys.stderr)
            return code

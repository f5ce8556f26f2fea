"""``forge-hpc status``."""

from __future__ import annotations

import argparse

from forge_hpc.commands.arguments import add_run_dir as arguments
from forge_hpc.control import find_run
from forge_hpc.observability.report import render_status
from forge_hpc.slurm.job import is_job_id, job_state

__all__ = ["arguments", "run"]


def run(args: argparse.Namespace) -> int:
    run_dir = find_run(args.run_dir)
    print(render_status(run_dir))
    status = run_dir.read_status()
    if status and is_job_id(status.job_id) and not status.is_terminal:
        state = job_state(status.job_id)
        print(f"{'Slurm':<10} {' '.join(state) if state else 'does not know the job any more'}")
    return 0

"""``forge-hpc cancel``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.cancel import cancel_lending, cancel_runs
from forge_hpc.files import is_there
from forge_hpc.finding import find_runs
from forge_hpc.joining.jobs import is_lending_job
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm.job import is_job_id


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR|JOB")  # never a guess
    parser.add_argument("--now", action="store_true", help="end it without waiting for its step and a save")


def run(args: argparse.Namespace) -> int:
    runs: list[RunDir] = []
    for what in args.runs:
        for run_dir in find_runs(what):
            if is_job_id(str(what)) and not is_there(what) and is_lending_job(run_dir, str(what)):
                cancel_lending(run_dir, str(what))
            else:
                runs.append(run_dir)
    return cancel_runs(runs, now=args.now)

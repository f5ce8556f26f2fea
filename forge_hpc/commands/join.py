"""``forge-hpc join``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.commands.arguments import add_overrides
from forge_hpc.control import find_run
from forge_hpc.joining.command import JoinRequest, join


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR|JOB", help="the run that is to have the nodes")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the job; default 1")
    parser.add_argument("--partition", metavar="P", help="default: the run's own")
    parser.add_argument("--array", type=int, metavar="N", help="an array of N such jobs, each of which comes and goes")
    parser.add_argument("--at-once", type=int, metavar="N", help="no more than N of them at the same time")
    parser.add_argument("--dry-run", action="store_true", help="print the job script, queue nothing")
    add_overrides(parser, "of the job, such as slurm.time=04:00:00 or slurm.requeue=never")


def run(args: argparse.Namespace) -> int:
    request = JoinRequest(
        find_run(args.run), args.nodes, args.partition, args.array, args.at_once, tuple(args.overrides)
    )
    return join(request, dry_run=args.dry_run)

"""``forge-hpc logs``."""

from __future__ import annotations

import argparse

from forge_hpc.commands.arguments import add_run_dir
from forge_hpc.control import find_run
from forge_hpc.log_files import show_logs


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument(
        "--role",
        default="controller",
        help="controller, trainer, generator, worker (of a node), slurm (the job's output), ...; also trainer-0",
    )
    parser.add_argument("--rank", type=int, metavar="N", help="of this rank alone; default all, merged by time")
    parser.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="lines to begin with")
    parser.add_argument("--follow", action="store_true", help="show what is added until the run ends")


def run(args: argparse.Namespace) -> int:
    return show_logs(find_run(args.run_dir), args.role, args.rank, args.lines, args.follow)

"""``forge-hpc logs``."""

from __future__ import annotations

import argparse

from forge_hpc.commands.arguments import add_run_dir
from forge_hpc.control import find_run, show_log


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("--role", default="controller", help="controller, generator-0, trainer-0, slurm-JOBID, ...")
    parser.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="lines to begin with")
    parser.add_argument("--follow", action="store_true", help="show what is added until the run ends")


def run(args: argparse.Namespace) -> int:
    return show_log(find_run(args.run_dir), args.role, args.lines, args.follow)

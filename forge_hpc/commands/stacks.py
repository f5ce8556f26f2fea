"""``forge-hpc stacks``."""

from __future__ import annotations

import argparse

from forge_hpc.commands.arguments import add_run_dir
from forge_hpc.control import find_run
from forge_hpc.standing import show_stacks


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("--full", action="store_true", help="all frames of all threads")
    parser.add_argument("--json", action="store_true", help="the table for programs")


def run(args: argparse.Namespace) -> int:
    return show_stacks(find_run(args.run_dir), full=args.full, as_records=args.json)

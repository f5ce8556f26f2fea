"""``forge-hpc attach``."""

from __future__ import annotations

import argparse

from forge_hpc.attach import attach
from forge_hpc.commands.arguments import add_run_dir
from forge_hpc.control import find_run


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("--node", metavar="NAME|N", help="its name, or its number as stacks has it; default 0")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --: run this in place of a shell")


def run(args: argparse.Namespace) -> int:
    attach(find_run(args.run_dir), args.node, args.command)
    return 0  # it has become srun

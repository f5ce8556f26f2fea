"""``forge-hpc report``."""

from __future__ import annotations

import argparse

from forge_hpc.commands.arguments import add_run_dir as arguments
from forge_hpc.control import find_run
from forge_hpc.observability.report import render_report

__all__ = ["arguments", "run"]


def run(args: argparse.Namespace) -> int:
    print(render_report(find_run(args.run_dir)))
    return 0

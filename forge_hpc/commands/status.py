"""``forge-hpc status``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from forge_hpc.config.errors import UserError
from forge_hpc.finding import RUNS, find_run, find_runs, runs_in, together
from forge_hpc.observability.overview import overview, overview_table
from forge_hpc.observability.terminal import as_json, width_of_terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR|JOB", help="default: the newest under runs/")
    parser.add_argument("--all", action="store_true", help="all runs in the folders named; default those in runs/")
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(args: argparse.Namespace) -> int:
    folders = (args.runs or [RUNS]) if args.all else []
    if args.all:
        run_dirs = [run_dir for folder in folders for run_dir in together(runs_in(folder), folder)]
    else:
        run_dirs = [run_dir for what in args.runs for run_dir in find_runs(what)] or [find_run(None)]
    lines, problem = overview(run_dirs)
    one = lines[0] if len(lines) == 1 and not args.all else None
    if one is not None and one.state == "unreadable":
        run_dirs[0].read_status()  # says what to do
        raise UserError(
            f"{run_dirs[0]}: {one.message}", "forge-hpc resume goes on with it; or name another run directory"
        )
    if args.json:
        print(as_json([line.as_dict() for line in lines]) if one is None else json.dumps(one.as_dict()))
    elif one is not None:
        from forge_hpc.observability.watching import render_status

        print(render_status(run_dirs[0], one))
    else:
        print("\n".join(overview_table(lines, width_of_terminal(), folders)))
        for line in lines:
            if line.state == "unreadable":
                print(f"{Path(line.run).name}: {line.message}", file=sys.stderr)
    if problem is not None:
        print(f"note: {problem}", file=sys.stderr)
    return 0

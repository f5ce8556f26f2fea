"""``forge-hpc resume``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from forge_hpc.commands.arguments import add_cluster, add_follow, add_overrides, add_run_dir
from forge_hpc.config import UserError
from forge_hpc.control import find_run
from forge_hpc.files import is_there
from forge_hpc.fork import parse_source
from forge_hpc.submission import Request, submit


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    add_overrides(parser, "what may change: docs/configuration.md")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with other files of yours than those that the run began with",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="RUN_DIR[@STEP]",
        help="begin a new run from a checkpoint, by default the newest",
    )
    parser.add_argument(
        "--no-optimizer", action="store_true", help="with --from: take the weights and the schedule alone"
    )
    parser.add_argument("--run-dir", dest="new_run_dir", type=Path, metavar="D", help="with --from: the new run's")
    parser.add_argument("--name", help="with --from: the new run's, over name")
    add_cluster(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the job script, queue nothing")
    add_follow(parser)


def run(args: argparse.Namespace) -> int:
    if args.run_dir is not None and "=" in str(args.run_dir) and not is_there(args.run_dir):
        args.run_dir, args.overrides = None, [str(args.run_dir), *args.overrides]
    request = Request(
        overrides=tuple(args.overrides), cluster=args.cluster, site=args.site, accept_changes=args.accept_changes
    )
    if args.source is None:
        if args.no_optimizer or args.new_run_dir or args.name:
            raise UserError(
                "--no-optimizer, --run-dir and --name are for a new run", "--from RUN_DIR[@STEP] begins one"
            )
        request = replace(request, run_dir=find_run(args.run_dir).path)
    else:
        if args.run_dir is not None:
            raise UserError(f"{args.run_dir} and --from are two runs", "--run-dir D names the new one's directory")
        path, step = parse_source(args.source)
        new = replace(request, source=find_run(path).path, source_step=step, name=args.name)
        request = replace(new, run_dir=args.new_run_dir, keep_optimizer=not args.no_optimizer)
    return submit(request, dry_run=args.dry_run, follow=args.follow)

"""``forge-hpc submit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.commands.arguments import add_cluster, add_follow, add_overrides
from forge_hpc.config import UserError
from forge_hpc.kept.directory import keep_s_of
from forge_hpc.queueing import Queueing
from forge_hpc.submission import Request, submit


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration; default configs/grpo/demo.yaml")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes, over cluster.nodes; more than 1 means Slurm")
    add_cluster(parser)
    parser.add_argument("--name", help="name of the run, over name")
    parser.add_argument("--dry-run", action="store_true", help="print the job script and the node split, queue nothing")
    parser.add_argument("--run-dir", type=Path, metavar="D", help="run directory; default runs/NAME-TIMESTAMP")
    add_follow(parser)
    parser.add_argument("--fresh", action="store_true", help="move a completed run in --run-dir aside first")
    parser.add_argument(
        "--keep-engines",
        metavar="TIME",
        help="take the engines that an earlier run has left, and leave them for so long: 90s, 30m, 2h",
    )
    queue = parser.add_argument_group("when it begins")
    queue.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="RUN_DIR|JOB",
        help="when this run, sweep or job has ended well; may be repeated",
    )
    queue.add_argument("--hold", action="store_true", help="when it is released: scontrol release JOB")
    queue.add_argument("--begin", metavar="TIME", help="not before: 20:00, now+2hours, 2027-01-31T08:00")
    several = parser.add_argument_group("several runs")
    several.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=a,b",
        help="a run for each combination of these values, with --run-dir as the directory of them all",
    )
    several.add_argument(
        "--one-base",
        action="store_true",
        help="train the LoRA adapters of a sweep at once, in one run that holds their base once",
    )
    several.add_argument("--at-once", type=int, metavar="N", help="run no more than N of them at the same time")
    several.add_argument(
        "--then",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="afterwards a run of this configuration, with the model that the one before trained; may be repeated",
    )
    add_overrides(parser, "such as trainer.optimizer.lr=1e-6")


def run(args: argparse.Namespace) -> int:
    queueing = Queueing(tuple(args.after), args.hold, args.begin)
    request = Request(
        args.config,
        tuple(args.overrides),
        args.run_dir,
        args.nodes,
        args.cluster,
        args.site,
        args.name,
        queueing=queueing,
        keep_s=None if args.keep_engines is None else keep_s_of(args.keep_engines),
    )
    if request.keep_s is not None and (args.sweep or args.then):
        raise UserError("--keep-engines is for one run at a time", "leave it out, or --sweep and --then")
    if args.at_once is not None and not args.sweep:
        raise UserError("--at-once is for the runs of a --sweep", "leave it out")
    if args.one_base:
        if not args.sweep or args.at_once is not None or request.keep_s is not None:
            raise UserError(
                "--one-base is for the adapters of a --sweep, all at once, on engines of their own",
                "give --sweep key=a,b; leave out --at-once and --keep-engines",
            )
        from forge_hpc.sweep import with_adapters

        request = with_adapters(request, args.sweep)
        args.sweep = []
    if not args.sweep and not args.then:
        return submit(request, dry_run=args.dry_run, fresh=args.fresh, follow=args.follow)
    if args.follow or args.fresh or (args.sweep and args.then):
        raise UserError("--follow, --fresh, --sweep and --then are each without the others", "leave some of them out")
    if args.then:
        from forge_hpc.pipeline import submit_pipeline

        return submit_pipeline(request, args.then, dry_run=args.dry_run)
    from forge_hpc.sweep import submit_sweep

    return submit_sweep(request, args.sweep, at_once=args.at_once, dry_run=args.dry_run)

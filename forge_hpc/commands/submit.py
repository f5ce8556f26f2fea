"""``forge-hpc submit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.commands.arguments import add_cluster, add_follow, add_overrides
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
    add_overrides(parser, "such as trainer.optimizer.lr=1e-6")


def run(args: argparse.Namespace) -> int:
    request = Request(args.config, tuple(args.overrides), args.run_dir, args.nodes, args.cluster, args.site, args.name)
    return submit(request, dry_run=args.dry_run, fresh=args.fresh, follow=args.follow)

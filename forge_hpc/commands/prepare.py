"""``forge-hpc prepare``: what ``sbatch/common.sh`` asks in a job."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.commands.arguments import add_overrides
from forge_hpc.submission import PROJECT, Request, prepare_in_allocation


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", default="grpo", help="whose demo is the default configuration")
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument("--run-dir", type=Path, metavar="D")
    parser.add_argument("--site", metavar="NAME")
    parser.add_argument("--name")
    add_overrides(parser, "such as trainer.optimizer.lr=1e-6")


def run(args: argparse.Namespace) -> int:
    default = PROJECT / "configs" / args.recipe / "demo.yaml"
    request = Request(
        args.config, tuple(args.overrides), args.run_dir, site=args.site, name=args.name, default_config=default
    )
    print(prepare_in_allocation(request))
    return 0

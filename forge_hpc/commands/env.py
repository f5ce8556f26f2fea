"""``forge-hpc env``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.commands.arguments import add_overrides
from forge_hpc.config import UserError, check_environment, load_config
from forge_hpc.config.sources import run_source
from forge_hpc.environments.play import play


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration of a run with an environment")
    parser.add_argument("--prompt", type=int, default=0, metavar="N", help="the run's Nth prompt, from 0; default 0")
    parser.add_argument("--source", metavar="NAME", help="of a configuration with several `sources`")
    parser.add_argument("--held-out", action="store_true", help="of those of evaluation")
    add_overrides(parser, "such as environment.name=guessing")


def run(args: argparse.Namespace) -> int:
    if args.prompt < 0:
        raise UserError(f"--prompt is {args.prompt}", "count from 0")
    config = run_source(load_config(args.config, args.overrides), args.source)
    if config.environment.name is None:
        raise UserError("there is no environment", "name one: forge-hpc env environment.name=guessing")
    check_environment(config)
    return play(config, args.prompt, args.held_out)

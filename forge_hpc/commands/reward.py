"""``forge-hpc reward``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.config import UserError, load_config, validate
from forge_hpc.config.sources import run_source
from forge_hpc.rewards.score_file import score_files


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help='lines of {"prompt", "response", "target", …}')
    parser.add_argument("--config", type=Path, metavar="YAML", help="whose rewards; default: reward=[{name: math}]")
    parser.add_argument("--source", metavar="NAME", help="of a configuration with several `sources`")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    overrides = [word for word in args.files if "=" in word]
    files = [Path(word) for word in args.files if "=" not in word]
    if not files:
        raise UserError("no file is named", "forge-hpc reward FILE… [--config YAML] [key=value …]")
    default = [] if args.config else ["reward=[{name: math}]"]
    config = load_config(args.config, [*default, *overrides])
    validate(config)
    return score_files(files, run_source(config, args.source), args.json)

"""``forge-hpc fetch``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.commands.arguments import add_overrides


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration whose models and data are fetched")
    parser.add_argument("--run-dir", type=Path, metavar="D", help="a run: what it needs, at the commits it began with")
    parser.add_argument("--site", metavar="NAME", help="site profile; default $FORGE_HPC_SITE")
    for kind, what in (("model", "a judge that is served beside the run"), ("dataset", "one that your code loads")):
        parser.add_argument(
            f"--{kind}", action="append", default=[], metavar="NAME", help=f"also this {kind}: {what}; may be repeated"
        )
    add_overrides(parser, "such as model.path=OWNER/NAME")


def run(args: argparse.Namespace) -> int:
    from forge_hpc.hub.command import fetch

    return fetch(args.config, args.run_dir, args.overrides, args.site, args.model, args.dataset)

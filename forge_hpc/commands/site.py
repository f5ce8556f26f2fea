"""``forge-hpc site``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.config import UserError
from forge_hpc.slurm.site import sites_folder
from forge_hpc.slurm.site_init import find, profile


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("init",), help="init: write a profile from what Slurm says of this cluster")
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the profile; default the cluster's")
    parser.add_argument("--partition", metavar="P", help="the partition of your runs; default the one with GPUs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="another file, or - for the terminal")
    parser.add_argument("--force", action="store_true", help="write over a profile that is there")


def run(args: argparse.Namespace) -> int:
    found = find(args.partition)
    if str(args.output) == "-":
        print(profile(found), end="")
        return 0
    name = args.name or found.cluster
    file = args.output or sites_folder() / f"{name}.yaml"
    if file.exists() and not args.force:
        raise UserError(f"{file} is there already", "--force writes over it, --output - shows the new one")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(profile(found), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}", "--output FILE names another place") from None
    print(f"{file}\nread it, then: forge-hpc submit --site {name if args.output is None else file} --dry-run")
    return 0

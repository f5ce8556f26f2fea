"""``forge-hpc compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.commands.pages import write_page
from forge_hpc.observability.compare import as_json, compare, find_runs, render_comparison
from forge_hpc.run_dir import RunDir


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="runs, or folders of them")
    parser.add_argument("--json", action="store_true", help="the figures for programs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="table and curves as a page")


def run(args: argparse.Namespace) -> int:
    groups = compare(find_runs(map(RunDir, args.run_dirs)))
    print(as_json(groups) if args.json else render_comparison(groups))
    if args.html is None:
        return 0

    def render() -> str:
        from forge_hpc.observability.page.compared import render_comparison_page

        return render_comparison_page(groups)

    return write_page(args.html, render, is_asked_for=True, is_quiet=args.json)

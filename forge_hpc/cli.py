"""The command line: ``forge-hpc COMMAND``, or ``python -m forge_hpc.cli COMMAND``.

Exit codes: 0 done, 1 the run failed, 2 wrong usage or configuration. No torch is loaded here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn

from forge_hpc.config import UserError, print_error
from forge_hpc.supervisor.ending import Exit

_REFRESH_S = 2.0


class _Parser(argparse.ArgumentParser):
    """Errors in two lines, like all others."""

    def error(self, message: str) -> NoReturn:
        print_error(UserError(message, f"{self.prog} --help"))
        sys.exit(Exit.USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.umask(0o077)  # what a command writes lies in run directories, which are their owner's alone
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else Exit.USAGE
    name = arguments.pop(0)
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name}", f"commands: {', '.join(_PUBLIC)}")
        return COMMANDS[name](arguments)
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return Exit.CANCELLED
    except BrokenPipeError:  # `forge-hpc logs | head`
        sys.stderr.close()
        return 0


def _submit(argv: list[str]) -> int:
    """start a run: queue it on Slurm, or run it here"""
    from forge_hpc.submission import Request, submit

    parser = _parser("submit", _submit)
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration; default configs/grpo/demo.yaml")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes, over cluster.nodes; more than 1 means Slurm")
    parser.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm where it is")
    parser.add_argument("--site", metavar="NAME", help="site profile; default $FORGE_HPC_SITE")
    parser.add_argument("--name", help="name of the run, over name")
    parser.add_argument("--dry-run", action="store_true", help="print the job script and the node split, queue nothing")
    parser.add_argument("--run-dir", type=Path, metavar="D", help="run directory; default runs/NAME-TIMESTAMP")
    parser.add_argument("--follow", action="store_true", help="show the job's output until the run ends")
    parser.add_argument("--fresh", action="store_true", help="move a completed run in --run-dir aside first")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as trainer.optimizer.lr=1e-6")
    args = parser.parse_intermixed_args(argv)
    request = Request(args.config, tuple(args.overrides), args.run_dir, args.nodes, args.cluster, args.site, args.name)
    return submit(request, dry_run=args.dry_run, fresh=args.fresh, follow=args.follow)


def _resume(argv: list[str]) -> int:
    """go on with a run, or (--from) begin a new one from a checkpoint of it"""
    from forge_hpc.control import find_run
    from forge_hpc.files import is_there
    from forge_hpc.fork import parse_source
    from forge_hpc.submission import Request, submit

    parser = _run_parser("resume", _resume)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what may change: docs/configuration.md")
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
    parser.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto")
    parser.add_argument("--site", metavar="NAME", help="site profile; default $FORGE_HPC_SITE")
    parser.add_argument("--dry-run", action="store_true", help="print the job script, queue nothing")
    parser.add_argument("--follow", action="store_true", help="show the job's output until the run ends")
    args = parser.parse_intermixed_args(argv)
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


def _status(argv: list[str]) -> int:
    """state, step and heartbeat of a run"""
    from forge_hpc.control import find_run
    from forge_hpc.observability.report import render_status
    from forge_hpc.slurm.job import is_job_id, job_state

    args = _run_parser("status", _status).parse_args(argv)
    run_dir = find_run(args.run_dir)
    print(render_status(run_dir))
    status = run_dir.read_status()
    if status and is_job_id(status.job_id) and not status.is_terminal:
        state = job_state(status.job_id)
        print(f"{'Slurm':<10} {' '.join(state) if state else 'does not know the job any more'}")
    return 0


def _logs(argv: list[str]) -> int:
    """the end of a log of the newest start"""
    from forge_hpc.control import find_run, show_log

    parser = _run_parser("logs", _logs)
    parser.add_argument("--role", default="controller", help="controller, generator-0, trainer-0, slurm-JOBID, ...")
    parser.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="lines to begin with")
    parser.add_argument("--follow", action="store_true", help="show what is added until the run ends")
    args = parser.parse_args(argv)
    return show_log(find_run(args.run_dir), args.role, args.lines, args.follow)


def _watch(argv: list[str]) -> int:
    """status, curve and last steps, drawn again until the run ends"""
    from forge_hpc.control import Liveness, StatusReader, find_run
    from forge_hpc.observability.report import render_watch

    run_dir = find_run(_run_parser("watch", _watch).parse_args(argv).run_dir)
    liveness, seen = Liveness(run_dir), StatusReader(run_dir)
    clear = "\033[H\033[2J" if sys.stdout.isatty() else ""
    while True:
        has_moved, status = seen.moved(), seen.status()
        if has_moved:
            print(f"{clear}{render_watch(run_dir)}", flush=True)
        if status is None or status.is_terminal:
            return 0 if status and status.state == "completed" else 1
        if lost := liveness.lost(status):
            print(f"error: {lost}", file=sys.stderr)
            return 1
        time.sleep(_REFRESH_S)


def _cancel(argv: list[str]) -> int:
    """end a run and wait until it has ended"""
    from forge_hpc.control import cancel_run, find_run

    parser = _parser("cancel", _cancel)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")  # never a guess
    return cancel_run(find_run(parser.parse_args(argv).run_dir))


def _report(argv: list[str]) -> int:
    """what a run achieved and where its time went"""
    from forge_hpc.control import find_run
    from forge_hpc.observability.report import render_report

    print(render_report(find_run(_run_parser("report", _report).parse_args(argv).run_dir)))
    return 0


def _env(argv: list[str]) -> int:
    """play an environment by hand: you write the responses"""
    from forge_hpc.config import check_environment, load_config
    from forge_hpc.environments.play import play

    parser = _parser("env", _env)
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration of a run with an environment")
    parser.add_argument("--prompt", type=int, default=0, metavar="N", help="the run's Nth prompt, from 0; default 0")
    parser.add_argument("--held-out", action="store_true", help="of those of evaluation")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as environment.name=guessing")
    args = parser.parse_intermixed_args(argv)
    if args.prompt < 0:
        raise UserError(f"--prompt is {args.prompt}", "count from 0")
    config = load_config(args.config, args.overrides)
    if config.environment.name is None:
        raise UserError("there is no environment", "name one: forge-hpc env environment.name=guessing")
    check_environment(config)
    return play(config, args.prompt, args.held_out)


def _step(text: str) -> int | Literal["best"]:
    return "best" if text == "best" else int(text)


def _export(argv: list[str]) -> int:
    """write the model of a checkpoint for transformers and vLLM, also while the run goes on"""
    from forge_hpc.control import find_run
    from forge_hpc.export import export

    parser = _run_parser("export", _export)
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help="of this step, or best (checkpoint.best); default the newest one",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default RUN_DIR/exports/step-N")
    args = parser.parse_args(argv)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(Exit.TERMINATED)
    )  # so that nothing is left of an export that is ended
    print(export(find_run(args.run_dir), args.step, args.output))
    return 0


def _reward(argv: list[str]) -> int:
    """score a JSONL of prompts, responses and targets, without a run"""
    from forge_hpc.config import load_config, validate
    from forge_hpc.rewards.score_file import score_files

    parser = _parser("reward", _reward)
    parser.add_argument("files", nargs="+", metavar="FILE", help='lines of {"prompt", "response", "target", …}')
    parser.add_argument("--config", type=Path, metavar="YAML", help="whose rewards; default: reward=[{name: math}]")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_intermixed_args(argv)
    overrides = [word for word in args.files if "=" in word]
    files = [Path(word) for word in args.files if "=" not in word]
    if not files:
        raise UserError("no file is named", "forge-hpc reward FILE… [--config YAML] [key=value …]")
    default = [] if args.config else ["reward=[{name: math}]"]
    config = load_config(args.config, [*default, *overrides])
    validate(config)
    return score_files(files, config, args.json)


def _doctor(argv: list[str]) -> int:
    """whether this machine has what a run needs"""
    from forge_hpc.doctor import doctor

    _parser("doctor", _doctor).parse_args(argv)
    return doctor()


def _prepare(argv: list[str]) -> int:
    """(sbatch/common.sh) in a job: make the run directory, print the command that starts the run"""
    from forge_hpc.submission import PROJECT, Request, prepare_in_allocation

    parser = _parser("prepare", _prepare)
    parser.add_argument("--recipe", metavar="NAME", default="grpo", help="whose demo is the default configuration")
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument("--run-dir", type=Path, metavar="D")
    parser.add_argument("--site", metavar="NAME")
    parser.add_argument("--name")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    default = PROJECT / "configs" / args.recipe / "demo.yaml"
    request = Request(
        args.config, tuple(args.overrides), args.run_dir, site=args.site, name=args.name, default_config=default
    )
    print(prepare_in_allocation(request))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "watch": _watch,
    "cancel": _cancel,
    "resume": _resume,
    "report": _report,
    "reward": _reward,
    "env": _env,
    "export": _export,
    "doctor": _doctor,
    "prepare": _prepare,
}
_PUBLIC = [name for name in COMMANDS if name != "prepare"]


def _overview() -> str:
    lines = ["usage: forge-hpc COMMAND [...]", ""]
    lines += [f"  {name:<8} {COMMANDS[name].__doc__}" for name in _PUBLIC]
    lines += ["", "RUN_DIR defaults to the newest run under runs/. forge-hpc COMMAND --help says more."]
    return "\n".join(lines)


def _parser(name: str, command: Callable[[list[str]], int]) -> _Parser:
    return _Parser(prog=f"forge-hpc {name}", description=command.__doc__, allow_abbrev=False)


def _run_parser(name: str, command: Callable[[list[str]], int]) -> _Parser:
    parser = _parser(name, command)
    parser.add_argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="default: the newest under runs/")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""A sweep: one configuration with several values of some keys, a run for each combination.

    forge-hpc submit --sweep trainer.optimizer.lr=1e-6,3e-6 seed=0,1,2      6 runs, seed varies fastest

On Slurm they are the tasks of one array, each preempted, requeued and cancelled by itself; elsewhere they run one after
another. Nothing of a sweep is in its runs: each is what the same configuration alone would be. With ``--one-base`` they
are the LoRA adapters of one run (``config.adapters``). No torch here.
"""

from __future__ import annotations

import io
import itertools
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from forge_hpc.config import UserError
from forge_hpc.config.load import override_of
from forge_hpc.run_dir import make_private_dir
from forge_hpc.several import check_unused, name_of, run_in_turn, say_warnings
from forge_hpc.submission import (
    Checked,
    Place,
    Request,
    check_run,
    check_start,
    default_run_dir,
    find_place,
    look_at_queue,
    tool,
)
from forge_hpc.sweep_dir import SweepDir

_JOB_KEYS = ("name", "slurm.", "cluster.nodes", "cluster.gpus_per_node", "cluster.spare_nodes")


def combinations(sweep: Sequence[str]) -> list[list[str]]:
    """The overrides of each run: every value of each argument with every one of the others, the last varying fastest.

    The values of an argument are the items of a YAML list, without its brackets: a value that holds commas is in quotes
    or brackets of its own.

    Example:
        combinations(["seed=0,1", "evaluation.k=[1, 8]"])  # [["seed=0", "evaluation.k=[1, 8]"], ["seed=1", …]]

    Raises:
        UserError: an argument has no values, is twice there, or is of what all tasks of an array have in common.
    """
    axes: dict[str, list[str]] = {}
    for argument in sweep:
        key, _, text = argument.partition("=")
        values = _values(argument, text)
        if not values or not key:
            raise UserError(f"--sweep {argument}: no values", "write key=value,value, such as seed=0,1,2")
        if key in axes:
            raise UserError(f"--sweep has {key} twice", f"write all values at once: {key}={','.join(values)},…")
        if key.startswith(_JOB_KEYS) and len(values) > 1:
            raise UserError(
                f"--sweep {argument}: the runs of a sweep are one array, and have their job in common",
                "submit a sweep for each value",
            )
        axes[key] = [f"{key}={value}" for value in values]
    return [list(run) for run in itertools.product(*axes.values())]


def with_adapters(request: Request, sweep: Sequence[str]) -> Request:
    """One run that trains an adapter for each combination, on one base. Raises UserError as ``combinations``."""
    items = [shlex.join(overrides) for overrides in combinations(sweep)]
    return replace(request, overrides=(*request.overrides, override_of("trainer.lora.sweep", items)))


def _values(argument: str, text: str) -> list[str]:
    """The items as they were written: 1e-6 stays 1e-6, and quotes stay."""
    listed = f"[{text}]"
    try:
        node = yaml.compose(listed, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"--sweep {argument}: not values between commas", "put a value that holds commas into quotes")
    return [listed[item.start_mark.index : item.end_mark.index].strip() for item in node.value]


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, all of them checked, and nothing of them written yet."""

    directory: SweepDir
    overrides: list[list[str]]
    runs: list[Checked]

    def make(self) -> None:
        """Create the directories of all runs."""
        for run in self.runs:
            run.make()
            make_private_dir(run.run_dir.logs)  # Slurm opens the output of a task there
        self.directory.write(self.overrides)


def submit_sweep(
    request: Request, arguments: Sequence[str], *, at_once: int | None = None, dry_run: bool = False
) -> int:
    """Queue the runs as one array, or run them here one after another; the exit code for the shell.

    Args:
        request: what all runs have in common; ``run_dir`` is the sweep's directory.
        arguments: of ``--sweep``, such as ``seed=0,1,2``.
        at_once: run no more than so many at the same time.

    Raises:
        UserError: one of the runs could not start; then nothing is created or queued.
    """
    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once {at_once}", "give 1 or more")
    place = find_place(request, dry_run=dry_run)
    sweep = _check(request, place, combinations(arguments))
    say_warnings(sweep.runs[:1])  # the others have the same job
    if dry_run:
        return _show(request, place, sweep, at_once)
    options = check_start(request, place, sweep.runs[0])
    sweep.make()
    if not place.on_slurm:
        print(f"sweep          {sweep.directory}  ({len(sweep.runs)} runs, one after another)", flush=True)
        titles = [" ".join(overrides) for overrides in sweep.overrides]
        return run_in_turn(place, list(zip(titles, sweep.runs, strict=True)), is_chain=False)
    from forge_hpc.before_queue import starts_later
    from launchers.slurm import SweepExecutor

    try:
        cfgs = [run.cfg for run in sweep.runs]
        job_id = SweepExecutor(cfgs, sweep.directory.path, at_once, options).submit_run()
    except UserError:
        shutil.rmtree(sweep.directory.path)
        raise
    for number, run in enumerate(sweep.runs):
        run.is_job(f"{job_id}_{number}")
    print(f"job array      {job_id}\nsweep          {sweep.directory}")
    print(_table(sweep, job_id))
    if waits := starts_later(options, job_id):
        print(waits)
    first = shlex.quote(str(sweep.runs[0].run_dir))
    print(f"next           {tool()} watch {first}")
    print(f"               {tool()} compare {shlex.quote(str(sweep.directory))}")
    print(f"               {tool()} cancel {job_id}")
    return 0


def _check(request: Request, place: Place, overrides: list[list[str]]) -> Sweep:
    first = replace(request, overrides=(*request.overrides, *overrides[0]))
    directory = SweepDir(request.run_dir or default_run_dir(name_of(first)))
    check_unused(directory.path, "a sweep")
    if place.on_slurm and len(overrides) > (limit := _max_array_size()):
        raise UserError(
            f"{len(overrides)} runs, and an array of this cluster has {limit} tasks at most (MaxArraySize)",
            "sweep over fewer values, or submit several sweeps",
        )
    runs = []
    for number, changes in enumerate(overrides):
        run_dir = directory.run(number)
        asked = replace(request, run_dir=run_dir.path, overrides=(*request.overrides, *changes))
        with redirect_stderr(io.StringIO() if number else sys.stderr):  # what is to be said of all is said once
            runs.append(check_run(asked, place, place.configuration(asked), run_dir))
    if runs[0].cfg.slurm.extra.get("array"):
        raise UserError("slurm.extra.array: a sweep is an array itself", "leave it out; --at-once N is its %N")
    return Sweep(directory, overrides, runs)


def _max_array_size() -> int:
    from forge_hpc.slurm.client import PATIENT_S, ask, at_a_terminal
    from forge_hpc.slurm.facts import word

    with at_a_terminal("try `sinfo`"):
        said = word(ask("scontrol", "show", "config", timeout_s=PATIENT_S), "MaxArraySize")
    return int(said) if said.isdigit() else 1001  # Slurm's own default


def _show(request: Request, place: Place, sweep: Sweep, at_once: int | None) -> int:
    from launchers.slurm import SweepExecutor

    if place.as_jobs:
        print(SweepExecutor([run.cfg for run in sweep.runs], sweep.directory.path, at_once).script())
        if options := request.queueing.options():
            print(f"# sbatch {shlex.join(options)}")
    print(_table(sweep))
    print(sweep.runs[0].outlook.table("# "))
    look_at_queue(request, place, sweep.runs[0])
    print("Dry run: nothing was created or queued.", file=sys.stderr)
    return 0


def _table(sweep: Sweep, job_id: str | None = None) -> str:
    """A line a run: its job, its directory, and what it varies."""
    lines = []
    for number, (run, overrides) in enumerate(zip(sweep.runs, sweep.overrides, strict=True)):
        job = f"{job_id}_{number}  " if job_id else ""
        lines.append(f"{job}{_shown(run.run_dir.path)}  {' '.join(overrides)}")
    return "\n".join(lines)


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

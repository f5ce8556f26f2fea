"""A pipeline: configurations one after another, each beginning with the model that the one before has trained.

    forge-hpc submit --config sft.yaml --then grpo.yaml --then eval.yaml

On Slurm all are queued at once, each waiting for the one before to end well; elsewhere they run one after another.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from forge_hpc.config import UserError
from forge_hpc.config.recipes import needs_of
from forge_hpc.run_dir import RunDir
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


def submit_pipeline(request: Request, then: Sequence[Path], *, dry_run: bool = False) -> int:
    """Queue all stages, or run them here; the exit code for the shell.

    Args:
        request: the first stage; its overrides are for all of them, its ``run_dir`` is the directory of all.
        then: configurations of the others. Their ``model.path`` is the export of the stage before.

    Raises:
        UserError: one of them could not start; then nothing is created or queued.
    """
    place = find_place(request, dry_run=dry_run)
    directory = request.run_dir or default_run_dir(name_of(request))
    check_unused(directory, "a pipeline")
    stages = _check(request, place, [request.config, *then], directory)
    say_warnings(stages)
    titles = [f"{stage.cfg.recipe}, model.path={stage.cfg.model.path}" for stage in stages]
    if dry_run:
        return _show(request, place, stages, titles)
    options = [check_start(request, place, stage) for stage in stages]
    if place.on_slurm:
        return _queue(stages, options[0], titles, directory)
    for stage in stages:
        stage.make()
    return run_in_turn(place, list(zip(titles, stages, strict=True)), is_chain=True)


def _check(request: Request, place: Place, configs: Sequence[Path | None], directory: Path) -> list[Checked]:
    """A later model is not there yet: its stage is checked with the first one's, which it is another version of."""
    stages: list[Checked] = []
    model, there = "", ""
    for number, config in enumerate(configs, 1):
        asked = replace(request, config=config, run_dir=None)
        cfg = place.configuration(asked)
        if model:
            cfg.model.path = there
        run_dir = RunDir(directory / f"{number}-{cfg.name}")
        stage = check_run(asked, place, cfg, run_dir)
        there = there or _first_model(stage)
        if model:
            cfg.model.path = model
        if needs_of(cfg).trains:
            model = str(run_dir.export)
        elif number < len(configs) and not model:
            raise UserError(
                f"{config} trains no model that the next stage could begin with", "begin with one that does"
            )
        stages.append(stage)
    return stages


def _first_model(stage: Checked) -> str:
    return stage.warm.model.path if stage.warm is not None else stage.cfg.model.path


def _queue(stages: Sequence[Checked], options: Sequence[str], titles: Sequence[str], directory: Path) -> int:
    from forge_hpc.before_queue import starts_later
    from forge_hpc.slurm.job import cancel_job

    jobs: list[str] = []
    try:
        for stage in stages:
            jobs.append(stage.queue(options if not jobs else [f"--dependency=afterok:{jobs[-1]}"]))
    except UserError:
        for job_id in jobs:
            cancel_job(job_id)
        shutil.rmtree(directory)
        raise
    for job_id, stage, title in zip(jobs, stages, titles, strict=True):
        print(f"job {job_id}  {stage.run_dir}  {title}")
    if waits := starts_later(options, jobs[0]):
        print(waits)
    print(f"next           {tool()} watch {shlex.quote(str(stages[0].run_dir))}")
    return 0


def _show(request: Request, place: Place, stages: Sequence[Checked], titles: Sequence[str]) -> int:
    from launchers.slurm import RunExecutor

    for number, (stage, title) in enumerate(zip(stages, titles, strict=True)):
        print(f"# == {stage.run_dir}  {title}")
        if place.as_jobs:
            print(RunExecutor(stage.cfg, stage.run_dir.path).script())
            waits = ["--dependency=afterok:(the job above)"] if number else request.queueing.options()
            print(f"# sbatch {shlex.join(waits)}")
        print(stage.outlook.table("# "))
        look_at_queue(request, place, stage, waits=number > 0)
    print("Dry run: nothing was created or queued.", file=sys.stderr)
    return 0

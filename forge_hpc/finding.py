"""Which runs somebody means who names a run directory, a job of Slurm, or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from forge_hpc.config.errors import UserError
from forge_hpc.files import Look, is_there, look, reading
from forge_hpc.run_dir import RunDir, Status
from forge_hpc.slurm.client import PATIENT_S, SlurmRefused, ask, is_unknown
from forge_hpc.slurm.facts import JobFacts
from forge_hpc.slurm.job import is_job_id
from forge_hpc.sweep_dir import SweepDir

RUNS = Path("runs")
"""Where runs lie unless somebody says otherwise."""


def find_run(what: Path | None) -> RunDir:
    """The run in the directory ``what``, that of the job ``what``, or where it is None the newest under ``runs/``.

    Raises:
        UserError: there is no run, or there are several.
    """
    if what is None:
        return _newest()
    runs = find_runs(what)
    if len(runs) > 1:
        raise UserError(
            f"{'' if is_there(what) else 'job '}{what} has {len(runs)} runs", f"name one of them, such as {runs[0]}"
        )
    return runs[0]


def find_runs(what: Path) -> list[RunDir]:
    """The same for those who take several: a sweep, and its job, have a run each task.

    Raises:
        UserError: there is no run.
    """
    if is_job_id(str(what)) and not is_there(what):
        return _of_job(str(what))
    run_dir = RunDir(what)
    if run_dir.has_config or run_dir.read_status() is not None:
        return [run_dir]
    sweep = SweepDir(what)
    if sweep.exists and (runs := [run for run in sweep.runs if run.has_config or run.read_status() is not None]):
        return runs
    hint = "a run directory holds config.yaml and status.json"
    with suppress(UserError, OSError):
        hint = f"it is a folder of runs, such as {runs_in(what)[0]}"
    raise UserError(f"no run in {run_dir}", hint)


def runs_in(folder: Path) -> list[RunDir]:
    """The runs whose directories lie in ``folder``, or there in that of a sweep or a pipeline: those that wrote their
    status last first.

    Raises:
        UserError: there is none, or the folder is another user's.
    """
    with reading(folder):
        folders = list(folder.iterdir()) if is_there(folder) and folder.is_dir() else []
    found = _statuses(folders)
    for several in [path for path in folders if path not in found]:
        with suppress(PermissionError, NotADirectoryError, FileNotFoundError):  # another user's, a file, a dead link
            found |= _statuses(several.iterdir())
    if not found:
        raise UserError(f"no run in {folder}/", "name the folder that run directories lie in, or a run directory")
    return [RunDir(path) for path in sorted(found, key=lambda path: -found[path])]


def together(runs: Sequence[RunDir], folder: Path) -> list[RunDir]:
    """Those of a sweep or a pipeline in ``folder`` in the order of their numbers, where the one of them stands that
    stands first."""
    several: dict[Path, list[RunDir]] = {}
    for run in runs:
        parent = run.path.parent
        several.setdefault(run.path if parent == RunDir(folder).path else parent, []).append(run)
    return [run for group in several.values() for run in sorted(group, key=_number)]


def _number(run: RunDir) -> tuple[int, str]:
    digits = re.match(r"\d*", run.name)
    return int(digits[0] or 0) if digits else 0, run.name


def _statuses(folders: Iterable[Path]) -> dict[Path, int]:
    """Those that are runs, each with the time at which it wrote its status last."""
    looks = ((path, _look(path / "status.json")) for path in folders)
    return {path: status.mtime_ns for path, status in looks if status is not None}


def _look(path: Path) -> Look | None:
    try:
        return look(path)
    except (PermissionError, NotADirectoryError):  # another user's run, a file
        return None


def _newest() -> RunDir:
    try:
        return runs_in(RUNS)[0]
    except UserError:
        raise UserError("no run directory given, and no run in runs/", "name one: forge-hpc status RUN_DIR") from None


def _of_job(job_id: str) -> list[RunDir]:
    """Among those under ``runs/``, else as the job says: its output is in ``RUN_DIR/logs``, its script has a
    ``--run-dir``, or it lies in ``runs/`` where the job was submitted."""
    runs = list(_runs_here())
    job = re.compile(rf"{re.escape(job_id)}([_+]\d+)?")
    if found := [run for run in runs if (status := _status(run)) and job.fullmatch(status.job_id or "")]:
        return sorted(found, key=lambda run: run.name)
    if found := [run for run in runs if any(run.logs.glob(f"{job_id}.*"))]:  # an earlier one of the run
        return found
    try:
        facts = JobFacts.parse(ask("scontrol", "show", "job", job_id, timeout_s=PATIENT_S), job_id)
    except SlurmRefused as refused:
        why = "and Slurm does not know it" if is_unknown(refused) else f"and {refused}"
        raise UserError(f"no run of job {job_id} in runs/, {why}", "name its run directory") from None
    places = [Path(facts.said.get("StdOut", "")).parent.parent]
    work_dir = Path(facts.said.get("WorkDir", "."))
    places += [work_dir / path for path in re.findall(r"--run-dir[ =](\S+)", facts.said.get("Command", ""))]
    places += work_dir.joinpath(RUNS).glob(f"*-{facts.job_id}")
    for place in places:
        if (run_dir := RunDir(place)).has_config:
            return [run_dir]
    raise UserError(f"no run of job {job_id} in runs/", "name its run directory: forge-hpc status RUN_DIR")


def _runs_here() -> Iterator[RunDir]:
    try:
        yield from runs_in(RUNS)
    except UserError:
        return


def _status(run_dir: RunDir) -> Status | None:
    try:
        return run_dir.read_status()
    except UserError:
        return None

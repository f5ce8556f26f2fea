"""A line for each of many runs, from the ends of their files and one question to Slurm (no torch).

``overview(run_dirs)`` is what ``forge-hpc status --all`` shows: cheap enough for hundreds of runs on a shared file
system, which is asked for three small files each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.observability.console import format_duration
from forge_hpc.observability.terminal import Column, fitted
from forge_hpc.run_dir import RunDir, Status
from forge_hpc.slurm.client import SlurmAbsent, SlurmRefused
from forge_hpc.slurm.job import is_job_id
from forge_hpc.slurm.queue import QueuedJob, queued_jobs

SILENT_S = 180.0
"""A run whose heartbeat is older than this has probably died without a word."""
_NEW_S = 60.0
"""A job that was queued so lately may not have been in Slurm's answer yet."""
_LAST_STEPS = 5
_READERS = 16
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class RunLine:
    """What is said of a run in one line."""

    run: str
    """Its directory."""
    state: str
    """As in ``status.json``; ``unreadable`` where that is damaged, or another user's."""
    lost: str | None
    """Where it has died without a word, and its state is no end: how that is seen."""
    step: int
    total_steps: int | None
    reward: float | None
    """``reward/mean`` over the last five steps."""
    restarts: int
    job_id: str | None
    slurm_state: str | None
    """None outside Slurm, and where Slurm does not know the job any more, or was not asked."""
    waits_for: str | None
    """Of a job that waits: Slurm's reason, and when it is expected to start."""
    nodes: int | None
    time_left_s: float | None
    """Until the job's walltime; None: no limit, or not known."""
    heartbeat_age_s: float | None
    """Seconds since the last sign of life."""
    message: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def overview(run_dirs: Sequence[RunDir]) -> tuple[list[RunLine], str | None]:
    """A line each, in their order; and why Slurm could not be asked, where there are jobs to ask it for."""
    with ThreadPoolExecutor(_READERS) as pool:  # it is the file server that takes the time
        found = list(pool.map(_read, run_dirs))
    jobs, problem = _ask_slurm(files.status for files in found)
    return [_line(files, jobs) for files in found], problem


def overview_table(lines: Sequence[RunLine], width: int | None, folders: Sequence[Path] = ()) -> list[str]:
    """The lines as a table of at most ``width`` characters. A run in the directory of a sweep is named as it lies in
    one of the ``folders``."""
    places = {RunDir(folder).path for folder in folders}
    columns = (
        Column("run", right=False),
        Column("state", right=False),
        Column("step"),
        Column("reward", 2),
        Column("restarts", 6),
        Column("job", 5),
        Column("nodes", 4),
        Column("left", 3),
        Column("seen", 1),
    )
    return fitted(columns, [_cells(line, places) for line in lines], width)


def state_text(line: RunLine) -> str:
    """The state as a table shows it: what Slurm knows better, and whether the run has died."""
    if line.lost:
        return f"{line.state}, lost"
    if line.slurm_state and line.waits_for:
        return f"{line.state}, queued"
    return line.state


def _cells(line: RunLine, places: Collection[Path]) -> list[str]:
    age, path = line.heartbeat_age_s, Path(line.run)
    return [
        f"{path.parent.name}/{path.name}" if path.parent.parent in places else path.name,
        state_text(line),
        f"{line.step}/{line.total_steps}" if line.total_steps else str(line.step) if line.total_steps is None else "",
        "" if line.reward is None else f"{line.reward:.3f}",
        str(line.restarts) if line.restarts else "",
        line.job_id or "",
        str(line.nodes or ""),
        "" if line.time_left_s is None else format_duration(line.time_left_s),
        "" if age is None else f"{format_duration(age)} ago",
    ]


@dataclass(frozen=True, slots=True)
class _Files:
    """What a run's files say."""

    run_dir: RunDir
    status: Status | None
    problem: str
    """Why ``status`` is None."""
    reward: float | None
    nodes: int | None


def _read(run_dir: RunDir) -> _Files:
    try:
        status, problem = run_dir.read_status(), "there is no status.json"
        last = tail_jsonl(run_dir.metrics, _LAST_STEPS)
        begun = [record for record in tail_jsonl(run_dir.path / "starts.jsonl", 8) if record.get("event") == "begin"]
    except UserError as error:
        return _Files(run_dir, None, error.message, None, None)
    except OSError as error:
        return _Files(run_dir, None, f"{error.filename}: {error.strerror}", None, None)
    rewards = [record["reward/mean"] for record in last if isinstance(record.get("reward/mean"), int | float)]
    nodes = begun[-1].get("nodes") if begun else None
    return _Files(run_dir, status, problem, fmean(rewards) if rewards else None, nodes)


def _ask_slurm(statuses: Iterable[Status | None]) -> tuple[dict[str, QueuedJob] | None, str | None]:
    """Jobs by id, None where Slurm could not be asked, and why not."""
    open_runs = [status for status in statuses if status is not None and not status.is_terminal]
    ids = [status.job_id for status in open_runs if is_job_id(status.job_id)]
    if not ids:
        return {}, None
    try:
        return queued_jobs(ids), None
    except SlurmAbsent:
        return None, "there is no squeue here: what Slurm says of the jobs is left out"
    except SlurmRefused as refused:
        return None, f"what Slurm says of the jobs is left out: {refused}"


def _line(files: _Files, jobs: dict[str, QueuedJob] | None) -> RunLine:
    run_dir, status = files.run_dir, files.status
    if status is None:
        return RunLine(
            str(run_dir), "unreadable", None, 0, None, None, 0, None, None, None, None, None, None, files.problem
        )
    on_slurm = is_job_id(status.job_id) and not status.is_terminal
    job = (jobs or {}).get(status.job_id or "") if on_slurm else None
    age_s = max(0.0, time.time() - status.heartbeat) if status.heartbeat else None
    lost = None
    if on_slurm and jobs is not None:
        if (job is None or not job.is_active) and (age_s or 0.0) > _NEW_S:
            lost = f"job {status.job_id} is {job.state if job else 'not known to Slurm any more'}"
            now = _read(run_dir)  # it may have ended, or come back, since
            if now.status is not None and (now.status.is_terminal or now.status.job_id != status.job_id):
                return _line(now, jobs)
    elif not status.is_terminal and status.state not in ("pending", "preempted") and (age_s or 0.0) > SILENT_S:
        lost = "silent: has it died?"
    waits = job is not None and job.waits
    return RunLine(
        run=str(run_dir),
        state=status.state,
        lost=lost,
        step=status.step,
        total_steps=status.total_steps,
        reward=files.reward,
        restarts=status.restarts,
        job_id=status.job_id,
        slurm_state=job.state if job else None,
        waits_for=job.waits_for() if job and waits else None,
        nodes=job.num_nodes if job and job.num_nodes else files.nodes,
        time_left_s=job.time_left_s if job and job.is_active and not waits else None,
        heartbeat_age_s=round(age_s, 1) if age_s is not None else None,
        message=status.message,
    )


def tail_jsonl(path: Path, num: int) -> list[dict[str, Any]]:
    """The last ``num`` objects of a JSONL file, without reading the rest; none where there is no file. Torn lines are
    left out."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return []
    with os.fdopen(fd, "rb") as file:
        place, data = file.seek(0, os.SEEK_END), b""
        while place > 0 and data.count(b"\n") <= num:
            size = min(_BLOCK, place)
            place -= size
            file.seek(place)
            data = file.read(size) + data
    lines = data.split(b"\n")[:-1]  # what follows the last line break is still being written
    records = []
    for line in lines[-num:] if place == 0 else lines[1:][-num:]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records

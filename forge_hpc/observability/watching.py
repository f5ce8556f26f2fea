"""A run as it stands now, for ``forge-hpc status`` and ``forge-hpc watch`` (no torch).

``render_status`` is a few lines, ``render_watch`` a screen: how far the run is, what it learns, where the time goes and
what happened last; of a job that waits, why. Both return a string without a final newline.
"""

from __future__ import annotations

import re
import time
from calendar import timegm
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.joining.jobs import lending_text
from forge_hpc.observability.console import format_duration, tokens_per_second
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.overview import RunLine, overview, tail_jsonl
from forge_hpc.observability.report import sparkline, total_steps
from forge_hpc.observability.summary import series
from forge_hpc.observability.terminal import Column, cut, fitted
from forge_hpc.run_dir import RunDir

_LATELY = 20
"""Steps that speed, shares of time and the time left are taken from."""
_NUM_PARTS = 4
_NUM_EVENTS = 5
_LABEL = 11
_LOG_BLOCK = 1 << 16
_WARNING = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d+Z (?:WARNING|ERROR|CRITICAL) +\S+ \S+: (?:\[actor=\S+\] )?(.*)"
)


def render_status(run_dir: RunDir, line: RunLine | None = None) -> str:
    """State, job, step, sign of life, reward and speed of a run.

    Args:
        line: of ``overview``, where somebody has asked already.

    Raises:
        UserError: there is no run in the directory.
    """
    line = _with_total(run_dir, line or _overview_of(run_dir))
    lines = [("run", f"{run_dir.name}  {run_dir}"), ("state", f"{line.state}  {line.message}".rstrip())]
    if line.job_id:
        lines.append(("job", f"{line.job_id}{_job_text(line)}"))
        if line.waits_for:
            lines.append(("waits for", line.waits_for))
    elif line.nodes is not None and line.nodes > 1:
        lines.append(("nodes", str(line.nodes)))
    status = run_dir.read_status()
    if status is not None and not status.is_terminal and (lent := lending_text(run_dir, status.lent)) is not None:
        lines.append(("lent", lent))
    if line.total_steps != 0:
        lines.append(("step", f"{_steps(line)}  restarts {line.restarts}"))
    lines.append(("heartbeat", _sign_of_life(line)))
    last = tail_jsonl(run_dir.metrics, _LATELY)
    if line.reward is not None:
        lines.append(("reward", f"{line.reward:.3f}  {_mean_of(series(last[-5:], 'reward/mean'))}"))
    elif losses := series(last[-5:], "loss"):
        lines.append(("loss", f"{fmean(losses):.3f}  {_mean_of(losses)}"))
    if line.total_steps != 0 and (evaluations := tail_jsonl(run_dir.evaluations, 1)):
        lines.append(("held out", _evaluated(evaluations[-1])))
    if last:
        lines.append(("speed", _speed(last)))
        lines += [("served", text) for text in _served(last[-1])]
    return "\n".join(f"{name:<{_LABEL}}{text}" for name, text in lines)


def _evaluated(record: Mapping[str, Any]) -> str:
    """The newest evaluation in short: the accuracy of all prompts, and of each of several sets."""
    shown = [key for key in record if key.rpartition("/")[2] in ("accuracy", "loss") and record[key] is not None]
    return "  ".join([*(f"{key} {record[key]:.3f}" for key in shown), f"after step {record['step']}"])


def render_watch(run_dir: RunDir, num_steps: int = 8, width: int | None = None) -> str:
    """``render_status``, how far the run is, its curve, where the time goes, the last ``num_steps`` steps and the last
    events, in lines of at most ``width`` characters."""
    line, records = _with_total(run_dir, _overview_of(run_dir)), list(read_jsonl(run_dir.metrics))
    lines = render_status(run_dir, line).splitlines()
    if records:
        lines += ["", *_progress(line, records, width), *_curves(records, width), *_time(records)]
        lines += ["", *_steps_table(records[-num_steps:], width)]
    if events := _events(run_dir):
        lines += ["", *events]
    return "\n".join(cut(text, width) for text in lines)


def _overview_of(run_dir: RunDir) -> RunLine:
    if run_dir.read_status() is None:
        raise UserError(f"no run in {run_dir}: it has no status.json", "give a run directory, such as runs/demo")
    [line], _ = overview([run_dir])
    return line


def _with_total(run_dir: RunDir, line: RunLine) -> RunLine:
    status = run_dir.read_status()
    return line if status is None else replace(line, total_steps=total_steps(run_dir, status))


def _steps(line: RunLine) -> str:
    return f"{line.step}/{line.total_steps}" if line.total_steps else str(line.step)


def _job_text(line: RunLine) -> str:
    parts = [line.slurm_state or "", f"{line.nodes} node{'s' * (line.nodes != 1)}" if line.nodes else ""]
    parts.append(f"{format_duration(line.time_left_s)} left" if line.time_left_s is not None else "")
    said = ", ".join(filter(None, parts))
    return f"  {said}" if said else ""


def _sign_of_life(line: RunLine) -> str:
    said = f"{format_duration(line.heartbeat_age_s or 0.0)} ago"
    return said if line.lost is None else f"{said}  ({line.lost}; forge-hpc logs, forge-hpc resume)"


def _mean_of(values: Sequence[float]) -> str:
    return f"mean of the last {len(values)} steps" if len(values) > 1 else "last step"


def _speed(records: Sequence[dict[str, Any]]) -> str:
    seconds = sum(series(records, "time/step_s"))
    tokens = sum(tokens_per_second(record) * (record.get("time/step_s") or 0.0) for record in records)
    if not seconds:
        return "not measured"
    step_s = seconds / len(records)
    return f"{tokens / seconds:,.0f} tokens/s  {step_s:.3g} s a step  last {len(records)} steps"


def _served(record: Mapping[str, Any]) -> list[str]:
    """What each model of ``served`` was asked in a step."""
    found = []
    for key in record:
        if match := re.fullmatch(r"served/(\w+)/requests", key):
            num = sum(record[f"served/{match[1]}/{kind}_tokens"] for kind in ("prompt", "generated"))
            found.append(f"{match[1]}  {record[key]:,.0f} requests  {num:,.0f} tokens  last step")
    return found


def _progress(line: RunLine, records: Sequence[dict[str, Any]], width: int | None) -> list[str]:
    if not line.total_steps:
        return []
    share = min(1.0, line.step / line.total_steps)
    room = min(30, max(10, (width or 80) - 50))
    bar = "█" * round(share * room) + "░" * (room - round(share * room))
    last = records[-_LATELY:]
    gaps = [record["wall_time"] for record in last if isinstance(record.get("wall_time"), int | float)]
    left = ""
    if len(gaps) > 1 and line.state == "running":
        left_s = (line.total_steps - line.step) * (gaps[-1] - gaps[0]) / (len(gaps) - 1)
        left = f"  about {format_duration(left_s)} to go"
    return [f"{'progress':<{_LABEL}}{bar} {_steps(line)}  {share:.0%}{left}"]


def _curves(records: Sequence[dict[str, Any]], width: int | None) -> list[str]:
    room = min(60, max(10, (width or 100) - 35))
    lines = []
    for key, name in (("reward/mean", "reward"), ("loss", "loss"), ("entropy/mean", "entropy")):
        if values := series(records, key):
            curve = sparkline(values, room)
            lines.append(f"{name:<{_LABEL}}{curve}  {values[-1]:.3g}  ({min(values):.3g} to {max(values):.3g})")
    return lines


def _time(records: Sequence[dict[str, Any]]) -> list[str]:
    """The largest parts of the last steps. They overlap: what is generated while something trains is in both."""
    last = records[-_LATELY:]
    whole = sum(series(last, "time/step_s"))
    keys = {key for record in last for key in record if re.fullmatch(r"time/\w+_s", key)} - {"time/step_s"}
    parts = sorted(((sum(series(last, key)), key) for key in keys), reverse=True)[:_NUM_PARTS]
    if not whole or not parts:
        return []
    said = ", ".join(f"{key[5:-2].replace('_', ' ')} {seconds / whole:.0%}" for seconds, key in parts if seconds)
    return [f"{'time':<{_LABEL}}{said} of a step"]


def _steps_table(records: Sequence[dict[str, Any]], width: int | None) -> list[str]:
    keys = [key for key in ("reward/mean", "loss", "grad_norm", "entropy/mean") if series(records, key)]
    ranks = {"reward/mean": 0, "loss": 1, "entropy/mean": 4, "grad_norm": 5}
    columns = [Column("step"), *(Column(key, ranks[key]) for key in keys), Column("tokens/s", 2), Column("seconds", 3)]
    rows = []
    for record in records:
        cells = ["" if record.get(key) is None else f"{record[key]:.4g}" for key in keys]
        seconds = "" if record.get("time/step_s") is None else f"{record['time/step_s']:.3g}"
        rows.append([str(record["step"]), *cells, f"{tokens_per_second(record):,.0f}", seconds])
    return fitted(columns, rows, width)


def _events(run_dir: RunDir) -> list[str]:
    """The last starts, ends and changes, and what the controller of the newest start has warned of."""
    found = [(float(record.get("time", 0.0)), _start_text(record)) for record in _starts(run_dir)]
    found += _warnings(run_dir)
    lines = []
    for moment, text in sorted(found)[-_NUM_EVENTS:]:
        lines.append(f"{time.strftime('%d %b %H:%M:%S', time.localtime(moment))}  {text}")
    return lines


def _starts(run_dir: RunDir) -> list[dict[str, Any]]:
    return [record for record in tail_jsonl(run_dir.path / "starts.jsonl", _NUM_EVENTS) if "event" in record]


def _start_text(record: dict[str, Any]) -> str:
    if record["event"] == "begin":
        job = f", job {record['job_id']}" if record.get("job_id") else ""
        again = f"start {record.get('restart', 0) + 1}"
        nodes = f"{record.get('nodes')} node{'s' * (record.get('nodes') != 1)}"
        return f"{again} from step {record.get('step', 0)} on {nodes}{job}"
    if record["event"] == "end":
        state, cause, message = (record.get(key) for key in ("state", "cause", "message"))
        return f"{state}{f' ({cause})' if cause not in (None, state) else ''}{f': {message}' if message else ''}"
    if record["event"] == "changed":
        return f"changed: {', '.join(record.get('changes', ()))}"
    if record["event"] == "phases":
        seconds = {phase: s for phase, s in record.get("seconds", {}).items() if phase != "queue"}
        longest = max(seconds, key=lambda phase: seconds[phase], default="")
        return f"first step after {sum(seconds.values()):.0f} s ({longest} {seconds.get(longest, 0.0):.0f} s)"
    if record["event"] == "left out":
        return f"left out: {', '.join(f'{node}: {why}' for node, why in record.get('nodes', {}).items())}"
    return f"{record['event']} {record.get('from', '')}".rstrip()


def _warnings(run_dir: RunDir) -> list[tuple[float, str]]:
    log_dir = run_dir.latest_log_dir()
    if log_dir is None or not (log_dir / "controller.log").exists():
        return []
    with (log_dir / "controller.log").open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _LOG_BLOCK))
        text = file.read().decode(errors="replace")
    return [(timegm(time.strptime(when, "%Y-%m-%dT%H:%M:%S")), said) for when, said in _WARNING.findall(text)]

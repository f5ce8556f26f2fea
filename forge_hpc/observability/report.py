"""Texts about a run for the command line, made from its directory alone (no torch).

``render_report(run_dir)`` is ``forge-hpc report``, readable as text and as Markdown: a string without a final newline.
How a run stands now: ``watching``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import yaml

from forge_hpc.config.errors import UserError
from forge_hpc.observability.all_steps import AllSteps
from forge_hpc.observability.console import format_duration, tokens_per_second
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.phases import start_table
from forge_hpc.observability.summary import figures_of, next_commands, read_evaluations
from forge_hpc.observability.tables import PARTS_OVERLAP, evaluation_table, rewards_of_sources, table
from forge_hpc.run_dir import RunDir, Status

_QUANTILES = (0.1, 0.5, 0.9, 1.0)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """``values`` as a line of block characters, averaged down to ``width``, from their lowest to their highest."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span) if span else 0] for value in means)


def render_report(run_dir: RunDir) -> str:
    """The whole story of a run.

    Raises:
        UserError: there is no run in the directory.
    """
    status = _status_of(run_dir)
    steps, evaluations = AllSteps(read_jsonl(run_dir.metrics)), read_evaluations(run_dir)
    figures = figures_of(steps, evaluations)
    total = total_steps(run_dir, status)
    lines = [f"# {run_dir.name}", "", f"{run_dir}", ""]
    step = f" at step {status.step}{f' of {total}' if total else ''}" if total != 0 else ""
    lines.append(f"{status.state}{step}, {status.restarts} restarts")
    if status.message:
        lines.append(status.message)
    if evaluations:
        lines += ["", "## Evaluation", "", *evaluation_table(evaluations)]
    if not steps.num and total != 0:
        lines += ["", "No training step has been logged yet."]
    elif steps.num:
        lines += ["", "## Learning", "", *_curves(steps)]
        rewards = {"reward": "reward/mean"} if figures.reward_first is not None else {}
        sources = {f"of {name}": key for name, key in rewards_of_sources(steps.names).items()}
        lines += [f"{name}: {steps.ends(key)}" for name, key in (rewards | sources).items()]
        lines += ["", "## Where the time goes", "", *_time_table(steps)]
        lines += ["", "## Quantiles over steps", "", *_quantile_table(steps)]
        lines += ["", "## Last steps", "", *_steps_table(steps.newest)]
    if starts := start_table(run_dir):
        lines += ["", "## Start", "", *starts]
    lines += ["", *_log_lines(run_dir, status.state)]
    lines += ["## Next", "", *(f"    {command}" for command in next_commands(run_dir) if "report" not in command)]
    return "\n".join(lines).rstrip()


def _status_of(run_dir: RunDir) -> Status:
    status = run_dir.read_status()
    if status is None:
        raise UserError(f"no run in {run_dir}: it has no status.json", "give a run directory, such as runs/demo")
    return status


def total_steps(run_dir: RunDir, status: Status) -> int | None:
    """Optimizer steps of the whole run, 0 for one that trains nothing, None before its configuration is written."""
    if status.total_steps is not None:
        return status.total_steps
    if not run_dir.has_config:
        return None
        return None
    config = yaml.safe_load(run_dir.config.read_text(encoding="utf-8")) or {}
    return config.get("trainer", {}).get("training", {}).get("steps")


def _curves(steps: AllSteps) -> list[str]:
    keys = ["reward/mean", *rewards_of_sources(steps.names).values(), "loss", "entropy/mean"]
    shown = {key: steps[key] for key in keys if steps[key].count}
    width = max(13, *map(len, shown), 0)
    return [
        f"{key:<{width}} {sparkline(values.kept)}  {values.low:.3g} to {values.high:.3g}"
        for key, values in shown.items()
    ]


def _steps_table(records: Collection[dict[str, Any]]) -> list[str]:
    keys = [
        key
        for key in ("reward/mean", "loss", "grad_norm", "entropy/mean")
        if any(record.get(key) is not None for record in records)
    ]
    rows = []
    for record in records:
        cells = ["" if record.get(key) is None else f"{record[key]:.4g}" for key in keys]
        rows.append([str(record["step"]), *cells, f"{tokens_per_second(record):,.0f}", _number(record, "time/step_s")])
    return table(("step", *keys, "tokens/s", "time/step_s"), rows)


def _number(record: dict[str, Any], key: str) -> str:
    return "" if record.get(key) is None else f"{record[key]:.3g}"


def _time_table(steps: AllSteps) -> list[str]:
    """Each time of a step summed over the run."""
    whole = steps["time/step_s"].total
    sums = {key: steps[key].total for key in {"time/step_s", *steps.names} if key.startswith("time/")}
    ordered = sorted(sorted(sums.items()), key=lambda item: (-item[1], item[0] != "time/step_s"))
    rows = [(key, format_duration(total), f"{total / whole:.1%}" if whole else "") for key, total in ordered]
    return [*table(("part", "total", "of all steps"), rows), "", PARTS_OVERLAP]


def _quantile_table(steps: AllSteps) -> list[str]:
    rows = [(key, steps[key]) for key in steps.names if key not in ("step", "wall_time", "policy_version")]
    cells = [
        (key, *(f"{values.quantile(share):.4g}" for share in _QUANTILES))
        for key, values in [*rows, ("tokens/s", steps.speed)]
    ]
    return table(("metric", "10%", "median", "90%", "max"), cells)


def _log_lines(run_dir: RunDir, state: str) -> list[str]:
    """Where the logs of the newest start are, and the last words of a failed one."""
    log_dir = run_dir.latest_log_dir()
    if log_dir is None:
        return []
    lines = ["## Logs", "", f"{log_dir}: {', '.join(sorted(path.name for path in log_dir.iterdir()))}"]
    controller = log_dir / "controller.log"
    if state == "failed" and controller.exists():
        last = controller.read_text(encoding="utf-8", errors="replace").splitlines()[-10:]
        lines += ["", *(f"    {line}" for line in last)]
    return [*lines, ""]

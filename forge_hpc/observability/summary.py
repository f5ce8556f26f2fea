"""The figures of a run, and the last words of one that ends."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_hpc.observability.all_steps import AllSteps
from forge_hpc.observability.console import format_duration
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.tables import evaluation_table
from forge_hpc.run_dir import RunDir
from forge_hpc.sweep_dir import SweepDir


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run achieved, from its files. None where the recipe has no such thing, or nothing happened yet."""

    num_steps: int
    reward_first: float | None
    """Mean of ``reward/mean`` over the first five steps."""
    reward_last: float | None
    loss_first: float | None
    accuracy_before: float | None
    """Greedy accuracy on held-out prompts before training."""
    accuracy_after: float | None
    tokens_per_s: float | None
    """Tokens generated (GRPO) or trained (SFT), by the second of all steps."""
    steps_s: float
    """Duration of all steps together, without the start and the evaluations."""


def series(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The values of ``key`` in the records that have one."""
    return [record[key] for record in records if record.get(key) is not None]


def read_evaluations(run_dir: RunDir) -> list[dict[str, Any]]:
    """The evaluations by generation, in order."""
    return [record for record in read_jsonl(run_dir.evaluations) if record.get("accuracy") is not None]


def read_figures(run_dir: RunDir) -> Figures:
    """The figures of ``run_dir`` so far."""
    return figures_of(AllSteps(read_jsonl(run_dir.metrics)), read_evaluations(run_dir))


def figures_of(steps: AllSteps, evaluations: Sequence[dict[str, Any]]) -> Figures:
    """The figures of a run by its steps and evaluations."""
    before = next((record["accuracy"] for record in evaluations if record["step"] == 0), None)
    after = next((record["accuracy"] for record in reversed(evaluations) if record["step"] > 0), None)
    tokens = steps["tokens/generated"] if steps["tokens/generated"].count else steps["tokens/trained"]
    steps_s = steps["time/step_s"].total
    return Figures(
        num_steps=steps.num,
        reward_first=steps.first("reward/mean"),
        reward_last=steps.last("reward/mean"),
        loss_first=steps.first("loss"),
        accuracy_before=before,
        accuracy_after=after,
        tokens_per_s=tokens.total / steps_s if steps_s else None,
        steps_s=steps_s,
    )


def final_summary(run_dir: RunDir, wall_s: float | None = None) -> str:
    """Several lines for the end of a run: what it achieved, where it is, what to do next.

    Args:
        run_dir: the finished run.
        wall_s: duration of the whole command, seconds; left out where None.
    """
    all_steps, evaluations = AllSteps(read_jsonl(run_dir.metrics)), read_evaluations(run_dir)
    figures = figures_of(all_steps, evaluations)
    status = run_dir.read_status()
    adapters = SweepDir(run_dir.adapters)
    says_steps = (figures.num_steps or not evaluations) and not adapters.exists
    steps = f" after {figures.num_steps} steps" if says_steps else ""
    lines = [("run", f"{run_dir.name}: {status.state if status else 'unknown'}{steps}")]
    if status and status.message:
        lines.append(("message", status.message))
    if adapters.exists:
        lines += [("adapters" if index == 0 else "", row) for index, row in enumerate(_adapter_rows(adapters))]
    if figures.reward_first is not None:
        lines.append(("reward", all_steps.ends("reward/mean")))
    elif figures.loss_first is not None:
        lines.append(("loss", all_steps.ends("loss")))
    if (lost := _lost_episodes(all_steps)) is not None:
        lines.append(("episodes", lost))
    if evaluations and not figures.num_steps:
        lines += [("evaluation" if index == 0 else "", row) for index, row in enumerate(evaluation_table(evaluations))]
    elif figures.accuracy_before is not None or figures.accuracy_after is not None:
        change = _change(figures.accuracy_before, figures.accuracy_after, "before", "after")
        lines.append(("accuracy", f"{change}, greedy, held-out prompts"))
    if figures.tokens_per_s is not None:
        lines.append(
            ("speed", f"{figures.tokens_per_s:,.0f} tokens/s over {format_duration(figures.steps_s)} of steps")
        )
    if wall_s is not None:
        lines.append(("wall time", format_duration(wall_s)))
    lines.append(("directory", str(run_dir)))
    lines += [("next" if index == 0 else "", command) for index, command in enumerate(next_commands(run_dir))]
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _adapter_rows(adapters: SweepDir) -> list[str]:
    """What became of each of several adapters, in a line each."""
    rows = []
    for run, overrides in zip(adapters.runs, adapters.overrides(), strict=True):
        status, figures = run.read_status(), read_figures(run)
        row = f"{run.name} ({' '.join(overrides)}): {status.state if status else 'unknown'} after "
        row += f"{figures.num_steps} steps"
        if figures.accuracy_after is not None:
            row += f", accuracy {_change(figures.accuracy_before, figures.accuracy_after, 'before', 'after')}"
        elif figures.reward_last is not None:
            row += f", reward {figures.reward_last:.3f}"
        rows.append(row)
    return rows


def _lost_episodes(steps: AllSteps) -> str | None:
    """How many episodes were left out, where those were most of them."""
    num_failed, num_kept = steps.num_failed_episodes, steps.num_kept_episodes
    if num_failed <= num_kept:
        return None
    return (
        f"{num_failed:,.0f} of {num_failed + num_kept:,.0f} were left out: their environment or reward failed "
        "(controller.log)"
    )


def next_commands(run_dir: RunDir) -> list[str]:
    """Shell commands that make sense now."""
    path, export = shlex.quote(str(run_dir)), shlex.quote(str(run_dir.export))
    several = SweepDir(run_dir.adapters).exists
    what = f"compare {shlex.quote(str(run_dir.adapters))}" if several else f"report {path}"
    commands = [f"{_tool('forge-hpc')} {what}"]
    if run_dir.tensorboard.is_dir():
        commands.append(f"{_tool('tensorboard')} --logdir {shlex.quote(str(run_dir.tensorboard))}")
    if run_dir.export.is_dir():
        load = "import sys, transformers; print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]))"
        commands.append(f'{_tool("python")} -c "{load}" {export}')
        commands.append(f"{_tool('vllm')} serve {export}")
    status = run_dir.read_status()
    if status is None or status.state in ("failed", "cancelled", "preempted"):
        commands.append(f"{_tool('forge-hpc')} resume {path}")
        if any(run_dir.checkpoints.glob("step-*")):
            commands.append(f"{_tool('forge-hpc')} export {path}")
    return commands


def _tool(name: str) -> str:
    """``name``, with its directory where the shell does not find this environment's."""
    ours = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not ours.exists() or (found and Path(found).resolve() == ours.resolve()):
        return name
    near = ours.is_relative_to(Path.cwd())
    return shlex.quote(str(ours.relative_to(Path.cwd()) if near else ours))


def _change(before: float | None, after: float | None, before_name: str, after_name: str) -> str:
    parts = [(before, before_name), (after, after_name)]
    return " -> ".join(f"{value:.3f} ({name})" for value, name in parts if value is not None)

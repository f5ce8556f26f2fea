"""The page of one run."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from forge_hpc.files import is_there, read_text
from forge_hpc.observability.console import format_duration
from forge_hpc.observability.environment import read_environments
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.page.charts import (
    COLORS,
    NARROW,
    WIDE,
    Bar,
    Line,
    Mark,
    Shares,
    interval_chart,
    line_chart,
    require_matplotlib,
    time_line,
)
from forge_hpc.observability.page.curves import (
    GENERATOR_PARTS,
    MOST_LINES,
    PANELS,
    TRAINER_PARTS,
    Panel,
    panels_of_sources,
)
from forge_hpc.observability.page.events import Event, Start, history, starts_of
from forge_hpc.observability.page.markup import (
    Html,
    cards,
    color_key,
    document,
    element,
    folded,
    picture,
    section,
    table,
    wide_picture,
)
from forge_hpc.observability.page.samples import Group, first_and_last
from forge_hpc.observability.steps import Bucket, Span, Steps
from forge_hpc.observability.tables import PARTS_OVERLAP, is_shown, split_set
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import StartLog

_MAX_TEXT = 4000
"""Characters shown of a prompt or a response."""
_MAX_SAMPLES = 16
_MAX_ROWS = 400
"""Of a table."""
_MAX_EVALUATIONS = 1000
_MAX_MARKS = 60


def render_page(run_dir: RunDir) -> str:
    """The HTML page of a run, finished or not.

    Raises:
        UserError: Matplotlib is not installed, or there is no run.
    """
    require_matplotlib()
    status = run_dir.read_status()
    steps = Steps.read(read_jsonl(run_dir.metrics))
    evaluations = _thinned(list(read_jsonl(run_dir.evaluations)), _MAX_EVALUATIONS)
    records = StartLog(run_dir).read()
    events = history(records, steps)
    last_sign = max([*(bucket.end for bucket in steps.buckets[-1:]), status.heartbeat if status else 0.0])
    starts = starts_of(records, steps, last_sign, over=status is None or status.state in ("preempted", "pending"))
    marks = [Mark(event.step, event.is_fault) for event in events if event.step and (event.is_fault or event.is_start)]
    first, last = first_and_last(run_dir.rollouts)
    state = f"{status.state}" if status else "no status yet"
    return document(
        f"{run_dir.name}: {state}",
        element("h1", run_dir.name),
        element("p", f"{run_dir}", class_="quiet"),
        element("p", _cut(status.message, 1000) if status else "", class_="bad" if state == "failed" else ""),
        cards(_figures(run_dir, steps, evaluations, starts)),
        section("Curves", _curves(steps, marks)) if steps.num else Html(""),
        section("Evaluations", *_evaluations(evaluations, marks)) if evaluations else Html(""),
        section("Time line", *_time(steps, starts, events)),
        section("What happened", _events(events)),
        section("Samples", *_samples(first, last)),
        section("All figures", folded(f"{len(steps.whole)} figures of {steps.num:,} steps", _all(steps))),
        section("Configuration", *_config(run_dir)),
        section("Environment", *_environment(run_dir)),
        element("p", f"Made at {_clock(time.time())} UTC", class_="quiet"),
    )


# ------------------------------------------------------------------------------------------------ figures and curves
def _figures(
    run_dir: RunDir, steps: Steps, evaluations: Sequence[Mapping[str, Any]], starts: Sequence[Start]
) -> list[tuple[str, object]]:
    status = run_dir.read_status()
    found: list[tuple[str, object]] = [("state", status.state if status else "unknown")]
    if status is not None:
        total = f" of {status.total_steps:,}" if status.total_steps else ""
        found.append(("step", f"{status.step:,}{total}"))
    found.append(("starts", len(starts)))
    for key, name in (("reward/mean", "reward"), ("loss", "loss")):
        if curve := steps.curve(key):
            found.append((f"{name}, first → last", f"{curve[0][1].mean:.3f} → {curve[-1][1].mean:.3f}"))
            break
    if accuracies := [each["accuracy"] for each in evaluations if each.get("accuracy") is not None]:
        shown = f"{accuracies[0]:.3f}" + (f" → {accuracies[-1]:.3f}" if len(accuracies) > 1 else "")
        found.append(("accuracy, held-out", shown))
    if speed := steps.whole.get("perf/tokens_per_s"):
        found.append(("tokens/s of a GPU", f"{speed.mean:,.0f}"))
    if whole := steps.whole.get("time/step_s"):
        found.append(("time in steps", format_duration(whole.total)))
    if starts:
        found.append(("from start to end", format_duration(starts[-1].end - starts[0].start)))
    return found


def _curves(steps: Steps, marks: Sequence[Mark]) -> Html:
    rewards = [key for key in steps.whole if key.startswith("reward/") and key.count("/") == 1]
    rewards = [key for key in rewards if key not in ("reward/mean", "reward/std")]
    panels = list(PANELS)
    if len(rewards) > 1:
        panels.insert(1, Panel("Each reward", tuple(rewards[:MOST_LINES])))
    panels[1:1] = panels_of_sources(steps.whole)
    return element("div", *(_panel(panel, steps, marks) for panel in panels), class_="charts")


def _panel(panel: Panel, steps: Steps, marks: Sequence[Mark]) -> Html:
    lines = [_line(panel.label(key), curve) for key in panel.keys if (curve := steps.curve(key))]
    if not lines:
        return Html("")
    what = "; ".join(f"{line.label}: {line.y[0]:.4g} at first, {line.y[-1]:.4g} at last" for line in lines)
    return picture(line_chart(lines, _few(marks)), panel.caption, what)


def _line(label: str, curve: Sequence[tuple[float, Span]]) -> Line:
    spans = [span for _, span in curve]
    is_banded = any(span.num > 1 for span in spans)
    low, high = [span.low for span in spans], [span.high for span in spans]
    x, y = [step for step, _ in curve], [span.mean for span in spans]
    return Line(label, x, y, low if is_banded else None, high if is_banded else None)


def _all(steps: Steps) -> Html:
    rows = [
        (key, f"{steps.curve(key)[0][1].mean:.4g}", *(f"{value:.4g}" for value in (span.low, span.mean, span.high)),
         f"{steps.last[key]:.4g}")
        for key, span in sorted(steps.whole.items())
    ]  # fmt: skip
    return table(("figure", "first", "lowest", "mean", "highest", "last"), rows[:_MAX_ROWS])


def _evaluations(records: Sequence[Mapping[str, Any]], marks: Sequence[Mark]) -> list[Html]:
    names = {key: None for record in records for key in record}
    plain = sorted(filter(is_shown, names), key=lambda key: "/" in key)  # those of all prompts first
    charts = []
    for title, lines in _held_out(plain, names, records).items():
        for begin in range(0, len(lines), MOST_LINES):
            part = lines[begin : begin + MOST_LINES]
            what = "; ".join(f"{line.label} {line.y[-1]:.4g} at step {line.x[-1]:.0f}" for line in part)
            charts.append(picture(interval_chart(part, _few(marks)), title, what))
    columns = [*plain, *(key for key in ("reward", "reward_sampled", "num_prompts", "num_documents") if key in names)]
    rows = [[record["step"], *(_with_interval(record, key) for key in columns)] for record in _thinned(records, 100)]
    return [element("div", *charts, class_="charts"), table(("step", *columns), rows)]


def _held_out(
    keys: Sequence[str], names: Container[str], records: Sequence[Mapping[str, Any]]
) -> dict[str, list[Line]]:
    """The lines of each picture by its title: figures of all prompts together, and each figure of all sets."""
    found: dict[str, list[Line]] = defaultdict(list)
    for key in keys:
        label, figure = split_set(key, names)
        is_loss = figure.rpartition("/")[2] == "loss"
        ending = "" if is_loss else ", 95 % intervals"
        if label:
            kind = "source" if key.startswith("source/") else "set"
            found[f"Held-out {figure} of each {kind}{ending}"].append(_evaluated(key, label, records))
        else:
            found[f"Held-out {'loss' if is_loss else 'prompts'}{ending}"].append(_evaluated(key, key, records))
    return found


def _evaluated(key: str, label: str, records: Sequence[Mapping[str, Any]]) -> Line:
    those = [record for record in records if record.get(key) is not None]
    x, y = [record["step"] for record in those], [record[key] for record in those]
    if any(record.get(f"{key}_low") is None for record in those):
        return Line(label, x, y)
    return Line(label, x, y, [record[f"{key}_low"] for record in those], [record[f"{key}_high"] for record in those])


def _with_interval(record: Mapping[str, Any], key: str) -> str:
    value, low, high = record.get(key), record.get(f"{key}_low"), record.get(f"{key}_high")
    shown = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return shown if low is None or high is None else f"{shown} ({low:.3f} to {high:.3f})"


# ------------------------------------------------------------------------------------------------ time
def _time(steps: Steps, starts: Sequence[Start], events: Sequence[Event]) -> list[Html]:
    if not starts and not steps.num:
        return [element("p", "Nothing has begun yet.")]
    faults = {event.what for event in events if event.is_fault} | {"killed"}
    shortest = (starts[-1].end - starts[0].start) / 200 if starts else 0.0
    bars = [
        Bar(
            start.start,
            max(start.end, start.start + shortest),
            COLORS[4] if start.cause in faults else COLORS[0] if start.cause else COLORS[2],
        )
        for start in starts[-_MAX_ROWS:]
    ]
    rows = []
    if steps.num:
        rows.append(_shares("trainers: share of the time", steps.buckets, TRAINER_PARTS, "weights, other"))
        if "time/generate_s" in steps.whole:
            rows.append(_shares("generators: share of the time", steps.buckets, GENERATOR_PARTS, "weights, other"))
    marks = _few([Mark(event.time, True) for event in events if event.is_fault])
    narrow, wide = (time_line(bars, rows, marks, size) for size in (NARROW, WIDE))
    keys = [color_key(row.title.partition(":")[0], list(row.parts), COLORS) for row in rows]
    note = "White: no step was under way (queue, start, warm start, evaluations). Red: faults. Times are UTC."
    whole = steps.whole.get("time/step_s")
    parts = [(name, span) for name, span in steps.whole.items() if name.startswith("time/")]
    cells = [
        (name, format_duration(span.total), f"{span.total / whole.total:.1%}" if whole and whole.total else "")
        for name, span in sorted(parts, key=lambda part: -part[1].total)
    ]
    shown = [wide_picture(narrow, wide, "what trainers and generators did over time"), *keys, element("p", note)]
    if not cells:
        return shown
    return [*shown, table(("part", "total", "of all steps"), cells), element("p", PARTS_OVERLAP)]


def _shares(title: str, buckets: Sequence[Bucket], parts: Mapping[str, Sequence[str]], rest: str) -> Shares:
    """What each stretch of steps went into; between them nothing. Parts may overlap, and more than all cannot be."""
    edges: list[float] = []
    shares: dict[str, list[float]] = {part: [] for part in (*parts, rest)}
    for bucket in buckets:
        start = max(bucket.start, edges[-1]) if edges else bucket.start
        length = max(bucket.end - start, 1e-3)
        left = min(1.0, bucket.total("time/step_s") / length)
        taken = {}
        for part, keys in parts.items():
            taken[part] = min(left, sum(map(bucket.total, keys)) / length)
            left -= taken[part]
        if edges:
            for part in shares:  # up to this stretch
                shares[part].append(0.0)
        edges += [start, start + length]
        for part in shares:
            shares[part].append(taken.get(part, left))
    used = {part: values for part, values in shares.items() if any(values)}
    return Shares(title, edges, used)


# ------------------------------------------------------------------------------------------------ history, samples
def _events(events: Sequence[Event]) -> Html:
    rows = [
        (_clock(event.time)[5:], "" if event.step is None else event.step,
         element("span", event.what, class_="bad" if event.is_fault else ""), _cut(event.text, 1000))
        for event in events[-_MAX_ROWS:]
    ]  # fmt: skip
    return table(("time (UTC)", "step", "what", "more"), rows, text_columns=(2, 3))


def _samples(first: Sequence[Group], last: Sequence[Group]) -> list[Html]:
    if not first:
        return [element("p", "No rollouts were kept.")]
    shown = [_group(group, is_open=index == 0) for groups in (first, last) for index, group in enumerate(groups)]
    if all(len(group) == 1 for group in (*first, *last)):
        note = "One sample was kept of each group; logging.num_groups_per_step=1 keeps a whole one of every step."
        shown.append(element("p", note, class_="quiet"))
    return shown


def _group(group: Group, is_open: bool) -> Html:
    head = group[0]
    rewards = [record.get("reward") for record in group]
    known = [reward for reward in rewards if isinstance(reward, int | float)]
    mean = f", mean reward {sum(known) / len(known):.3f}" if known else ""
    plural = "s" if len(group) != 1 else ""
    of = f" of {head['source']}" if head.get("source") else ""
    title = f"Step {head['step']}, prompt {head.get('position')}{of}: {len(group)} sample{plural}{mean}"
    parts = [element("p", "Prompt"), element("pre", _cut(head.get("prompt")))]
    if head.get("target") is not None:
        parts += [element("p", "Target"), element("pre", _cut(head["target"]))]
    for record in group[:_MAX_SAMPLES]:
        said = [f"sample {record.get('sample')}", f"reward {_number(record.get('reward'))}"]
        rewards_of = record.get("rewards")
        if isinstance(rewards_of, dict) and len(rewards_of) > 1:
            said += [f"{name} {_number(value)}" for name, value in rewards_of.items()]
        said.append(f"advantage {_number(record.get('advantage'))}")
        said += [f"{record.get('num_tokens')} tokens", f"{record.get('finish_reason')}"]
        parts += [element("p", ", ".join(said)), element("pre", _cut(record.get("completion")))]
    if len(group) > _MAX_SAMPLES:
        parts.append(element("p", f"and {len(group) - _MAX_SAMPLES} more", class_="quiet"))
    found = folded(title, *parts)
    return Html(found.replace("<details>", "<details open>", 1)) if is_open else found


def _cut(text: object, most: int = _MAX_TEXT) -> str:
    """``text`` without its middle, where it is longer than ``most`` characters."""
    shown = "" if text is None else text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    more = len(shown) - most
    return shown if more <= 0 else f"{shown[: most // 2]}\n… {more:,} characters …\n{shown[-most // 2 :]}"


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "none" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ configuration
def _config(run_dir: RunDir) -> list[Html]:
    found = []
    if is_there(run_dir.config):
        found.append(folded("config.yaml", element("pre", read_text(run_dir.config))))
    if is_there(run_dir.warmstart / "config.yaml"):
        found.append(
            folded("config.yaml of the warm start", element("pre", read_text(run_dir.warmstart / "config.yaml")))
        )
    changes = [record for record in StartLog(run_dir).read() if record["event"] in ("changed", "forked")]
    for record in changes[-_MAX_ROWS:]:
        title = f"{record['event']} at {_clock(record['time'])}"
        found.append(folded(title, element("pre", "\n".join(record["changes"]) or "nothing else")))
    if not changes:
        found.append(element("p", "It was the same at every start.", class_="quiet"))
    return found


def _environment(run_dir: RunDir) -> list[Html]:
    environments = read_environments(run_dir)
    if not environments:
        return [element("p", "It was not recorded.", class_="quiet")]
    found, before = [], None
    for start, environment in environments:
        if environment != before:
            rows = [(name, value) for name, value in environment.items() if name != "packages"]
            packages = sorted(environment.get("packages", {}).items())
            listed = folded(f"{len(packages)} packages", table(("package", "version"), packages))
            found.append(folded(f"since {start}", table(("", ""), rows, text_columns=(1,)), listed))
        before = environment
    return found


def _few(marks: Sequence[Mark]) -> list[Mark]:
    """At most so many that the curve can still be seen, faults first."""
    return sorted(marks, key=lambda mark: not mark.is_fault)[:_MAX_MARKS]


def _thinned(records: Sequence[Mapping[str, Any]], num: int) -> list[Mapping[str, Any]]:
    """Of many records every so many, with the last."""
    every = max(1, -(-len(records) // num))
    return [record for at, record in enumerate(records) if at % every == 0 or at == len(records) - 1]


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"

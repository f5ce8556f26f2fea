"""The page of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from forge_hpc.observability.compare import Group, Interval, range_of
from forge_hpc.observability.page.charts import COLORS, Line, line_chart
from forge_hpc.observability.page.curves import PANELS
from forge_hpc.observability.page.markup import color_key, document, element, picture, section, table
from forge_hpc.observability.steps import Span
from forge_hpc.observability.tables import rewards_of_sources, split_set

_NUM_POINTS = 150


def render_comparison_page(groups: Sequence[Group]) -> str:
    """Table and curves of the groups, with intervals over the runs of each.

    Raises:
        UserError: Matplotlib is not installed.
    """
    figures = [group.figures() for group in groups]
    names = list({name: None for each in figures for name in each})
    rows = [
        [group.label, len(group.runs), group.states, group.steps, *(each.get(name, "") for name in names)]
        for group, each in zip(groups, figures, strict=True)
    ]
    charts = [
        picture(line_chart(lines, names=False), title, f"{figure} by group")
        for title, figure, lines in _pictures(groups)
        if any(line.x for line in lines)
    ]
    colors = [COLORS[number % len(COLORS)] for number in range(len(groups))]  # as the charts have them
    key = color_key("groups", [group.label for group in groups], colors)
    runs = [(group.label, run.run_dir, run.state, run.config.get("seed", "")) for group in groups for run in group.runs]
    note = "Bands and brackets: 95 % intervals over the runs of a group (Student's t). Dotted: not all runs are so far."
    return document(
        f"{sum(len(group.runs) for group in groups)} runs compared",
        element("h1", "Runs compared"),
        element("p", note, class_="quiet"),
        section("Figures", table(("group", "runs", "state", "steps", *names), rows, text_columns=(0,))),
        section("Curves", key, element("div", *charts, class_="charts")),
        section("Runs", table(("group", "run directory", "state", "seed"), runs, text_columns=(0, 1))),
    )


def _pictures(groups: Sequence[Group]) -> Iterator[tuple[str, str, list[Line]]]:
    """Title and figure of each, and a line a group: held-out accuracy, reward, that of each source, and the rest."""
    runs = [run for group in groups for run in group.runs]
    evaluated = {key: None for run in runs for key in run.evaluations.whole}
    for key in sorted(evaluated, key=lambda key: "/" in key):
        if key.rpartition("/")[2] == "accuracy":
            label, figure = split_set(key, evaluated)
            title = f"Held-out {figure}{f' of {label}' if label else ''}: {key}"
            range = range_of(f"held-out {key}")
            curves = [[run.evaluations.curve(key) for run in group.runs] for group in groups]
            yield title, key, [_line(group, own, range) for group, own in zip(groups, curves, strict=True)]
    figures = [(panel.title, key, panel.unit) for panel in PANELS for key in panel.keys]
    of_sources = rewards_of_sources({key: None for run in runs for key in run.steps.whole})
    figures[1:1] = [(f"Reward of {name}", key, "") for name, key in of_sources.items()]
    for title, key, unit in figures:
        lines = [_line(group, [run.steps.curve(key) for run in group.runs]) for group in groups]
        yield f"{title}: {key}{f' ({unit})' if unit else ''}", key, lines


def _line(
    group: Group, curves: Sequence[Sequence[tuple[float, Span]]], range: tuple[float, float] = (-math.inf, math.inf)
) -> Line:
    """The mean of the runs that have come so far, with its interval; a single run is its own mean. Empty where no run
    has the figure. ``range``: where its values lie."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return Line(group.label, (), ())
    places = [[step for step, _ in curve] for curve in curves]
    values = [[span.mean for _, span in curve] for curve in curves]
    if len(curves) == 1:
        return Line(group.label, places[0], values[0])
    first, last = min(place[0] for place in places), max(place[-1] for place in places)
    is_one_grid = all(place == places[0] for place in places)
    grid = np.array(places[0]) if is_one_grid else np.linspace(first, last, _NUM_POINTS)
    reached = [
        np.interp(grid, place, value, left=np.nan, right=np.nan) for place, value in zip(places, values, strict=True)
    ]
    x, intervals = [], []
    for at, column in zip(grid, np.stack(reached, axis=1), strict=True):
        if known := [float(value) for value in column if not np.isnan(value)]:
            x.append(float(at))
            intervals.append(Interval.of(known, range))
    y = [each.mean for each in intervals]
    low = [each.mean if each.low is None else each.low for each in intervals]
    high = [each.mean if each.high is None else each.high for each in intervals]
    return Line(group.label, x, y, low, high, sure_to=min(place[-1] for place in places))

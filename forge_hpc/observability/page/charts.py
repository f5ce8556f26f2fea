"""Pictures as SVG text, by Matplotlib (``pip install 'forge_hpc[report]'``): static, sharp at any size, no script."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.observability.page.markup import plain

COLORS = ("#0b62a4", "#d1600a", "#2d8a4e", "#8a4fbf", "#a8324a", "#5b6470", "#9a7d0a", "#14828c")
NARROW, WIDE = (4.2, 2.4), (12.0, 2.6)
"""Inches: of a picture in the grid, and of the time line on a desk."""
_MOST_WITHIN, _SHORT = 3, 16
"""Lines whose names have room in a picture, and characters of a name of which three stand side by side."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "forge_hpc",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#59636e",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "path.simplify": True,
}


@dataclass(frozen=True, slots=True)
class Line:
    """A curve, with what it varies between as a band."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    sure_to: float = math.inf
    """From here on it is dotted: not all that it is made of has come so far."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened, at a step or at a time."""

    at: float
    is_fault: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time in a row."""

    start: float
    end: float
    color: str


@dataclass(frozen=True, slots=True)
class Shares:
    """A row of the time line: which share of each stretch between ``edges`` (Unix time) each part took."""

    title: str
    edges: Sequence[float]
    parts: Mapping[str, Sequence[float]]
    """By name, in the order of ``COLORS``."""


def require_matplotlib() -> None:
    """Raises:
    UserError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("a page needs Matplotlib, and it is not installed", "pip install 'matplotlib>=3.10'") from None


def line_chart(lines: Sequence[Line], marks: Sequence[Mark] = (), *, names: bool = True) -> str:
    """Curves over steps; a point each where there are few, a vertical line at each mark.

    Args:
        names: the lines' labels stand in the chart, where it has several.
    """
    with _figure(NARROW) as (figure, render):
        axes = figure.subplots()
        for index, line in enumerate(lines):
            color = COLORS[index % len(COLORS)]
            marker = "o" if len(line.x) <= 12 else None
            near = [at for at, x in enumerate(line.x) if x <= line.sure_to]
            options: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3, "linewidth": 1.4}
            axes.plot(_at(line.x, near), _at(line.y, near), label=plain(line.label), **options)
            if len(near) < len(line.x):
                far = list(range(max(0, len(near) - 1), len(line.x)))
                axes.plot(_at(line.x, far), _at(line.y, far), linestyle=":", **options)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
        _mark(axes, marks)
        axes.set_xlabel("step")
        axes.ticklabel_format(useOffset=False)
        if names and len(lines) > 1:
            _legend(axes)
        return render()


def interval_chart(lines: Sequence[Line], marks: Sequence[Mark] = ()) -> str:
    """Points with their intervals, joined; those of several lines at one step stand beside each other."""
    steps = [x for line in lines for x in line.x]
    between = 0.01 * (max(steps, default=0) - min(steps, default=0))
    with _figure(NARROW) as (figure, render):
        axes = figure.subplots()
        for index, line in enumerate(lines):
            aside = between * (index - (len(lines) - 1) / 2)
            errors = None
            if line.low is not None and line.high is not None:
                below = [max(0.0, y - low) for y, low in zip(line.y, line.low, strict=True)]
                above = [max(0.0, high - y) for y, high in zip(line.y, line.high, strict=True)]
                errors = (below, above)
            options: dict[str, Any] = {"capsize": 3, "marker": "o", "markersize": 3, "linewidth": 1.2}
            axes.errorbar([x + aside for x in line.x], line.y, yerr=errors, label=plain(line.label), **options)
        _mark(axes, marks)
        axes.set_xlabel("step")
        _legend(axes)
        return render()


def time_line(starts: Sequence[Bar], rows: Sequence[Shares], marks: Sequence[Mark], size: tuple[float, float]) -> str:
    """Starts as bars, and below them what each role did, over the clock."""
    width, height = size
    with _figure((width, 0.9 + height * 0.5 * len(rows))) as (figure, render):
        heights = [0.22] + [1.0] * len(rows)
        all_axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for bar in starts:
            left, right = _clock(bar.start), _clock(bar.end)
            all_axes[0].barh(0, right - left, left=left, color=bar.color, edgecolor="white", linewidth=0.6)
        all_axes[0].set_yticks([])
        all_axes[0].grid(False)
        _name(all_axes[0], "starts")
        for axes, row in zip(all_axes[1:], rows, strict=True):
            edges, below = [_clock(edge) for edge in row.edges], [0.0] * (len(row.edges) - 1)
            for index, shares in enumerate(row.parts.values()):
                above = [low + share for low, share in zip(below, shares, strict=True)]
                axes.stairs(above, edges, baseline=below, fill=True, color=COLORS[index], linewidth=0)
                below = above
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
            _name(axes, row.title)
        for axes in all_axes:
            _mark(axes, [Mark(_clock(mark.at), mark.is_fault) for mark in marks])
        _date_axis(all_axes[-1], wide=width > 8)
        for axes in all_axes[:-1]:
            axes.tick_params(labelbottom=False)
        return render()


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A figure in our style, and what makes SVG of it; the user's own settings and pyplot play no part."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # glyphs that the font lacks: the browser has others
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")

        def render() -> str:
            file = io.BytesIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", metadata=nothing)
            return file.getvalue().decode()

        yield figure, render


def _name(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9)


def _legend(axes: Any) -> None:
    """Within the picture where there is room for it, else above."""
    labels = axes.get_legend_handles_labels()
    if (num := len(labels[1])) <= _MOST_WITHIN:
        legend = axes.legend(loc="best")
    else:
        columns = 3 if max(map(len, labels[1])) <= _SHORT else 2
        width, height = axes.figure.get_size_inches()
        axes.figure.set_size_inches(width, height + 0.17 * math.ceil(num / columns))
        legend = axes.figure.legend(*labels, loc="outside upper left", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _mark(axes: Any, marks: Sequence[Mark]) -> None:
    for mark in marks:
        color, style = ("#b3261e", "--") if mark.is_fault else ("#59636e", ":")
        axes.axvline(mark.at, color=color, linestyle=style, linewidth=0.9)


def _date_axis(axes: Any, wide: bool) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(maxticks=10 if wide else 5)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _clock(seconds: float) -> float:
    """Unix time as Matplotlib counts it, in UTC."""
    from matplotlib.dates import date2num

    return float(date2num(datetime.fromtimestamp(seconds, UTC)))


def _at(values: Sequence[float], places: Sequence[int]) -> list[float]:
    return [values[place] for place in places]

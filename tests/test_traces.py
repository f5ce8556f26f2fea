"""Traces of single steps: Chrome traces that say what a process did, and nothing in other steps."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import torch

from forge_hpc.observability import traces
from forge_hpc.observability.traces import Spans, traced


def events(file: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def test_a_trace_has_the_operations_of_its_body_alone(tmp_path: Path) -> None:
    file = tmp_path / "profile-step-3" / "trainer-0.json.gz"
    torch.ones(4).cumsum(0)
    with traced(file):
        torch.ones(4, 4) @ torch.ones(4, 4)
    names = {event["name"] for event in events(file)}
    assert "aten::mm" in names and "aten::cumsum" not in names
    assert file.parent.stat().st_mode & 0o077 == 0
    with traced(None):
        assert traces._profiler is None


def test_a_trace_that_cannot_be_written_keeps_nobody_from_the_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = False
    with traced(tmp_path / "file" / "trainer-0.json.gz"):
        done = True
    assert done and traces._profiler is None


def test_spans_of_the_controller_last_as_long_as_what_they_are_of(tmp_path: Path) -> None:
    async def controller() -> None:
        with spans.span("before"):  # not recorded
            pass
        spans.begin()
        with spans.span("train_step"):
            await asyncio.sleep(0.05)
        with spans.span("publish"):
            pass

    spans = Spans()
    asyncio.run(controller())
    spans.end(tmp_path / "step" / "controller.json.gz")
    train, publish = events(tmp_path / "step" / "controller.json.gz")
    assert (train["name"], publish["name"]) == ("train_step", "publish")
    assert 5e4 <= train["dur"] < 5e6 and publish["ts"] >= train["ts"] + train["dur"] - 1
    assert not spans.is_recording

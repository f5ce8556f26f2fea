"""Whole runs of the demo's task, small enough for a test, and what must be true of them afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).parent.parent
DEMO = PROJECT / "configs/grpo/demo.yaml"

# A model from random weights has no right answer to be rewarded for, but it can learn to write longer ones.
REWARD = """
def length(prompt, response, target, **fields):
    return len(response) / 6
"""


def small_run(directory: Path, steps: int = 4, reward: str = REWARD, *overrides: str) -> list[str]:
    """Overrides that make the demo's configuration short: no warm start, few steps, a reward with a signal."""
    file = directory / "reward.py"
    file.write_text(reward)
    return [
        "model.path=builtin:qwen3-tiny",
        f"reward=[{{name: {file}:length}}]",
        f"trainer.training.steps={steps}",
        "trainer.lr_scheduler.warmup_steps=0",
        "rollout.prompts_per_step=16",
        "checkpoint.interval=2",
        "evaluation.num_prompts=20",
        "generator.engine.kv_cache_memory_gib=0.25",
        *overrides,
    ]


def start_local(run_dir: Path, overrides: Sequence[str], config: Path = DEMO) -> subprocess.Popen[str]:
    """Submit to this machine, in the foreground of a process of its own."""
    command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--config", str(config)]
    command += ["--run-dir", str(run_dir), *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        command, env=env, cwd=run_dir.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run_local(
    run_dir: Path, overrides: Sequence[str], timeout_s: float = 400, config: Path = DEMO
) -> subprocess.CompletedProcess[str]:
    """The same, to its end. Nothing may be left of it."""
    process = start_local(run_dir, overrides, config)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert not left_over(run_dir)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def read(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The records of a JSONL file; none where it is not there yet."""
    path = run_dir / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be under way


def status(run_dir: Path) -> dict[str, Any]:
    """status.json; empty where it is not there yet."""
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def processes(run_dir: Path, word: str = "") -> list[psutil.Process]:
    """Living processes of the run: those whose certificates lie in its directory, parents first.

    ``word`` is in the command line or in the path of the log.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if str(run_dir) in process.environ().get("HYPERACTOR_TLS_KEY", "") and process.status() != "zombie":
                command = " ".join(process.cmdline())
                if word in command or word in open_files(process):
                    found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def open_files(process: psutil.Process) -> str:
    """Paths behind the process's standard output: its log file."""
    return str(Path(f"/proc/{process.pid}/fd/1").readlink())


def left_over(run_dir: Path, within_s: float = 15) -> list[psutil.Process]:
    """Processes of the run that still live after ``within_s`` seconds."""
    deadline = time.monotonic() + within_s
    while (alive := processes(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 300) -> Any:
    """The first true value of ``condition``."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.1)
    return value


def lost_prompts(run_dir: Path, steps: Iterable[int], prompts_per_step: int) -> int:
    """How many prompts of ``steps`` were skipped, and how many were used twice or by another step than theirs.

    All groups must have an episode, and ``logging.num_rollouts_per_step`` be at least ``prompts_per_step``.
    """
    wanted = Counter(
        (step, (step - 1) * prompts_per_step + index) for step in steps for index in range(prompts_per_step)
    )
    chosen = {step for step, _ in wanted}
    records = read(run_dir, "rollouts.jsonl")
    found = Counter((record["step"], record["position"]) for record in records if record["step"] in chosen)
    return ((wanted - found) + (found - wanted)).total()


def explained_metrics() -> dict[str, tuple[str, str]]:
    """The keys of docs/metrics.md, each with its unit and what it is."""
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) ?\| (.+) \|$", (PROJECT / "docs/metrics.md").read_text(), re.MULTILINE)
    keys = [key for key, *_ in rows]
    assert len(set(keys)) == len(keys), "a key stands twice in docs/metrics.md"
    return {key: (unit, explanation) for key, unit, explanation in rows}


def pattern_of(key: str) -> str:
    """A regular expression for what a key of docs/metrics.md stands for: words in capitals for any one, a reward's NAME
    for that of a figure of it too."""
    return re.sub(r"[A-Z]+", lambda word: "[^/]+(/[^/]+)?" if word[0] == "NAME" else "[^/]+", re.escape(key))


def without_source(key: str) -> str:
    """What a figure of one of several sources is called where there is one alone."""
    return re.sub(r"^source/[^/]+/", "", key)


def unexplained_metrics(run_dir: Path) -> set[str]:
    """What a run has written, and docs/metrics.md does not explain."""
    known = re.compile("|".join(map(pattern_of, explained_metrics())))
    keys = {without_source(key) for record in read(run_dir) for key in record}
    of_sets = {without_source(key) for record in read(run_dir, "evaluations.jsonl") for key in record}
    keys |= {key if known.fullmatch(key) else key.partition("/")[2] or key for key in of_sets}  # without a label
    return {key for key in keys if not known.fullmatch(key)}


def check_contract(run_dir: Path, steps: int) -> None:
    """A completed run has left everything that the run directory promises."""
    from forge_hpc.checkpoint import verify
    from forge_hpc.observability.metrics import METRIC_KEYS

    state = status(run_dir)
    assert (state["state"], state["step"], state["policy_version"]) == ("completed", steps, steps)
    metrics = read(run_dir)
    assert [record["step"] for record in metrics] == list(range(1, steps + 1))
    assert all(METRIC_KEYS.keys() <= record.keys() for record in metrics)
    assert not unexplained_metrics(run_dir)
    assert {record["step"] for record in read(run_dir, "rollouts.jsonl")} == set(range(1, steps + 1))
    assert verify(run_dir / f"checkpoints/step-{steps:08d}") is None
    assert list((run_dir / "tensorboard").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (run_dir / "export").iterdir()}
    logs = {path.name for start in (run_dir / "logs").iterdir() if start.is_dir() for path in start.iterdir()}
    assert {"controller.log", "generator-0.log", "trainer-0.log"} <= logs
    assert not list((run_dir / "tls").iterdir())  # the identity ends with the start that it was made for
    readable = [path for path in run_dir.rglob("*") if path.lstat().st_mode & 0o077 and not path.is_symlink()]
    assert not readable, f"others may read {readable[:5]}"

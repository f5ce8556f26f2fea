"""What a fault costs a run: a generator killed, a trainer rank killed, SIGTERM; seconds until the next new step.

    python benchmarks/faults.py [--together] [--config configs/grpo/qwen3_0_6b.yaml] [key=value ...]

It submits a run on this machine (of a model with random weights, a step ahead, with two generators), and of each kind
waits for some more steps, then does it; lost is the time until the end of the fourth new step, less four usual ones
(one alone tells little: of steps whose answers are generated together the second comes at once). A lost generator takes
its share of the generation with it until another serves; what is lost beyond that, the others have lost. SIGTERM comes
last: the run saves and leaves, and is submitted again. With ``--together`` trainers and generators are on all GPUs at
once: on two of them there are two generators.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rows import PROJECT, row
from whole_run import LARGE, REWARD, TOGETHER, on_gpus

from forge_hpc.data.builtin import write_tiny_qwen3

WAIT_S = 300.0
CALM = 4


class Watched:
    """A run of its own, on this machine."""

    def __init__(self, run_dir: Path, config: str, overrides: list[str]) -> None:
        self.run_dir = run_dir
        self._command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--run-dir", str(run_dir)]
        self._command += ["--config", config, *overrides]
        self._environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.run_dir.parent / "output").open("ab") as output:
            self.process = subprocess.Popen(
                self._command, env=self._environ, stdout=output, stderr=output, start_new_session=True
            )

    def steps(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def checkpoints(self) -> list[Path]:
        """The complete ones."""
        return list((self.run_dir / "checkpoints").glob("step-*"))

    def wait_for(self, step: int, limit_s: float = WAIT_S) -> list[dict[str, Any]]:
        """The steps so far, once that one is done. SystemExit: the run has ended before, or it takes too long."""
        end = time.monotonic() + limit_s
        while not (found := self.steps()) or found[-1]["step"] < step:
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > end:
                output = (self.run_dir.parent / "output").read_text(errors="replace").splitlines()
                raise SystemExit("\n".join(output[-30:]) + f"\nno step {step}: {self.process.poll()}")
            time.sleep(0.05)
        return found

    def end(self) -> None:
        """End what still runs, without a save."""
        if self.process is None or self.process.poll() is not None:
            return
        command = [sys.executable, "-m", "forge_hpc.cli", "cancel", "--now", str(self.run_dir)]
        subprocess.run(command, env=self._environ, check=True, stdout=subprocess.DEVNULL, timeout=120)
        self.process.wait(120)

    def processes(self) -> list[dict[str, Any]]:
        """What `forge-hpc stacks` says of each process: its ``role``, its ``pid``."""
        command = [sys.executable, "-m", "forge_hpc.cli", "stacks", str(self.run_dir), "--json"]
        out = subprocess.run(command, env=self._environ, check=True, capture_output=True, text=True).stdout
        found: list[dict[str, Any]] = json.loads(out)
        return found

    def told(self, pattern: str, since: float) -> tuple[re.Match[str], float]:
        """The controller's first line that is so, of those after a time, and how many seconds after; waited for."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            for path in self.run_dir.glob("logs/*/controller.log"):
                for line in path.read_text(errors="replace").splitlines():
                    found = re.search(rf"^(\S+Z) .*{pattern}", line)
                    if found and (after := datetime.fromisoformat(found[1]).timestamp() - since) >= 0:
                        return found, after
            time.sleep(0.5)
        raise SystemExit(f"the controller has not said {pattern!r}")

    def kill(self, role: str) -> tuple[float, float, float]:
        """Seconds lost: until the end of so many new steps as are waited for before, less what those took; how many
        until then; and when it was killed."""
        pid = next(each["pid"] for each in self.processes() if each["role"] == role)
        first = self.steps()[-1]["step"]
        before = {each["step"]: each["wall_time"] for each in self.wait_for(first + CALM)}
        last = max(before)
        os.kill(pid, signal.SIGKILL)
        killed = time.time()
        usual = (before[last] - before[last - CALM]) / CALM
        # Steps that were done already are done again, and are not new.
        after = {each["step"]: each["wall_time"] - killed for each in self.wait_for(last + CALM)}
        lost = after[last + CALM] - CALM * usual
        ends = ", ".join(f"{after[step]:.1f}" for step in range(last + 1, last + CALM + 1))
        print(f"{role} (pid {pid}) killed after step {last}: {lost:.1f} s lost; usual step {usual:.2f} s, the next "
              f"ended after {ends} s", flush=True)  # fmt: skip
        return lost, after[last + CALM], killed


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description="What a fault costs a run.")
    parser.add_argument("--config", help="of a run that has a model")
    parser.add_argument("--together", action="store_true", help="trainers and generators on all GPUs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="forge-hpc-faults-") as name:
        config, overrides = args.config, [*(TOGETHER if args.together else ()), *args.overrides]
        if config is None:
            config, overrides = str(PROJECT / "configs/grpo/demo.yaml"), [*own_model(Path(name)), *overrides]
        run = Watched(Path(name) / "run", config, overrides)
        run.start()
        try:
            measure(run, "on the same GPUs, " if args.together else "")
        finally:
            run.end()
            logs = "\n".join(
                line
                for path in sorted(run.run_dir.glob("logs/*/controller.log"))
                for line in path.read_text(errors="replace").splitlines()
                if any(word in line for word in ("lost", "replaced", "resum", "attempt", "starts again", "ready"))
            )
            print(logs[-6000:], flush=True)


def own_model(directory: Path) -> list[str]:
    """Overrides for a run of a model that is made here; a step takes seconds on a GPU."""
    gpus = torch.cuda.device_count()
    write_tiny_qwen3(directory / "model", seed=0, **(LARGE if gpus else {}))
    (directory / "reward.py").write_text(REWARD)
    overrides = [f"model.path={directory / 'model'}", f"reward=[{{name: {directory / 'reward.py'}:length}}]"]
    overrides += ["trainer.training.steps=10000", "evaluation.num_prompts=0", "trainer.optimizer.lr=1e-6"]
    overrides += ["rollout.max_staleness=1", "algorithm.max_steps_without_signal=1000000", "checkpoint.interval=5"]
    return overrides + ([*on_gpus(gpus), "rollout.max_response_tokens=512"] if gpus else ["generator.replicas=2"])


def measure(run: Watched, where: str) -> None:
    run.wait_for(CALM)
    num = sum(1 for each in run.processes() if each["role"].startswith("generator-"))
    generator_s, until_s, killed = run.kill("generator-0")
    served_s = float(run.told(r"generator 0 is replaced after ([\d.]+) s", killed)[0][2])
    row(f"{where}a generator killed: lost beside usual steps", generator_s, unit="s",
        note=f"another served after {served_s:.1f} s")  # fmt: skip
    if num > 1:
        row(f"{where}a generator killed: lost by the others, beyond its share until another served",
            generator_s - min(served_s, until_s) / num, target=1.0, better="less", unit="s",
            note=f"one of {num}")  # fmt: skip
    trainer_s, _, killed = run.kill("trainer-0")
    _, ready_s = run.told(r"weights: ", killed)
    row(f"{where}a trainer rank killed: until others have loaded the checkpoint, and compiled", ready_s, target=20.0,
        better="less", unit="s")  # fmt: skip
    row(f"{where}a trainer rank killed: lost beside usual steps", trainer_s, unit="s",
        note="with the steps since the last save")  # fmt: skip
    last = run.wait_for(run.steps()[-1]["step"] + CALM)[-1]["step"]
    assert run.process is not None
    start = time.time()
    run.process.send_signal(signal.SIGTERM)
    code = run.process.wait(WAIT_S)
    left_s = time.time() - start
    before, saved = run.steps(), max(int(path.name.removeprefix("step-")) for path in run.checkpoints())
    state = json.loads((run.run_dir / "status.json").read_text())["state"]
    run.start()
    after = run.wait_for(before[-1]["step"] + 1)
    again_s = next(each["wall_time"] for each in after if each["step"] > before[-1]["step"]) - start
    print(f"SIGTERM after step {last}: exit code {code} after {left_s:.1f} s, state {state}, saved at step "
          f"{saved} of {before[-1]['step']}; the next new step {again_s:.1f} s after", flush=True)  # fmt: skip
    row(f"{where}SIGTERM: steps repeated", before[-1]["step"] - saved, target=0, better="less",
        note="since the save that the next start goes on from")  # fmt: skip
    row(f"{where}SIGTERM: until it has saved and left", left_s, unit="s", note=f"exit code {code}")
    row(f"{where}SIGTERM: until the next new step", again_s, unit="s")


if __name__ == "__main__":
    main()

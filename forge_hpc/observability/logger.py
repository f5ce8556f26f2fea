"""One call a step that reaches every place where metrics go."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Protocol, Self, TextIO

from forge_hpc.config.schema import LoggingConfig
from forge_hpc.data.types import Episode, Group
from forge_hpc.observability.console import ConsoleProgress
from forge_hpc.observability.jsonl import JsonlWriter, read_jsonl, replace_jsonl
from forge_hpc.run_dir import RunDir, make_private_dir

logger = logging.getLogger(__name__)


class CurveWriter(Protocol):
    """A place that draws curves."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricLogger:
    """Writes metrics, rollouts and evaluations of a run; a restart goes on where its checkpoint stands.

    All that was written for steps after ``resume_step`` is forgotten on opening. So that no step is missing after a
    restart, call ``log(step, …)`` before the checkpoint of ``step`` is committed.

    Args:
        run_dir: an existing run directory.
        config: ``logging`` of the configuration.
        resume_step: steps that the restored checkpoint has done; 0 for a fresh run.
        total_steps: steps of the whole run, for the time left.
        label: first word of the progress lines (the recipe).
        stream: where progress goes; by default the stdout of this process.

    Example:
        with MetricLogger(run_dir, config.logging, resume_step=0, total_steps=100) as metrics:
            metrics.log(1, {"loss": 0.5})
            metrics.log_rollouts(1, groups)
    """

    def __init__(
        self,
        run_dir: RunDir,
        config: LoggingConfig,
        resume_step: int = 0,
        *,
        total_steps: int | None = None,
        label: str = "step",
        stream: TextIO | None = None,
    ) -> None:
        self._config = config
        self._metrics = JsonlWriter(run_dir.metrics, resume_step)
        self._rollouts = JsonlWriter(run_dir.rollouts, resume_step)
        self._evaluations = JsonlWriter(run_dir.evaluations, resume_step)
        self._answers = run_dir.answers
        for path in self._answers.glob("step-*.jsonl"):
            if (number := path.stem.removeprefix("step-")).isdigit() and int(number) > resume_step:
                path.unlink()
        if (self._metrics.last_step or 0) < resume_step:
            logger.warning("%s ends at step %s, the checkpoint at %d", run_dir.metrics, self.last_step, resume_step)
        self._curves: list[CurveWriter] = []
        if config.tensorboard:
            from forge_hpc.observability.tensorboard import TensorBoardWriter

            self._curves.append(TensorBoardWriter(run_dir.tensorboard, resume_step))
        if config.wandb:
            from forge_hpc.observability.wandb import WandbWriter

            self._curves.append(WandbWriter(run_dir, resume_step))
        if config.mlflow:
            from forge_hpc.observability.mlflow import MlflowWriter

            self._curves.append(MlflowWriter(run_dir, resume_step))
        if config.prometheus_port is not None:
            from forge_hpc.observability.prometheus import PrometheusWriter

            self._curves.append(PrometheusWriter(config.prometheus_host, config.prometheus_port, run_dir.name))
        self._console = ConsoleProgress(config.console, total_steps, resume_step, label, stream)

    @property
    def last_step(self) -> int | None:
        """Step of the last line of ``metrics.jsonl``."""
        return self._metrics.last_step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the record of training step ``step`` (``step`` and ``wall_time`` are added).

        Raises:
            ValueError: ``step`` is not after the last one.
        """
        if self.last_step is not None and step <= self.last_step:
            raise ValueError(f"step {step} is logged after step {self.last_step}")
        record = {"step": step, "wall_time": time.time()} | dict(values)
        self._metrics.write(record)
        self._write_curves(step, values)
        self._console.update(step, record)

    def log_rollouts(self, step: int, groups: Iterable[Group]) -> None:
        """Write rollouts of ``step``: of the first ``num_groups_per_step`` groups all episodes, of those after them, up
        to ``num_rollouts_per_step`` groups in all, the first episode each. Groups without an episode do not count."""
        whole, single = self._config.num_groups_per_step, self._config.num_rollouts_per_step
        records: list[dict[str, object]] = []
        for index, group in enumerate(islice((group for group in groups if group.episodes), max(whole, single))):
            for episode in group.episodes if index < whole else group.episodes[:1]:
                records.append({"step": step, **_rollout(episode), "num_failed": group.num_failed})
        self._rollouts.write(*records)

    def is_evaluated(self, step: int, figure: str | None = None) -> bool:
        """Whether the evaluation of ``step`` has been written; with ``figure`` the one that has it."""
        if self._evaluations.last_step is None or step > self._evaluations.last_step:
            return False
        records = read_jsonl(self._evaluations.path) if figure is not None else ()
        return figure is None or any(figure in record for record in records if record["step"] == step)

    def show_evaluation(self, step: int, num_done: int, num: int, num_right: int) -> None:
        """Show how far the evaluation of ``step`` is, in answers."""
        self._console.show_evaluation(step, num_done, num, num_right)

    def log_evaluation(
        self, step: int, values: Mapping[str, float], answers: Sequence[Mapping[str, object]] = ()
    ) -> None:
        """Write an evaluation of the policy after ``step`` (0: before training), such as ``{"accuracy": 0.93}``, and
        the answers that it graded.

        The first evaluation of a step counts: a restart that repeats it writes nothing. Where SFT stops early its
        answers are evaluated after its loss, in a line of their own.
        """
        if self.is_evaluated(step, "accuracy" if "accuracy" in values else "loss"):
            return
        if answers:  # before the figures: where these are, so are the answers
            make_private_dir(self._answers)
            replace_jsonl(self._answers / f"step-{step:08d}.jsonl", answers)
        self._evaluations.write({"step": step, "wall_time": time.time()} | dict(values))
        self._write_curves(step, {f"eval/{key}": value for key, value in values.items()})
        self._console.evaluated(step, values)

    def warn(self, message: str) -> None:
        """Say something that the user should know now, in one line."""
        logger.warning("%s", message)
        self._console.warn(" ".join(message.split()))

    def say(self, text: str) -> None:
        """Show a line that is no warning, such as a choice that was made."""
        self._console.say(text)

    def close(self) -> None:
        """Close all files; the progress bar stays as it is. W&B may still be sending: ``remote.finish_runs`` waits."""
        self._console.close()
        for lines in (self._metrics, self._rollouts, self._evaluations):
            lines.close()
        for curve in self._curves:
            curve.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _write_curves(self, step: int, values: Mapping[str, float]) -> None:
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        for curve in self._curves:
            curve.write(step, finite)


def _rollout(episode: Episode) -> dict[str, object]:
    completion = episode.completion
    return {
        "position": episode.prompt.position,
        **({"source": episode.prompt.source} if episode.prompt.source else {}),
        "sample": completion.sample_index,
        "prompt": episode.prompt.text,
        "target": episode.prompt.target,
        "completion": completion.text,
        "num_tokens": completion.num_tokens,
        "finish_reason": completion.finish_reason,
        "reward": episode.reward,
        "rewards": episode.rewards,
        "advantage": episode.advantage,
        "policy_versions": list(completion.policy_versions),
        **completion.metadata,
    }

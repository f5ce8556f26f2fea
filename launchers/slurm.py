"""Submitit's Slurm executor, with the run's own command in place of a pickled function.

submitit renders and submits the job script. What it would run there is replaced: its pickles are read again after a
requeue that it did not start itself, its handler swallows SIGTERM, and it never asks for a requeue (submitit 1.5.4).
The job runs `forge_hpc.run --run-dir D`, which handles signals and finds its state in the run directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from forge_hpc.config import Config, UserError, signal_lead_s
from launchers.command import job_command


class RunExecutor(SlurmExecutor):
    """Renders and submits the job of one run.

    Example:
        executor = RunExecutor(cfg, run_dir)
        print(executor.script())
        job_id = executor.submit_run()
    """

    def __init__(self, cfg: Config, run_dir: Path, lead_s: float = 0.0) -> None:
        super().__init__(folder=run_dir / "logs")
        self._command = job_command(cfg, run_dir)
        self.parameters = job_parameters(cfg, run_dir, lead_s)

    @classmethod
    def affinity(cls) -> int:
        """Submitit refuses to make an executor where there is no srun; a dry run renders a script there too."""
        return 2

    def script(self) -> str:
        """The job script."""
        return self._make_submission_file_text(self._command, uid="")

    def submit_run(self) -> str:
        """Queue the job and return its id; the script is kept as ``RUN_DIR/logs/JOBID_submission.sh``.

        Raises:
            UserError: Slurm refused the job, with its own words.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with _private_and_outside_jobs():
            try:
                job = self._submit_command(self._command)
            except (FailedJobError, FailedSubmissionError) as error:
                reason = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
                raise UserError(f"Slurm refused the job: {reason}", "see `sinfo`, and the keys slurm.*") from None
        for link in self.folder.glob(".submission_file_*.sh"):
            link.unlink()
        return job.job_id


def job_parameters(cfg: Config, run_dir: Path, lead_s: float = 0.0) -> dict[str, Any]:
    """The parameters of submitit for `cfg`; ``slurm.extra`` has the last word.

    ``lead_s`` is what an earlier start of the run has measured that it needs to save and leave, 0 where there was none.
    """
    slurm, log = cfg.slurm, run_dir / "logs" / "slurm-%j.out"
    parameters: dict[str, Any] = {
        "job_name": cfg.name,
        "nodes": cfg.cluster.nodes,
        "ntasks_per_node": 1,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclusive": slurm.exclusive or None,
        "cpus_per_task": slurm.cpus_per_task,
        "mem": "0" if slurm.mem is None and slurm.exclusive else slurm.mem,  # whole nodes, whole memory
        "gpus_per_node": cfg.cluster.gpus_per_node or None,
        "signal_delay_s": signal_lead_s(
            cfg, lead_s
        ),  # rendered as --signal=USR2@…: to the tasks, not to the batch shell
        "stderr_to_stdout": True,
        "wckey": None,
        "use_srun": False,  # the command brings its own
        "setup": ["umask 077"],
    }
    extra: dict[str, Any] = {"output": str(log), "requeue" if slurm.requeue == "auto" else "no-requeue": True}
    if cfg.cluster.spare_nodes:
        extra["no-kill"] = True
    for name, value in slurm.extra.items():
        extra[name.lstrip("-").replace("_", "-")] = value
    parameters["additional_parameters"] = {k: v for k, v in extra.items() if v is not None and v is not False}
    return {key: value for key, value in parameters.items() if value is not None or key == "wckey"}


@contextmanager
def _private_and_outside_jobs() -> Iterator[None]:
    """A umask for the job's files, and no variables of a job that we may be in: sbatch would take them for options."""
    saved = dict(os.environ)
    if "SLURM_JOB_ID" in os.environ:
        for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_", "SRUN_")) and n != "SLURM_CONF"]:
            del os.environ[name]
    umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(umask)
        os.environ.update(saved)

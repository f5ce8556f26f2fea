"""Submitit's Slurm executor, with the run's own command in place of a pickled function.

submitit renders and submits the job script. What it would run there is replaced: its pickles are read again after a
requeue that it did not start itself, its handler swallows SIGTERM, and it never asks for a requeue (submitit 1.5.4).
The job runs `forge_hpc.run --run-dir D`, which handles signals and finds its state in the run directory.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from forge_hpc.config import Config, UserError
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm.client import SlurmRefused
from forge_hpc.slurm.expected_start import expected_start
from forge_hpc.supervisor.lead import lead_s
from launchers.command import job_command, lent_job_command

_REFUSED = "see `sinfo`, `man sbatch`, and the keys slurm.*"


class RunExecutor(SlurmExecutor):
    """Renders and submits the job of one run.

    Example:
        executor = RunExecutor(cfg, run_dir)
        print(executor.script())
        job_id = executor.submit_run()
    """

    def __init__(self, cfg: Config, run_dir: Path, options: Sequence[str] = ()) -> None:
        """``options`` go to sbatch and not into the script: a successor has the script, and not these."""
        super().__init__(folder=run_dir / "logs")
        self._options = options
        self._command = job_command(cfg, run_dir)
        self._site_script = None if cfg.slurm.script is None else Path(cfg.slurm.script).expanduser()
        self.parameters = job_parameters(cfg, run_dir)

    @classmethod
    def affinity(cls) -> int:
        """Submitit refuses to make an executor where there is no srun; a dry run renders a script there too."""
        return 2

    def script(self) -> str:
        """The job script. Raises UserError: the site's own cannot be read, or leaves something out."""
        return self._make_submission_file_text(self._command, uid="")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self._options, str(submission_file_path)]

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text = super()._make_submission_file_text(command, uid)
        if self._site_script is None:
            return text
        options = "\n".join(line for line in text.splitlines() if line.startswith("#SBATCH"))
        return fill_script(self._site_script, options, "\n".join([*self.parameters["setup"], command]))

    def expected_start(self) -> str | None:
        """When Slurm would start the job; None where it does not say.

        Raises:
            UserError: it would refuse the job.
        """
        with _private_and_outside_jobs(), tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(self.script())
            file.flush()
            try:
                return expected_start([*self._options, file.name])
            except SlurmRefused as refused:
                raise UserError(f"Slurm refused the job: {refused}", _REFUSED) from None

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
                raise UserError(f"Slurm refused the job: {reason}", _REFUSED) from None
        for link in self.folder.glob(".submission_file_*.sh"):
            link.unlink()
        return job.job_id


def fill_script(file: Path, options: str, command: str) -> str:
    """The site's own job script with the options and the command of a run.

    Raises:
        UserError: it cannot be read, or has no place for one of them.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"slurm.script: cannot read {file}: {error}", "give the site's job script") from None
    for mark, given in (("@OPTIONS@", options), ("@COMMAND@", command)):
        if text.count(mark) != 1:
            raise UserError(
                f"slurm.script: {file} has {mark} {text.count(mark)} times",
                "write each of @OPTIONS@ and @COMMAND@ once, on a line of its own",
            )
        text = text.replace(mark, given)
    return text


class SweepExecutor(RunExecutor):
    """Renders and submits the job array of a sweep: task N is the run in ``SWEEP_DIR/N``.

    Example:
        executor = SweepExecutor([cfg_0, cfg_1, cfg_2], sweep_dir, at_once=2)
        array_id = executor.submit_run()
    """

    def __init__(
        self, cfgs: Sequence[Config], sweep_dir: Path, at_once: int | None = None, options: Sequence[str] = ()
    ) -> None:
        super().__init__(cfgs[0], sweep_dir, options)
        self._command = job_command(cfgs[0], sweep_dir, array=True)
        tasks = f"0-{len(cfgs) - 1}{f'%{at_once}' if at_once else ''}"
        self.parameters = job_parameters(cfgs[0], sweep_dir, tasks)
        self.parameters["signal_delay_s"] = max(lead_s(cfg, RunDir(sweep_dir)) for cfg in cfgs)


class LentExecutor(RunExecutor):
    """Renders and submits a job that lends its nodes to a run, or an array of such jobs.

    Example:
        job_id = LentExecutor(cfg, run_dir, array="0-7%4").submit_run()
    """

    def __init__(self, cfg: Config, run_dir: Path, array: str | None = None, options: Sequence[str] = ()) -> None:
        super().__init__(cfg, run_dir, options)
        self.folder = RunDir(run_dir).lent
        self._command = lent_job_command(cfg, run_dir)
        more = self.parameters["additional_parameters"]
        more |= {"output": str(self.folder / f"lender-{'%A_%a' if array else '%j'}.out"), "no-kill": True}
        if array:
            more["array"] = array


def job_parameters(cfg: Config, run_dir: Path, sweep: str | None = None) -> dict[str, Any]:
    """The parameters of submitit for `cfg`; ``slurm.extra`` has the last word.

    Args:
        sweep: the tasks of an array, ``0-5%2``, each with a run directory of its own in `run_dir`.
    """
    slurm = cfg.slurm
    options = _extra(cfg)
    log = run_dir / "logs" / f"slurm-{'%A_%a' if options.get('array') else '%j'}.out"
    if sweep is not None:
        log = run_dir / "%a" / "logs" / "slurm-%A_%a.out"
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
        "mem": "0" if slurm.exclusive and not _sizes_memory(cfg) else slurm.mem,  # whole nodes, whole memory
        "gpus_per_node": None if slurm.gres else cfg.cluster.gpus_per_node or None,
        # Rendered as --signal=USR2@…: to the tasks, not to the batch shell.
        "signal_delay_s": lead_s(cfg, RunDir(run_dir)),
        "stderr_to_stdout": True,
        "wckey": None,
        "use_srun": False,  # the command brings its own
        "setup": ["umask 077"],
    }
    requeue = "requeue" if slurm.requeue == "auto" else "no-requeue"
    extra: dict[str, Any] = {"array": sweep, "output": str(log), requeue: True}
    if slurm.gres:
        extra["gres"] = slurm.gres
    if cfg.cluster.spare_nodes:
        extra["no-kill"] = True
    extra |= options
    parameters["additional_parameters"] = {k: v for k, v in extra.items() if v is not None and v is not False}
    return {key: value for key, value in parameters.items() if value is not None or key == "wckey"}


def check_share(cfg: Config) -> None:
    """Raise a UserError if the job asks for part of each node without saying how much: Slurm would give it one core,
    with the site's default memory a core."""
    options = _extra(cfg)
    if cfg.slurm.exclusive or options.get("exclusive"):
        return
    cores = {"cpus-per-task", "cpus-per-gpu", "mincpus", "tres-per-task"} & options.keys()
    missing = [] if cfg.slurm.cpus_per_task is not None or cores else ["slurm.cpus_per_task=16"]
    missing += [] if _sizes_memory(cfg) else ["slurm.mem=128G"]
    if missing:
        raise UserError(
            "slurm.exclusive=false asks for part of each node, and does not say how much of it",
            f"say how much, such as {' '.join(missing)}, or take whole nodes: slurm.exclusive=true",
        )


def check_array(cfg: Config) -> None:
    """Raise a UserError if several jobs at once would be one and the same run, in one directory."""
    array = str(_extra(cfg).get("array") or "")
    if array and not re.fullmatch(r"\d+|.+%1", array):
        raise UserError(
            f"slurm.extra.array={array}: its tasks would all be this one run, which only one of them can have",
            "a sweep is --sweep key=a,b, with a run directory a task; one run in jobs after one another is "
            f"{array.partition('%')[0]}%1",
        )


def _extra(cfg: Config) -> dict[str, Any]:
    return {name.lstrip("-").replace("_", "-"): value for name, value in cfg.slurm.extra.items()}


def _sizes_memory(cfg: Config) -> bool:
    return cfg.slurm.mem is not None or not {"mem", "mem-per-cpu", "mem-per-gpu"}.isdisjoint(_extra(cfg))


def adopt_shell(cfg: Config, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Take over whom the user's shell charges for jobs, and where it runs them, where `cfg` says nothing of it.

    Returns what of the shell is for sbatch and is not passed on, as SBATCH_TIMELIMIT would win over the job script.
    """
    for key in ("account", "partition", "qos"):
        if getattr(cfg.slurm, key) is None and (value := environ.get(f"SBATCH_{key.upper()}")):
            setattr(cfg.slurm, key, value)
    taken = {f"SBATCH_{key.upper()}" for key in ("account", "partition", "qos")}
    return sorted(name for name in environ if name.startswith("SBATCH_") and name not in taken)


@contextmanager
def _private_and_outside_jobs() -> Iterator[None]:
    """A umask for the job's files, and none of the variables that sbatch takes for options, or hands on to the job as
    if they were its own: a job that we may be in has left them, or somebody's shell."""
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_")) and name not in ("SLURM_CONF", "SLURM_CLUSTERS"):
            del os.environ[name]
    umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(umask)
        os.environ.update(saved)

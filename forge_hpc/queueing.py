"""When a job may begin: after others, not before a time, or when it is released.

What is asked for here goes to sbatch and not into the job script: the run's next starts are not to wait again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from forge_hpc.config.errors import UserError
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm.job import is_active, is_job_id, job_state
from forge_hpc.sweep_dir import SweepDir


@dataclass(frozen=True)
class Queueing:
    """What a command line asks for.

    Example:
        Queueing(after=("runs/sft", "1234"), hold=True).options()  # ["--dependency=afterok:99:1234", "--hold"]
    """

    after: tuple[str, ...] = ()
    """Run directories, sweeps and Slurm jobs, all of which must have ended well."""
    hold: bool = False
    begin: str | None = None
    """As sbatch takes it: ``20:00``, ``now+2hours``, ``2027-01-31T08:00``."""

    def options(self) -> list[str]:
        """Options of sbatch.

        Raises:
            UserError: something to wait for is unknown, or will never have ended well.
        """
        jobs = [job for name in self.after for job in _jobs_of(name)]
        dependency = [f"--dependency=afterok:{':'.join(jobs)}"] * bool(jobs)
        return [*dependency, *["--hold"] * self.hold, *[f"--begin={self.begin}"] * bool(self.begin)]

    def check_here(self) -> None:
        """Raise a UserError unless a run without a job may begin at once."""
        if self.hold or self.begin:
            raise UserError("--hold and --begin are for jobs of Slurm", "leave them out, or use --cluster slurm")
        for name in self.after:
            if jobs := list(_jobs_of(name)):
                raise UserError(f"{name} has not ended yet (job {jobs[0]})", "only a job of Slurm can wait for it")


AT_ONCE = Queueing()


def _jobs_of(name: str) -> Iterator[str]:
    """The jobs that `name`, a job, a run directory or a sweep, still needs."""
    if is_job_id(name):
        if job_state(name) is None:
            raise UserError(f"--after {name}: Slurm knows no such job", "name a run directory, or see `squeue --me`")
        yield name
        return
    sweep = SweepDir(name)
    for run_dir in sweep.runs if sweep.exists else [RunDir(name)]:
        status = run_dir.read_status()
        if status is None:
            raise UserError(f"--after {name}: no run in {run_dir}", "name a run directory, a sweep or a job's id")
        if status.state == "completed":
            continue
        if not is_job_id(status.job_id) or not is_active(status.job_id):
            raise UserError(
                f"--after {name}: {run_dir} is {status.state}, and no job goes on with it",
                f"forge-hpc resume {run_dir}, or start without --after",
            )
        yield status.job_id

"""A run as an object, for scripts and notebooks: ``forge_hpc.Run``. No torch here, and no event loop.

submit ─► Run ─► state, status, metrics(), logs(), wait(), cancel()
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from forge_hpc.cancel import cancel_runs
from forge_hpc.config import UserError
from forge_hpc.config.load import override_of
from forge_hpc.control import Liveness, StatusReader, find_run
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.run_dir import RunDir, Status
from forge_hpc.slurm.job import is_job_id

if TYPE_CHECKING:
    import pandas as pd

_POLL_S = 0.5


class Run:
    """One run: a job of Slurm, or a process on this machine; whoever has its directory has the run.

    Example:
        import forge_hpc

        run = forge_hpc.Run.submit("configs/grpo/demo.yaml", seed=1, **{"trainer.training.steps": 20})
        run.wait()                                # "completed"
        run.metrics()["reward/mean"].plot()       # a pandas frame, a row a step
        again = forge_hpc.Run("runs/demo-20270131-120000")
        again.state, again.status.step

    Every method returns at once but `wait` and `cancel`. None needs an event loop, so that all work where one runs (a
    notebook); `await asyncio.to_thread(run.wait)` waits beside other tasks.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        """The run in a directory.

        Raises:
            UserError: there is none.
        """
        self._run_dir = find_run(Path(run_dir))
        self._seen = StatusReader(self._run_dir)
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def submit(
        cls,
        config: str | os.PathLike[str] | None = None,
        /,
        *,
        run_dir: str | os.PathLike[str] | None = None,
        nodes: int | None = None,
        on: str = "auto",
        site: str | None = None,
        after: tuple[str, ...] = (),
        keep_engines: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Start a run and return at once, as ``forge-hpc submit`` does: on Slurm where it is, within salloc there.

        A run on this machine, or in this process's allocation, ends with this process: it saves, and
        ``forge-hpc resume`` goes on with it.

        Args:
            config: a configuration file; without one, that of the demo.
            run_dir: where it lives; by default ``runs/NAME-TIMESTAMP``.
            on: ``auto``, ``slurm``, ``allocation`` or ``local``, as ``--cluster``.
            after: run directories and jobs that must have ended well, as ``--after``.
            keep_engines: how long engines stay for the next run, ``"30m"`` say, as ``--keep-engines``.
            overrides: keys of the configuration: ``seed=1``, ``trainer={"training": {"steps": 20}}``, or with dots
                ``**{"trainer.training.steps": 20}``.

        Raises:
            UserError: anything that would keep the run from starting.
        """
        from forge_hpc import submission
        from forge_hpc.kept.directory import keep_s_of
        from forge_hpc.queueing import Queueing
        from launchers.local import run_behind

        request = submission.Request(
            config=None if config is None else Path(config),
            overrides=tuple(override_of(key, value) for key, value in overrides.items()),
            run_dir=None if run_dir is None else Path(run_dir),
            nodes=nodes,
            cluster=on,
            site=site,
            queueing=Queueing(tuple(map(str, after))),
            keep_s=None if keep_engines is None else keep_s_of(keep_engines),
        )
        place = submission.find_place(request)
        cfg = place.configuration(request)
        checked = submission.check_run(request, place, cfg, RunDir(run_dir or submission.default_run_dir(cfg.name)))
        options, process = submission.check_start(request, place, checked), None
        if not checked.is_complete:
            if place.on_slurm:
                checked.queue(options)
            else:
                checked.make()
                process = run_behind(checked.run_dir.path, place.start(cfg, checked.run_dir, request.keep_s))
        run = cls(checked.run_dir.path)
        run._process = process
        return run

    def __repr__(self) -> str:
        return f"Run({str(self._run_dir)!r}, {self.state})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._run_dir.path

    @property
    def status(self) -> Status:
        """What ``status.json`` says now: state, step, total_steps, job_id, restarts, message, …"""
        return self._seen.status() or Status("pending")

    @property
    def state(self) -> str:
        """pending, starting, running, saving, preempted, completed, failed or cancelled."""
        return self.status.state

    @property
    def job_id(self) -> str | None:
        """Slurm's id of its job, ``ARRAY_TASK`` for one of a sweep; None where it is no job."""
        job_id = self.status.job_id
        return job_id if is_job_id(job_id) else None

    def metrics(self) -> pd.DataFrame:
        """The figures of every step (docs/metrics.md), a row a step, so far."""
        import pandas as pd

        records = list(read_jsonl(self._run_dir.metrics))
        return pd.DataFrame.from_records(records, columns=None if records else ["step"]).set_index("step")

    def logs(self, role: str = "controller") -> str:
        """The log of a role (``controller``, ``trainer-0``, ``generator-1``, …) of the newest start; of one that has
        not begun, what its job has printed.

        Raises:
            UserError: there is no such log; the hint names those that are there.
        """
        newest = self._run_dir.latest_log_dir()
        found = {path.stem: path for path in newest.glob("*.log")} if newest else {}
        printed = sorted(self._run_dir.logs.glob("*.out"), key=lambda path: path.stat().st_mtime)
        if role in found:
            return found[role].read_text(errors="replace")
        if role == "controller":
            return printed[-1].read_text(errors="replace") if printed else ""
        raise UserError(f"no log {role} in {self._run_dir.logs}", f"there are: {', '.join(sorted(found)) or 'none'}")

    def wait(self, timeout_s: float | None = None) -> str:
        """Wait until the run has ended, through all its restarts; its last state.

        Raises:
            TimeoutError: it has not within ``timeout_s``.
            UserError: it has died without a word.
        """
        liveness, begun = Liveness(self._run_dir), time.monotonic()
        while not self._has_ended():
            if self._process is None and (lost := liveness.lost(self.status)):
                raise UserError(lost, f"forge-hpc resume {self._run_dir} goes on with it")
            if timeout_s is not None and time.monotonic() - begun > timeout_s:
                raise TimeoutError(f"{self._run_dir} is {self.state} after {timeout_s:g} s")
            time.sleep(_POLL_S)
        return self.state

    def _has_ended(self) -> bool:
        status = self.status
        if status.state != "preempted":
            return status.is_terminal
        if self._process is not None:  # nobody starts it again
            return self._process.poll() is not None
        return not is_job_id(status.job_id)

    def cancel(self, *, now: bool = False) -> None:
        """Have the run save and end, and return when it has ended; ``now`` does not wait for the save.

        Raises:
            UserError: it cannot be ended from here.
        """
        if self._process is not None and self._process.poll() is None and not now:
            self._process.send_signal(signal.SIGINT)
            self.wait()
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cancel_runs([self._run_dir], now=now)
